# What the README names. Everything runs from a fresh clone: the first target to run makes .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
SEED ?= 0

.PHONY: demo seeds test lint format base clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

data/shapes/shapes.json: $(VENV)/.installed
	$(BIN)/python -m balcap.shapes.dataset --out data/shapes --images 3000
	touch $@

## train on the embedded world, validate before and after, print what changed
demo: $(VENV)/.installed data/shapes/shapes.json
	rm -rf $(RUN)
	$(BIN)/python main.py fit --config configs/shapes.yaml --run_dir $(RUN) --seed_everything $(SEED)
	$(BIN)/python -m balcap.shapes.summary $(RUN)

## the table of the README: three seeds of the demo
seeds: $(VENV)/.installed data/shapes/shapes.json
	for seed in 0 1 2; do \
	  rm -rf runs/seed-$$seed; \
	  $(BIN)/python main.py fit --config configs/shapes.yaml --run_dir runs/seed-$$seed --seed_everything $$seed || exit 1; \
	done
	$(BIN)/python -m balcap.shapes.summary runs/seed-0 runs/seed-1 runs/seed-2

## every test
test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## rebuild the embedded world's base policy from its seed (about half an hour on two cores)
base: $(VENV)/.installed
	$(BIN)/python -m balcap.shapes.base_policy --out assets/shapes-base --seed 0

clean:
	rm -rf runs data/shapes

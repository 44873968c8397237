# What the README names. Everything runs from a fresh clone: the first target to run makes .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
RUN ?= runs/demo
SEED ?= 0

NEWEST_VENV ?= .venv-newest
NEWEST_BIN := $(NEWEST_VENV)/bin

.PHONY: demo seeds test test-newest test-vllm lint docs format lock base clean

$(VENV)/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

## choose the versions of requirements.lock anew, within the ranges of pyproject.toml
lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --upgrade \
	  --custom-compile-command "make lock" --constraint .ci/constraints.txt --output-file requirements.lock pyproject.toml

data/shapes/shapes.json: $(VENV)/.installed
	$(BIN)/python -m examples.shapes.dataset --out data/shapes --images 3000
	touch $@

data/shapes/benchmarks/caparena.json: $(VENV)/.installed
	$(BIN)/python -m examples.shapes.benchmarks --out data/shapes/benchmarks --images 200
	touch $@

## train on the embedded world, validate before and after, print what changed; benchmarks of both policies
demo: $(VENV)/.installed data/shapes/shapes.json data/shapes/benchmarks/caparena.json
	rm -rf $(RUN)
	$(BIN)/python main.py fit --config configs/shapes.yaml --run_dir $(RUN) --seed_everything $(SEED)
	$(BIN)/python -m examples.shapes.summary $(RUN)
	$(BIN)/python main.py test --config configs/shapes.yaml --run_dir $(RUN) --ckpt_path last \
	  --benchmark_eval.models '{base: assets/shapes-base}'

## the table of the README: three seeds of the demo
seeds: $(VENV)/.installed data/shapes/shapes.json
	for seed in 0 1 2; do \
	  rm -rf runs/seed-$$seed; \
	  $(BIN)/python main.py fit --config configs/shapes.yaml --run_dir runs/seed-$$seed --seed_everything $$seed || exit 1; \
	done
	$(BIN)/python -m examples.shapes.summary runs/seed-0 runs/seed-1 runs/seed-2

# One thread for each of several processes: OpenMP threads that wait take the core that another test needs.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(1)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

## every test
test: $(VENV)/.installed
	$(call PYTEST,$(BIN))

## every test with the newest release of everything that pyproject.toml allows; then how it differs from the lock
test-newest:
	rm -rf $(NEWEST_VENV) && $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_BIN)/python -m pip install --quiet --upgrade pip
	$(NEWEST_BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]"
	sed 's/ *;.*//' requirements.lock > $(NEWEST_VENV)/locked
	$(call PYTEST,$(NEWEST_BIN)); status=$$?; echo "not as in requirements.lock:"; \
	  $(NEWEST_BIN)/python -m pip freeze --exclude-editable | sed s/_/-/g | grep -vixFf $(NEWEST_VENV)/locked; exit $$status

# vLLM pins its own torch: an environment of its own, every package at the version in .ci/vllm.txt.
VLLM_INSTALL = $(VLLM_BIN)/python -m pip install --quiet --no-deps -r .ci/vllm.txt
$(VLLM_VENV)/.installed: pyproject.toml .ci/vllm.txt .ci/torchvision_operators.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_INSTALL) || $(VLLM_INSTALL) --extra-index-url https://download.pytorch.org/whl/cpu
	$(VLLM_BIN)/python -m pip install --quiet --no-deps -e .
	site=$$($(VLLM_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  cp .ci/torchvision_operators.py $$site/ && echo "import torchvision_operators" > $$site/torchvision_operators.pth
	touch $@

## the tests of the vLLM engines, with vLLM for the CPU; with one thread each, because its threads wait busily
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/rollout/with_vllm

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## the documentation's site, in site/; it fails on a link or an anchor that leads nowhere
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## rebuild the embedded world's base policy from its seed (about half an hour on two cores)
base: $(VENV)/.installed
	$(BIN)/python -m examples.shapes.base_policy --out assets/shapes-base --seed 0

clean:
	rm -rf runs data/shapes

#!/usr/bin/env bash
# What one GPU of 80 GB can show, within a quarter of an hour, of which compiling takes minutes: parity with the CPU, updates
# against TRL, rollouts, a QLoRA step.
#
#   bash perf/gpu.sh OUT        OUT/gpu.json: the last line of each script, by name; OUT/<name>.log: all that it printed
#
# Needs the project with TRL (the lock has it); vLLM and bitsandbytes where they are installed, else their parts fail and
# say so. Weights are random, at the real sizes: nothing is downloaded. Each part has a time limit of its own, and one that
# fails does not end the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python}

part() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  echo "   status $?, $SECONDS s since the start"
}

part parity 150 "$python" -m pytest -q tests/gpu
part update_3b 200 "$python" perf/update.py --size 3b
part update_7b_lora 200 "$python" perf/update.py --size 7b --lora
part rollout_3b 150 "$python" perf/rollout.py --size 3b

demo() {  # steps of the embedded world
  "$python" -m examples.shapes.dataset --out "$out/shapes" --images 200 && "$python" main.py fit --config configs/shapes.yaml \
    --data.data "$out/shapes/shapes.json" --data.image_root "$out/shapes" --trainer.accelerator gpu --trainer.max_steps 12 \
    --data.val_size 0 --model.judge.cache null --model.policy.compile false --report.enabled false --run_dir "$out/demo"
}
export -f demo
export python out
part demo 90 bash -c demo

qlora() {  # a whole step of the 7B model in 4 bits, on pictures of the embedded world
  "$python" - "$out" <<'PYTHON' && "$python" main.py fit --config configs/qwen7b_qlora_16gb.yaml \
    --config configs/judge/oracle.yaml --model.policy.model "$out/model" --data.data "$out/data/shapes.json" \
    --data.name null --data.image_root "$out/data" --data.val_size 0 --trainer.max_steps 3 --trainer.val_check_interval null \
    --model.policy.min_pixels 401408 --run_dir "$out/qlora"
import sys
from pathlib import Path

sys.path.insert(0, ".")
from examples.shapes.dataset import write_dataset
from perf.rollout import Case, write_model

out = Path(sys.argv[1])
write_model(Case("7b", device="cuda", dtype="bfloat16"), out / "model")
write_dataset(out / "data", 16)
PYTHON
  local status=$?
  rm -rf "$out/model"
  return $status
}
export -f qlora
part qlora_7b 150 bash -c qlora

"$python" - "$out" <<'PYTHON'
import csv
import json
import sys
from pathlib import Path

out, found = Path(sys.argv[1]), {}
for log in sorted(out.glob("*.log")):
    lines = log.read_text(errors="replace").splitlines()
    figures = next((line for line in reversed(lines) if line.startswith("{")), None)
    found[log.stem] = json.loads(figures) if figures else {"last_lines": lines[-5:]}
for metrics in sorted(out.glob("*/metrics.csv")):  # of whole runs: the last step, where all is warm
    steps = [row for row in csv.DictReader(metrics.open()) if row["time/step_s"]]
    last = steps[-1] if steps else {}
    found[metrics.parent.name] = {key: value for key, value in last.items() if key.startswith("time/")}
(out / "gpu.json").write_text(json.dumps(found, indent=1))
print(json.dumps(found))
PYTHON

"""``python main.py general``: has the captioner unlearned anything else? Ten general vision benchmarks by lmms-eval.

lmms-eval (0.7.3) has dependencies that conflict with ours, so it runs in an environment of its own::

    python -m venv .venv-lmms && .venv-lmms/bin/pip install "lmms-eval==0.7.3" "wandb==0.25.0" "av<16"
    python main.py general --model runs/qwen7b/export --base Qwen/Qwen2.5-VL-7B-Instruct

The base is run as well, with the same settings: scores of other papers depend on prompts and versions. A difference
whose 95 % interval lies below 0 is flagged as a regression.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balcap.benchmarks.scores import Score, Statistic, difference
from balcap.policy.identity import weights_state
from balcap.utils.errors import UserError
from balcap.utils.files import atomic_write

TASKS = {
    "blink": "blink_acc",
    "chartqa": "relaxed_overall",
    "docvqa_val": "anls",
    "infovqa_val": "anls",
    "mmbench_en_dev": "gpt_eval_score",
    "mmstar": "average",
    "ocrbench": "ocrbench_accuracy",
    "scienceqa_img": "exact_match",
    "seedbench": "seed_image",
    "textvqa_val": "exact_match",
}
"""Tasks of lmms-eval, and the score that is reported of each."""

INSTALL = '.venv-lmms/bin/pip install "lmms-eval==0.7.3" "wandb==0.25.0" "av<16"'


@dataclass(frozen=True)
class TaskScore:
    """What lmms-eval says of a model on a task.

    Attributes:
        metric: name of the score.
        value: in lmms-eval's unit.
        stderr: its standard error, where lmms-eval gives one.
        samples: sample -> its score, where samples have one number each.
    """

    metric: str
    value: float
    stderr: float | None
    samples: Mapping[str, float] = field(default_factory=dict, repr=False)


def read_results(folder: Path) -> dict[str, TaskScore]:
    """Task -> score, of the newest results below a folder that lmms-eval wrote.

    Raises:
        UserError: there are none.
    """
    files = sorted(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{folder} holds no *_results.json of lmms-eval")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    stamp = files[-1].name.removesuffix("results.json")
    scores = {}
    for task, own in results.items():
        metrics = {key.split(",")[0]: value for key, value in own.items() if isinstance(value, int | float)}
        named = TASKS.get(task)
        metric = named if named in metrics else next((m for m in metrics if "stderr" not in m), None)
        if metric is not None:
            stderr = metrics.get(f"{metric}_stderr")
            paths = [
                *files[-1].parent.glob(f"{stamp}samples_{task}.jsonl"),
                *files[-1].parent.glob(f"{stamp}samples_{task}_*.jsonl"),
            ]
            scores[task] = TaskScore(metric, float(metrics[metric]), stderr, _samples(paths, metric))
    return scores


def _samples(paths: Sequence[Path], metric: str) -> dict[str, float]:
    """Empty unless every sample has a number: scores that are made of several have no interval of this kind."""
    samples: dict[str, float] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                value = _number(row.get(metric))
                if value is None:
                    return {}
                samples[f"{path.name.partition('samples_')[2]} {row.get('doc_id')}"] = value
    return samples


def _number(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = value.get("score", value.get("acc"))
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return float(value) if isinstance(value, bool | int | float) else None


def gap(own: TaskScore, base: TaskScore) -> Score:
    """`own` minus `base`: paired over samples where their mean is the score, else by the two standard errors.

    The interval is NaN where lmms-eval gives neither.
    """
    common = own.samples.keys() & base.samples.keys()
    if common and all(_is_mean(score) for score in (own, base)):
        ids = sorted(common)
        scale = _scale(own)
        return difference(
            Statistic.of(ids, [scale * own.samples[i] for i in ids]),
            Statistic.of(ids, [scale * base.samples[i] for i in ids]),
        )
    value = own.value - base.value
    if own.stderr is None or base.stderr is None:
        return Score(value, math.nan, math.nan, 0)
    half = 1.959964 * math.hypot(own.stderr, base.stderr)
    return Score(value, value - half, value + half, 0)


def _scale(score: TaskScore) -> float:
    """lmms-eval writes some scores as shares and some in percent."""
    mean = sum(score.samples.values()) / len(score.samples)
    return 100.0 if abs(100 * mean - score.value) < 1e-3 < abs(mean - score.value) else 1.0


def _is_mean(score: TaskScore) -> bool:
    mean = sum(score.samples.values()) / max(1, len(score.samples))
    return bool(score.samples) and math.isclose(_scale(score) * mean, score.value, abs_tol=1e-3)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


def main(args: Sequence[str] | None = None) -> None:
    """Run lmms-eval for both models, where it has not run yet, and print the table."""
    from balcap.utils.arguments import Parser, SettingsFile

    parser = Parser(prog="main.py general", description="Ten general vision benchmarks, by lmms-eval.")
    add = parser.add_argument
    add("--config", action=SettingsFile)
    add(
        "--model",
        type=str,
        required=True,
        help="Folder or hub id; a run folder stands for its export, an adapter is merged first.",
    )
    add("--base", type=str | None, default=None, help="What it is compared with; null for its scores alone.")
    add("--out", type=str, default="runs/general", help="Folder for all results.")
    add("--tasks", type=list[str], default=list(TASKS), help="Of lmms-eval.")
    add("--python", type=str, default=".venv-lmms/bin/python", help="Of lmms-eval's environment.")
    add("--model_type", type=str, default="qwen2_5_vl", help="lmms-eval's name of the family, or vllm.")
    add("--batch_size", type=int, default=1)
    add("--limit", type=int | None, default=None, help="Samples of each task; null for all.")
    add("--arguments", type=list[str], default=[], help="Further ones for lmms-eval.")
    options = parser.parse_args(args)
    check_installed(options.python)
    scores = {}
    for name, model in (("model", options.model), ("base", options.base)):
        if model is not None:
            scores[name] = evaluate(usable(model, Path(options.out)), Path(options.out) / name, options)
    report(scores, Path(options.out))


def check_installed(python: str) -> None:
    """UserError, with what to do, where lmms-eval does not run."""
    try:
        tried = subprocess.run([python, "-c", "import lmms_eval"], capture_output=True, text=True)
        why = tried.stderr.strip().split("\n")[-1]
    except OSError as error:
        tried, why = None, str(error)
    if tried is None or tried.returncode != 0:
        raise UserError(
            f"python: {python} cannot import lmms_eval ({why}); python -m venv .venv-lmms && {INSTALL}"
        )


def usable(model: str, out: Path) -> str:
    """What lmms-eval can load: a run's export for its folder, a merged model for an adapter."""
    folder = Path(model).expanduser()
    if (folder / "export").is_dir():
        folder = folder / "export"
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return str(folder) if folder.is_dir() else model
    from balcap.commands.export import main as export

    digest = _digest([str(folder.resolve()), weights_state(folder)])
    merged = out / f"merged-{digest}"  # of this very adapter
    if not (merged / "config.json").is_file():
        export(["--model.policy.model", str(folder), "--out", str(merged), "--merge"])
    return str(merged)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def evaluate(model: str, folder: Path, options: Any) -> dict[str, TaskScore]:
    """The scores of a model; lmms-eval runs unless the folder holds them already, made with the same settings.

    Raises:
        UserError: it fails; its own output is on the console.
    """
    settings = {
        "model": model,
        "weights": weights_state(model),
        "tasks": options.tasks,
        "model_type": options.model_type,
    }
    settings |= {"limit": options.limit, "arguments": options.arguments}
    folder = folder / _digest(settings)
    kept = folder / "settings.json"
    if kept.is_file():
        return read_results(folder)
    command = [options.python, "-m", "lmms_eval", "--model", options.model_type]
    command += ["--model_args", f"pretrained={model}", "--tasks", ",".join(options.tasks)]
    command += ["--batch_size", str(options.batch_size), "--output_path", str(folder), "--log_samples"]
    command += [] if options.limit is None else ["--limit", str(options.limit)]
    print(" ".join(command), flush=True)
    status = subprocess.run([*command, *options.arguments]).returncode
    if status != 0:
        raise UserError(
            f"lmms-eval ended with status {status}; its message is above. Data sets come from the hub (HF_HOME)"
        )
    scores = read_results(folder)
    if missing := [task for task in options.tasks if task not in scores]:
        raise UserError(f"lmms-eval gave no score for {', '.join(missing)}")
    with atomic_write(kept) as file:
        json.dump(settings, file)
    return scores


def report(scores: Mapping[str, Mapping[str, TaskScore]], out: Path) -> None:
    """Prints the table, and writes ``general.json``."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "score", "model", "base", "difference (95 %)", title="General vision (lmms-eval)")
    rows = []
    for task, own in scores["model"].items():
        base = scores.get("base", {}).get(task)
        row: dict[str, Any] = {"task": task, "metric": own.metric, "model": own.value}
        if base is not None:
            change = gap(own, base)
            row |= {"base": base.value, "difference": change.value, **change.interval()}
            row |= {"n": change.n, "regression": change.high < 0}
        rows.append(row)
        flag = "  regression" if row.get("regression") else ""
        shown = "" if base is None else f"{row['difference']:+.4g}"
        if row.get("low") is not None:
            shown += f" [{row['low']:+.4g}, {row['high']:+.4g}]{flag}"
        table.add_row(
            task, own.metric, f"{own.value:.4g}", "" if base is None else f"{base.value:.4g}", shown
        )
    with atomic_write(out / "general.json") as file:
        json.dump(rows, file, indent=2)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    worse = [row["task"] for row in rows if row.get("regression")]
    if "base" in scores:
        unknown = [row["task"] for row in rows if row.get("low") is None]
        also = f" (no interval, so unknown: {', '.join(unknown)})" if unknown else ""
        print(
            f"Regressions beyond noise: {', '.join(worse) or 'none'}{also}. Results in {out / 'general.json'}"
        )

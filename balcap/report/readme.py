"""The README of a run folder: what was trained, what came of it, how to use and to repeat it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from balcap.report.markdown import base_of, benchmarks, how_to_load, results, table
from balcap.report.page import facts, method
from balcap.report.run import Run, leaves
from balcap.report.text import text_filter
from balcap.utils.files import atomic_write

FILES = {
    "report.html": "curves, captions before and after with their verdicts, costs; open it in a browser",
    "curves.png": "rewards, lengths, KL, entropy and time",
    "metrics.csv": "all metrics by optimizer steps",
    "tensorboard": "the same for TensorBoard",
    "rollouts": "`*.parquet`: captions with assertions, verdicts, rewards and advantages; `_images`: small images",
    "checkpoints": "`last.ckpt`: what is trained, the optimizer and the place in the data",
    "export": "the model, or with LoRA the adapter, in Hugging Face's format",
    "config.yaml": "all settings",
    "config.changed.yaml": "the settings that differ from the defaults",
    "benchmarks.json": "scores of the benchmarks",
    "benchmarks": "captions and judgments of each benchmark",
    "captions.jsonl": "captions of `predict`",
    "bad_rows.jsonl": "rows of the data that were skipped, with the cause",
    "judge_ledger.sqlite": "every call to a judge: tokens, dollars, outcome; `python main.py ledger` sums it up",
}
"""What a run may leave behind, in the order of the README."""


def write_readme(run: Run) -> Path:
    """Write ``README.md`` of a run in its folder, over an older one.

    Texts of images and captions are not in it, nor are secrets.

    Args:
        run: whose it is.

    Returns:
        The file.

    Raises:
        OSError: the file cannot be written.
    """
    path = run.folder / "README.md"
    with atomic_write(path) as file:
        file.write(text_filter()(readme(run)))
    return path


def readme(run: Run) -> str:
    """The text, in Markdown."""
    there = {name: text for name, text in FILES.items() if (run.folder / name).exists()}
    export = run.folder / "export"
    parts = {
        "": table(["", ""], facts(run)),
        "Results": results(run),
        "Benchmarks": benchmarks(run),
        "Settings": _settings(run),
        "Use the model": "" if "export" not in there else _use(run, export),
        "Repeat and continue": _repeat(run) if run.command else "",
        "Files": table(["file", "what"], [[f"`{name}`", text] for name, text in there.items()]),
    }
    lines = [f"# {run.name}", f"A captioner trained {method(run)}."]
    lines += [f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text]
    return "\n\n".join(lines) + "\n"


def _settings(run: Run) -> str:
    if run.changed is None:
        return "All settings are in [config.yaml](config.yaml)." if run.settings else ""
    rows = [
        [f"`{name}`", value if isinstance(value, str) else json.dumps(value, default=str)]
        for name, value in leaves(run.changed)
    ]
    return f"These differ from the defaults; [config.yaml](config.yaml) has all.\n\n{table(['setting', 'value'], rows)}"


def _use(run: Run, export: Path) -> str:
    base, tokens = base_of(run, export), run.setting("model.sampling.max_tokens", 1024)
    code = how_to_load(export, str(export), base, tokens)
    push = shlex.join(["python", "main.py", "push", str(run.folder), "OWNER/NAME"])
    return f"{code}\n\n`{push}` uploads `export/` to Hugging Face's hub."


def _repeat(run: Run) -> str:
    lines = [f"{run.command}   # again"]
    if run.fits:
        goes_on = ["fit", "--config", str(run.config), "--run_dir", str(run.folder), "--ckpt_path", "last"]
        goes_on += ["--resume", "null"] if run.setting("resume") else []
        lines.append(f"{shlex.join(['python', 'main.py', *goes_on])}   # go on")
    return "\n".join(["```bash", *lines, "```"])

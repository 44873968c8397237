"""Parts that the README of a run and the model card share, as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from balcap.benchmarks.scores import Score
from balcap.report.run import Run

PROMPT = "Describe this image in detail."
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_DATA_FILE = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" without rows. What stands in a cell stays in it."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(head) - 1)] if len(head) > 2 else ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])


def results(run: Run) -> str:
    """Before and after on the held-out images; "" where nothing is compared."""
    rows = [
        [
            o.title, *(_score(score, 3) for score in (o.before, o.after)),
            f"{o.change.value:+.3f}{_interval(o.change, 3)}", str(o.change.n),
        ]
        for o in run.outcomes
    ]  # fmt: skip
    if not rows:
        return ""
    note = "Held-out images; 95 % intervals by bootstrap over images."
    if run.missing_judgments:
        note += (
            f" {run.missing_judgments:,.0f} judgments of the run are missing, because the judge failed: each row is over "
            "the images that have its score before and after."
        )
    return f"{note}\n\n{table(['', 'before', 'after', 'change', 'images'], rows)}"


def benchmarks(run: Run) -> str:
    """Scores of ``benchmarks.json``; "" without."""
    return table(
        ["benchmark", "score", "images", "judge"],
        [
            [
                name,
                f"{entry['score']:.1f}{_limits(entry['low'], entry['high'], 1)}",
                str(entry["n"]),
                public_name(entry.get("judge") or "–"),
            ]
            for name, entry in run.benchmarks.items()
            if entry["score"] is not None
        ],
    )


def how_to_load(export: Path, name: str, base: str, max_tokens: int = 1024) -> str:
    """Code that captions an image with an export.

    Args:
        export: the folder, which is looked into: with LoRA it holds an adapter.
        name: of the export in the code: a path or a hub id.
        base: model that an adapter is for.
        max_tokens: of a caption.
    """
    adapter = (export / "adapter_config.json").is_file()
    lines = [
        *(["from peft import PeftModel"] if adapter else []),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'processor = AutoProcessor.from_pretrained("{name}")',
        f'model = AutoModelForImageTextToText.from_pretrained("{base if adapter else name}", dtype="auto")',
        *([f'model = PeftModel.from_pretrained(model, "{name}")'] if adapter else []),
        'image = Image.open("image.jpg").convert("RGB")',
        f'content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "{PROMPT}"}}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
        ").to(model.device)",
        f"tokens = model.generate(**inputs, max_new_tokens={max_tokens})[:, inputs['input_ids'].shape[1] :]",
        "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
    ]
    return "\n".join(["```python", *lines, "```"])


def base_of(run: Run, export: Path) -> str:
    """The model that an export was trained from: what its adapter names, or the setting."""
    config = export / "adapter_config.json"
    named = json.loads(config.read_text()).get("base_model_name_or_path") if config.is_file() else None
    return str(named or run.setting("model.policy.model", ""))


def hub_id(name: str) -> str | None:
    """`name` if it is one of a model or data set on Hugging Face's hub, and nothing on this machine."""
    local = Path(name).expanduser().exists() or Path(name).suffix in _DATA_FILE
    return name if _HUB_ID.fullmatch(name) and not local else None


def public_name(name: str) -> str:
    """A model or data set as it may be published: of what is on this machine the last part of its path."""
    local = "//" in name or name.startswith(("/", "~", ".")) or Path(name).exists()
    return Path(name).name if local else name


def _score(score: Score, digits: int) -> str:
    return f"{score.value:.{digits}f}{_interval(score, digits)}"


def _interval(score: Score, digits: int) -> str:
    ends = score.interval()
    return _limits(ends["low"], ends["high"], digits)


def _limits(low: float | None, high: float | None, digits: int) -> str:
    return "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"

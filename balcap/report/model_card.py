"""The model card of an export, in Hugging Face's format: what was trained, how, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from balcap.report.markdown import base_of, benchmarks, how_to_load, hub_id, public_name, results, table
from balcap.report.page import facts, method
from balcap.report.run import Run
from balcap.report.text import text_filter
from balcap.utils.files import atomic_write

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TASK = "image-text-to-text"
PUBLIC = (
    "trained",
    "rewards",
    "algorithm",
    "optimizer steps",
    "images × captions a step",
    "KL coefficient",
    "seed",
)
"""Facts of a run that say nothing of the machine."""


def write_model_card(run: Run, export_folder: str | Path) -> Path:
    """Write ``README.md`` in an export, over an older one: metadata for the hub, and text.

    It holds neither paths of this machine, nor captions, nor secrets. The license is left out: it depends on the base.

    Args:
        run: whose it is.
        export_folder: ``export`` of the run: a model or an adapter.

    Returns:
        The file.

    Raises:
        OSError: the file cannot be written.
    """
    from huggingface_hub import ModelCard

    export = Path(export_folder)
    card = ModelCard(f"---\n{_metadata(run, export).to_yaml()}\n---\n\n{_text(run, export)}")
    path = export / "README.md"
    with atomic_write(path) as file:
        file.write(text_filter()(str(card)))
    return path


def _metadata(run: Run, export: Path) -> ModelCardData:
    from huggingface_hub import ModelCardData

    adapter = (export / "adapter_config.json").is_file()
    how = ["sft"] if run.setting("model.supervised", False) else ["reinforcement-learning", "grpo"]
    tags = ["image-captioning", *how, "balcap", "arxiv:2605.07394"]
    return ModelCardData(
        base_model=hub_id(base_of(run, export)),
        datasets=hub_id(str(run.setting("data.data", ""))),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASK,
        tags=[*tags, "lora"] if adapter else tags,
        model_name=_name(run, export),
        eval_results=list(_eval_results(run)) or None,
    )


def _eval_results(run: Run) -> Iterator[EvalResult]:
    """After training: of the held-out images and of the benchmarks."""
    from huggingface_hub import EvalResult

    data, judge = (
        str(run.setting("data.data", "data")),
        public_name(str(run.setting("model.judge.model", "a judge"))),
    )
    short = Path(data).stem
    for outcome in run.outcomes:
        yield EvalResult(
            task_type=TASK,
            dataset_type=hub_id(data) or short,
            dataset_name=f"held-out images of {short}",
            dataset_split="validation",
            metric_type=outcome.name,
            metric_value=round(outcome.after.value, 4),
            metric_name=outcome.title
            if outcome.name == "length_ratio" or not run.judged
            else f"{outcome.title}, judged by {judge}",
        )
    for name, entry in run.benchmarks.items():
        if entry["score"] is not None:
            by = entry.get("judge") and public_name(entry["judge"])
            yield EvalResult(
                task_type=TASK,
                dataset_type=name.split("/")[0].lower(),
                dataset_name=name.split("/")[0],
                metric_type=name,
                metric_value=round(entry["score"], 2),
                metric_name=f"{name}, judged by {by}" if by else name,
            )


def _name(run: Run, export: Path) -> str:
    return f"{Path(base_of(run, export)).name}-balcap"


def _text(run: Run, export: Path) -> str:
    base, judge = base_of(run, export), run.setting("model.judge.model")
    data = str(run.setting("data.data", ""))
    lines = [["base", public_name(base)], ["data", hub_id(data) or Path(data).stem]]
    lines += [["judge", public_name(str(judge))]] if judge and run.judged else []
    lines += [[name, value] for name, value in facts(run) if name in PUBLIC]
    tokens = run.setting("model.sampling.max_tokens", 1024)
    parts = {
        "": table(["", ""], [line for line in lines if line[1]]),
        "Use": how_to_load(export, f"OWNER/{_name(run, export)}", public_name(base), tokens),
        "Results": results(run),
        "Benchmarks": benchmarks(run),
        "Limits": "Rewards and scores are judgments of models. Captions can be wrong all the same.",
    }
    about = f"{public_name(base)}, trained {method(run)}."
    shown = [f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text]
    return "\n\n".join([f"# {_name(run, export)}", about, *shown]) + "\n"

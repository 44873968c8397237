"""Every rollout with what the judge said about it: Parquet for programs, TensorBoard and other loggers for eyes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from balcap.judge.tasks.rate import SCALES
from balcap.report.thumbnails import FOLDER, thumbnail_path, write_thumbnail
from balcap.utils.files import atomic_write
from callbacks.logger_media import RolloutMedia, media_of

if TYPE_CHECKING:
    import pyarrow as pa

    from balcap.types import StepRecord

THUMBNAIL = 512  # pixels of the longer side: event files hold images uncompressed by anything but PNG


class RolloutLog(Callback):
    """Writes all rollouts of a logged step, and shows some of them.

    Reads ``outputs["records"]``, each a `balcap.types.StepRecord`, which ``training_step`` and
    ``validation_step`` return: none of a step that only sampled. Each rank writes
    ``<dirpath>/<train|val|validate>-<step>-rank<rank>-<batch>.parquet``, one row per rollout, whole or not
    at all; `rollout_table` documents the columns. ``step`` is the number of optimizer steps behind the
    weights when the file is written. Validation is logged completely at every pass: it is the evidence of
    before and after. Rank 0 also sends images with their captions, verdicts, rewards and advantages to the
    trainer's loggers: TensorBoard, W&B, MLflow and Trackio (`callbacks.logger_media`). Small copies of the
    images, of every row of validation and of the first of a logged step, are in ``<dirpath>/_images``
    (`balcap.report.thumbnails`).

    Args:
        every_n_steps: log every n-th training batch, the first one included.
        max_images: rows, each with all its images, per logged step, or per validation pass, in the loggers; 0 for
            none.
        thumbnails: whether to keep small copies of the images.
        dirpath: folder of the Parquet files; None: ``rollouts`` under the trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        max_images: int = 4,
        thumbnails: bool = True,
        dirpath: str | None = None,
    ) -> None:
        self.every_n_steps, self.max_images, self.thumbnails = every_n_steps, max_images, thumbnails
        self.dirpath = dirpath
        self._shown = 0

    def problems(self) -> list[str]:
        """What is out of range, each with the key to change."""
        least = {"every_n_steps": 1, "max_images": 0}
        values = [(name, getattr(self, name), low) for name, low in least.items()]
        return [
            f"rollout_log.{name}: {value} must be at least {low}"
            for name, value, low in values
            if value < low
        ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Batches, not the global step: a batch may take several optimizer steps, or skip its own.
        for record in _records(outputs):
            if record.number % self.every_n_steps == 0:
                self._shown = 0
                self._log(trainer, pl_module, "train", record)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._shown = 0 if batch_idx == 0 else self._shown
            for record in _records(outputs):
                stage = "val" if trainer.state.fn == "fit" else "validate"  # never over those of a fit
                self._log(trainer, pl_module, stage, record)

    def _log(self, trainer: Trainer, pl_module: Any, stage: str, record: StepRecord) -> None:
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "rollouts")
        step = getattr(pl_module, "weights_step", trainer.global_step)
        rank, number = trainer.global_rank, record.number
        table = rollout_table(record, stage=stage, step=step, batch_idx=number, rank=rank)
        write_parquet(table, folder / f"{stage}-{step:08d}-rank{rank}-{number:06d}.parquet")
        if self.thumbnails and (stage != "train" or trainer.is_global_zero):
            rows = self.max_images if stage == "train" else len(record.rollouts)
            self._keep_images(folder / FOLDER, record, rows)
        if trainer.is_global_zero:
            self._show(trainer, stage, step, record)

    def _keep_images(self, folder: Path, record: StepRecord, rows: int) -> None:
        batch = record.rollouts.batch
        for sample_id, images in list(zip(batch.sample_ids, batch.images, strict=True))[:rows]:
            for number, image in enumerate(images):
                write_thumbnail(image, thumbnail_path(folder, sample_id, number))

    def _show(self, trainer: Trainer, stage: str, step: int, record: StepRecord) -> None:
        loggers = [(logger, show) for logger in trainer.loggers if (show := media_of(logger))]
        for b in range(min(len(record.rollouts), self.max_images - self._shown) if loggers else 0):
            media = rollout_media(record, b, f"{stage}_rollouts/{self._shown}", step)
            for logger, show in loggers:
                show(logger, media)
            self._shown += 1


def _records(outputs: Any) -> list[StepRecord]:
    return outputs.get("records", []) if isinstance(outputs, dict) else []


def rollout_table(record: StepRecord, stage: str, step: int, batch_idx: int, rank: int) -> pa.Table:
    """One row per rollout, B * G rows, group by group; what is missing is null.

    Columns: ``stage, step, batch, rank``; ``group`` and ``rollout``, the indices in ``[B, G]``; ``sample_id,
    prompt, reference, caption, truncated, length, reference_length`` (tokens); ``weights_version``;
    ``reward/<name>`` before and ``shaped/<name>`` after the reward transforms (the length mask); ``advantage``, where
    there is one per token their mean; ``assertions`` with ``true`` and ``pointable`` of each; ``reference_units`` with
    ``covered`` of each; ``clarity, fluency,
    coherency``. A column of a judgment that the suite does not need is null throughout.
    """
    import pyarrow as pa

    run = {"stage": stage, "step": step, "batch": batch_idx, "rank": rank}
    return pa.Table.from_pylist([run | row for row in _rows(record)], schema=_schema(record.reward_names))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Writes a table so that a reader, or a killed run, never sees half a file."""
    import pyarrow.parquet as pq

    with atomic_write(path, "wb") as file:
        pq.write_table(table, file)


def rollout_media(record: StepRecord, b: int, tag: str, step: int) -> RolloutMedia:
    """The rollouts of one image for a logger: ``<reward>`` is before the reward transforms, ``shaped/<reward>`` after."""
    images = [image.convert("RGB") for image in record.rollouts.batch.images[b]]
    for image in images:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    rows = [row for row in _rows(record) if row["group"] == b]
    scores = {name: f"reward/{name}" for name in record.reward_names}
    scores |= {f"shaped/{name}": f"shaped/{name}" for name in record.reward_names}
    keys = {"image": "sample_id", "caption": "caption", "tokens": "length", "truncated": "truncated"}
    keys |= scores | {"advantage": "advantage"}
    table = [[*(row[key] for key in keys.values()), "\n".join(_marked(row))] for row in rows]
    title = f"{rows[0]['sample_id']}: {rows[0]['reference']}"
    return RolloutMedia(tag, step, images, title, rollout_markdown(record, b), [*keys, "assertions"], table)


def rollout_markdown(record: StepRecord, b: int) -> str:
    """The rollouts of one image as a Markdown table, for TensorBoard's text tab.

    An assertion is ✓ true and pointable, ○ true but not pointable, ✗ false.
    """
    rows = [row for row in _rows(record) if row["group"] == b]
    names = list(record.reward_names)
    lines = [
        f"**{_cell(rows[0]['sample_id'])}** {_cell(rows[0]['prompt'])}\n",
        f"Reference ({rows[0]['reference_length']} tokens): {_cell(rows[0]['reference'])}\n",
        "| " + " | ".join(["caption", "tokens", *names, "advantage", "assertions"]) + " |",
        "|" + " --- |" * (len(names) + 4),
    ]
    for row in rows:
        cells = [_cell(row["caption"]), f"{row['length']}{' (cut)' if row['truncated'] else ''}"]
        for name in names:
            before, after = row[f"reward/{name}"], row[f"shaped/{name}"]
            cells.append(_number(before) + ("" if before == after else f" → {_number(after)}"))
        lines.append(
            "| "
            + " | ".join([*cells, _number(row["advantage"]), "<br>".join(map(_cell, _marked(row)))])
            + " |"
        )
    return "\n".join(lines)


def _rows(record: StepRecord) -> Iterator[dict[str, Any]]:
    """Place in ``[B, G]`` and contents of every rollout, as plain Python values."""
    rollouts, judgments = record.rollouts, record.judgments
    advantages = None if record.advantages is None else _per_caption(record)

    def answer(task: str, b: int, g: int) -> Any | None:
        return judgments[task][b][g] if task in judgments else None

    for b in range(len(rollouts)):
        for g in range(rollouts.num_captions):
            verdicts, rating = answer("verify", b, g), answer("rate", b, g)
            row = {
                "group": b,
                "rollout": g,
                "sample_id": rollouts.batch.sample_ids[b],
                "prompt": rollouts.batch.prompts[b],
                "reference": rollouts.batch.references[b],
                "caption": rollouts.captions[b][g],
                "truncated": rollouts.truncated[b, g].item(),
                "length": rollouts.lengths[b, g].item(),
                "reference_length": rollouts.reference_lengths[b].item(),
                "weights_version": rollouts.weights_version,
                "advantage": None if advantages is None else advantages[b, g].item(),
                "assertions": answer("decompose", b, g),
                "true": verdicts and [verdict.true for verdict in verdicts],
                "pointable": verdicts and [verdict.pointable for verdict in verdicts],
                "reference_units": judgments.units[b] if b < len(judgments.units) else None,
                "covered": answer("match", b, g),
            }
            row |= {scale: rating and getattr(rating, scale) for scale in SCALES}
            for k, name in enumerate(record.reward_names):
                row[f"reward/{name}"] = _or_null(record.rewards[b, g, k].item())
                row[f"shaped/{name}"] = _or_null(record.shaped[b, g, k].item())
            yield row


def _per_caption(record: StepRecord) -> Tensor:
    """``[B, G]`` advantages."""
    assert record.advantages is not None
    values, mask = record.advantages, record.rollouts.completion_mask
    return values if values.ndim == 2 else (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _schema(reward_names: Any) -> pa.Schema:
    """Types do not depend on what happens to be missing, so the files of a run read as one data set."""
    import pyarrow as pa

    text, integer, number, flag = pa.string(), pa.int64(), pa.float64(), pa.bool_()
    columns = {"stage": text, "step": integer, "batch": integer, "rank": integer, "group": integer}
    columns |= {"rollout": integer, "sample_id": text, "prompt": text, "reference": text, "caption": text}
    columns |= {"truncated": flag, "length": integer, "reference_length": integer, "weights_version": integer}
    columns |= {f"{kind}/{name}": number for kind in ("reward", "shaped") for name in reward_names}
    columns |= {"advantage": number, "assertions": pa.list_(text)}
    columns |= {"true": pa.list_(flag), "pointable": pa.list_(flag)}
    columns |= {"reference_units": pa.list_(text), "covered": pa.list_(flag)}
    columns |= dict.fromkeys(SCALES, number)
    return pa.schema(list(columns.items()))


def _marked(row: dict[str, Any]) -> list[str]:
    """The assertions of a caption, each after its mark."""
    marked = []
    for i, assertion in enumerate(row["assertions"] or []):
        mark = "?"
        if row["true"] is not None:
            mark = "✗" if not row["true"][i] else "✓" if row["pointable"][i] else "○"
        marked.append(f"{mark} {assertion}")
    return marked


def _cell(text: str) -> str:
    """Text of a model, harmless inside a cell of a Markdown table."""
    return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value

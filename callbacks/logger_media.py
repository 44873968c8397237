"""Images and captions of rollouts in the logger that a run has: one function for each kind of logger."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
    from PIL import Image


@dataclass(frozen=True)
class RolloutMedia:
    """One row of a batch with its captions, for people.

    Attributes:
        tag: its name in the logger, such as ``val_rollouts/0``.
        step: optimizer steps behind the weights.
        images: of the row, small, at least one.
        title: of the images.
        markdown: the captions as a Markdown table with prompt and reference.
        columns: of `table`.
        table: one row per caption; None where a value is missing.
    """

    tag: str
    step: int
    images: Sequence[Image.Image]
    title: str
    markdown: str
    columns: Sequence[str]
    table: Sequence[Sequence[Any]]

    def named_images(self) -> dict[str, Image.Image]:
        """The images under names of their own: the tag, then ``<tag>_2`` and so on."""
        return {f"{self.tag}_{i}" if i > 1 else self.tag: image for i, image in enumerate(self.images, 1)}


Show = Callable[[Any, RolloutMedia], None]


def media_of(logger: Logger) -> Show | None:
    """What shows rollouts in this logger; None for one that has no images, such as a CSV file.

    No logger's own package is imported for it.
    """
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    from balcap.trainer.trackio_logger import TrackioLogger

    kinds: dict[type[Logger], Show] = {
        TensorBoardLogger: _tensorboard,
        WandbLogger: _wandb,
        MLFlowLogger: _mlflow,
        TrackioLogger: _trackio,
    }
    return next((show for kind, show in kinds.items() if isinstance(logger, kind)), None)


def _tensorboard(logger: Any, media: RolloutMedia) -> None:
    import numpy as np

    for name, image in media.named_images().items():
        logger.experiment.add_image(name, np.asarray(image), media.step, dataformats="HWC")
    logger.experiment.add_text(media.tag, media.markdown, media.step)


def _wandb(logger: Any, media: RolloutMedia) -> None:
    titles = [media.title] * len(media.images)
    logger.log_image(media.tag, list(media.images), step=media.step, caption=titles)
    logger.log_table(
        f"{media.tag}/captions", columns=list(media.columns), data=_lists(media), step=media.step
    )


def _mlflow(logger: Any, media: RolloutMedia) -> None:
    client, run_id = logger.experiment, logger.run_id
    for name, image in media.named_images().items():
        client.log_image(run_id, image, key=name, step=media.step)
    # A CSV file, which MLflow shows as a table: log_table lists all tables in one tag, too short for those of a run.
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([media.columns, *media.table])
    client.log_text(run_id, text.getvalue(), f"{media.tag}/{media.step:08d}.csv")


def _trackio(logger: Any, media: RolloutMedia) -> None:
    import trackio

    shown: dict[str, Any] = {
        name: trackio.Image(image, caption=media.title) for name, image in media.named_images().items()
    }
    shown[f"{media.tag}/captions"] = trackio.Table(columns=list(media.columns), data=_lists(media))
    logger.experiment.log(shown, step=media.step)


def _lists(media: RolloutMedia) -> list[list[Any]]:
    return [list(row) for row in media.table]

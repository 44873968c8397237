"""A curriculum: images that the policy has mastered come less often."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from balcap.data import CaptionDataModule
from balcap.rewards import b_capscore
from balcap.trainer.distributed import gather_objects, sums
from balcap.trainer.metrics import PARTS
from balcap.types import StepRecord


def mastered_rows(rewards: Tensor, scores: Tensor, threshold: float) -> list[bool]:
    """``[B]`` whether a group has nothing left to teach: no reward has a spread, and the mean score is high.

    Args:
        rewards: ``[B, G, K]`` in [0, 1]; a group that misses one (NaN) is not mastered.
        scores: ``[B, G]`` b-CapScore.
        threshold: least mean score of a mastered group.
    """
    constant = (rewards == rewards[:, :1]).flatten(1).all(1)  # [B]; NaN equals nothing
    return (constant & (scores.mean(1) >= threshold)).tolist()


class Mastery(Callback):
    """Reads images that the policy has mastered at only some of their visits.

    A group without any spread of its rewards costs sampling and judging, and gives no gradient. Where its mean b-CapScore
    is at least `threshold` as well (without spread it could be all bad), the image counts as mastered (`mastered_rows`),
    until a later group of it does not. At the start of each epoch the images that are mastered then become those that
    this epoch skips: at every visit with probability `skip_share`, by a hash of seed, visit and image, so that all ranks
    and a resumed run skip the same. Nothing is dropped for good: an image that is forgotten is found out at its next visit.
    An epoch keeps its number of batches; other images come again sooner.

    Logged as ``train/mastered``, images on the list, and ``train/rows_skipped``, rows of all ranks that were skipped on the
    way to this step's batch.

    Args:
        threshold: least mean b-CapScore of a mastered group, in [0, 1].
        skip_share: probability that a mastered image is skipped at a visit, in (0, 0.95].

    Raises:
        ValueError: every setting that is out of range, each with its key; at the start of a fit, a module that lacks
            one of the three rewards of b-CapScore.
    """

    def __init__(self, threshold: float = 0.9, skip_share: float = 0.75) -> None:
        rules = [
            ("threshold", threshold, 0 <= threshold <= 1, "is outside [0, 1]"),
            ("skip_share", skip_share, 0 < skip_share <= 0.95, "is outside (0, 0.95]"),
        ]
        problems = [f"Mastery.{name}: {value} {rule}" for name, value, holds, rule in rules if not holds]
        if problems:
            raise ValueError("\n".join(problems))
        self.threshold, self.skip_share = threshold, skip_share
        self.skipped: set[str] = set()  # of this epoch
        self.mastered: set[str] = set()  # now

    def observe(self, record: StepRecord) -> dict[str, bool]:
        """Sample id -> whether it is mastered, of the groups of one step of this rank."""
        names = list(record.reward_names)
        scores = b_capscore(*(record.rewards[..., names.index(part)] for part in PARTS))
        found = mastered_rows(record.rewards, scores, self.threshold)
        return dict(zip(record.rollouts.batch.sample_ids, found, strict=True))

    def module_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What of the config does not go together with it, with the key to change."""
        module: Any = pl_module
        missing = [name for name in PARTS if name not in module.rewards.names]
        why = f"Mastery goes by b-CapScore, and model.rewards lacks {', '.join(missing)}; add it, or leave Mastery out"
        return [f"trainer.callbacks: {why}"] if missing else []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if problems := self.module_problems(trainer, pl_module):
            raise ValueError("\n".join(problems))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.skipped = set(self.mastered)
        self._apply(trainer)

    def _apply(self, trainer: Trainer) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CaptionDataModule)
        data.skip_mastered(frozenset(self.skipped), self.skip_share)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        mine: dict[str, bool] = {}
        for record in outputs["records"]:
            mine |= self.observe(record)
        for found in gather_objects(trainer, mine):
            for sample_id, is_mastered in found.items():
                (self.mastered.add if is_mastered else self.mastered.discard)(sample_id)
        (rows,) = sums(trainer, [float(batch.cursor.skipped)])
        for name, value in (("mastered", float(len(self.mastered))), ("rows_skipped", rows)):
            pl_module.log(f"train/{name}", value, on_step=True, on_epoch=False, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Sample ids, sorted."""
        return {"skipped": sorted(self.skipped), "mastered": sorted(self.mastered)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.skipped, self.mastered = set(state_dict["skipped"]), set(state_dict["mastered"])

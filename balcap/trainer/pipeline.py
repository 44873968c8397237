"""Batches between sampling and update: each group is judged as soon as its captions exist.

With ``lag: 0`` a step samples, waits for the judge, and updates on what it sampled. With ``lag: 1`` it updates on
the batch of the step before, whose judgments had all of this step's sampling and the last step's update
to arrive: judging (network) and the device work at the same time. Captions are then one update older than the
weights that learn from them, which the importance ratio corrects (`balcap.algorithms.loss`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from balcap.judge import Judge, Judgments
from balcap.rewards.suite import RewardSuite, merge
from balcap.types import CaptionBatch, Rollouts

if TYPE_CHECKING:
    from balcap.policy.prompts import Prompts


class Judging:
    """The judgments of one batch, asked for group by group.

    Args:
        suite: says what is needed.
        judge: answers, on its own thread.
        batch: the images.

    Attributes:
        started, ended: `time.perf_counter` of the first question and of the last answer so far.
    """

    def __init__(self, suite: RewardSuite, judge: Judge, batch: CaptionBatch) -> None:
        self._suite, self._judge, self._batch = suite, judge, batch
        self._futures: dict[int, Future[Judgments]] = {}
        self.started = self.ended = time.perf_counter()

    def ask(self, row: int, captions: Sequence[str]) -> None:
        """Start judging the captions of one image."""
        batch = self._batch
        if not self._futures:
            self.started = time.perf_counter()
        units = batch.extra("reference_units")[row]
        future = self._judge.submit(
            self._suite.gather_group(
                self._judge,
                batch.sample_ids[row],
                batch.image_bytes[row],
                batch.references[row],
                captions,
                units,
            )
        )
        future.add_done_callback(self._note)
        self._futures[row] = future

    def result(self) -> Judgments:
        """All groups in the order of the batch; waits for them.

        Raises:
            CacheError: the judge's cache cannot be used.
        """
        try:
            return merge([self._futures[row].result() for row in range(len(self._batch))])
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give up what is not answered yet. What was answered is in the judge's cache."""
        for future in self._futures.values():
            future.cancel()

    def _note(self, future: Future[Judgments]) -> None:
        self.ended = time.perf_counter()


@dataclass(eq=False)
class Flight:
    """A batch on its way from sampling to update.

    Attributes:
        rollouts: its captions.
        prompts: its encoded prompts.
        judging: under way.
    """

    rollouts: Rollouts
    prompts: Prompts
    judging: Judging


_SAVED = (
    "token_ids",
    "completion_mask",
    "sampler_logps",
    "truncated",
    "lengths",
    "reference_lengths",
    "weights_version",
)


def saved(rollouts: Rollouts) -> dict[str, Any]:
    """What a checkpoint keeps of rollouts in flight: tensors and texts, no images.

    They were sampled by weights that the checkpoint does not hold any more; sampled anew they would be other captions,
    to be paid again.
    """
    kept = {name: getattr(rollouts, name) for name in _SAVED}
    kept["captions"] = [list(group) for group in rollouts.captions]
    return kept | {"sample_ids": list(rollouts.batch.sample_ids)}


def restored(state: dict[str, Any], batch: CaptionBatch) -> Rollouts | None:
    """`saved` rollouts with their images, None where the batch holds others."""
    if state["sample_ids"] != list(batch.sample_ids):
        return None
    return Rollouts(batch=batch, captions=state["captions"], **{name: state[name] for name in _SAVED})

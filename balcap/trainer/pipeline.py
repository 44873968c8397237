"""Batches between sampling and update: each group is judged as soon as its captions exist.

With ``lag: 0`` a step samples, waits for the judge, and updates on what it sampled. With ``lag: 1`` it updates on
the batch of the step before, whose judgments had all of this step's sampling and the last step's update
to arrive: judging (network) and the device work at the same time. Captions are then one update older than the
weights that learn from them, which the importance ratio corrects (`balcap.algorithms.loss`).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from balcap.judge import Judge, JudgeStats, Judgments
from balcap.rewards.suite import RewardSuite, merge
from balcap.rollout import EngineFailed, HFGenerate, RolloutEngine, Sampling
from balcap.rollout.base import OnGroupDone
from balcap.rollout.references import reference_rollouts
from balcap.trainer.distributed import gather_objects, stop_together
from balcap.trainer.timeline import Timeline
from balcap.types import CaptionBatch, Rollouts
from balcap.utils.errors import UserError
from balcap.utils.seeding import seeded

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts

log = logging.getLogger(__name__)

TRAIN, VALIDATE, PREDICT, TEST = 0, 1, 2, 3
"""Stages; captions of each are drawn from numbers of their own."""


class InFlightBatch:
    """A batch between sampling and update, whose groups are judged one by one.

    Args:
        suite: says what is needed.
        judge: answers, on its own thread, until it is closed; may be None where nothing is needed.
        batch: the images.

    Attributes:
        prompts: encoded.
        rollouts: its captions.
        started, ended: `time.perf_counter` of the first question and of the last answer so far.
    """

    prompts: Prompts
    rollouts: Rollouts

    def __init__(self, suite: RewardSuite, judge: Judge | None, batch: CaptionBatch) -> None:
        self._suite, self._judge, self._batch = suite, judge, batch
        self._futures: dict[int, Future[Judgments]] = {}
        self.started = self.ended = time.perf_counter()

    def start(self, row: int, captions: Sequence[str]) -> None:
        """Start judging the captions of one image."""
        if not self._suite.needs:
            return
        assert self._judge is not None
        if not self._futures:
            self.started = time.perf_counter()
        future = self._judge.submit(self._suite.gather_group(self._judge, self._batch, row, captions))
        future.add_done_callback(self._answered)
        self._futures[row] = future

    def judgments(self) -> Judgments:
        """Of all groups, in the order of the batch; waits for them.

        Raises:
            StoreError: the judge's cache cannot be used.
        """
        if not self._suite.needs:
            return Judgments({}, [None] * len(self._batch))
        return merge([self._futures[row].result() for row in range(len(self._batch))])

    def _answered(self, future: Future[Judgments]) -> None:
        self.ended = time.perf_counter()


class RolloutPipeline:
    """Samples, has captions judged, and keeps batches in flight until they are learned from.

    Args:
        suite: the rewards, which say what is judged.
        judge: None where no reward needs one.
        engine: samples; None for HF ``generate``.
        sampling: how.
        lag: batches that stay in flight while the next one is sampled: 0 or 1.
        seed: of the run.

    Attributes:
        in_flight: sampled and not yet learned from, oldest first.
        sampled: of them the one that this step has sampled on the rank's own device, or None.
        learned: batches learned from so far.
        judged: rollouts that this process has had judged.
        timeline: of the step.
    """

    def __init__(
        self,
        suite: RewardSuite,
        judge: Judge | None,
        engine: RolloutEngine | None,
        sampling: Sampling,
        lag: int,
        seed: int,
    ) -> None:
        self.suite, self.judge, self.engine = suite, judge, engine or HFGenerate()
        self.sampling, self.lag, self.seed = sampling, lag, seed
        self.in_flight: deque[InFlightBatch] = deque()
        self.sampled: InFlightBatch | None = None
        self._resumed: deque[dict[str, Any]] = deque()  # in flight in the run that is continued
        self._attached = False
        self._synced = 0  # version of the weights that the engine has
        self.learned = self.judged = 0
        self.timeline = Timeline(lambda: torch.cuda.synchronize() if torch.cuda.is_initialized() else None)

    def attach(self, trainer: Trainer, policy: Policy) -> None:
        """Work for this trainer and policy; the engine starts at its first use, when the policy is on its device."""
        self.trainer, self.policy = trainer, policy

    @property
    def needs_importance_correction(self) -> bool:
        """Whether the sampler's distribution is another than the trainer's at the start of an update."""
        return self.lag > 0 or not self.engine.on_policy

    def judge_stats(self) -> JudgeStats:
        """Of this process."""
        return JudgeStats() if self.judge is None else self.judge.stats()

    # ── sampling ─────────────────────────────────────────────────────────────────────────────────────

    def start_rollout(self, batch: CaptionBatch, num_captions: int, updates_per_rollout: int) -> bool:
        """Sample captions; each image's go to the judge when they are complete.

        Returns:
            False where the run has enough in flight for the steps that are left: nothing was sampled.
        """
        self.sampled = None
        if len(self.in_flight) >= self._batches_left(updates_per_rollout):
            return False
        number = self.trainer.global_step + updates_per_rollout * len(self.in_flight)
        with self.timeline.span("rollout"), self.seeded(TRAIN, number):
            batch, prompts = self._encode(batch, fill=True)
            in_flight = InFlightBatch(self.suite, self.judge, batch)
            in_flight.prompts, resumed = prompts, self._resume_rollouts(batch)
            for row, captions in enumerate(resumed.captions if resumed else ()):
                in_flight.start(row, captions)
            in_flight.rollouts = self._generate(
                batch, in_flight.prompts, num_captions, in_flight.start, resumed
            )
        self.in_flight.append(in_flight)
        if (data := getattr(self.trainer, "datamodule", None)) is not None:
            data.taken(batch)
        self.sampled = in_flight if resumed is None and self.engine.own_device else None
        return True

    def take_references(self, batch: CaptionBatch) -> InFlightBatch:
        """The references of a batch in place of captions: nothing is sampled, nobody is asked."""
        batch, prompts = self._encode(batch, fill=True)
        in_flight = InFlightBatch(self.suite, None, batch)
        in_flight.prompts = prompts
        in_flight.rollouts = reference_rollouts(
            self.policy, batch, self.sampling.max_tokens, self.trainer.global_step
        )
        self.in_flight.append(in_flight)
        return in_flight

    def sample(
        self,
        batch: CaptionBatch,
        num_captions: int,
        stage: int,
        number: int,
        temperature: float | None = None,
    ) -> Rollouts:
        """Captions outside training, at a temperature of their own; the same draw for the same stage and number."""
        sampling = self.sampling if temperature is None else replace(self.sampling, temperature=temperature)
        with self.seeded(stage, number):
            return self._generate(*self._encode(batch, fill=False), num_captions, sampling=sampling)

    def sample_each(
        self,
        batches: Iterable[tuple[int, CaptionBatch]],
        stage: int,
        sampling: Sampling,
        on_batch: Callable[[Sequence[str], Sequence[str]], None],
    ) -> None:
        """One caption for each image of some batches, which may be more or fewer than those of other ranks.

        A collective at its beginning and end alone. A batch's captions depend on its number, not on the rank.

        Args:
            batches: with their numbers.
            stage: whose random numbers are drawn.
            sampling: how.
            on_batch: is given the sample ids of each batch and their captions, without those that the model's processor
                refuses.
        """
        self._start_engine()
        with self._failing_together():
            for number, batch in batches:
                good, _, prompts = self._accepted(batch)
                if not good:
                    continue
                if prompts is None:
                    batch = batch.select(good)
                    prompts = self.policy.encode(batch)
                with seeded(self.trainer.strategy.root_device, self.seed, stage, number, 0):
                    rollouts = self.engine.generate(batch, prompts, 1, sampling)
                on_batch(batch.sample_ids, [captions[0] for captions in rollouts.captions])

    def _encode(self, batch: CaptionBatch, fill: bool) -> tuple[CaptionBatch, Prompts]:
        """The batch with its prompts, without images that the model's processor or template refuses: they are listed as
        bad rows. With `fill`, others of the batch take their places, so that every rank has as many.

        Raises:
            UserError: it refuses all of them.
        """
        good, refused, prompts = self._accepted(batch)
        if prompts is not None:
            return batch, prompts
        if (data := getattr(self.trainer, "datamodule", None)) is not None:
            for sample_id, why in refused.items():
                data.leave_out(sample_id, "refused_by_processor", why)
        if not good:
            raise UserError(
                "model.policy: the model, or its processor, refuses all rows of a batch, such as "
                f"{next(iter(refused.values()))}"
            )
        rows = [row if row in good else good[row % len(good)] for row in range(len(batch))] if fill else good
        return batch.select(rows), self.policy.encode(batch.select(rows))

    def _accepted(self, batch: CaptionBatch) -> tuple[list[int], dict[str, str], Prompts | None]:
        """Rows of a batch that the model's processor and template accept; why it refuses the others, by sample id, which
        is logged too; the prompts, where it accepts all."""
        try:
            return list(range(len(batch))), {}, self.policy.encode(batch)
        except Exception:  # processors raise whatever they like
            good, refused = [], {}
        for row, sample_id in enumerate(batch.sample_ids):
            try:
                self.policy.encode(batch.select([row]))
                good.append(row)
            except Exception as error:
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                refused[sample_id] = f"{sample_id}: {kind}{error}"
                log.warning("skipped: the model, or its processor, refuses %s", refused[sample_id])
        return good, refused, None

    def sync(self) -> None:
        """Give the engine, which has sampled, the policy's weights."""
        with self._failing_together(), self.timeline.span("sync"):
            self._sync()

    def _sync(self) -> None:
        self.engine.sync(self.policy, self.trainer.global_step)
        self._synced = self.trainer.global_step

    def sync_bytes(self) -> int:
        """Of the weights that a sync hands to the engine: of what is trained, of all ranks; 0 where captions are sampled on
        the policy itself."""
        trained = () if self.engine.on_policy else (p for p in self.policy.parameters() if p.requires_grad)
        return sum(parameter.nbytes for parameter in trained)

    def _generate(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        on_group_done: OnGroupDone | None = None,
        resumed: Rollouts | None = None,
        sampling: Sampling | None = None,
    ) -> Rollouts:
        """Captions from the engine, unless there are some already."""
        self._start_engine()
        with self._failing_together():
            if resumed is None:
                sampling = sampling or self.sampling
                return self.engine.generate(batch, prompts, num_captions, sampling, on_group_done)
        return resumed

    def _start_engine(self) -> None:
        """At its first use; and give it the weights of now, if updates did not. A collective."""
        if self._attached and self._synced == self.trainer.global_step:
            return
        with self._failing_together():
            if not self._attached:
                self.engine.attach(self.policy)
            self._sync()
        self._attached = True

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """An engine that fails on one rank ends the run on all of them; all must come here."""
        failure = None
        try:
            yield
        except EngineFailed as error:
            failure = error
        stop_together(self.trainer, failure)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────

    def ready(self, sampled: bool) -> list[InFlightBatch]:
        """Batches to learn from in this step, oldest first: none, one, or what is left at the end of the run.

        Args:
            sampled: whether this step has sampled; the last one leaves nothing in flight.
        """
        keep = self.lag if sampled and not self._is_last_batch() else 0
        return list(self.in_flight)[: max(0, len(self.in_flight) - keep)]

    def learned_from(self, batch: InFlightBatch) -> None:
        """The oldest batch in flight is done: a resumed run goes on behind it."""
        assert self.in_flight[0] is batch
        self.in_flight.popleft()
        self.learned += 1
        if self.sampled is batch:
            self.sampled = None  # so that what it holds of the device can go
        if (data := getattr(self.trainer, "datamodule", None)) is not None:
            data.consumed(batch.rollouts.batch)

    def judgments(self, batch: InFlightBatch) -> Judgments:
        """Of a batch in flight; waits for them. A judge that stops the run stops it on all ranks."""
        with self.timeline.span("judge_wait"):
            judgments = batch.judgments()
        self.timeline.add("judge", "judge", batch.started, batch.ended)
        return self._count(judgments, batch.rollouts)

    def judge_now(self, rollouts: Rollouts) -> Judgments:
        """All judgments that the rewards need, asked for and waited for."""
        batch = InFlightBatch(self.suite, self.judge, rollouts.batch)
        for row, captions in enumerate(rollouts.captions):
            batch.start(row, captions)
        return self._count(batch.judgments(), rollouts)

    def _count(self, judgments: Judgments, rollouts: Rollouts) -> Judgments:
        self.judged += rollouts.truncated.numel()
        stop_together(self.trainer, None if self.judge is None else self.judge.stopped)
        return judgments

    def _batches_left(self, updates_per_rollout: int) -> float:
        """Batches that the run will still learn from, where it ends with a number of steps."""
        steps = self.trainer.max_steps
        return math.inf if steps < 0 else math.ceil((steps - self.trainer.global_step) / updates_per_rollout)

    def _is_last_batch(self) -> bool:
        """Whether the run ends with this batch, where it ends with a number of epochs."""
        epochs = self.trainer.max_epochs or -1
        return 0 < epochs <= self.trainer.current_epoch + 1 and self.trainer.is_last_batch

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """A collective: call it on every rank."""
        mine = [saved(batch.rollouts) for batch in self.in_flight]
        return {"learned": self.learned, "in_flight": gather_objects(self.trainer, mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Captions in flight are used again where the number of ranks is the same, else sampled anew."""
        self.learned = state.get("learned", 0)
        in_flight = state.get("in_flight", [])
        if len(in_flight) == self.trainer.world_size:
            self._resumed = deque(in_flight[self.trainer.global_rank])
        elif any(in_flight):
            rank_zero_info("captions in flight are those of another number of ranks; sampled anew")

    def _resume_rollouts(self, batch: CaptionBatch) -> Rollouts | None:
        """Captions that the run before had sampled for this batch and not learned from."""
        if not self._resumed:
            return None
        rollouts = restored(self._resumed.popleft(), batch)
        if rollouts is None:
            self._resumed.clear()
            log.warning("captions in flight belong to other images than those that come now; sampled anew")
        return rollouts

    def close(self) -> None:
        """Give up what is in flight; close engine and judge. Safe to call twice."""
        self.in_flight.clear()
        if self.judge is not None:
            self.judge.close()
        if self._attached:
            self.engine.close()
            self._attached = False

    def seeded(self, stage: int, number: int) -> Any:
        """A context with random numbers of this stage, number and rank alone."""
        return seeded(self.trainer.strategy.root_device, self.seed, stage, number, self.trainer.global_rank)


def saved(rollouts: Rollouts) -> dict[str, Any]:
    """What a checkpoint keeps of rollouts in flight: tensors and texts, no images.

    They were sampled by weights that the checkpoint does not hold any more; sampled anew they would be other captions,
    to be paid again.
    """
    kept = {field.name: getattr(rollouts, field.name) for field in fields(rollouts) if field.name != "batch"}
    return kept | {"sample_ids": list(rollouts.batch.sample_ids)}


def restored(state: dict[str, Any], batch: CaptionBatch) -> Rollouts | None:
    """`saved` rollouts with their images, None where the batch holds others."""
    kept = dict(state)
    return Rollouts(batch, **kept) if kept.pop("sample_ids") == list(batch.sample_ids) else None

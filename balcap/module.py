"""The training step: sample, judge, gate, advantage, update, log."""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from balcap.algorithms import cgdpo, grpo, length_mask, linear_length_penalty
from balcap.algorithms.loss import LossAggregation
from balcap.judge import Judge, JudgeStats, Judgments
from balcap.judge.cache import describe
from balcap.policy import PolicyConfig
from balcap.rewards import Reward, RewardSuite
from balcap.rollout import EngineFailed, Finished, RolloutEngine, Sampling
from balcap.trainer.metrics import caption_scores, judge_costs, step_metrics
from balcap.trainer.pipeline import Flight, Judging, restored, saved
from balcap.trainer.tally import Tally
from balcap.trainer.timeline import Timeline
from balcap.trainer.update import update
from balcap.types import CaptionBatch, Rollouts, StepRecord
from balcap.utils.errors import RunStopped

if TYPE_CHECKING:
    from balcap.policy.prompts import Prompts

log = logging.getLogger(__name__)


class BalCapModule(L.LightningModule):
    """BalCapRL (arXiv 2605.07394): a captioner trained on precision, recall and language at once.

    Args:
        policy: the captioner: weights, adapter, what is frozen.
        judge: who answers the questions that rewards are made of.
        rewards: the K rewards; each is a metric with a name.
        weights: reward name -> weight (α, β, γ of the paper). A reward that is left out weighs 0: it is
            judged and logged, not trained.
        engine: samples captions; null uses HF ``generate`` on the policy itself.
        num_captions: G, captions per image and step; at least 2.
        sampling: temperature, top-p and longest caption.
        advantage: ``cgdpo`` normalises each reward in its group, then weights; ``grpo`` weights first.
        whiten: normalise c-GDPO's advantages over the batch as well.
        length_control: ``mask`` drops the linguistic reward outside [tau_low, tau_high], ``linear`` lowers
            it with the distance from the reference's length, ``none`` leaves it.
        length_reward: name of the reward that length control acts on.
        tau_low: smallest kept ratio of caption tokens to reference tokens.
        tau_high: largest kept ratio.
        clip_eps_low: lower clip range of the importance ratio, in (0, 1).
        clip_eps_high: upper clip range, above 0.
        loss_aggregation: ``token_mean`` over all caption tokens of the step, or ``sequence_mean``, the mean
            over captions of their token means.
        kl_coef: weight of the KL (k3) to the reference; 0 keeps no reference.
        lag: 0 updates on the captions that it has just sampled; 1 on those of the step before, so that judging
            goes on while the device works. They are then one update old.
        importance_cap: where another engine or older weights sampled, a token's loss is multiplied with the
            importance ratio of trainer to sampler, at most this (truncated importance sampling); null
            corrects nothing. Samples of the policy itself with lag 0 need no correction.
        mismatch_threshold: nats of difference between the log-probs of sampler and trainer beyond which a token
            counts in ``train/mismatch_share``.
        updates_per_rollout: optimizer steps on each batch of rollouts.
        micro_batch_size: images (with their G captions) per forward pass; null takes all at once.
        max_tokens_per_forward: tokens per forward pass, all images packed into it together; an image with more
            has a pass of its own; null for no limit. The memory of an update grows with it.
        max_grad_norm: clip the gradient to this norm; null does not clip.
        max_skipped_updates: end the run when more updates in a row than this had a non-finite gradient.
        val_captions: captions per image in validation.
        optimizer: over the trainable parameters.
        scheduler: of the learning rate, stepped after each optimizer step; null keeps it constant.
        seed: captions of step n on rank r are drawn from (seed, n, r), so that a resumed run draws the same.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        judge: Judge,
        rewards: list[Reward],
        weights: dict[str, float],
        engine: RolloutEngine | None = None,
        num_captions: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        advantage: Literal["cgdpo", "grpo"] = "cgdpo",
        whiten: bool = True,
        length_control: Literal["mask", "linear", "none"] = "mask",
        length_reward: str = "linguistic",
        tau_low: float = 0.5,
        tau_high: float = 2.0,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        loss_aggregation: LossAggregation = "token_mean",
        kl_coef: float = 0.0,
        lag: Literal[0, 1] = 0,
        importance_cap: float | None = 2.0,
        mismatch_threshold: float = 0.1,
        updates_per_rollout: int = 1,
        micro_batch_size: int | None = None,
        max_tokens_per_forward: int | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_updates: int = 5,
        val_captions: int = 1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what is trained, not the frozen rest
        self.policy_config, self.judge, self.rewards = policy, judge, RewardSuite(rewards)
        self.weights, self.num_captions, self.sampling = weights, num_captions, sampling
        self.advantage, self.whiten = advantage, whiten
        self.length_control, self.length_reward = length_control, length_reward
        self.tau_low, self.tau_high = tau_low, tau_high
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.loss_aggregation, self.kl_coef = loss_aggregation, kl_coef
        self.lag, self.importance_cap, self.mismatch_threshold = lag, importance_cap, mismatch_threshold
        self.updates_per_rollout, self.micro_batch_size = updates_per_rollout, micro_batch_size
        self.max_tokens_per_forward = max_tokens_per_forward
        self.max_grad_norm, self.max_skipped_updates = max_grad_norm, max_skipped_updates
        self.val_captions, self.seed = val_captions, seed
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.engine = engine
        self.val_rewards = copy.deepcopy(self.rewards)
        self.val_means = MetricCollection(
            {name: MeanMetric(nan_strategy="ignore") for name in _VAL_MEANS}, compute_groups=False
        )
        self.skipped_in_a_row = self.skipped_total = 0
        self._attached = False
        self._flights: deque[Flight] = deque()  # sampled, not yet learned from; oldest first
        self._resumed: deque[dict[str, Any]] = deque()  # the same, of the run that is continued
        self.learned = 0  # batches
        self.timeline = Timeline(self._settle)
        self.judged = 0  # rollouts, in this process

    # ── construction ─────────────────────────────────────────────────────────────────────────────────

    def problems(self) -> list[str]:
        """Everything in the settings that contradicts itself, each with the key to change. Loads nothing."""
        found = [*self.policy_config.problems(), *self.judge.problems(), *self.sampling.problems()]
        names = ", ".join(self.rewards.names)
        found += [
            f"model.weights.{n}: no such reward; there are {names}"
            for n in self.weights
            if n not in self.rewards.names
        ]
        found += [f"model.weights.{n}: {w} is negative" for n, w in self.weights.items() if w < 0]
        if not any(self.weights.values()):
            found.append(
                f"model.weights: all weights are 0, nothing would be trained; give one of {names} a weight"
            )
        if self.num_captions < 2:
            found.append(
                f"model.num_captions: a group of {self.num_captions} has no spread to normalise; use 2 or more"
            )
        if self.length_control != "none" and self.length_reward not in self.rewards.names:
            found.append(
                f"model.length_reward: there is no reward {self.length_reward!r} to control; there are {names}"
            )
        if not 0 <= self.tau_low <= self.tau_high:
            found.append(
                f"model.tau_low: {self.tau_low} must lie between 0 and model.tau_high: {self.tau_high}"
            )
        if not 0 < self.clip_eps_low < 1:
            found.append(f"model.clip_eps_low: {self.clip_eps_low} is outside (0, 1)")
        if self.clip_eps_high <= 0:
            found.append(f"model.clip_eps_high: {self.clip_eps_high} must be above 0")
        if self.kl_coef < 0:
            found.append(f"model.kl_coef: {self.kl_coef} would reward drifting away; use 0 or more")
        if self.importance_cap is not None and self.importance_cap < 1:
            found.append(
                f"model.importance_cap: {self.importance_cap} would weigh down captions that the sampler and the "
                "trainer agree on; use 1 or more, or null"
            )
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            found.append(f"model.max_grad_norm: {self.max_grad_norm} must be above 0, or null")
        for key in ("updates_per_rollout", "micro_batch_size", "max_tokens_per_forward", "val_captions"):
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append(f"model.{key}: {value} must be at least 1")
        return found

    def configure_model(self) -> None:
        """Load the weights: here, so that nothing heavy happens before the settings are checked."""
        if hasattr(self, "policy"):
            return
        from balcap.policy.policy import Policy
        from balcap.rollout.hf import HFGenerate

        trains = self._trainer is None or self._trainer.state.fn == "fit"
        self.policy = Policy.load(self.policy_config, with_reference=trains and self.kl_coef > 0)
        self.engine = self.engine or HFGenerate()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory([p for p in self.policy.parameters() if p.requires_grad])
        if self.scheduler_factory is None:
            return optimizer
        return [optimizer], [self.scheduler_factory(optimizer)]

    def setup(self, stage: str) -> None:
        rank_zero_info(
            f"judge: {self.judge.settings.model}; rewards: {', '.join(self.rewards.names)}; {self.advantage}"
        )
        if self.judge.settings.cache is not None and stage != "predict":
            answers, size = describe(self.judge.settings.cache)
            rank_zero_info(
                f"judge cache: {self.judge.settings.cache}, {answers:,} answers, {size / 1e6:,.1f} MB"
            )

    # ── the step ─────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> dict[str, list[StepRecord]]:
        """Sample G captions per image, judge them, gate, advantage, update, log.

        With a lag the update is on the batch of the step before. The first step has none then; the last one
        samples nothing.
        """
        self.timeline.begin()
        before = self.judge.stats()
        sampled = len(self._flights) < self._updates_left()
        if sampled:
            self._flights.append(self._depart(batch))
        keep = self.lag if sampled and not self._is_last_batch() else 0
        records = []
        while len(self._flights) > keep:
            records.append(self._learn(self._flights[0], before, last=len(self._flights) == keep + 1))
            self._flights.popleft()
            before = self.judge.stats()
        return {"records": records}

    def _depart(self, batch: CaptionBatch) -> Flight:
        """Sample captions; each image's are sent to the judge when they are complete."""
        number = self.global_step + self.updates_per_rollout * len(self._flights)
        judging = Judging(self.rewards, self.judge, batch)
        try:
            with self.timeline.span("rollout"), self._seeded(number):
                prompts = self.policy.encode(batch)
                resumed = self._resume_flight(batch, judging)
                rollouts = self._sample(batch, prompts, self.num_captions, judging.ask, resumed)
        except BaseException:
            judging.cancel()
            raise
        return Flight(rollouts, prompts, judging)

    def _sample(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        finished: Finished | None = None,
        resumed: Rollouts | None = None,
    ) -> Rollouts:
        """Captions from the engine, unless there are some already; an engine that fails ends the run on all ranks."""
        failure, rollouts = None, resumed
        try:
            if rollouts is None:
                rollouts = self._engine().generate(batch, prompts, num_captions, self.sampling, finished)
        except EngineFailed as error:
            failure = error
        self._stop_together(failure)
        assert rollouts is not None
        return rollouts

    def _sync(self) -> None:
        failure = None
        try:
            self._engine().sync(self.policy, self.global_step)
        except EngineFailed as error:
            failure = error
        self._stop_together(failure)

    def _stop_together(self, why: RunStopped | None) -> None:
        """Raise on all ranks what stopped one of them: they save a checkpoint together, or wait for each other."""
        if self.gather(torch.tensor([float(why is not None)])).sum() > 0:
            raise why or RunStopped("another process stopped the run, and says why")

    def _resume_flight(self, batch: CaptionBatch, judging: Judging) -> Rollouts | None:
        """Captions that the run before had sampled for this batch and not learned from."""
        if not self._resumed:
            return None
        rollouts = restored(self._resumed.popleft(), batch)
        if rollouts is None:
            self._resumed.clear()
            log.warning("captions in flight belong to other images than those that come now; sampled anew")
            return None
        for row, captions in enumerate(rollouts.captions):
            judging.ask(row, captions)
        return rollouts

    def _learn(self, flight: Flight, before: JudgeStats, last: bool) -> StepRecord:
        """Update on one batch when its judgments are there."""
        rollouts = flight.rollouts
        with self.timeline.span("judge_wait"):
            judgments = self._judged_flight(flight)
            rewards = self.rewards(rollouts, judgments).cpu()  # [B, G, K]; lengths and masks are there too
        self.timeline.add("judge", "judge", flight.judging.started, flight.judging.ended)
        gated = self.control_length(rewards, rollouts)
        advantages = self.advantages(gated)  # [B, G]
        staleness = self.global_step - rollouts.weights_version
        with self.timeline.span("update"), self._seeded(self.global_step):
            tally = update(self, rollouts, flight.prompts, advantages)
        with self.timeline.span("sync"):
            self._sync()
        tally.add("staleness", staleness, 1)
        self._log_step(tally, rollouts, judgments, rewards, before, last)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            data.consumed(rollouts.batch)
        number, self.learned = self.learned, self.learned + 1
        return StepRecord(rollouts, judgments, self.rewards.names, rewards, gated, advantages, number)

    def _updates_left(self) -> float:
        """Batches that the run will still learn from, where it ends with a number of steps."""
        steps = self.trainer.max_steps
        return math.inf if steps < 0 else math.ceil((steps - self.global_step) / self.updates_per_rollout)

    def _is_last_batch(self) -> bool:
        """Whether the run ends with this batch, where it ends with a number of epochs."""
        epochs = self.trainer.max_epochs
        return bool(
            epochs not in (-1, None)
            and self.trainer.current_epoch + 1 >= epochs
            and self.trainer.is_last_batch
        )

    @property
    def corrects(self) -> bool:
        """Whether the sampler's distribution is another than the trainer's at the start of an update."""
        return self.lag > 0 or not self._engine().exact

    def control_length(self, rewards: Tensor, rollouts: Rollouts) -> Tensor:
        """``[B, G, K]`` with the linguistic reward gated by length, as `length_control` says."""
        if self.length_control == "none":
            return rewards
        index = self.rewards.names.index(self.length_reward)
        lengths, references = rollouts.lengths, rollouts.reference_lengths
        if self.length_control == "linear":
            return linear_length_penalty(rewards, lengths, references, index)
        return length_mask(rewards, lengths, references, self.tau_low, self.tau_high, index)

    def advantages(self, rewards: Tensor) -> Tensor:
        """``[B, G]``, whitened over all ranks where c-GDPO says so."""
        weights = torch.tensor([self.weights.get(name, 0.0) for name in self.rewards.names])
        if self.advantage == "grpo":
            return grpo(rewards, weights)
        return cgdpo(rewards, weights, whiten=self.whiten, all_gather=self.gather)

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> dict[str, list[StepRecord]]:
        """Rewards of `val_captions` sampled captions per held-out image; the same draw at every validation."""
        with self._seeded(batch_idx, stage=1):
            rollouts = self._sample(batch, self.policy.encode(batch), self.val_captions)
        judgments = self._judge(rollouts)
        rewards = self.val_rewards(rollouts, judgments).cpu()
        for name, values in caption_scores(self, rollouts, rewards).items():
            if name in self.val_means:
                self.val_means[name].update(values.float())
        record = StepRecord(rollouts, judgments, self.rewards.names, rewards, rewards, number=batch_idx)
        return {"records": [record]}

    def _judge(self, rollouts: Rollouts) -> Judgments:
        """All judgments that the rewards need, asked for now."""
        return self._counted(self.rewards.gather(self.judge, rollouts), rollouts)

    def _judged_flight(self, flight: Flight) -> Judgments:
        """The same, asked for when the captions came."""
        return self._counted(flight.judging.result(), flight.rollouts)

    def _counted(self, judgments: Judgments, rollouts: Rollouts) -> Judgments:
        """Ends the run, on all ranks, where the judge says so."""
        self.judged += rollouts.truncated.numel()
        self._stop_together(self.judge.stopped)
        return judgments

    def on_train_epoch_start(self) -> None:
        for name in self.rewards.names:
            self.rewards[name].reset()

    def on_validation_epoch_start(self) -> None:
        for metric in (*self.val_rewards.rewards, *self.val_means.values()):
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        values = {name: self.val_rewards[name].compute() for name in self.rewards.names}
        values |= {name: metric.compute() for name, metric in self.val_means.items() if metric.update_called}
        self._emit({f"val/{name}": float(value) for name, value in values.items()}, prog_bar=True)
        self._emit(judge_costs(self))

    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One caption per image."""
        with self._seeded(batch_idx, stage=2):
            rollouts = self._engine().generate(batch, self.policy.encode(batch), 1, self.sampling)
        rows = zip(
            batch.sample_ids, batch.prompts, rollouts.captions, rollouts.truncated[:, 0].tolist(), strict=True
        )
        return [
            {"image": sample_id, "prompt": prompt, "caption": texts[0], "truncated": cut}
            for sample_id, prompt, texts, cut in rows
        ]

    def _engine(self) -> RolloutEngine:
        """The engine, attached to the policy at its first use: by then the policy is on its device."""
        assert self.engine is not None, "configure_model has not run"
        if not self._attached:
            self.engine.attach(self.policy)
            self.engine.sync(self.policy, self.global_step)
            self._attached = True
        return self.engine

    # ── logging ──────────────────────────────────────────────────────────────────────────────────────

    def _log_step(
        self,
        tally: Tally,
        rollouts: Rollouts,
        judgments: Judgments,
        rewards: Tensor,
        before: JudgeStats,
        last: bool,
    ) -> None:
        metrics = step_metrics(self, tally, rollouts, judgments, rewards, before)
        self._emit(metrics, last, batch_size=len(rollouts))
        if judgments.failures:
            missing = ", ".join(f"{n} {task}" for task, n in judgments.failures.items())
            self.say(f"step {self.global_step}: judgments missing: {missing}; {'; '.join(judgments.reasons)}")

    def _emit(self, metrics: dict[str, float], last: bool = True, **how: Any) -> None:
        """Log under the number of batches learned from: with a lag Lightning's own count is of batches sampled."""
        own_count = self.lag > 0 and self.trainer.state.fn == "fit"
        if last:
            self.log_dict(metrics, logger=not own_count, **how)
        training = self.trainer.state.stage == RunningStage.TRAINING
        every = max(1, getattr(self.trainer, "log_every_n_steps", 1)) if training else 1
        if own_count and self.learned % every == 0 and not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(metrics | {"epoch": self.current_epoch}, step=self.learned)

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, with a leading rank dimension where there is more than one; on the CPU's side."""
        gathered = self.all_gather(tensor.to(self.device))
        assert isinstance(gathered, Tensor)
        return gathered.to(tensor.device)

    def say(self, message: str) -> None:
        """A warning to the console, once for all ranks."""
        if self.trainer.is_global_zero:
            log.warning(message)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def _seeded(self, step: int, stage: int = 0) -> Iterator[None]:
        """Random numbers from (seed, stage, step, rank) alone: a resumed run draws what it would have drawn."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            mixed = torch.Generator().manual_seed(self.seed)
            for part in (stage, step, self.global_rank):
                state = int(torch.randint(2**62, (1,), generator=mixed))
                mixed.manual_seed((state + part * 0x9E3779B97F4A7C15) % 2**63)
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=mixed)))
            yield

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only what is trained: the frozen rest is in the base model, where it came from."""
        trained = {f"policy.{n}" for n, p in self.policy.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["balcap"] = {
            "skipped_total": self.skipped_total,
            "learned": self.learned,
            "in_flight": self._of_all_ranks([saved(flight.rollouts) for flight in self._flights]),
        }

    def _of_all_ranks(self, mine: Any) -> list[Any]:
        """A collective: call it on every rank."""
        if self.trainer.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else: strict loading is off, and would let it pass in silence."""
        self.configure_model()
        trained = {f"policy.{n}" for n, p in self.policy.named_parameters() if p.requires_grad}
        there = set(checkpoint["state_dict"])
        if trained != there:
            raise RuntimeError(
                f"this checkpoint holds {len(there)} trained tensors, the config makes {len(trained)}, and "
                f"{len(trained ^ there)} differ (such as {sorted(trained ^ there)[0]}). Were model.policy.lora, "
                "freeze_vision or the base model changed? Resume with the config saved in the run folder"
            )
        own = checkpoint.get("balcap", {})
        self.skipped_total, self.learned = own.get("skipped_total", 0), own.get("learned", 0)
        in_flight = own.get("in_flight", [])
        if len(in_flight) == self.trainer.world_size:
            self._resumed = deque(in_flight[self.global_rank])
        elif any(in_flight):
            rank_zero_info(
                "captions in flight were sampled by another number of ranks; they are sampled anew"
            )

    def teardown(self, stage: str) -> None:
        for flight in self._flights:
            flight.judging.cancel()
        self._flights.clear()
        self.judge.close()
        if self.engine is not None and self._attached:
            self.engine.close()
            self._attached = False


_VAL_MEANS = ("b_capscore", "length_ratio", "caption_tokens", "length_masked", "truncated")

"""`BalCapModule`: the training step reads as the algorithm of the paper, top to bottom."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from balcap.algorithms import CGDPO, AdvantageEstimator, AdvantageTransform, LengthMask, RewardTransform
from balcap.benchmarks.text import text_statistics
from balcap.judge import Judge, JudgeStats, Judgments
from balcap.judge.redis_cache import describe
from balcap.policy import PolicyConfig
from balcap.rewards import Reward, RewardSuite
from balcap.rollout import RolloutEngine, Sampling
from balcap.trainer import metrics
from balcap.trainer.checkpoint import (
    apply_settings,
    check_resumable,
    check_trained,
    name_optimizer_state,
    optimizer_settings,
    trained_names,
)
from balcap.trainer.distributed import gather, gather_objects, sums
from balcap.trainer.loggers import log_metrics, warn_of_missing
from balcap.trainer.pipeline import PREDICT, TEST, TRAIN, VALIDATE, InFlightBatch, RolloutPipeline
from balcap.trainer.spans import assertion_spans
from balcap.trainer.supervised import supervised_update
from balcap.trainer.tally import Tally
from balcap.trainer.update import OptimizerLoop, UpdateSettings, update
from balcap.types import AssertionSpans, CaptionBatch, Rollouts, StepRecord
from balcap.utils.errors import UserError

if TYPE_CHECKING:
    from balcap.benchmarks.runner import BenchmarkRun, Result

_VAL_MEANS = ("b_capscore", "length_ratio", "caption_tokens", "length_masked", "truncated")


class BalCapModule(L.LightningModule):
    """BalCapRL (arXiv 2605.07394): a captioner trained on precision, recall and language at once.

    Args:
        policy: the captioner: weights, adapter, what is frozen.
        rewards: the K rewards; each is a metric with a name.
        weights: reward name -> weight (α, β, γ of the paper). A reward that is left out weighs 0: it is
            judged and logged, not trained.
        judge: who answers the questions that rewards are made of; null where no reward needs one.
        engine: samples captions; null uses HF ``generate`` on the policy itself.
        supervised: learn the references by cross-entropy instead (SFT): training samples nothing and asks no judge,
            validation does. Rewards, advantages, `num_captions` and `lag` do not matter to training then.
        num_captions: G, captions per image and step; at least 2.
        sampling: temperature, top-p and longest caption.
        reward_transforms: change rewards before the advantage, in this order; null for the paper's length mask,
            an empty list for none.
        advantage: the estimator; null for c-GDPO, which normalises each reward in its group, then weights.
        advantage_transforms: change advantages after the estimator, in this order; null for none.
        lag: 0 updates on the captions that it has just sampled; 1 on those of the step before, so that judging
            goes on while the device works. They are then one update old.
        val_captions: captions per image in validation.
        predict_temperature: of the captions of ``predict``, at least 0; 0 takes the likeliest tokens.
        optimizer: over the trainable parameters.
        scheduler: of the learning rate, stepped after each optimizer step; null keeps it constant.
        seed: captions of step n on rank r are drawn from (seed, n, r), so that a resumed run draws the same.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: list[Reward],
        weights: dict[str, float],
        judge: Judge | None = None,
        engine: RolloutEngine | None = None,
        supervised: bool = False,
        num_captions: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        reward_transforms: list[RewardTransform] | None = None,
        advantage: AdvantageEstimator | None = None,
        advantage_transforms: list[AdvantageTransform] | None = None,
        lag: Literal[0, 1] = 0,
        val_captions: int = 1,
        predict_temperature: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        **update: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds what is trained, not the frozen rest
        self.advantage, self.advantage_transforms = advantage or CGDPO(), advantage_transforms or []
        self.policy_config, self.judge = policy, judge
        estimates = not supervised  # else nothing needs the words of assertions, in validation either
        self.rewards = RewardSuite(
            rewards, estimates and self.advantage.needs_spans, estimates and self.advantage.needs_coverage
        )
        self.weights, self.num_captions, self.val_captions = weights, num_captions, val_captions
        self.supervised = supervised
        self.predict_temperature = predict_temperature
        self.update_settings = UpdateSettings(**update)
        self.reward_transforms = [LengthMask()] if reward_transforms is None else reward_transforms
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.pipeline = RolloutPipeline(self.rewards, judge, engine, sampling, lag, seed)
        self.val_rewards = copy.deepcopy(self.rewards)
        self.val_means = MetricCollection(
            {name: MeanMetric(nan_strategy="ignore") for name in _VAL_MEANS}, compute_groups=False
        )
        self.loop: OptimizerLoop | None = None
        self._skipped = 0  # updates of the run that is continued
        self._logged: dict[str, float] = {}  # the latest step's, for a checkpoint: loggers get them after it
        self._loaded_step = self._rewards_missing = self._rewards_seen = 0
        self._val_failures: Counter[str] = Counter()
        self._val_reasons: list[str] = []
        self._val_captions: list[str] = []
        self._optimizer_settings: dict[str, Any] = {}
        self._resumed_settings: dict[str, Any] | None = None

    def configure_model(self) -> None:
        """Load the weights: here, so that nothing heavy happens before the settings are checked."""
        if hasattr(self, "policy"):
            return
        from balcap.policy.families.base import num_weights
        from balcap.policy.policy import Policy
        from balcap.trainer.sharded import sharding_of

        trains = self._trainer is None or self._trainer.state.fn == "fit"
        compared = trains and self.update_settings.kl_coef > 0
        self.policy = Policy.load(self.policy_config, compared, sharding_of(self._trainer))
        if self._trainer is not None:
            self.pipeline.attach(self._trainer, self.policy)
            if self.policy.is_sharded and self._trainer.ckpt_path:
                check_resumable(self._trainer.ckpt_path, self, fits=self._trainer.state.fn == "fit")
        trained, there = (
            sum(num_weights(p) for p in self.policy.model.parameters() if p.requires_grad or frozen)
            for frozen in (False, True)
        )
        rank_zero_info(
            f"policy: {self.policy_config.model}, {there / 1e6:,.1f} M weights, {trained / 1e6:,.1f} M trained"
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory([p for p in self.policy.parameters() if p.requires_grad])
        scheduler = None if self.scheduler_factory is None else self.scheduler_factory(optimizer)
        self._optimizer_settings = optimizer_settings(optimizer, scheduler)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def setup(self, stage: str) -> None:
        names = ", ".join(self.rewards.names)
        method = "supervised, on the references" if self.supervised else type(self.advantage).__name__
        judge = self.judge and self.judge.settings
        if self.judge is not None and self._trainer is not None:
            self.judge.share(self.trainer.world_size, self.trainer.num_nodes)
        rank_zero_info(f"judge: {judge and judge.model}; rewards: {names}; {method}")
        if judge and judge.cache is not None and stage != "predict":
            answers, size = describe(judge.cache)
            rank_zero_info(f"judge cache: {judge.cache}, {answers:,} answers, {size / 1e6:,.1f} MB")
        if judge and stage != "predict":
            for line in judge.endings("take --config configs/judge/gpt-6-luna.yaml instead, for a whole run"):
                rank_zero_info(line)
        if stage == "fit":
            self._check_val_interval()

    def _check_val_interval(self) -> None:
        """Lightning would say it after the weights are loaded.

        Raises:
            UserError: it is beyond the epoch, whose length is known once the data are there.
        """
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        interval = trainer.val_check_interval
        if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or data is None:
            return
        batches = len(data.train_dataloader())
        if isinstance(trainer.limit_train_batches, int):
            batches = min(batches, trainer.limit_train_batches)
        if interval > batches:
            raise UserError(
                f"trainer.val_check_interval: an epoch has {batches} batches, fewer than {interval}; lower it, or set "
                "trainer.check_val_every_n_epoch: null, and it counts batches of the whole run"
            )

    def on_train_start(self) -> None:
        """The state of the optimizer has been loaded by now, with the settings that it had then."""
        if self.judge is not None and self.trainer.world_size > 1:
            self.judge.open()  # to know what was spent before
            metrics.judge_costs(self.trainer, self.pipeline)
        then, self._resumed_settings = self._resumed_settings, None
        if then is not None:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            if changes := apply_settings(optimizer, self._optimizer_settings, then):
                rank_zero_info(f"model.optimizer: from here on {', '.join(changes)}")

    # ── training ─────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> dict[str, list[StepRecord]]:
        """One step of BalCapRL: sample, judge, mask by length, advantage, update, log.

        With a lag the update is on the batch of the step before. The first step has none then; the last one
        samples nothing.
        """
        if self.supervised:
            self._supervised_step(batch)
            return {"records": []}
        pipeline, names = self.pipeline, self.rewards.names
        pipeline.timeline.begin()
        before = pipeline.judge_stats()
        sampled = pipeline.start_rollout(batch, self.num_captions, self.update_settings.updates_per_rollout)
        ready, records = pipeline.ready(sampled), []
        for in_flight in ready:
            rollouts = in_flight.rollouts
            judgments = pipeline.judgments(in_flight)
            rewards = self.rewards(rollouts, judgments).cpu()  # [B, G, K]; lengths and masks are there too
            shaped = self.transform_rewards(rewards, rollouts)  # the length mask
            spans = self.spans(rollouts, judgments)  # None unless the estimator needs them
            advantages = self.advantages(shaped, rollouts, spans)  # [B, G], or [B, G, T]
            staleness = self.global_step - rollouts.weights_version
            tally = self._update(in_flight, advantages)
            tally.add("staleness", staleness, 1)
            if spans is not None:
                tally.add_values("assertions_located", spans.located())
            pipeline.sync()
            self._log_step(tally, rollouts, judgments, rewards, before, last=in_flight is ready[-1])
            records.append(
                StepRecord(rollouts, judgments, names, rewards, shaped, advantages, pipeline.learned)
            )
            pipeline.learned_from(in_flight)
            before = pipeline.judge_stats()
        return {"records": records}

    def _supervised_step(self, batch: CaptionBatch) -> None:
        """One step of supervised fine-tuning: references, cross-entropy, update, log."""
        pipeline = self.pipeline
        pipeline.timeline.begin()
        in_flight = pipeline.take_references(batch)
        references = in_flight.rollouts
        with pipeline.timeline.span("update"), pipeline.seeded(TRAIN, self.global_step):
            tally = supervised_update(
                self.policy, self.update_settings, references, in_flight.prompts, self._optimizer_loop()
            )
        tally.add_values("caption_tokens", references.lengths.double())
        tally.add_values("truncated", references.truncated.double())
        nothing = Judgments({}, [None] * len(references))
        self._log_tally(tally, references, nothing, pipeline.judge_stats(), last=True)
        pipeline.learned_from(in_flight)

    def transform_rewards(self, rewards: Tensor, rollouts: Rollouts) -> Tensor:
        """``[B, G, K]`` after `reward_transforms`."""
        for transform in self.reward_transforms:
            rewards = transform.transform(rewards, self.rewards.names, rollouts)
        return rewards

    def spans(self, rollouts: Rollouts, judgments: Judgments) -> AssertionSpans | None:
        """Which tokens each assertion comes from, where the estimator gives advantages by them."""
        if not self.advantage.needs_spans:
            return None
        return assertion_spans(self.rewards, rollouts, judgments, self.policy.encoder.tokenizer)

    def advantages(self, rewards: Tensor, rollouts: Rollouts, spans: AssertionSpans | None = None) -> Tensor:
        """``[B, G]``, or ``[B, G, T]`` where the estimator or a transform gives one per token; statistics are over all
        ranks."""
        names = self.rewards.names
        weights = torch.tensor([self.weights.get(name, 0.0) for name in names])
        if spans is None:
            advantages = self.advantage.advantages(rewards, weights, self.gather)
        else:
            advantages = self.advantage.token_advantages(rewards, weights, spans, self.gather)
        for transform in self.advantage_transforms:
            advantages = transform.transform(advantages, rewards, names, rollouts)
        return advantages

    def _update(self, in_flight: InFlightBatch, advantages: Tensor) -> Tally:
        pipeline = self.pipeline
        with pipeline.timeline.span("update"), pipeline.seeded(TRAIN, self.global_step):
            return update(
                self.policy,
                self.update_settings,
                in_flight.rollouts,
                in_flight.prompts,
                advantages,
                self._optimizer_loop(),
                pipeline.sampling.temperature,
                pipeline.needs_importance_correction,
            )

    def _optimizer_loop(self) -> OptimizerLoop:
        self.loop = self.loop or OptimizerLoop.of(self, self.gather, self._skipped)
        return self.loop

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, with a leading rank dimension where there is more than one."""
        return gather(self.trainer, tensor)

    # ── validation and prediction ────────────────────────────────────────────────────────────────────

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> dict[str, list[StepRecord]]:
        """Rewards of `val_captions` sampled captions per held-out image; the same draw at every validation."""
        rollouts = self.pipeline.sample(batch, self.val_captions, VALIDATE, batch_idx)
        judgments = self.pipeline.judge_now(rollouts)
        self._val_failures += judgments.failures
        self._val_reasons += judgments.reasons
        self._val_captions += [caption for group in rollouts.captions for caption in group]
        rewards = self.val_rewards(rollouts, judgments).cpu()
        for name, values in metrics.caption_scores(
            rollouts, self.rewards.names, rewards, self.reward_transforms
        ).items():
            self.val_means[name].update(values.float())
        return {
            "records": [
                StepRecord(rollouts, judgments, self.rewards.names, rewards, rewards, number=batch_idx)
            ]
        }

    def on_train_epoch_start(self) -> None:
        for name in self.rewards.names:
            self.rewards[name].reset()

    def on_validation_epoch_start(self) -> None:
        for metric in (*self.val_rewards.rewards, *self.val_means.values()):
            metric.reset()
        self._val_failures, self._val_reasons, self._val_captions = Counter(), [], []

    def on_validation_epoch_end(self) -> None:
        values = {name: self.val_rewards[name].compute() for name in self.rewards.names}
        values |= {name: metric.compute() for name, metric in self.val_means.items() if metric.update_called}
        captions = [text for of_rank in gather_objects(self.trainer, self._val_captions) for text in of_rank]
        logged = {f"val/{name}": float(value) for name, value in values.items()}
        logged |= {f"val/{name}": value for name, value in text_statistics(captions).items()}
        (logged["val/judge_failed"],) = sums(self.trainer, [float(self._val_failures.total())])
        where = f"validation at step {self.weights_step}"
        warn_of_missing(self._val_failures, self._val_reasons, len(self._val_captions), where)
        logged |= metrics.judge_costs(self.trainer, self.pipeline)
        log_metrics(self, logged, self.weights_step, prog_bar=True)

    def test_step(self, run: BenchmarkRun, batch_idx: int) -> None:
        """One benchmark; its result is in `benchmark_results`."""
        self.benchmark_results.append(run.run(self.trainer, self.pipeline, TEST))

    def on_test_start(self) -> None:
        self.benchmark_results: list[Result] = []

    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One caption per image."""
        rollouts = self.pipeline.sample(batch, 1, PREDICT, batch_idx, self.predict_temperature)
        batch, cut = rollouts.batch, rollouts.truncated[:, 0].tolist()
        rows = zip(batch.sample_ids, batch.prompts, rollouts.captions, cut, strict=True)
        return [
            {"image": sample_id, "prompt": prompt, "caption": captions[0], "truncated": truncated}
            for sample_id, prompt, captions, truncated in rows
        ]

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
        metrics.reward_metrics(tally, self.rewards.names, rewards)
        for name, values in metrics.caption_scores(
            rollouts, self.rewards.names, rewards, self.reward_transforms
        ).items():
            tally.add_values(name, values)
        self._log_tally(tally, rollouts, judgments, before, last)
        self._rewards_missing += int(rewards.isnan().sum())
        self._rewards_seen += rewards.numel()
        captions = rollouts.truncated.numel()
        warn_of_missing(judgments.failures, judgments.reasons, captions, f"step {self.global_step}")

    def _log_tally(
        self, tally: Tally, rollouts: Rollouts, judgments: Judgments, before: JudgeStats, last: bool
    ) -> None:
        loop = self._optimizer_loop()
        logged = metrics.step_metrics(self.trainer, self.pipeline, loop, tally, rollouts, judgments, before)
        log_metrics(self, logged, self.weights_step, last, batch_size=len(rollouts))
        if self.weights_step % max(1, self.trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._logged = logged | {"step": self.weights_step, "epoch": self.current_epoch}

    @property
    def missing_share(self) -> float:
        """Share of the rewards of this fit, in [0, 1], that are missing because their judgments are; of this rank."""
        return self._rewards_missing / max(1, self._rewards_seen)

    @property
    def weights_step(self) -> int:
        """Optimizer steps behind the weights, also where another run has made them."""
        return self.global_step if self.trainer.state.fn == "fit" else self._loaded_step

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Only what is trained: the frozen rest is in the base model, where it came from."""
        trained = trained_names(self)
        return {
            name: value for name, value in super().state_dict(*args, **options).items() if name in trained
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside weights, the optimizer and the loops, which Lightning saves."""
        name_optimizer_state(checkpoint, self, self.trainer.optimizers[0])
        skipped = self._skipped if self.loop is None else self.loop.skipped
        checkpoint["balcap"] = {
            "skipped_total": skipped,
            "logged": self._logged,
            "optimizer": self._optimizer_settings,
            **self.pipeline.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()
        if not self.policy.is_sharded:  # else the weights are loaded by now, and were checked before
            check_trained(checkpoint, self)
        own, self._loaded_step = checkpoint.get("balcap", {}), checkpoint["global_step"]
        self._skipped, self._resumed_settings = own.get("skipped_total", 0), own.get("optimizer")
        self.pipeline.load_state_dict(own)

    def teardown(self, stage: str) -> None:
        self.pipeline.close()
        if self.loop is not None:  # another fit has another optimizer
            self._skipped, self.loop = self.loop.skipped, None

"""An estimate: rows are sampled, judged in a dry run, and multiplied by what the run judges."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from balcap.commands.estimate_dry_run import (
    NOTHING,
    FakeClient,
    Plan,
    Usage,
    dry_run,
    limited,
    ranks_of,
    share_text,
    stand_ins,
    training_batches,
    validations,
)
from balcap.commands.estimate_tokens import image_tokens, place_of, reasoning_tokens, rule_for, text_counter
from balcap.data import CaptionDataModule
from balcap.data.reader import to_batch
from balcap.judge import Decompose, JudgeSettings, Task, Verify
from balcap.judge.settings import price_of
from balcap.module import BalCapModule
from balcap.policy.policy import Policy
from balcap.rollout.hf import HFGenerate
from balcap.types import CaptionBatch

TOKENS_PER_WORD = 1.3
"""Of English."""

_IMAGES_AT_ONCE = 16


@dataclass
class Estimate:
    """What a run's judging uses.

    Attributes:
        settings: of the judge.
        plan: the run.
        rollouts: captions that are judged, validation included.
        train, val: what the whole run would use for training, or for validation, if all of its images were like
            this row; for each sampled row.
        assumptions: text; and the flag or key that changes it, "" for none.
    """

    settings: JudgeSettings
    plan: Plan
    rollouts: int
    train: list[Usage] = field(default_factory=list)
    val: list[Usage] = field(default_factory=list)
    assumptions: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def used(self) -> Usage:
        """Training and validation together."""
        train, val = mean(self.train), mean(self.val)
        return {
            key: train.get(key, NOTHING) + val.get(key, NOTHING) for key in sorted(train | val, key=_order)
        }

    def figures(self, used: Usage) -> np.ndarray:
        """Calls, tokens in, tokens out, dollars; NaN dollars if a price is unknown."""
        total = np.zeros(4)
        for (_, model), (calls, tokens_in, tokens_out) in used.items():
            prices, place = self.settings.prices or {}, place_of(self.settings, model)
            price = prices.get(model) or price_of(self.settings, place)
            usd = np.nan if price is None else price.usd(tokens_in, tokens_out, 0)
            total += (calls, tokens_in, tokens_out, usd)
        return total

    def uncertainty(self) -> np.ndarray:
        """Two standard errors of `figures` of the whole run: what a larger sample would make smaller."""
        variance = np.zeros(4)
        for rows, population in ((self.train, self.plan.train_rows), (self.val, self.plan.val_images)):
            if len(rows) > 1:
                left_out = max(0.0, 1 - len(rows) / population)
                spread = np.var([self.figures(row) for row in rows], axis=0, ddof=1)
                variance += 4 * spread * left_out / len(rows)
        return np.sqrt(variance)

    @property
    def unpriced(self) -> list[str]:
        """Models without a price."""
        return sorted({key[1] for key, row in self.used.items() if np.isnan(self.figures({key: row})[3])})

    def budget_step(self) -> int | None:
        """The step at which the budget is spent; None if it lasts, or nobody can tell."""
        budget, usd = self.settings.budget_usd, self.figures(self.used)[3]
        return int(self.plan.batches * budget / usd) if budget is not None and usd > budget else None

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; dollars are null where a price is unknown."""

        def plain(figures: np.ndarray) -> dict[str, float | None]:
            calls, tokens_in, tokens_out, usd = (
                None if np.isnan(value) else float(value) for value in figures
            )
            return {"calls": calls, "tokens_in": tokens_in, "tokens_out": tokens_out, "usd": usd}

        total, plan = self.figures(self.used), self.plan
        return {
            "tasks": [
                {"task": key[0], "model": key[1], **plain(self.figures({key: row}))}
                for key, row in self.used.items()
            ],
            "total": plain(total),
            "uncertainty": plain(self.uncertainty()),
            "validation": plain(self.figures(mean(self.val))),
            "usd_per_1k_rollouts": plain(total * 1000 / max(1, self.rollouts))["usd"],
            "rollouts": self.rollouts,
            **vars(plan),
            "budget_usd": self.settings.budget_usd,
            "budget_spent_at_step": self.budget_step(),
            "unpriced_models": self.unpriced,
            "assumptions": [{"text": text, "change": change} for text, change in self.assumptions],
        }

    def show(self, console: Console) -> None:
        """Table, totals and assumptions."""
        table = Table(
            "task", "judge", title="What this run's judge will be asked (estimate, nothing was paid)"
        )
        for name in ("calls", "tokens in", "tokens out", "$"):
            table.add_column(name, justify="right")
        for key, row in self.used.items():
            table.add_row(*key, *_shown(self.figures({key: row})))
        table.add_section()
        table.add_row("total", "", *_shown(self.figures(self.used)), style="bold")
        console.print(table)
        for line in self._lines():
            console.print(line, markup=False)
        console.print("\nAssumed:")
        for text, change in self.assumptions:
            console.print(f"  - {text}" + (f"  [{change}]" if change else ""), markup=False)

    def _lines(self) -> list[str]:
        plan, total, width = self.plan, self.figures(self.used), self.uncertainty()
        low, high = _shown(total - width), _shown(total + width)
        names = ("calls", "tokens in", "tokens out", "dollars")
        spread = "; ".join(f"{name} {a} to {b}" for name, a, b in zip(names, low, high, strict=True))
        val = _shown(self.figures(mean(self.val)))
        lines = [
            f"{plan.batches:,} steps x {plan.images_per_batch:,} images, {len(plan.validations)} validations x "
            f"{plan.val_images:,} images: {self.rollouts:,} rollouts to judge",
            f"If all that is assumed holds, by the spread of the sampled rows (95 %): {spread}",
            f"Of this, validation: {val[0]} calls, {val[3]}",
            f"$ per 1,000 rollouts: {_shown(total * 1000 / max(1, self.rollouts))[3]}",
        ]
        lines += [
            f"The price of {model} is unknown: set it, per million tokens, with "
            f"--model.judge.prices '{{{model}: {{input: ..., output: ...}}}}'"
            for model in self.unpriced
        ]
        if self.settings.budget_usd is not None and not self.unpriced:
            step, budget = self.budget_step(), f"model.judge.budget_usd={self.settings.budget_usd:g}"
            ends = f"is spent at about step {step} of {plan.batches:,}: the run would end there"
            lines.append(f"{budget} {'lasts for the whole run' if step is None else ends}")
        return lines


def mean(rows: Sequence[Usage]) -> Usage:
    """The mean over rows, some of which may lack a key."""
    keys = {key for row in rows for key in row}
    return {key: np.mean([row.get(key, NOTHING) for row in rows], axis=0) for key in keys}


def _order(key: tuple[str, str]) -> tuple[int, tuple[str, str]]:
    order = ("decompose", "verify", "match", "rate")
    return (order.index(key[0]) if key[0] in order else len(order), key)


def _shown(figures: np.ndarray) -> list[str]:
    usd = figures[3]
    dollars = "unknown" if np.isnan(usd) else f"${usd:,.{2 if usd >= 1 or usd == 0 else 4}f}"
    return [*(f"{value:,.0f}" for value in figures[:3]), dollars]


# ---- making one


def make_estimate(
    trainer: Trainer,
    module: BalCapModule,
    data: CaptionDataModule,
    launch: Any,
    options: SimpleNamespace,
    ckpt_path: str | None,
) -> Estimate:
    """What the run's judge would be asked; calls nobody and writes nothing that stays.

    Args:
        launch: settings of the trainer of the run: devices, num_nodes, accelerator, max_time.
        options: the flags of the command, see `balcap.commands.estimate.BalCapTrainer.estimate`.

    Raises:
        DataError: if the rows cannot be used.
    """
    notes: list[tuple[str, str]] = []
    assert module.judge is not None
    plan = make_plan(trainer, module, data, _ranks(launch, options, notes))
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        notes.append(("validations by the clock are not counted, only the first and the last", ""))
    if launch.max_time is not None:
        notes.append((f"trainer.max_time={launch.max_time} does not end the run before its last step", ""))
    if ckpt_path is not None:
        notes.append(("the whole run is counted, also what it has paid for before ckpt_path", ""))
    with tempfile.TemporaryDirectory() as scratch:
        data.settings = replace(data.settings, run_dir=scratch)  # bad rows are listed there
        train = read_rows(data, data.split.train, options.rows) if plan.batches else None
        val = read_rows(data, data.split.val, options.rows) if plan.validations else None
    parts = (
        (train, module.num_captions, plan.visits()),
        (val, module.val_captions, plan.val_visits()),
    )
    rollouts = sum(captions * sum(visits) for _, captions, visits in parts)
    estimate = Estimate(module.judge.settings, plan, rollouts, assumptions=notes)
    notes.append(
        (f"{options.rows} images of training and validation each, at random, stand for all", "--rows")
    )
    client = _client(module, train, options, notes)
    for (rows, captions, visits), used in zip(parts, (estimate.train, estimate.val), strict=True):
        if rows is not None:
            texts = _captions(module, rows, captions * (2 if visits[1] else 1), options)
            used += dry_run(client, module.rewards, rows, texts, visits)
    _note_captions(module, options, notes)
    _note_judge(module.judge.settings, client, notes)
    return estimate


def _ranks(launch: Any, options: SimpleNamespace, notes: list[tuple[str, str]]) -> int:
    gpus = torch.cuda.device_count()
    ranks, sure = ranks_of(launch.devices, launch.num_nodes, str(launch.accelerator), gpus)
    how = f"trainer.devices={launch.devices}, num_nodes={launch.num_nodes}"
    how += "" if sure else f"; {gpus} GPUs are seen here, which may not be where the run will be"
    if options.ranks is not None:
        ranks, how = options.ranks, "as given"
    notes.append((f"{ranks} process{'es' if ranks > 1 else ''} ({how})", "--ranks"))
    return ranks


def make_plan(trainer: Trainer, module: BalCapModule, data: CaptionDataModule, ranks: int) -> Plan:
    """The images that a run on `ranks` processes judges. Reads the table of rows."""
    settings, split = data.settings, data.split
    per_batch, val_per_batch = settings.batch_size * ranks, settings.eval_batch_size * ranks
    per_epoch = limited(max(1, len(split.train) // per_batch), trainer.limit_train_batches)
    batches = training_batches(
        per_epoch, trainer.max_steps, trainer.max_epochs, module.update_settings.updates_per_rollout
    )
    val_batches = limited(-(-len(split.val) // val_per_batch), trainer.limit_val_batches)
    val_images = min(len(split.val), val_batches * val_per_batch)
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    interval = None if timed else trainer.val_check_interval
    due = validations(batches, per_epoch, interval, trainer.check_val_every_n_epoch)
    causes = data.table.column("problem")
    good_rows = sum(not causes[int(row)] for row in split.train)
    return Plan(batches, per_batch, good_rows, due if val_images else (), val_images)


def read_rows(data: CaptionDataModule, rows: np.ndarray, count: int) -> CaptionBatch | None:
    """`count` good rows of these, drawn at random."""
    reader, samples = data.reader(data.table, data.root), []
    for row in np.random.default_rng(data.settings.seed).permutation(rows):
        if (sample := reader.read(int(row))) is not None:
            samples.append(sample)
        if len(samples) == count:
            break
    return to_batch(samples) if samples else None


def _captions(
    module: BalCapModule, rows: CaptionBatch, count: int, options: SimpleNamespace
) -> Sequence[Sequence[str]]:
    """`count` captions of each row: the policy's own, or stand-ins."""
    references = rows.references
    if options.sample_policy:
        captions = sample_policy(module, rows, count)
    else:
        most = max(1, int(module.pipeline.sampling.max_tokens / TOKENS_PER_WORD))
        captions = [stand_ins(references, row, count, most) for row in range(len(rows))]
    beginnings = [texts[0] for texts in captions] if options.sample_policy else references
    return [share_text(*group, options.overlap) for group in zip(captions, beginnings, strict=True)]


def sample_policy(module: BalCapModule, rows: CaptionBatch, count: int) -> list[Sequence[str]]:
    """Load the policy, unless it is there, and sample `count` captions of each row with HF; costs no money."""
    if not hasattr(module, "policy"):
        module.policy = Policy.load(module.policy_config, with_reference=False)
        module.policy.to("cuda" if torch.cuda.is_available() else "cpu")
    # an estimate starts no vLLM, and sends a server no weights
    engine = own if isinstance(own := module.pipeline.engine, HFGenerate) else HFGenerate(max_sequences=64)
    engine.attach(module.policy)
    captions: list[Sequence[str]] = []
    with torch.random.fork_rng():
        torch.manual_seed(module.pipeline.seed)
        for start in range(0, len(rows), _IMAGES_AT_ONCE):
            batch = rows.select(list(range(start, min(start + _IMAGES_AT_ONCE, len(rows)))))
            captions += engine.generate(
                batch, module.policy.encode(batch), count, module.pipeline.sampling
            ).captions
    return captions


def _client(
    module: BalCapModule, rows: CaptionBatch | None, options: SimpleNamespace, notes: list[tuple[str, str]]
) -> FakeClient:
    """What answers, and how it counts."""
    assert module.judge is not None
    settings = module.judge.settings
    text, what = text_counter(options.chars_per_token)
    # Whoever counts characters counts as some server does, which sees no schema.
    schema = options.chars_per_token is None
    what += ", schemas of answers included where they are billed" if schema else ""
    notes.append((f"tokens: {what}", "--chars_per_token"))
    asked: set[type[Task[Any]]] = {Decompose, *module.rewards.needs}
    for task in sorted(asked, key=lambda task: task.name):
        route = settings.routes(task.name)[0]
        if issubclass(task, Verify) and rows is not None and options.image_tokens is None:
            tokens = fmean(image_tokens(settings, route.model, image) for image in rows.image_bytes)
            rule = rule_for(place_of(settings, route.model)).family
            notes.append((f"an image is {tokens:,.0f} tokens of {route.model} ({rule})", "--image_tokens"))
        reasoning = options.reasoning_tokens
        reasoning = reasoning_tokens(route.model, route.params) if reasoning is None else reasoning
        note = (f"{route.model} reasons for {reasoning:,} tokens per call", "--reasoning_tokens")
        if reasoning and note not in notes:
            notes.append(note)
    counting = (options.image_tokens, options.reasoning_tokens, options.words_per_assertion)
    return FakeClient(settings, text, schema, *counting)


def _note_captions(module: BalCapModule, options: SimpleNamespace, notes: list[tuple[str, str]]) -> None:
    text = f"{options.words_per_assertion:g} words of a caption make an assertion"
    notes.append((text, "--words_per_assertion"))
    text = f"captions of an image have {options.overlap:.0%} of what they say in common"
    notes.append((text, "--overlap"))
    if options.sample_policy:
        notes.append(("captions stay as the policy writes them now, before training", ""))
    else:
        text = f"captions are as long as the references, at most {module.pipeline.sampling.max_tokens} tokens"
        notes.append((text, "--sample_policy true"))


def _note_judge(settings: JudgeSettings, client: FakeClient, notes: list[tuple[str, str]]) -> None:
    notes.append(("every call succeeds at once, and nobody falls back to another judge", ""))
    notes.append(("no discount for prompts that begin like an earlier one (prefix caches)", ""))
    if len(places := settings.deployments or []) > 1:
        notes.append((f"all deployments cost what {places[0].model} costs", "--model.judge.prices"))
    holds = "keeps no answers" if settings.cache is None else "holds nothing of these images yet"
    notes.append((f"model.judge.cache {holds}", "--model.judge.cache"))
    for task in sorted(client.unknown):
        notes.append((f"answers of {task} are short, and nothing else is asked because of them", ""))

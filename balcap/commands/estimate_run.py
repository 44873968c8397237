"""An estimate: rows are sampled, judged in a dry run, and multiplied by what the run judges."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from balcap.commands.estimate_assumptions import Assumptions
from balcap.commands.estimate_dry_run import FakeClient, Usage, dry_run, stand_ins
from balcap.commands.estimate_plan import Plan, make_plan, ranks_of
from balcap.commands.estimate_tokens import text_counter
from balcap.data import CaptionDataModule
from balcap.data.reader import Sample, to_batch
from balcap.judge import JudgeSettings
from balcap.module import BalCapModule
from balcap.types import CaptionBatch

TOKENS_PER_WORD = 1.3
"""Of English."""

_ALWAYS_ASSUMED = (
    ("every call succeeds at once, and all deployments cost what the first costs", "--model.judge.prices"),
    ("model.judge.cache, if there is one, holds nothing of these images yet", "--model.judge.cache"),
    ("no discount for prompts that begin like an earlier one (prefix caches)", ""),
    ("the run goes to its last step, whatever trainer.max_time, and begins anew, whatever ckpt_path", ""),
    ("where validations come by the clock, only the first and the last count", ""),
)


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
        """Training and validation together: the mean over the rows of each."""
        used = Usage()
        for rows in (self.train, self.val):
            for row in rows:
                used.add(row, 1 / len(rows))
        return used

    def uncertainty(self) -> np.ndarray:
        """Two standard errors of the total of `used`: what a larger sample would make smaller."""
        variance = np.zeros(4)
        for rows, population in ((self.train, self.plan.train_rows), (self.val, self.plan.val_images)):
            if len(rows) > 1:
                left_out = max(0.0, 1 - len(rows) / population)
                variance += 4 * np.var([row.total for row in rows], axis=0, ddof=1) * left_out / len(rows)
        return np.sqrt(variance)

    def show(self, console: Console) -> None:
        """Table, totals and assumptions."""
        table = Table(
            "task", "judge", title="What this run's judge will be asked (estimate, nothing was paid)"
        )
        for name in ("calls", "tokens in", "tokens out", "dollars"):
            table.add_column(name, justify="right")
        for key, row in sorted(self.used.items()):
            table.add_row(*key, *_shown(row))
        table.add_section()
        table.add_row("total", "", *_shown(self.used.total), style="bold")
        table.add_row("± (95 %)", "by the spread of the rows", *_shown(self.uncertainty()))
        console.print(table)
        for line in self._lines():
            console.print(line, markup=False)
        console.print("\nAssumed:")
        for text, change in self.assumptions:
            console.print(f"  - {text}" + (f"  [{change}]" if change else ""), markup=False)

    def _lines(self) -> Iterator[str]:
        plan, total, budget = self.plan, self.used.total, self.settings.budget_usd
        yield (
            f"{plan.batches:,} steps x {plan.images_per_batch:,} images, {len(plan.validations)} validations x "
            f"{plan.val_images:,} images: {self.rollouts:,} rollouts to judge"
        )
        yield f"$ per 1,000 rollouts: {_shown(total * 1000 / max(1, self.rollouts))[3]}"
        for model in sorted({model for (_, model), row in self.used.items() if np.isnan(row[3])}):
            yield (
                f"The price of {model} is unknown: set it, per million tokens, with "
                f"--model.judge.prices '{{{model}: {{input: ..., output: ...}}}}'"
            )
        if budget is not None and not np.isnan(total[3]):
            step = int(plan.batches * budget / max(total[3], budget))
            spent = f"is spent at about step {step} of {plan.batches:,}: the run would end there"
            fate = spent if step < plan.batches else "lasts for the whole run"
            yield f"model.judge.budget_usd={budget:g} {fate}"


def _shown(figures: np.ndarray) -> list[str]:
    usd = figures[3]
    dollars = "unknown" if np.isnan(usd) else f"${usd:,.{2 if usd >= 1 or usd == 0 else 4}f}"
    return [*(f"{value:,.0f}" for value in figures[:3]), dollars]


# ---- making one


def make_estimate(
    trainer: Trainer, module: BalCapModule, data: CaptionDataModule, launch: Any, assume: Assumptions
) -> Estimate:
    """What the run's judge would be asked; calls nobody and writes nothing that stays.

    Args:
        launch: settings of the trainer of the run: devices, num_nodes, accelerator.

    Raises:
        DataError: if the rows cannot be used.
        ValueError: if a task has no example.
    """
    assert module.judge is not None
    ranks = ranks_of(launch.devices, launch.num_nodes, str(launch.accelerator), torch.cuda.device_count())
    plan = make_plan(trainer, data, assume.ranks or ranks, module.update_settings.updates_per_rollout)
    visits = (0, 0) if module.supervised else plan.visits()  # of references the judge is asked nothing
    train = data.split.train, module.num_captions, visits
    val = data.split.val, module.val_captions, plan.val_visits()
    rollouts = sum(captions * sum(visits) for _, captions, visits in (train, val))
    estimate = Estimate(module.judge.settings, plan, rollouts)
    client = FakeClient(module.judge.settings, text_counter(assume.chars_per_token), assume)
    for (row_numbers, count, visits), used in ((train, estimate.train), (val, estimate.val)):
        if sum(visits) and (rows := read_rows(data, row_numbers, assume.rows)) is not None:
            captions = _captions(rows, 2 * count, module.pipeline.sampling.max_tokens, assume)
            used += dry_run(client, module.rewards, rows, captions, visits)
    where_null = _where_null(module, launch, ranks, client)
    estimate.assumptions += [*assume.report(where_null), *_ALWAYS_ASSUMED]
    return estimate


def read_rows(data: CaptionDataModule, rows: np.ndarray, count: int) -> CaptionBatch | None:
    """`count` good rows of these, drawn at random; None if there is none. Says how many bad ones it met."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as scratch:
        data.settings = replace(data.settings, run_dir=scratch)  # bad rows are listed there
        reader = data.reader(data.table, data.root)
        for row in np.random.default_rng(data.settings.seed).permutation(rows):
            if len(samples) < count and (sample := reader.read(int(row))) is not None:
                samples.append(sample)
        if bad := reader.bad_rows.counts():
            causes = ", ".join(f"{cause} {n}" for cause, n in bad.items())
            print(
                f"data: {len(samples)} good rows, and {sum(bad.values())} bad ones ({causes}), the first: "
                f"{reader.bad_rows.first()}; a fit lists them in bad_rows.jsonl",
                file=sys.stderr,
                flush=True,
            )
    return to_batch(samples) if samples else None


def _captions(rows: CaptionBatch, count: int, max_tokens: int, assume: Assumptions) -> list[list[str]]:
    """`count` stand-ins for the captions of each row; as long as others' are where it has no reference.

    Raises:
        ValueError: no row has a reference.
    """
    most, captions = max(1, int(max_tokens / TOKENS_PER_WORD)), []
    words = [len(reference.split()) for reference in rows.references]
    if not any(words):
        raise ValueError(
            "data.data: no row that was drawn has a caption, whose words stand for the policy's; estimate on rows with "
            "captions of the kind that is to be learned"
        )
    usual = round(fmean(filter(None, words)))
    for row, length in enumerate(words):
        length = assume.caption_words or min(most, length or usual)
        captions.append(stand_ins(rows.references, row, count, length, assume.overlap))
    return captions


def _where_null(module: BalCapModule, launch: Any, ranks: int, client: FakeClient) -> dict[str, str]:
    """What `Assumptions` that are null are in this run, in words."""
    devices = f"trainer.devices={launch.devices}, num_nodes={launch.num_nodes}"
    images = (f"{fmean(tokens):,.0f} ({model})" for model, tokens in client.images.items() if tokens)
    reasoning = (f"{tokens:,} ({model})" for model, tokens in client.reasoning.items())
    return {
        "ranks": f"{ranks} ({devices}, {torch.cuda.device_count()} GPUs seen here)",
        "caption_words": f"those of its reference, at most {module.pipeline.sampling.max_tokens} tokens",
        "chars_per_token": "as OpenAI's cl100k_base has it, within some percent of others; schemas of answers count",
        "image_tokens": f"{', '.join(images)}; pixels / 750 where a model has no published rule",
        "reasoning_tokens": ", ".join(reasoning),
    }

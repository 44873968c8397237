"""``python main.py estimate``: what a run's judge will cost, before anything is paid.

Takes the configs and flags of ``fit``. Sampled rows are judged in a dry run that asks nobody
(`estimate_dry_run.py`); the mean of what they use is multiplied by the images that the run judges, and their
spread gives the interval. Every assumption is printed with the flag that changes it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    import numpy as np
    from lightning.pytorch import LightningDataModule, LightningModule
    from rich.console import Console
    from rich.table import Table

    from balcap.commands.estimate_dry_run import Counting, Plan, Usage
    from balcap.data import CaptionDataModule
    from balcap.judge import Price
    from balcap.module import BalCapModule
    from balcap.types import CaptionBatch

TOKENS_PER_WORD = 1.3
"""Of English."""

HERE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "plugins": None,
    "profiler": None,
    "logger": False,
}
"""Settings of the trainer that estimates, wherever the run will be."""


@dataclass(frozen=True)
class Launch:
    """How the run would be started, as the config says; estimating itself starts nothing.

    Attributes:
        devices, num_nodes, accelerator, max_time: of the trainer.
        ckpt_path: of ``fit``.
    """

    devices: Any
    num_nodes: int
    accelerator: str
    max_time: Any = None
    ckpt_path: Any = None


@dataclass(frozen=True)
class Options:
    """The flags of the command, see `BalCapTrainer.estimate`."""

    rows: int
    ranks: int | None
    sample_policy: bool
    caption_tokens: int | None
    overlap: float
    words_per_assertion: float
    chars_per_token: float | None
    image_tokens: int | None
    reasoning_tokens: int | None

    def problems(self) -> list[str]:
        """What is out of range, each with the flag to change."""
        ranges = {"overlap": (0, 1), "image_tokens": (0, None), "reasoning_tokens": (0, None)}
        above_zero = ("words_per_assertion", "chars_per_token")
        problems = []
        for name, value in vars(self).items():
            low, high = ranges.get(name, (1, None))
            if value is None or name == "sample_policy" or (name in above_zero and value > 0):
                continue
            if not low <= value or (high is not None and value > high):
                problems.append(f"{name}: {value} is out of range")
        return problems


class BalCapTrainer(Trainer):
    """`Trainer`, which can also say what the judge of a ``fit`` will cost."""

    def estimate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        launch: Launch,
        ckpt_path: str | None = None,
        rows: int = 32,
        ranks: int | None = None,
        sample_policy: bool = False,
        caption_tokens: int | None = None,
        overlap: float = 0.35,
        words_per_assertion: float = 4.1,
        chars_per_token: float | None = None,
        image_tokens: int | None = None,
        reasoning_tokens: int | None = None,
        json: str | None = None,
    ) -> None:
        """Print what the judge of a fit will be asked, and what that costs; nothing is paid or trained.

        Takes the config and flags of ``fit``. Needs no GPU and no key, and leaves the run folder alone.

        Args:
            model: with the judge and the rewards.
            datamodule: the rows.
            launch: how the run would be started.
            ckpt_path: taken as ``fit`` takes it; the whole run is counted all the same.
            rows: images that are sampled, of training and of validation.
            ranks: processes of the run over all machines; null takes them from the trainer's settings.
            sample_policy: load the policy and let it caption the sampled rows, which costs no money; else
                captions as long as the references are assumed.
            caption_tokens: tokens of a caption, instead.
            overlap: share of a caption that all captions of its image have in common, in [0, 1].
            words_per_assertion: words of a caption for each assertion that it makes.
            chars_per_token: characters of the messages for each token, and nothing beside them; null for a
                tokenizer.
            image_tokens: tokens of each image; null for the rule of the model.
            reasoning_tokens: per call; null assumes them by the model and its ``reasoning_effort``.
            json: write the same as JSON to this file; null for none.
        """
        from json import dump

        from rich.console import Console

        from balcap.utils.files import atomic_write

        options = Options(
            rows, ranks, sample_policy, caption_tokens, overlap, words_per_assertion, chars_per_token,
            image_tokens, reasoning_tokens,
        )  # fmt: skip
        if problems := options.problems():
            raise SystemExit("Cannot estimate; change:\n" + "\n".join(f"  - {text}" for text in problems))
        try:
            estimate = make_estimate(self, model, datamodule, launch, options)  # type: ignore[arg-type]
        except ValueError as error:  # DataError is one
            raise SystemExit(f"Cannot estimate: {error}") from None
        estimate.show(Console(width=None if sys.stdout.isatty() else 120, highlight=False))
        if json is not None:
            with atomic_write(json) as file:
                dump(estimate.as_json(), file, indent=2)


def estimate_problems(module: BalCapModule, data: CaptionDataModule) -> list[str]:
    """What contradicts itself in the config of a fit, but for keys, which only paying needs."""
    settings = module.judge.settings
    cache, ledger = settings.cache, settings.ledger
    # Checking these files would make them.
    settings.cache = cache if cache is not None and os.path.exists(cache) else None
    settings.ledger = None
    try:
        problems = module.problems()
    finally:
        settings.cache, settings.ledger = cache, ledger
    return [text for text in problems if " in the environment" not in text] + data.problems("fit")


def launch_of(options: Any) -> Launch:
    """How a fit of this config would be started."""
    trainer = options.trainer
    accelerator = trainer.accelerator if isinstance(trainer.accelerator, str) else "gpu"
    return Launch(trainer.devices, trainer.num_nodes, accelerator, trainer.max_time, options.ckpt_path)


@dataclass(frozen=True)
class Note:
    """An assumption.

    Attributes:
        text: what is assumed.
        change: the flag or key that changes it; "" for none.
    """

    text: str
    change: str = ""


def make_estimate(
    trainer: Trainer, module: BalCapModule, data: CaptionDataModule, launch: Launch, options: Options
) -> Estimate:
    """What the run's judge would be asked; calls nobody and writes nothing that stays.

    Raises:
        DataError: if the rows cannot be used.
    """
    from balcap.commands.estimate_dry_run import dry_run

    notes: list[Note] = []
    plan = _plan(trainer, module, data, launch, options, notes)
    with tempfile.TemporaryDirectory() as scratch:
        data.settings = replace(data.settings, run_dir=scratch)  # bad rows are listed there
        train = _rows(data, data.split.train, options.rows) if plan.batches else None
        val = _rows(data, data.split.val, options.rows) if plan.validations else None
    counted = [0 if rows is None else len(rows) for rows in (train, val)]
    notes.append(
        Note(
            f"{counted[0]} training and {counted[1]} validation images, drawn at random, stand for all",
            "--rows",
        )
    )
    counting = _counting(module, train, options, notes)
    settings, parts, unknown = module.judge.settings, [], set[str]()
    for rows, captions, visits, population in (
        (train, module.num_captions, plan.visits(), plan.train_rows),
        (val, module.val_captions, plan.val_visits(), plan.val_images),
    ):
        if rows is not None:
            texts = _captions(module, rows, captions * (2 if visits[1] else 1), options)
            used, guessed = dry_run(settings, module.rewards, counting, rows, texts, captions)
            unknown |= guessed
            parts.append(Part(used, visits, population))
        else:
            parts.append(Part([], (0, 0), 0))
    _caption_notes(module, options, notes)
    _judge_notes(module, unknown, notes)
    rollouts = sum(plan.visits()) * module.num_captions + sum(plan.val_visits()) * module.val_captions
    return Estimate(plan, parts[0], parts[1], rollouts, _price_of(module), tuple(notes), settings.budget_usd)


def _plan(
    trainer: Trainer,
    module: BalCapModule,
    data: CaptionDataModule,
    launch: Launch,
    options: Options,
    notes: list[Note],
) -> Plan:
    """The images that the run judges. Reads the table of rows."""
    import torch

    from balcap.commands.estimate_dry_run import Plan, limited, ranks_of, training_batches, validations
    from balcap.data.sharegpt4v import column

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks, sure = ranks_of(launch.devices, launch.num_nodes, launch.accelerator, visible)
    how = f"trainer.devices={launch.devices}, num_nodes={launch.num_nodes}"
    if not sure:
        how += f"; {visible} GPUs are seen here, which may not be where the run will be"
    if options.ranks is not None:
        ranks, how = options.ranks, "as given"
    notes.append(Note(f"{ranks} process{'es' if ranks > 1 else ''} ({how})", "--ranks"))
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    if launch.max_time is not None:
        notes.append(Note(f"trainer.max_time={launch.max_time} does not end the run before its last step"))
    if timed:
        notes.append(Note("validations by the clock are not counted, only the first and the last"))
    if launch.ckpt_path is not None:
        notes.append(Note("the whole run is counted, also what it has paid for before ckpt_path"))

    settings, split = data.settings, data.split
    images_per_batch = settings.batch_size * ranks
    per_epoch = limited(max(1, len(split.train) // images_per_batch), trainer.limit_train_batches)
    batches = training_batches(per_epoch, trainer.max_steps, trainer.max_epochs, module.updates_per_rollout)
    val_per_batch = settings.eval_batch_size * ranks
    val_batches = limited(-(-len(split.val) // val_per_batch), trainer.limit_val_batches)
    val_images = min(len(split.val), val_batches * val_per_batch)
    interval = None if timed else trainer.val_check_interval
    due = validations(batches, per_epoch, interval, trainer.check_val_every_n_epoch)
    causes = column(data.table, "problem")
    train_rows = sum(not causes[int(row)] for row in split.train)
    return Plan(batches, images_per_batch, train_rows, due if val_images else (), val_images)


def _rows(data: CaptionDataModule, rows: np.ndarray, count: int) -> CaptionBatch | None:
    """`count` good rows of these, drawn at random."""
    import numpy as np

    from balcap.data.reader import to_batch

    reader, samples = data.reader(data.table, data.root), []
    for row in np.random.default_rng(data.settings.seed).permutation(rows):
        if (sample := reader.read(int(row))) is not None:
            samples.append(sample)
        if len(samples) == count:
            break
    return to_batch(samples) if samples else None


def _captions(
    module: BalCapModule, rows: CaptionBatch, count: int, options: Options
) -> Sequence[Sequence[str]]:
    """`count` captions of each row: the policy's own, or stand-ins."""
    from balcap.commands.estimate_dry_run import stand_ins

    if options.sample_policy:
        return sample_policy(module, rows, count)
    most, given = module.sampling.max_tokens, options.caption_tokens
    captions = []
    for row, reference in enumerate(rows.references):
        tokens = len(reference.split()) * TOKENS_PER_WORD if given is None else given
        words = max(1, round(min(tokens, most) / TOKENS_PER_WORD))
        captions.append(stand_ins(rows.references, row, count, words, options.overlap))
    return captions


def sample_policy(module: BalCapModule, rows: CaptionBatch, count: int) -> list[Sequence[str]]:
    """Load the policy, unless it is there, and sample `count` captions of each row with HF; costs no money."""
    import torch

    from balcap.policy.policy import Policy
    from balcap.rollout.hf import HFGenerate

    if not hasattr(module, "policy"):
        module.policy = Policy.load(module.policy_config, with_reference=False)
        module.policy.to("cuda" if torch.cuda.is_available() else "cpu")
    # an estimate starts no vLLM, and sends a server no weights
    engine = module.engine if isinstance(module.engine, HFGenerate) else HFGenerate(max_sequences=64)
    engine.attach(module.policy)
    captions: list[Sequence[str]] = []
    with torch.random.fork_rng():
        torch.manual_seed(module.seed)
        for row in range(len(rows)):
            one = rows.select([row])
            rollouts = engine.generate(one, module.policy.encode(one), count, module.sampling)
            captions += rollouts.captions
    return captions


# ---- assumptions


def _caption_notes(module: BalCapModule, options: Options, notes: list[Note]) -> None:
    words, share = options.words_per_assertion, options.overlap
    notes.append(Note(f"{words:g} words of a caption make an assertion", "--words_per_assertion"))
    if options.sample_policy:
        notes.append(Note("captions stay as the policy writes them now, before training"))
        return
    given = options.caption_tokens
    length = "as long as the references" if given is None else f"of {given} tokens"
    most = module.sampling.max_tokens
    notes.append(
        Note(f"captions are {length}, at most {most} tokens", "--caption_tokens, --sample_policy true")
    )
    notes.append(
        Note(
            f"captions of an image have {share:.0%} of their text in common",
            "--overlap, --sample_policy true",
        )
    )


def _counting(
    module: BalCapModule, rows: CaptionBatch | None, options: Options, notes: list[Note]
) -> Counting:
    """How tokens are counted."""
    from balcap.commands.estimate_dry_run import (
        Counting,
        image_tokens,
        place_of,
        reasoning_tokens,
        rule_for,
        text_counter,
    )
    from balcap.judge import Decompose, Verify

    settings = module.judge.settings
    text, what = text_counter(options.chars_per_token)
    # Whoever counts characters counts as some server does, which sees no schema.
    schema = options.chars_per_token is None
    what += ", schemas of answers included where they are billed" if schema else ""
    notes.append(Note(f"tokens: {what}", "--chars_per_token"))
    routes = {task: settings.routes(task.name)[0] for task in {Decompose, *module.rewards.needs}}
    for task, route in routes.items():
        if issubclass(task, Verify) and rows is not None and options.image_tokens is None:
            mean = fmean(image_tokens(settings, route.model, image) for image in rows.image_bytes)
            rule = rule_for(place_of(settings, route.model)).family
            notes.append(Note(f"an image is {mean:,.0f} tokens of {route.model} ({rule})", "--image_tokens"))
    for route in {route.name: route for route in routes.values()}.values():
        tokens = options.reasoning_tokens
        tokens = reasoning_tokens(route.model, route.params) if tokens is None else tokens
        if tokens:
            notes.append(Note(f"{route.model} reasons for {tokens:,} tokens per call", "--reasoning_tokens"))
    return Counting(text, options.image_tokens, options.reasoning_tokens, schema, options.words_per_assertion)


def _judge_notes(module: BalCapModule, unknown: Iterable[str], notes: list[Note]) -> None:
    settings = module.judge.settings
    notes.append(Note("every call succeeds at once; what is repeated costs again"))
    notes.append(Note("no discount for prompts that begin like an earlier one (prefix caches)"))
    if settings.fallbacks:
        notes.append(Note("nobody falls back to another judge", "--model.judge.fallbacks"))
    if len(places := settings.deployments or []) > 1:
        text = f"all deployments cost what {places[0].model} costs"
        notes.append(Note(text, "--model.judge.prices"))
    if settings.cache is None:
        notes.append(Note("no answer is remembered: model.judge.cache is null", "--model.judge.cache"))
    else:
        notes.append(Note("model.judge.cache holds nothing of these images yet", "--model.judge.cache"))
    for task in sorted(unknown):
        notes.append(Note(f"answers of {task} are short, and nothing else is asked because of them"))


def _price_of(module: BalCapModule) -> Callable[[str], Price | None]:
    from balcap.commands.estimate_dry_run import place_of
    from balcap.judge.settings import price_of

    settings = module.judge.settings
    prices = settings.prices or {}
    return lambda model: prices.get(model) or price_of(settings, place_of(settings, model))


# ---- the result


@dataclass(frozen=True)
class Part:
    """What the images of training, or of validation, use.

    Attributes:
        used: by visit (the first, a later one) and sampled row.
        visits: images that are judged for the first time, and again.
        population: images that the sampled rows stand for.
    """

    used: list[list[Usage]]
    visits: tuple[int, int]
    population: int

    def usage(self) -> Usage:
        """Calls, tokens in and out of the whole run, by task and model."""
        total: Usage = {}
        for rows, images in zip(self.used, self.visits, strict=False):
            for row in rows:
                for key, figures in row.items():
                    total[key] = total.get(key, 0) + figures * images / len(rows)
        return total

    def uncertainty(self, of: Callable[[Usage], float]) -> float:
        """Two standard errors of a figure of the whole run: what a larger sample would make smaller."""
        import numpy as np

        if not self.used or (count := len(self.used[0])) < 2:
            return 0.0
        per_row = sum(
            np.array([of(row) * images for row in rows])
            for rows, images in zip(self.used, self.visits, strict=False)
        )
        left_out = max(0.0, 1 - count / max(1, self.population))
        return float(2 * np.std(per_row, ddof=1) * np.sqrt(left_out / count))


@dataclass(frozen=True)
class Estimate:
    """What a run's judging uses.

    Attributes:
        plan: the run.
        train, val: what its images use.
        rollouts: captions that are judged, validation included.
        price_of: model -> its price, None if unknown.
        notes: assumptions.
        budget_usd: of the judge.
    """

    plan: Plan
    train: Part
    val: Part
    rollouts: int
    price_of: Callable[[str], Price | None]
    notes: tuple[Note, ...]
    budget_usd: float | None

    def usd(self, used: Usage) -> float | None:
        """Dollars; None if a price is unknown."""
        prices = {key: self.price_of(key[1]) for key in used}
        if None in prices.values():
            return None
        return sum(
            prices[key].usd(tokens_in, tokens_out, 0) for key, (_, tokens_in, tokens_out) in used.items()
        )  # type: ignore[union-attr]

    def used(self) -> Usage:
        """Training and validation together."""
        train, val = self.train.usage(), self.val.usage()
        return {key: train.get(key, 0) + val.get(key, 0) for key in sorted(train | val, key=_order)}

    @property
    def unpriced(self) -> list[str]:
        """Models without a price."""
        return sorted({model for _, model in self.used() if self.price_of(model) is None})

    def uncertainty(self) -> dict[str, float]:
        """Two standard errors of calls, tokens and, where prices are known, dollars of the whole run."""
        figures: dict[str, Callable[[Usage], float]] = {
            name: lambda used, column=column: sum(row[column] for row in used.values())
            for column, name in enumerate(("calls", "tokens_in", "tokens_out"))
        }
        if not self.unpriced:
            figures["usd"] = lambda used: self.usd(used) or 0.0
        return {
            name: (self.train.uncertainty(of) ** 2 + self.val.uncertainty(of) ** 2) ** 0.5
            for name, of in figures.items()
        }

    def budget_step(self) -> int | None:
        """The step at which the budget is spent; None if it lasts, or nobody can tell."""
        usd = self.usd(self.used())
        if self.budget_usd is None or usd is None or usd <= self.budget_usd:
            return None
        return int(self.plan.batches * self.budget_usd / usd)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; dollars are null where a price is unknown."""
        plan, used = self.plan, self.used()
        total = self._plain(used)
        return {
            "tasks": [
                {"task": key[0], "model": key[1], **self._plain({key: row})} for key, row in used.items()
            ],
            "total": total,
            "uncertainty": {name: round(value, 4) for name, value in self.uncertainty().items()},
            "training": self._plain(self.train.usage()),
            "validation": self._plain(self.val.usage()),
            "usd_per_1k_rollouts": self._per_1k(total["usd"]),
            "rollouts": self.rollouts,
            "batches": plan.batches,
            "images_per_batch": plan.images_per_batch,
            "train_rows": plan.train_rows,
            "validations": list(plan.validations),
            "val_images": plan.val_images,
            "budget_usd": self.budget_usd,
            "budget_spent_at_step": self.budget_step(),
            "unpriced_models": self.unpriced,
            "assumptions": [vars(note) for note in self.notes],
        }

    def _per_1k(self, usd: float | None) -> float | None:
        return None if usd is None or not self.rollouts else 1000 * usd / self.rollouts

    def _plain(self, used: Usage) -> dict[str, Any]:
        calls, tokens_in, tokens_out = (sum(row[column] for row in used.values()) for column in range(3))
        return {
            "calls": round(float(calls), 1),
            "tokens_in": round(tokens_in),
            "tokens_out": round(tokens_out),
            "usd": self.usd(used),
        }

    def show(self, console: Console) -> None:
        """Table, totals and assumptions."""
        plan = self.plan
        console.print(
            f"{plan.batches:,} steps x {plan.images_per_batch:,} images and {len(plan.validations)} validations x "
            f"{plan.val_images:,} images: {self.rollouts:,} rollouts to judge"
        )
        console.print(self._table())
        for line in self._sums():
            console.print(line)
        console.print("\nAssumed:")
        for note in self.notes:
            console.print(f"  - {note.text}" + (f"  [{note.change}]" if note.change else ""), markup=False)

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(
            "task", "judge", title="What this run's judge will be asked (estimate, nothing was paid)"
        )
        for name in ("calls", "tokens in", "tokens out", "$"):
            table.add_column(name, justify="right")
        used = self.used()
        for key, row in used.items():
            table.add_row(*key, *self._figures({key: row}))
        table.add_section()
        table.add_row("total", "", *self._figures(used), style="bold")
        return table

    def _figures(self, used: Usage) -> list[str]:
        plain = self._plain(used)
        usd = plain.pop("usd")
        return [f"{value:,.0f}" for value in plain.values()] + [_dollars(usd)]

    def _sums(self) -> list[str]:
        total, val = self._plain(self.used()), self._plain(self.val.usage())
        spread = ", ".join(
            f"{name} {total[name] - width:,.{2 * (name == 'usd')}f} to {total[name] + width:,.{2 * (name == 'usd')}f}"
            for name, width in self.uncertainty().items()
        )
        lines = [
            f"95 % interval by the spread of the sampled rows, if all that is assumed holds: {spread}",
            f"Of this, validation: {val['calls']:,.0f} calls, {_dollars(val['usd'])}",
        ]
        if total["usd"] is not None and self.rollouts:
            lines.append(f"$ per 1,000 rollouts: {_dollars(self._per_1k(total['usd']))}")
        lines += [
            f"The price of {model} is unknown: set it, per million tokens, with "
            f"--model.judge.prices '{{{model}: {{input: ..., output: ...}}}}'"
            for model in self.unpriced
        ]
        if self.budget_usd is not None and not self.unpriced:
            step, budget = self.budget_step(), f"model.judge.budget_usd={self.budget_usd:g}"
            lines.append(
                f"{budget} lasts for the whole run"
                if step is None
                else f"{budget} is spent at about step {step:,} of {self.plan.batches:,}: the run would end there"
            )
        return lines


def _order(key: tuple[str, str]) -> tuple[int, tuple[str, str]]:
    order = ("decompose", "verify", "match", "rate")
    return (order.index(key[0]) if key[0] in order else len(order), key)


def _dollars(usd: float | None) -> str:
    if usd is None:
        return "unknown"
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.4f}"

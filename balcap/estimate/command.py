"""The command: sample rows, play their judging, multiply."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from balcap.estimate import calibrate
from balcap.estimate.captions import caption_of, sample_policy, tokens_per_word
from balcap.estimate.forecast import Forecast, Sample, Setting, forecast
from balcap.estimate.image_tokens import rule_for
from balcap.estimate.language import Language, growth_of
from balcap.estimate.options import Launch, Options
from balcap.estimate.plan import Plan, plan_of, ranks_of
from balcap.estimate.rehearsal import Counting, PaidAnswers, image_tokens, place_of
from balcap.estimate.report import Note, Report
from balcap.estimate.tokens import reasoning_tokens, text_counter
from balcap.estimate.usage import Usages
from balcap.judge import Decompose, Task, Verify
from balcap.judge.client import Price, listed_price

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from balcap.data import CaptionDataModule
    from balcap.data.reader import Sample as Row
    from balcap.judge import Judge
    from balcap.module import BalCapModule


def estimate(
    trainer: Trainer, module: BalCapModule, data: CaptionDataModule, launch: Launch, options: Options
) -> Report:
    """What the run's judge would be asked; calls nobody and writes nothing that stays.

    Raises:
        DataError: if the rows cannot be used.
        ValueError: if the ledger cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data.settings = replace(data.settings, run_dir=scratch)  # bad rows are listed there
        return _Estimate(trainer, module, data, launch, options).report()


class _Estimate:
    """The steps of one estimate; `notes` gathers what they assume."""

    def __init__(
        self,
        trainer: Trainer,
        module: BalCapModule,
        data: CaptionDataModule,
        launch: Launch,
        options: Options,
    ) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.launch, self.options = launch, options
        self.judge: Judge = module.judge
        self.captions = (module.num_captions, module.val_captions)
        self.notes: list[Note] = []

    def report(self) -> Report:
        plan = self._plan()
        train, val = self._rows(plan)
        paid = None if self.judge.settings.cache is None else PaidAnswers(self.judge.settings.cache)
        try:
            language = self._language(train, val, paid)
            counting, captions = self._counting(train), self._caption_of(train)
            setting = Setting(self.judge, self.module.rewards, language, counting, paid, captions)
            return self._played(setting, plan, train, val)
        finally:
            if paid is not None:
                paid.close()

    def _played(self, setting: Setting, plan: Plan, train: list[Sample], val: list[Sample]) -> Report:
        def play(grouping: str, adjust: Callable[[Usages], Usages]) -> Forecast:
            return forecast(setting, grouping, plan, train, val, self.captions, adjust)

        grouping = self.judge.settings.grouping
        adjust: Callable[[Usages], Usages] = _unchanged
        main = play(grouping, adjust)
        if self.options.ledger is not None:
            setting, adjust = self._measured(setting, main)
            main = play(grouping, adjust)
        other = "per_rollout" if grouping == "group" else "group"
        compared = play(other, adjust)
        self._closing_notes(main, plan)
        return Report(main, (other, compared), self._price_of, self.notes, self.judge.settings.budget_usd)

    # ---- what is judged

    def _plan(self) -> Plan:
        launch, options = self.launch, self.options
        if options.ranks is not None:
            ranks = options.ranks
            self._note(f"{ranks} processes, as given", "--ranks")
        else:
            ranks, sure = ranks_of(launch.devices, launch.num_nodes, launch.accelerator, _gpus())
            how = f"trainer.devices={launch.devices}, num_nodes={launch.num_nodes}"
            seen = "" if sure else f"; {_gpus()} GPUs are seen here, which may not be where the run will be"
            self._note(f"{ranks} process{'es' if ranks > 1 else ''} ({how}{seen})", "--ranks")
        plan = plan_of(self.trainer, self.data, ranks, self.module.updates_per_rollout)
        if launch.max_time is not None:
            self._note(f"trainer.max_time={launch.max_time} does not end the run before its last step")
        if getattr(self.trainer, "_val_check_time_interval", None) is not None:
            self._note("validations by the clock are not counted, only the first and the last")
        if launch.ckpt_path is not None:
            self._note("the whole run is counted, also what it has paid for before ckpt_path")
        return plan

    def _rows(self, plan: Plan) -> tuple[list[Sample], list[Sample]]:
        """Sampled rows of both kinds, with captions where the policy is asked."""
        import numpy as np

        rng = np.random.default_rng(self.data.settings.seed)
        train = self._read(rng.permutation(self.data.split.train)) if plan.batches else []
        val = self._read(rng.permutation(self.data.split.val)) if plan.validations else []
        drawn = f"{len(train):,} training and {len(val):,} validation images"
        self._note(f"{drawn}, drawn at random, stand for all", "--rows")
        sampled: list[list[list[str]]] = [[[]] * len(train), [[]] * len(val)]
        if self.options.sample_policy:
            rows = zip((train, val), self.captions, strict=True)
            sampled = [sample_policy(self.module, part, captions) if part else [] for part, captions in rows]
        return tuple(  # type: ignore[return-value]
            [
                Sample(row.sample_id, row.image_bytes, row.reference, row.extras["reference_units"], texts)
                for row, texts in zip(part, said, strict=True)
            ]
            for part, said in zip((train, val), sampled, strict=True)
        )

    def _read(self, rows: Iterable[int]) -> list[Row]:
        data = self.data
        reader = data.reader(data.table, data.root)
        found: list[Row] = []
        for row in rows:
            sample = reader.read(int(row))
            if sample is not None:
                found.append(sample)
            if len(found) == self.options.rows:
                break
        return found

    # ---- what is said

    def _language(self, train: list[Sample], val: list[Sample], paid: PaidAnswers | None) -> Language:
        options, many = self.options, self.captions[0]
        units = calibrate.with_paid_units(train, self.judge, paid)
        held = sum(sample.reference_units is not None for sample in train)
        known = sum(made is not None for made in units)
        if held:
            self._note(f"{held / len(train):.0%} of the references come with their units, which cost nothing")
        if known > held:
            share = (known - held) / len(train)
            self._note(f"{share:.0%} of the references are taken apart in model.judge.cache already")
        language, source = Language(), "DeCapBench"
        measured = calibrate.language_of_units(language, [sample.reference for sample in train], units)
        if measured is not None:
            language, source = measured, f"{known} references here"
        if options.words_per_assertion is not None:
            language, source = replace(language, words_per_assertion=options.words_per_assertion), "given"
        self._note(
            f"{language.words_per_assertion:.1f} words of a caption make an assertion ({source}), of "
            f"{language.words_in_assertion:.1f} words",
            "--words_per_assertion, --ledger",
        )
        growth, source = options.growth, ", as given"
        if growth is None and options.sample_policy:
            growth, source = growth_of([sample.captions for sample in train]), ", as their words tell"
        if growth is None:
            growth, source = language.growth, ""
        self._note(
            f"{many} captions of an image make {many**growth:.1f} times the different assertions of one"
            f"{source}; those of later epochs go on like that",
            "--growth, --sample_policy true, --ledger",
        )
        return replace(language, growth=growth)

    def _caption_of(self, train: list[Sample]) -> Callable[[Sample, int], str]:
        options, sampling = self.options, self.module.sampling
        per_word = tokens_per_word(self.module, [sample.reference for sample in train])
        if options.sample_policy:
            self._note("captions stay as the policy writes them now, before training")
        else:
            given = options.caption_tokens
            how = "as long as the references" if given is None else f"of {given} tokens"
            said = f"captions are {how}, at most {sampling.max_tokens} tokens, and as dense"
            self._note(
                f"{said}; the policy's own make the estimate closer", "--caption_tokens, --sample_policy true"
            )
        return caption_of(per_word, sampling.max_tokens, options.caption_tokens)

    # ---- what it counts as

    def _counting(self, train: list[Sample]) -> Counting:
        options, judge = self.options, self.judge
        text, what = text_counter(options.chars_per_token)
        # Whoever counts characters counts as some server does, which sees no schema.
        schema = options.chars_per_token is None
        self._note(
            f"tokens: {what}{', schemas of answers included where they are billed' if schema else ''}",
            "--chars_per_token",
        )
        asked: set[type[Task[Any]]] = {Decompose, *self.module.rewards.needs}
        routes = {task: judge.settings.routes(task.name)[0] for task in asked}
        for model in sorted({route.model for task, route in routes.items() if issubclass(task, Verify)}):
            if options.image_tokens is None and train:
                rule = rule_for(place_of(judge, model))
                mean = fmean(image_tokens(judge, model, sample.image_bytes) for sample in train)
                self._note(f"an image is {mean:,.0f} tokens of {model} ({rule.family})", "--image_tokens")
        for route in sorted(set(routes.values()), key=lambda route: route.name):
            tokens = options.reasoning_tokens
            tokens = reasoning_tokens(route.model, route.params) if tokens is None else tokens
            if tokens:
                self._note(f"{route.model} reasons for {tokens:,} tokens per call", "--reasoning_tokens")
        return Counting(text, options.image_tokens, options.reasoning_tokens, schema)

    def _measured(self, setting: Setting, played: Forecast) -> tuple[Setting, Callable[[Usages], Usages]]:
        """The ledger's figures in the place of assumptions."""
        path = self.options.ledger
        assert path is not None
        booked = calibrate.read_ledger(path)
        mine = {key: figures for key, figures in booked.items() if key in played.used}
        tasks = ", ".join(f"{task} ({figures.all.calls:,.0f} calls)" for (task, _), figures in mine.items())
        few = f"{path} holds too few calls of this judge to measure anything"
        self._note(f"measured in {path}: {tasks}" if mine else few, "--ledger")
        captions = (
            self.captions[0] * len(played.plan.visits()) if self.judge.settings.grouping == "group" else 1
        )
        language = calibrate.language_of_ledger(setting.language, mine, played.used, captions)
        setting = setting if language is None else replace(setting, language=language)
        return setting, lambda used: calibrate.as_booked(used, mine)

    def _price_of(self, model: str) -> Price | None:
        prices, place = self.judge.settings.prices or {}, place_of(self.judge, model)
        return prices.get(place) or prices.get(model) or listed_price(place)

    # ---- what is assumed

    def _closing_notes(self, main: Forecast, plan: Plan) -> None:
        judge = self.judge
        if self.options.ledger is None:
            self._note("every call succeeds at once; what is repeated costs again", "--ledger")
        if judge.settings.fallbacks:
            self._note("nobody falls back to another judge")
        if len(places := judge.settings.deployments or []) > 1:
            first = places[0].model
            self._note(f"all deployments cost what {first} costs", "model.judge.prices")
        self._note("no discount for prompts that begin like an earlier one (prefix caches)")
        if judge.settings.cache is None:
            self._note("no answer is remembered: model.judge.cache is null", "--model.judge.cache")
        for task in sorted(main.course.unknown | main.val_course.unknown):
            self._note(f"answers of {task} are short, and nothing else is asked because of them")
        left = max(0.0, 1 - len(main.course.visits.get(1, ())) / max(1, plan.train_rows)) ** 0.5
        error = 2 * main.course.error() * left
        self._note(
            f"with these rows drawn, tokens are uncertain by {error:.1%}, the rest of this list apart",
            "--rows",
        )

    def _note(self, text: str, change: str = "") -> None:
        self.notes.append(Note(text, change))


def _unchanged(used: Usages) -> Usages:
    return used


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0

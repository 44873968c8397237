"""From sampled rows to the whole run: what each visit of an image costs, times the number of visits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from balcap.estimate.language import Language, Said
from balcap.estimate.plan import Plan
from balcap.estimate.rehearsal import Counting, PaidAnswers, Rehearsal, Understudy
from balcap.estimate.usage import Usages, total
from balcap.judge import Judge
from balcap.rewards import RewardSuite


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        sample_id, image_bytes, reference, reference_units: as in `CaptionBatch`.
        captions: what the policy says about it; empty where it was not asked.
    """

    sample_id: str
    image_bytes: bytes
    reference: str
    reference_units: Sequence[str] | None
    captions: Sequence[str] = ()


CaptionOf = Callable[[Sample, int], str]
"""(row, number) -> the row's caption of this number, counted from 0 over the whole run."""


@dataclass(frozen=True)
class Setting:
    """What a forecast rests on.

    Attributes:
        judge: of the run.
        suite: its rewards.
        language: of captions.
        counting: of tokens.
        paid: answers that the judge has already; None where it keeps none.
        caption_of: the captions.
    """

    judge: Judge
    suite: RewardSuite
    language: Language
    counting: Counting
    paid: PaidAnswers | None
    caption_of: CaptionOf


@dataclass(frozen=True)
class Course:
    """What images cost, one by one.

    Attributes:
        visits: number of the visit -> usage of each row at it.
        unknown: tasks whose answers could not be guessed.
    """

    visits: Mapping[int, Sequence[Usages]]
    unknown: frozenset[str] = frozenset()

    def adjusted(self, adjust: Callable[[Usages], Usages]) -> Course:
        """The course with every usage corrected."""
        return Course({n: [adjust(used) for used in rows] for n, rows in self.visits.items()}, self.unknown)

    def mean(self, visit: float) -> Usages:
        """Of one image at its visit of this number, between those that were played in proportion."""
        played = sorted(self.visits)
        if not played:
            return Usages()
        below = max((number for number in played if number <= visit), default=played[0])
        above = min((number for number in played if number >= visit), default=played[-1])
        share = (visit - below) / (above - below) if above > below else 0.0
        return self._mean(below) * (1 - share) + self._mean(above) * share

    def _mean(self, visit: int) -> Usages:
        rows = self.visits[visit]
        return total(rows) * (1 / len(rows))

    def over(self, visits: Sequence[float]) -> Usages:
        """Of so many images at their first visit, at their second, …"""
        return total(self.mean(number) * count for number, count in enumerate(visits, 1))

    def error(self) -> float:
        """Standard error of the tokens of a first visit, as a share of them: what a larger sample would mend."""
        tokens = [used.all.tokens_in + used.all.tokens_out for used in self.visits.get(1, ())]
        if len(tokens) < 2 or not fmean(tokens):
            return 0.0
        return stdev(tokens) / fmean(tokens) / len(tokens) ** 0.5


def play(setting: Setting, grouping: str, samples: Sequence[Sample], captions: int, visits: int) -> Course:
    """Play `visits` visits of every row with `captions` captions each; some of many, and none in between."""
    understudy = Understudy(setting.judge, setting.language, setting.counting)
    judge = Rehearsal(setting.judge, understudy, grouping, setting.paid)
    said = [Said(setting.language) for _ in samples]
    found: dict[int, list[Usages]] = {}
    try:
        for visit in landmarks(visits):
            first = (visit - 1) * captions
            found[visit] = []
            for sample, before in zip(samples, said, strict=True):
                texts = [setting.caption_of(sample, first + number) for number in range(captions)]
                before.captions = first
                understudy.expect(before, texts)
                understudy.used = Usages()
                judge.run(
                    setting.suite.gather_group(
                        judge,
                        sample.sample_id,
                        sample.image_bytes,
                        sample.reference,
                        texts,
                        sample.reference_units,
                    )
                )
                found[visit].append(understudy.used)
    finally:
        judge.close()
    return Course(found, frozenset(understudy.unknown))


def landmarks(visits: int) -> list[int]:
    """Visits that are played: the first three, then ever fewer, and the last."""
    found, number = [], 1
    while number < visits:
        found.append(number)
        number += max(1, number // 2)
    return [*found, visits] if visits else []


@dataclass(frozen=True)
class Forecast:
    """What a run's judging uses.

    Attributes:
        plan: the run.
        train: usage of training.
        val: usage of all validations.
        course: of training images.
        val_course: of validation images.
        captions: G, and captions per image in validation.
    """

    plan: Plan
    train: Usages
    val: Usages
    course: Course
    val_course: Course
    captions: tuple[int, int]

    @property
    def used(self) -> Usages:
        """All of it."""
        return self.train + self.val

    @property
    def rollouts(self) -> int:
        """Captions that are judged, validation included."""
        trained, validated = self.captions
        return self.plan.images * trained + self.plan.val_images * len(self.plan.validations) * validated

    def step_of(self, budget_usd: float, usd: Callable[[Usages], float]) -> int | None:
        """The training batch in which `budget_usd` is spent; None if it lasts.

        Args:
            budget_usd: dollars.
            usd: of a usage.
        """
        plan, spent = self.plan, 0.0
        ends = sorted(plan.validations)
        validated = [usd(self.val_course.mean(n + 1)) * plan.val_images for n in range(len(ends))]
        # What is left to see of each visit, and its price.
        ahead = [[count, usd(self.course.mean(visit))] for visit, count in enumerate(plan.visits(), 1)][::-1]
        for batch in range(plan.batches + 1):
            images: float = plan.images_per_batch if batch else 0
            while images:
                seen = min(images, ahead[-1][0])
                spent += seen * ahead[-1][1]
                ahead[-1][0] -= seen
                images -= seen
                if not ahead[-1][0]:
                    ahead.pop()
            while ends and ends[0] == batch:
                ends.pop(0)
                spent += validated.pop(0)
            if spent >= budget_usd:
                return batch
        return None


def forecast(
    setting: Setting,
    grouping: str,
    plan: Plan,
    train: Sequence[Sample],
    val: Sequence[Sample],
    captions: tuple[int, int],
    adjust: Callable[[Usages], Usages] = lambda used: used,
) -> Forecast:
    """Play sampled rows and multiply.

    Args:
        setting: what it rests on.
        grouping: of the captions, as of `Judge`.
        plan: the run.
        train, val: sampled rows; at least one where the plan holds such images.
        captions: G, and captions per image in validation.
        adjust: corrects what was played; linear.
    """
    visits = plan.visits() if train else []
    course = play(setting, grouping, train, captions[0], len(visits)).adjusted(adjust)
    val_visits = [plan.val_images] * len(plan.validations) if val else []
    val_course = play(setting, grouping, val, captions[1], len(val_visits)).adjusted(adjust)
    return Forecast(plan, course.over(visits), val_course.over(val_visits), course, val_course, captions)

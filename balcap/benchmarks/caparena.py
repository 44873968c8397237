"""CapArena-Auto (arXiv 2503.12329): does a judge prefer a caption to those of three known captioners?

600 images of DOCCI are each the place of one battle against one of three baselines, 200 for each. A judge sees the image,
both captions and a person's, and prefers one or neither. The score against a baseline is 100 (wins - losses) / battles,
and the benchmark's their mean, in [-100, 100].

``official`` counts as the authors' code (njucckevin/CapArena at c251cdd) does: (wins - losses) / 2 for each baseline,
never divided by the battles that were judged, so that a battle without a judgment counts as a tie, and the mean is over
three baselines, also for a model that is itself one of them and has 400 battles; words are counted between single spaces.
Without it, battles without a judgment are left out and reported, and words are what white space separates.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

from balcap.benchmarks.base import Benchmark, BenchmarkImage, Record, given
from balcap.benchmarks.official import OfficialTask, Prompt
from balcap.benchmarks.scores import Statistic
from balcap.judge import Judge
from balcap.judge.tasks.compare import Compare

BASELINES = ("GPT-4o-0806", "CogVLM2-llama3-chat-19B", "MiniCPM-V2.6-8B")
CALLS = 5
"""Most calls of the authors' code for one battle."""

Outcome = Literal["win", "loss", "tie"]
POINTS = {"win": 1, "loss": -1, "tie": 0}


@dataclass(frozen=True)
class Battle:
    """A battle of the tested captioner.

    Attributes:
        baseline: whom it was against.
        outcome: None where there is no judgment.
        words: of the tested caption.
    """

    baseline: str
    outcome: Outcome | None
    words: int


def label_of(text: str | None) -> str | None:
    """What stands behind ``Judgment:`` in an answer that also gives a reason before it; None: ask again."""
    reason = re.search(r"Reason:\s*(.+?)\s*Judgment:", text or "", re.DOTALL)
    label = re.search(r"Judgment:\s*(.+)", text or "")
    if reason is None or label is None or not reason[1].strip():
        return None
    return label[1].strip() or None


def outcome_of(label: str | None, test_is_first: bool) -> Outcome | None:
    """The tested captioner's; None for a label that is not one of the three, with or without a full stop."""
    match (label or "").removesuffix("."):
        case "Caption 1 is better":
            return "win" if test_is_first else "loss"
        case "Caption 2 is better":
            return "loss" if test_is_first else "win"
        case "Tie":
            return "tie"
    return None


def count_words(caption: str, official: bool = False) -> int:
    """Words of a caption."""
    return len(caption.split(" ") if official else caption.split())


def official_scores(battles: Sequence[Battle]) -> tuple[dict[str, float], float]:
    """The authors' score against each baseline, and their mean over three."""
    scores = {
        name: sum(POINTS[b.outcome] for b in battles if b.baseline == name and b.outcome is not None) / 2
        for name in BASELINES
    }
    return scores, fmean(scores.values())


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────────


class CapArenaCompare(OfficialTask):
    """Which caption is better, in the authors' words."""

    name = "caparena_compare"
    params: ClassVar = {"temperature": 0.1, "top_p": 0.9, "max_tokens": 1500}

    def example(self, items: Sequence[Prompt], **context: Any) -> list[str]:
        """A tie, with a reason of the usual length."""
        return [f"Reason: {'Both name the dog and its place. ' * 10}\nJudgment: Tie"] * len(items)


_OUTCOMES: dict[str, Outcome] = {"first": "win", "second": "loss", "tie": "tie"}
_MIRRORED: dict[Outcome, Outcome] = {"win": "loss", "loss": "win", "tie": "tie"}


class CapArena(Benchmark):
    """CapArena-Auto, in [-100, 100]: wins and losses against three captioners (arXiv 2503.12329).

    ``caparena/<baseline>`` is the score against each, ``caparena/words`` the length of the captions.

    Args:
        data: ``caparena_auto_600.json``: image -> ``{"captions": {"human": …, "<baseline>": …}, "ref_model":
            "<baseline>"}``.
        image_root: its ``all_images``.
        seed: of the order in which the two captions are shown.
        both_orders: ask twice, with the captions exchanged; a battle is won or lost by half of what both say, and what
            depends on the order alone is a tie. Twice the cost; not official.
        settings: as of `Benchmark`.
    """

    name = "caparena"
    tasks = (Compare,)
    official_prompts = ("system_prompt_with_ref", "compare_prompt")
    official_judge = "gpt-4o-2024-08-06"
    source = "https://github.com/njucckevin/CapArena, readme and vlm_as_a_judge.py"

    def __init__(self, data: str, seed: int = 0, both_orders: bool = False, **settings: Any) -> None:
        super().__init__(data, **settings)
        self.seed, self.both_orders = seed, both_orders

    def problems(self, key: str) -> list[str]:
        wrong = self.official and self.both_orders
        problems = [f"{key}.both_orders: officially there is one order"] if wrong else []
        return [*super().problems(key), *problems]

    def load(self) -> list[BenchmarkImage]:
        rows, images = self.read_json(), []
        if not isinstance(rows, Mapping):
            raise self.row_error(0, "the file is no object of images")
        for number, (name, row) in enumerate(rows.items()):
            captions = row.get("captions", {}) if isinstance(row, Mapping) else {}
            if "human" not in captions or row.get("ref_model") not in captions:
                raise self.row_error(number, f"{name} has no captions of human and of its ref_model")
            images.append(BenchmarkImage(name, self.reader(name), row))
        return images

    async def judge_caption(self, judge: Judge, image: BenchmarkImage, caption: str) -> Record:
        baseline, captions = image.row["ref_model"], image.row["captions"]
        first = random.Random(f"{self.seed}/{image.id}").random() < 0.5
        data = await image.file()
        orders = [True, False] if self.both_orders else [first]
        ask = self._official if self.official else self._fixed
        outcomes = [
            await ask(judge, data, caption, captions[baseline], captions["human"], test_is_first)
            for test_is_first in orders
        ]
        record: Record = {"baseline": baseline, "words": count_words(caption, self.official)}
        if (missing := outcomes.count(None)) and not (self.official and judge.stopped is None):
            return record | {"failed": missing}
        return record | {
            "points": fmean(0 if one is None else POINTS[one] for one in outcomes),
            "failed": missing,
        }

    def statistics(self, ids: Sequence[str], records: Sequence[Record]) -> dict[str, Statistic]:
        there = [(i, record) for i, record in zip(ids, records, strict=True) if "points" in record]
        ids, baselines = [i for i, _ in there], [record["baseline"] for _, record in there]
        scale = {name: baselines.count(name) / 2 if self.official else 100.0 for name in set(baselines)}
        points = [scale[record["baseline"]] * record["points"] for _, record in there]
        whole = Statistic.of(ids, points, None, baselines, len(BASELINES) if self.official else None)
        statistics = {self.name: whole}
        for name in sorted(set(baselines)):
            rows = [row for row, own in enumerate(baselines) if own == name]
            own = Statistic.of([ids[row] for row in rows], [points[row] for row in rows])
            statistics[f"{self.name}/{name}"] = own
        words = {i: record["words"] for i, record in zip(ids, (r for _, r in there), strict=True)}
        return statistics | {f"{self.name}/words": Statistic.of(list(words), list(words.values()))}

    def harness_input(self, captions: Mapping[BenchmarkImage, str]) -> tuple[str, str]:
        """As ``caparena_auto_eval.py --result_path`` reads it."""
        return "caparena.json", json.dumps({i.id: text for i, text in captions.items()}, ensure_ascii=False)

    async def _fixed(
        self, judge: Judge, data: bytes, caption: str, other: str, reference: str, test_is_first: bool
    ) -> Outcome | None:
        pair = [caption, other] if test_is_first else [other, caption]
        (better,) = given(await judge.ask(Compare, [pair], image=data, reference=reference))
        if better is None:
            return None
        outcome = _OUTCOMES[better]
        return outcome if test_is_first else _MIRRORED[outcome]

    async def _official(
        self, judge: Judge, data: bytes, caption: str, other: str, reference: str, test_is_first: bool
    ) -> Outcome | None:
        first, second = (caption, other) if test_is_first else (other, caption)
        text = self.prompts["compare_prompt"].format(caption_1=first, caption_2=second, caption_ref=reference)
        system = self.prompts["system_prompt_with_ref"]
        for call in range(CALLS):
            item: Prompt = {"prompt": text, "draw": call}
            (said,) = given(await judge.ask(CapArenaCompare, [item], system=system, image=data))
            if (label := label_of(said)) is not None:
                return outcome_of(label, test_is_first)
            if judge.stopped is not None:
                return None
        return None

"""DCScore of DeCapBench (arXiv 2503.07906): are a caption's facts true, and does it tell those that people wrote down?

A caption is split into atomic facts, each of which describes the image or goes beyond it (``relevant``); each is
matched with at most one of the N facts of the annotation, and verified by the image. With V verified facts, of which U
match no annotated fact, and s(f) predictions that share f's annotated fact::

    precision = V / facts
    recall    = (Σ over verified and matched f of 1 / s(f)  +  U) / (N + U)
    F1        = 2 precision recall / (precision + recall + 1e-8)

DCScore is 100 times the mean over images of (F1 of all facts + F1 of the relevant ones) / 2, each F1 the mean of nine
trials: three matchings by three verifications.

``official`` counts exactly as the authors' code (MAGAer13/DeCapBench at 9f3fb10) does, quirks included; see
`official_try`. Without it: facts are known by their number and not by their text; the relevant pass shares an
annotated fact among relevant predictions alone; a caption without facts, or without relevant ones, scores 0 there
instead of leaving the mean; and an answer that the judge does not give costs its trial, not the image.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from balcap.benchmarks.base import Benchmark, BenchmarkImage, Record, given
from balcap.benchmarks.official import OfficialTask, Prompt
from balcap.benchmarks.scores import Statistic
from balcap.judge import Judge
from balcap.judge.tasks.facts import ExtractFacts, MatchFacts, VerifyFacts

TRIALS = 3
"""Matchings, and verifications, of a caption."""
MOST_TRIES = 5
"""Of the authors' code, each from the extraction on."""


@dataclass(frozen=True)
class Prediction:
    """One fact of a caption, after its trial.

    Attributes:
        verified: the image shows it.
        oracle: the annotated fact that it matches, None for none.
        relevant: it describes the image.
    """

    verified: bool
    oracle: Hashable | None
    relevant: bool


@dataclass(frozen=True)
class Pass:
    """Scores of some facts of a caption.

    Attributes:
        precision, recall, f1: in [0, 1].
        total: N + U, the facts that recall is measured against.
    """

    precision: float
    recall: float
    f1: float
    total: int


def score_facts(facts: Sequence[Prediction], shares: Mapping[Hashable, int], num_oracle: int) -> Pass:
    """The formulas above for some facts.

    Args:
        facts: what is counted; with none, precision is 0.
        shares: annotated fact -> predictions that share it.
        num_oracle: N, annotated facts.
    """
    verified = [fact for fact in facts if fact.verified]
    unmatched = sum(fact.oracle is None for fact in verified)
    total, correct = num_oracle, 0.0
    for fact in verified:
        correct += 1.0 if fact.oracle is None else 1 / shares[fact.oracle]
    total += unmatched
    precision = len(verified) / len(facts) if facts else 0.0
    recall = correct / total if total else 0.0
    return Pass(precision, recall, 2 * precision * recall / (precision + recall + 1e-8), total)


def score_trial(facts: Sequence[Prediction], num_oracle: int, official: bool = False) -> tuple[Pass, Pass]:
    """All facts of a caption, and the relevant ones.

    Args:
        facts: of one matching and one verification.
        num_oracle: N.
        official: the relevant pass divides by the shares of all facts.
    """
    relevant = [fact for fact in facts if fact.relevant]
    shares = _shares(facts)
    own = shares if official else _shares(relevant)
    return score_facts(facts, shares, num_oracle), score_facts(relevant, own, num_oracle)


def _shares(facts: Sequence[Prediction]) -> Counter[Hashable]:
    return Counter(fact.oracle for fact in facts if fact.oracle is not None)


@dataclass(frozen=True)
class ImageScore:
    """What an image's caption scored.

    Attributes:
        trials: of each trial, all facts and the relevant ones.
    """

    trials: Sequence[tuple[Pass, Pass]]

    def mean(self, what: str, relevant: bool = False) -> float:
        """Mean over the trials of ``precision``, ``recall`` or ``f1``."""
        return fmean(getattr(trial[relevant], what) for trial in self.trials)

    @property
    def score(self) -> float:
        """In [0, 1]."""
        return (self.mean("f1") + self.mean("f1", relevant=True)) / 2


# ── as the authors' code counts ──────────────────────────────────────────────────────────────────────


class TryFailed(Exception):
    """An answer that the authors' code cannot use; it starts again from the extraction.

    Attributes:
        after: the call whose answers it had got last: ``extract``, ``match`` or ``verify``.
    """

    def __init__(self, after: str, why: BaseException) -> None:
        super().__init__(f"after {after}: {type(why).__name__}: {why}")
        self.after = after


# What their code raises, and catches, over answers that are not as it expects.
_RAISED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError)


def parse_answer(text: str | None) -> Any:
    """The Python or JSON literal in the last fenced block of an answer, None where there is none.

    Four readings are tried in this order: the block up to its closing fence as Python, then all behind its opening
    fence, without line breaks, as Python, as JSON, and as JSON without back quotes. ``null`` and ``true`` are only read
    by the last two.
    """
    if text is None:
        return None
    last = text.split("```json")[-1]
    whole = last.strip("`").strip().strip("\n").replace("\n", "")
    readings: list[tuple[Callable[[str], Any], str]] = [
        (ast.literal_eval, last.split("```")[0].strip("\n")),
        (ast.literal_eval, whole),
        (json.loads, whole),
        (json.loads, whole.replace("`", "")),
    ]
    for read, content in readings:
        try:
            return read(content)
        except (*_RAISED, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def without_relevance(facts: Any) -> list[Any]:
    """The facts as the matching and the verification are shown them.

    Raises:
        TryFailed: one has no ``relevance``, or they are no list of objects that JSON can hold.
    """
    try:
        shown = copy.deepcopy(facts)
        for fact in shown:
            del fact["relevance"]
        json.dumps(list(shown))
    except _RAISED as error:
        raise TryFailed("extract", error) from error
    return shown


def mapping_of(answer: Any) -> dict[Any, Any]:
    """Fact -> matched annotated fact; of facts that stand twice, the last.

    Raises:
        TryFailed: it is no list of objects with these two keys.
    """
    try:
        return {entry["fact"]: entry["matched_oracle_id"] for entry in answer}
    except _RAISED as error:
        raise TryFailed("match", error) from error


def official_trial(
    facts: Any, verified: Any, mapping: Mapping[Any, Any], num_oracle: int
) -> tuple[Pass, Pass]:
    """One of the nine trials.

    Facts are known by their text. Verified facts that stand twice count twice, and ids of annotated facts are taken as
    they are: 3 and "3" are two, and one that does not exist is matched.

    Raises:
        TryFailed: matching and verification name other facts, or none is relevant.
    """
    try:
        entries = verified.copy()
        if set(mapping) != {entry["fact"] for entry in entries}:
            raise ValueError("matching and verification do not name the same facts")
        relevant = {fact["fact"] for fact in facts if fact["relevance"] == 1}
        predictions = [
            Prediction(
                entry["verification"] == 1,
                None if mapping[entry["fact"]] in (None, "None") else mapping[entry["fact"]],
                entry["fact"] in relevant,
            )
            for entry in entries
        ]
        if not any(fact.relevant for fact in predictions):
            raise ZeroDivisionError("no fact is relevant")
        return score_trial(predictions, num_oracle, official=True)
    except _RAISED as error:
        raise TryFailed("verify", error) from error


def official_try(
    extract: str | None, match: Sequence[str | None], verify: Sequence[str | None], num_oracle: int
) -> ImageScore:
    """The nine trials of one try, verification outside, matching inside.

    Args:
        extract: the judge's answer with the facts of the caption.
        match: three answers with their annotated facts.
        verify: three answers with what the image says.
        num_oracle: N.

    Raises:
        TryFailed: see there. One bad answer voids the try.
    """
    facts = parse_answer(extract)
    without_relevance(facts)
    mappings = [mapping_of(parse_answer(text)) for text in match]
    verified = [parse_answer(text) for text in verify]
    return ImageScore(
        [official_trial(facts, one, mapping, num_oracle) for one in verified for mapping in mappings]
    )


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────────


class DCScoreExtract(OfficialTask):
    """The facts of a caption, in the authors' words."""

    name = "dcscore_extract"
    params: ClassVar = {"temperature": 1.0, "max_tokens": 2000}

    def example(self, items: Sequence[Prompt], **context: Any) -> list[str]:
        """Thirty facts."""
        return [
            _listing([{"fact": f"The thing {n} is red and large.", "relevance": 1} for n in range(30)])
        ] * len(items)


class DCScoreMatch(OfficialTask):
    """Their annotated facts, in the authors' words."""

    name = "dcscore_match"
    params: ClassVar = {"temperature": 1.0, "max_tokens": 2000}

    def example(self, items: Sequence[Prompt], **context: Any) -> list[str]:
        """Nothing matches."""
        return [
            _listing([fact | {"matched_oracle_id": "None"} for fact in _shown(item, -2)]) for item in items
        ]


class DCScoreVerify(OfficialTask):
    """What the image says, in the authors' words."""

    name = "dcscore_verify"
    params: ClassVar = {"temperature": 0.3, "max_tokens": 2000}

    def example(self, items: Sequence[Prompt], **context: Any) -> list[str]:
        """All hold."""
        return [_listing([fact | {"verification": 1} for fact in _shown(item, -1)]) for item in items]


SYSTEM = "You are a helpful assistant."
"""The authors' system message; of OpenAI's examples."""
_PARTS = ("precision", "recall", "f1")


class DCScore(Benchmark):
    """DCScore of DeCapBench, in [0, 100]: truth and completeness of a caption, fact by fact (arXiv 2503.07906).

    Args:
        data: ``human_annotated_oracle_facts.jsonl`` of the repository: lines ``{"image_name", "oracle_caption",
            "oracle_facts": [...]}``.
        image_root: images of ImageInWords (``aar_test_*.jpg``).
        trials: matchings, and verifications, of a caption, at least 1; officially 3.
        settings: as of `Benchmark`.
    """

    name = "dcscore"
    tasks = (ExtractFacts, MatchFacts, VerifyFacts)
    official_prompts = ("extract_prompt", "match_prompt", "verify_prompt")
    official_judge = "gpt-4o-2024-05-13"
    source = "https://github.com/MAGAer13/DeCapBench, eval/ (images: https://github.com/google/imageinwords)"

    def __init__(self, trials: int = TRIALS, **settings: Any) -> None:
        super().__init__(**settings)
        self.trials = trials

    def problems(self, key: str) -> list[str]:
        wrong = self.trials < 1 or (self.official and self.trials != TRIALS)
        which = f"{TRIALS} officially" if self.official else "at least 1"
        problems = [f"{key}.trials: {self.trials} must be {which}"] if wrong else []
        return [*super().problems(key), *problems]

    def load(self) -> list[BenchmarkImage]:
        images = []
        for number, row in enumerate(self.read_json()):
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("oracle_facts"), list)
                or "image_name" not in row
            ):
                raise self.row_error(number, "it has no image_name and oracle_facts")
            images.append(BenchmarkImage(row["image_name"], self.reader(row["image_name"]), row))
        return images

    async def judge_caption(self, judge: Judge, image: BenchmarkImage, caption: str) -> Record:
        ask = self._official if self.official else self._fixed
        scored = await ask(judge, image.row, await image.file(), caption)
        if scored is None:
            return {"failed": 1}
        record: Record = {"score": scored.score, "trials": len(scored.trials), "failed": 0}
        for what in _PARTS:
            record[what] = scored.mean(what)
            record[f"{what}_relevant"] = scored.mean(what, relevant=True)
        return record

    def statistics(self, ids: Sequence[str], records: Sequence[Record]) -> dict[str, Statistic]:
        there = [(i, record) for i, record in zip(ids, records, strict=True) if "score" in record]
        names = ["score", *_PARTS, *(f"{what}_relevant" for what in _PARTS)]
        return {
            self.name if name == "score" else f"{self.name}/{name}": Statistic.of(
                [i for i, _ in there], [100 * record[name] for _, record in there]
            )
            for name in names
        }

    def harness_input(self, captions: Mapping[BenchmarkImage, str]) -> tuple[str, str]:
        """As ``evaluation_decapbench.py --caption_file`` reads it."""
        rows = (
            {"image_path": i.id, "caption": text, "oracle_caption": i.row.get("oracle_caption", "")}
            for i, text in captions.items()
        )
        return "dcscore.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    async def _fixed(
        self, judge: Judge, row: Mapping[str, Any], data: bytes, caption: str
    ) -> ImageScore | None:
        (facts,) = given(await judge.ask(ExtractFacts, [caption]))
        if facts is None:
            return None
        draws = [{"facts": [fact.text for fact in facts], "draw": draw} for draw in range(self.trials)]
        reference, annotated = row.get("oracle_caption") or "", tuple(row["oracle_facts"])
        matched, verified = await asyncio.gather(
            judge.ask(MatchFacts, draws, annotated=annotated),
            judge.ask(VerifyFacts, draws, image=data, reference=reference),
        )
        trials = [
            score_trial(
                [
                    Prediction(holds, place, fact.relevant)
                    for holds, place, fact in zip(one, places, facts, strict=True)
                ],
                len(annotated),
            )
            for one in given(verified)
            for places in given(matched)
            if one is not None and places is not None
        ]
        return ImageScore(trials) if trials else None

    # ---- in the authors' words

    async def _official(
        self, judge: Judge, row: Mapping[str, Any], data: bytes, caption: str
    ) -> ImageScore | None:
        for attempt in range(MOST_TRIES):
            if judge.stopped is not None:
                return None
            try:
                return await self._official_try(judge, row, data, caption, attempt)
            except TryFailed:
                continue
        return None

    async def _official_try(
        self, judge: Judge, row: Mapping[str, Any], data: bytes, caption: str, attempt: int
    ) -> ImageScore:
        async def say(task: type[OfficialTask], text: str, draws: int, **context: Any) -> list[str | None]:
            items: list[Prompt] = [{"prompt": text, "draw": attempt * draws + draw} for draw in range(draws)]
            return given(await judge.ask(task, items, system=SYSTEM, **context))

        prompts, oracle = self.prompts, row["oracle_facts"]
        (extract,) = await say(DCScoreExtract, prompts["extract_prompt"].format(caption=caption), 1)
        shown = _listing(without_relevance(parse_answer(extract)))
        annotated = _listing([{"id": number, "fact": fact} for number, fact in enumerate(oracle)])
        question = prompts["match_prompt"].format(predicted_atomic_facts=shown, oracle_atomic_facts=annotated)
        match = await say(DCScoreMatch, question, self.trials)
        for text in match:
            mapping_of(parse_answer(text))  # their code gives up here, before the image is paid for
        question = prompts["verify_prompt"].format(
            reference_caption=row.get("oracle_caption") or "", atomic_facts=shown
        )
        verify = await say(DCScoreVerify, question, self.trials, image=data)
        return official_try(extract, match, verify, len(oracle))


def _shown(item: Prompt, which: int) -> list[dict[str, Any]]:
    """The facts of one of the listings in a question."""
    blocks = item["prompt"].split("```json")
    return parse_answer("```json" + blocks[which].split("```")[0] + "```")


def _listing(rows: Sequence[Any]) -> str:
    """Rows as the authors' code shows them to the judge."""
    lines = "".join(f"  {json.dumps(row, ensure_ascii=False)},\n" for row in rows)
    return f"```json[\n{lines}]\n```"

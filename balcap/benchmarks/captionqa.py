"""CaptionQA (arXiv 2511.21025): can a text-only LLM answer questions about an image from its caption alone?

Every question has options, shuffled, and "cannot answer" beside them unless it is a yes/no question. Right is 1, wrong
or unreadable 0, "cannot answer" 1 / options + 0.05, a little more than a guess. The leaderboard's score is the mean of
the four domains' means; the authors' script prints the mean over questions. Both are reported, in percent.

``official`` counts as the authors' code (bronyayang/CaptionQA at f729489) does: a question is yes/no if its options
contain "yes" and "no" anywhere ("eyes", "none"), or if it begins with one of 19 words ("Is the dog black or white?"),
and one random generator runs through all questions, so that the order of a question's options depends on those
before it. Without it, yes/no questions are those whose options begin with yes and no, and each question's order depends on
its image, its number and the seed alone: another subset of images asks the same questions.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image

from balcap.benchmarks.base import Benchmark, BenchmarkImage, Record, given, read_bytes
from balcap.benchmarks.official import OfficialTask, Prompt
from balcap.benchmarks.scores import Statistic
from balcap.data.json_files import DataError
from balcap.judge import Judge
from balcap.judge.questions import LETTERS, AskedQuestion, as_asked
from balcap.judge.tasks.answer import Answer, Choice
from balcap.rollout import Sampling

DOMAINS = ("natural", "document", "ecommerce", "embodiedai")


def questions_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row's questions: its list, or the row itself where that is one."""
    if row.get("questions"):
        return list(row["questions"])
    return [row] if "question" in row else []


def ask(
    rows: Sequence[Mapping[str, Any]], seed: int = 0, official: bool = False, by_domain: bool = False
) -> list[list[AskedQuestion]]:
    """Each row's questions as they are asked, those without two choices or without a right one left out.

    Args:
        rows: with ``id`` and questions; officially all that have a caption, in the order of the data set.
        seed: of the shuffling.
        official: see the file's head.
        by_domain: officially, each domain begins anew, as in a run on its split alone.
    """
    shared: dict[str, random.Random] = defaultdict(lambda: random.Random(seed))
    asked: list[list[AskedQuestion]] = []
    for row in rows:
        asked.append([])
        for number, question in enumerate(questions_of(row)):
            if official:
                draw = shared[domain_of(row) if by_domain else ""]
            else:
                draw = random.Random(f"{seed}/{row.get('id')}/{number}")
            if (one := as_asked(number, question, draw, official)) is not None:
                asked[-1].append(one)
    return asked


def letter_of(text: str | None, num_options: int) -> int | None:
    """The place that an answer in words names, None for none.

    As the authors' code reads it: behind ``</think>``, behind ``Answer: ``, behind the first line break; then the first
    letter that stands alone, in capitals ("a" and "I" count), if there is such an option; else the first number.
    """
    text = (text or "").strip()
    for mark in ("</think>", "Answer: ", "\n"):
        if mark in text:
            text = text.split(mark, 1)[1]
    if match := re.search(r"\b([A-Z])\b", text.upper()):
        place = LETTERS.index(match[1])
        if place < max(1, num_options):
            return place
    if match := re.search(r"\b([1-9][0-9]?)\b", text):
        number = int(match[1])
        if number <= max(1, num_options):
            return number - 1
    return None


def prompt(caption: str, question: AskedQuestion) -> str:
    """The user's message."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False))
    return f"Caption:\n{caption}\n\nQuestion:\n{question.text}\n\nOptions:\n{options}\n\nAnswer:"


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────────


class CaptionQAAnswer(OfficialTask):
    """A question, in the authors' words."""

    name = "captionqa_answer"
    params: ClassVar = {"temperature": 0.0, "max_tokens": 4}

    def example(self, items: Sequence[Prompt], **context: Any) -> list[str]:
        """The first option."""
        return ["A"] * len(items)


_PREFIXES = dict(zip(("nat", "doc", "ecom", "emb"), DOMAINS, strict=True))


class CaptionQA(Benchmark):
    """CaptionQA, in percent: what a caption lets a reader answer about its image (arXiv 2511.21025).

    ``captionqa`` is the leaderboard's mean of the domains, ``captionqa/questions`` the mean over questions; each domain
    has its own.

    Args:
        data: ``Borise/CaptionQA`` on the hub, or a JSON file of the same rows: ``id`` (``nat_…``, ``doc_…``, ``ecom_…``,
            ``emb_…``, or a ``domain`` beside it), ``images`` (names of files), ``questions`` with ``question``, ``choices``,
            ``answer``, ``category``.
        image_root: needed for a JSON file.
        split: of the hub's data set.
        sampling: of the captioner.
        seed: of the order of options.
        shuffle: officially, one order through all questions (``all``), as in a run on the split ``all``, or through those
            of each domain (``domain``), as in four runs: the two give the options in other orders.
        settings: as of `Benchmark`.
    """

    name = "captionqa"
    tasks = (Answer,)
    official_prompts = ("system_prompt",)
    official_judge = "Qwen2.5-72B-Instruct"
    source = (
        "https://huggingface.co/datasets/Borise/CaptionQA and https://github.com/bronyayang/CaptionQA, qa.py"
    )

    def __init__(
        self,
        data: str = "Borise/CaptionQA",
        split: str = "all",
        sampling: Sampling = Sampling(temperature=0.7, max_tokens=500),  # noqa: B008  frozen
        seed: int = 0,
        shuffle: Literal["all", "domain"] = "all",
        **settings: Any,
    ) -> None:
        super().__init__(data, sampling=sampling, **settings)
        self.split, self.seed, self.shuffle = split, seed, shuffle

    def load(self) -> list[BenchmarkImage]:
        images, rows = [], self._rows()
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or row.get("id") is None:
                raise self.row_error(number, "it has no id")
            pictures = row.get("images") or [row.get("image")]
            if len(pictures) != 1 or not pictures[0]:
                raise self.row_error(number, f"it has {len(pictures)} images, not one")
            images.append(BenchmarkImage(str(row["id"]), self._reader(pictures[0]), row))
        questions = ask(rows, self.seed, self.official, self.shuffle == "domain")
        self.skipped = Counter()
        for row, asked in zip(rows, questions, strict=True):
            if missing := max(1, len(questions_of(row))) - len(asked):
                self.skipped["no_question_with_a_right_choice"] += missing
        return [
            BenchmarkImage(image.id, image.read, (domain_of(image.row), asked))
            for image, asked in zip(images, questions, strict=True)
            if asked
        ]

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        if Path(self.data).expanduser().is_file():
            return self.read_json()
        import datasets

        try:
            rows = datasets.load_dataset(self.data, split=self.split)
            columns = {name: _undecoded(feature) for name, feature in rows.features.items()}
            return list(rows.cast(datasets.Features(columns)))
        except Exception as error:  # the hub, a cache, a builder: whatever they raise
            raise DataError(
                f"{self.name}: data {self.data} cannot be loaded: {error}; see {self.source}"
            ) from None

    def _reader(self, picture: Any) -> Callable[[], tuple[bytes, Image.Image]]:
        if isinstance(picture, Mapping) and picture.get("bytes"):
            return lambda: read_bytes(picture["bytes"])
        return self.reader(picture["path"] if isinstance(picture, Mapping) else picture)

    async def judge_caption(self, judge: Judge, image: BenchmarkImage, caption: str) -> Record:
        domain, questions = image.row
        ask_about = self._official if self.official else self._fixed
        points = await ask_about(judge, caption, questions)
        return {"domain": domain, "points": points, "failed": points.count(None)}

    def statistics(self, ids: Sequence[str], records: Sequence[Record]) -> dict[str, Statistic]:
        domains = {i: record.get("domain", "") for i, record in zip(ids, records, strict=True)}
        questions = points_statistic(ids, records)
        ids = questions.images
        statistics = {
            self.name: Statistic.of(ids, questions.totals, questions.weights, [domains[i] for i in ids]),
            f"{self.name}/questions": questions,
        }
        for domain in sorted({domains[i] for i in ids}):
            own = questions.select([i for i in ids if domains[i] == domain])
            statistics[f"{self.name}/{domain}"] = own
        return statistics

    def harness_input(self, captions: Mapping[BenchmarkImage, str]) -> tuple[str, str]:
        """As ``qa.py --caption-path`` reads it."""
        return "captionqa.json", json.dumps({i.id: text for i, text in captions.items()}, ensure_ascii=False)

    async def _fixed(
        self, judge: Judge, caption: str, questions: Sequence[AskedQuestion]
    ) -> list[float | None]:
        """Points of each question, None where no answer came."""
        items: list[Choice] = [{"question": q.text, "options": q.options} for q in questions]
        answers = zip(questions, given(await judge.ask(Answer, items, caption=caption)), strict=True)
        return [None if place is None else question.score(place) for question, place in answers]

    async def _official(
        self, judge: Judge, caption: str, questions: Sequence[AskedQuestion]
    ) -> list[float | None]:
        items: list[Prompt] = [{"prompt": prompt(caption, q), "draw": 0} for q in questions]
        answers = given(await judge.ask(CaptionQAAnswer, items, system=self.prompts["system_prompt"]))
        return [
            None if text is None else question.score(letter_of(text, len(question.options)))
            for text, question in zip(answers, questions, strict=True)
        ]


def points_statistic(ids: Sequence[str], records: Sequence[Record]) -> Statistic:
    """Mean over questions, in percent, of records with ``points``, None where an answer is missing."""
    there = {
        i: points
        for i, record in zip(ids, records, strict=True)
        if (points := [one for one in record.get("points", ()) if one is not None])
    }
    totals = [100 * sum(points) for points in there.values()]
    return Statistic.of(list(there), totals, list(map(len, there.values())))


def domain_of(row: Mapping[str, Any]) -> str:
    """Of a row: its ``domain``, or by the prefix of its id."""
    prefix = str(row["id"]).partition("_")[0]
    return row.get("domain") or _PREFIXES.get(prefix, prefix)


def _undecoded(feature: Any) -> Any:
    """Images as the bytes that they are stored as."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list | datasets.List):
        return datasets.List(_undecoded(feature[0] if isinstance(feature, list) else feature.feature))
    return feature

"""Does a metric agree with people? Kendall's τ_b, Spearman's ρ and pairwise accuracy on human judgments.

    python -m balcap.benchmarks.agreement ratings.csv --metric b_capscore --image_root images \\
        --judge.model openai/gpt-4o-mini

The table is CSV, JSON or JSON lines. Each row has an ``image``, and either a ``caption`` with its ``human`` score (any
scale, higher is better), or ``caption_1``, ``caption_2`` with ``human``: 1, 2 or 0 for a tie. ``reference`` is what a
person wrote about the image, for metrics that need one. A metric that somebody else has computed is a column:
``--metric column:clipscore`` (``clipscore``, or ``clipscore_1`` and ``clipscore_2``), without judge and images.

Intervals are bootstraps over images. As appendix A.5 of arXiv 2605.07394 does for its judges and prompts, for yours.
"""

from __future__ import annotations

import asyncio
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from balcap.benchmarks.scores import RESAMPLES, Score
from balcap.data.images import BadImage
from balcap.data.json_files import DataError, read_json, read_text
from balcap.data.reader import ImageFolder
from balcap.judge import Group, Judge, Match, Rate, Task, Verify
from balcap.judge.tasks.compare import Compare
from balcap.rewards.b_capscore import b_capscore
from balcap.rewards.base import per_rollout
from balcap.rewards.linguistic import score_linguistic
from balcap.rewards.precision import score_precision
from balcap.rewards.recall import score_recall

METRICS = ("precision", "recall", "linguistic", "b_capscore", "compare")
_TIES = ("0", "tie", "")
_LEAST = 20  # images for an interval that means anything


@dataclass(frozen=True)
class Pair:
    """Two captions of an image: who is better, by people and by the metric: 1, -1, or 0 for neither."""

    image: str
    human: float
    metric: float


@dataclass(frozen=True)
class Rated:
    """A caption's scores."""

    image: str
    human: float
    metric: float


def agreement(rated: Sequence[Rated], pairs: Sequence[Pair], seed: int = 0) -> dict[str, Score]:
    """Agreement of a metric with people; what is NaN is left out.

    Args:
        rated: captions with two scores each; τ_b and ρ are over all of them.
        pairs: captions of one image. Accuracy is over those that people do not call a tie; a metric's tie counts half.

    Returns:
        ``kendall_tau_b``, ``spearman`` where captions are rated, ``pairwise_accuracy`` where there are pairs.
    """
    from scipy.stats import kendalltau, spearmanr

    rated = [one for one in rated if math.isfinite(one.human) and math.isfinite(one.metric)]
    pairs = [one for one in pairs if one.human and math.isfinite(one.metric)]
    scores: dict[str, Score] = {}
    if rated:
        human, metric = np.array([one.human for one in rated]), np.array([one.metric for one in rated])
        images = [one.image for one in rated]
        for name, correlation in (("kendall_tau_b", kendalltau), ("spearman", spearmanr)):
            scores[name] = _resampled(images, partial(_correlation, correlation, human, metric), seed)
    if pairs:
        right = np.array([(1 + np.sign(one.human * one.metric)) / 2 for one in pairs])
        images = [one.image for one in pairs]
        scores["pairwise_accuracy"] = _resampled(images, lambda rows: right[rows].mean(), seed)
    return scores


def _correlation(of: Any, human: np.ndarray, metric: np.ndarray, rows: np.ndarray) -> float:
    return of(human[rows], metric[rows])[0]


def _resampled(images: Sequence[str], statistic: Callable[[np.ndarray], float], seed: int) -> Score:
    """Of all rows, with an interval by drawing images, with all their rows, anew."""
    names, of_row = np.unique(list(images), return_inverse=True)
    rows = [np.flatnonzero(of_row == image) for image in range(len(names))]
    value, draw = float(statistic(np.arange(len(images)))), np.random.default_rng(seed)
    if len(names) < 2:
        return Score(value, math.nan, math.nan, len(names))
    drawn = [
        statistic(np.concatenate([rows[image] for image in draw.integers(len(names), size=len(names))]))
        for _ in range(RESAMPLES // 2)
    ]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Score(value, float(low), float(high), len(names))


def pairs_of(rated: Sequence[Rated]) -> list[Pair]:
    """All pairs of captions of one image."""
    by_image: dict[str, list[Rated]] = {}
    for one in rated:
        by_image.setdefault(one.image, []).append(one)
    return [
        Pair(image, float(np.sign(a.human - b.human)), float(np.sign(a.metric - b.metric)))
        for image, captions in by_image.items()
        for a, b in combinations(captions, 2)
    ]


# ── from a table ─────────────────────────────────────────────────────────────────────────────────────


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV, JSON or JSON-lines file.

    Raises:
        DataError: it cannot be read, or a row lacks what it needs, with its number.
    """
    if path.suffix in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix == ".tsv" else ","
        rows: Any = list(csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter))
    else:
        rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no list of rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: it is no object")
        wanted = {"image", "human"} | ({"caption_1", "caption_2"} if _is_pair(row) else {"caption"})
        if missing := sorted(wanted - {key for key, value in row.items() if value is not None}):
            raise DataError(f"{path}, row {number}: it has no {', '.join(missing)}; it has {', '.join(row)}")
        texts = [row[key] for key in sorted(wanted - {"human"})]
        if wrong := next((value for value in texts if not isinstance(value, str)), None):
            raise DataError(f"{path}, row {number}: {wrong!r} is no text")
        if not _is_pair(row) and not _is_number(row["human"]):
            raise DataError(f"{path}, row {number}: human is {row['human']!r}, which is no number")
        if _is_pair(row) and str(row["human"]).strip().lower() not in ("1", "2", *_TIES):
            raise DataError(f"{path}, row {number}: human is {row['human']!r}; it is 1, 2, or 0 for a tie")
    return rows


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_pair(row: Mapping[str, Any]) -> bool:
    return "caption_1" in row or "caption_2" in row


def _preference(human: Any) -> float:
    text = str(human).strip().lower()
    return 0.0 if text in _TIES else 1.0 if text == "1" else -1.0


def compare_with_people(
    rows: Sequence[Mapping[str, Any]],
    score: Callable[[int, str], float],
    prefer: Callable[[int], float] | None,
) -> tuple[list[Rated], list[Pair]]:
    """Captions and pairs with what people and the metric say.

    Args:
        rows: of the table.
        score: row number and ``caption``, ``caption_1`` or ``caption_2`` -> the metric's score, NaN where missing.
        prefer: row number -> the metric's preference, of a metric that compares; None for one that scores.
    """
    rated, pairs = [], []
    for number, row in enumerate(rows):
        if not _is_pair(row):
            rated.append(Rated(row["image"], float(row["human"]), score(number, "caption")))
            continue
        if prefer is None:
            preferred = float(np.sign(score(number, "caption_1") - score(number, "caption_2")))
        else:
            preferred = prefer(number)
        pairs.append(Pair(row["image"], _preference(row["human"]), preferred))
    return rated, [*pairs, *pairs_of(rated)]


class JudgedMetric:
    """Scores of captions by the judge: every caption of an image in the calls that they share.

    Args:
        judge: answers.
        images: where their files are.
        metric: one of `METRICS`.
    """

    def __init__(self, judge: Judge, images: ImageFolder, metric: str) -> None:
        self.judge, self.images, self.metric = judge, images, metric
        self.missing: dict[str, str] = {}
        self._scores: dict[tuple[str, str], float] = {}
        self._preferences: dict[int, float] = {}

    def judge_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Ask about every row; waits for all."""
        self.judge.run(self._all(rows))

    def score(self, image: str, caption: str) -> float:
        """NaN where a judgment is missing."""
        return self._scores.get((image, caption), math.nan)

    def prefer(self, row: int) -> float:
        """1 for the first caption, -1 for the second, 0 for a tie, NaN where the judgment is missing."""
        return self._preferences.get(row, math.nan)

    async def _all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        by_image: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            by_image.setdefault(row["image"], []).append(number)
        slots = asyncio.Semaphore(64)

        async def one(image: str, numbers: Sequence[int]) -> None:
            async with slots:
                try:
                    data, _ = await asyncio.to_thread(self.images.read, image)
                except BadImage as bad:
                    self.missing[image] = str(bad)
                    return
                if self.metric == "compare":
                    await self._compare(data, numbers, rows)
                else:
                    await self._score(image, data, [rows[number] for number in numbers])

        await asyncio.gather(*(one(image, numbers) for image, numbers in by_image.items()))

    async def _compare(self, data: bytes, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        value = {"first": 1.0, "second": -1.0, "tie": 0.0}
        for number in numbers:
            row = rows[number]
            pair = [row["caption_1"], row["caption_2"]]
            (better,) = await self.judge.ask(
                Compare, [pair], image=data, reference=row.get("reference") or ""
            )
            if isinstance(better, str):
                self._preferences[number] = value[better]

    async def _score(self, image: str, data: bytes, rows: Sequence[Mapping[str, Any]]) -> None:
        captions = [
            row[key]
            for row in rows
            for key in ("caption", "caption_1", "caption_2")
            if row.get(key) is not None
        ]
        reference = next((row["reference"] for row in rows if row.get("reference")), "")
        group = Group(self.judge, image, (data,), reference, captions)
        needs: dict[str, tuple[type[Task[Any]], ...]] = {
            "precision": (Verify,),
            "recall": (Match,),
            "linguistic": (Rate,),
        }
        tasks = needs.get(self.metric, (Verify, Match, Rate))
        judged = await group.judgments(tasks)
        of_task: tuple[tuple[Any, Any], ...] = (
            (Verify, score_precision),
            (Match, score_recall),
            (Rate, score_linguistic),
        )
        parts = [per_rollout(judged[task.name], score)[0] for task, score in of_task if task in tasks]
        scores = parts[0] if len(parts) == 1 else b_capscore(*parts)  # NaN where one is missing
        self._scores |= {(image, text): float(score) for text, score in zip(captions, scores, strict=True)}


def main(args: Sequence[str] | None = None) -> None:
    """See the head of the file."""
    from jsonargparse import ArgumentParser
    from rich.console import Console

    parser = ArgumentParser(
        prog="python -m balcap.benchmarks.agreement", description="Agreement of a metric with people."
    )
    parser.add_argument("table", type=str, help="CSV, JSON or JSON lines; see the head of the file.")
    parser.add_argument(
        "--metric", type=str, default="b_capscore", help=f"{', '.join(METRICS)}, or column:<name>."
    )
    parser.add_argument("--image_root", type=str | None, default=None, help="Folder of the images.")
    parser.add_argument(
        "--judge", type=Judge | None, default=None, help="The judge, as model.judge of a config."
    )
    parser.add_argument("--config", action="config")
    options = parser.instantiate(parser.parse_args(args))
    rows, metric = read_table(Path(options.table)), options.metric
    missing: Mapping[str, str] = {}
    if metric.startswith("column:"):
        name = metric.removeprefix("column:")
        if not any(key in (name, f"{name}_1", f"{name}_2") for row in rows for key in row):
            raise DataError(f"metric: {options.table} has no column {name}; it has {', '.join(rows[0])}")
        rated, pairs = compare_with_people(rows, lambda row, which: _column(rows[row], name, which), None)
    else:
        judged = _judged(options, rows, metric)
        missing = judged.missing
        rated, pairs = compare_with_people(
            rows,
            lambda row, which: judged.score(rows[row]["image"], rows[row][which]),
            judged.prefer if metric == "compare" else None,
        )
    console = Console(highlight=False, width=110)
    scores = agreement(rated, pairs)
    for name, score in scores.items():
        console.print(
            f"{name:18} {score.value:+.3f} [{score.low:+.3f}, {score.high:+.3f}]  ({score.n} images)",
            markup=False,
        )
        if score.n < _LEAST:
            console.print(f"  fewer than {_LEAST} images: the interval means little")
    metrics = [one.metric for one in rated] + [one.metric for one in pairs]
    left = sum(not math.isfinite(value) for value in metrics)
    if left:
        why = f"; images: {'; '.join(list(missing.values())[:3])}" if missing else ""
        console.print(
            f"{left} of {len(metrics)} rows and pairs have no judgment and are left out{why}",
            markup=False,
        )
    if not scores:
        raise DataError("there is nothing to compare: no row has both a judgment and a person's preference")


def _column(row: Mapping[str, Any], name: str, which: str) -> float:
    key = name if which == "caption" else f"{name}_{which[-1]}"
    try:
        return float(row[key])
    except (KeyError, TypeError, ValueError):
        return math.nan


def _judged(options: Any, rows: Sequence[Mapping[str, Any]], metric: str) -> JudgedMetric:
    if metric not in METRICS:
        raise DataError(f"metric: {metric!r} is none of {', '.join(METRICS)}, column:<name>")
    if options.judge is None or options.image_root is None:
        raise DataError(f"metric: {metric} needs --judge.model and --image_root")
    if problems := options.judge.problems("judge"):
        raise DataError("; ".join(problems))
    if not Path(options.image_root).expanduser().is_dir():
        raise DataError(f"image_root: there is no folder {options.image_root}")
    if metric in ("recall", "b_capscore"):
        without = [number for number, row in enumerate(rows) if not row.get("reference")]
        if without:
            raise DataError(f"metric: {metric} needs a column reference; row {without[0]} has none")
    if metric == "compare" and not all(map(_is_pair, rows)):
        raise DataError("metric: compare is about pairs; the rows have one caption each")
    judged = JudgedMetric(options.judge, ImageFolder(options.image_root), metric)
    try:
        judged.judge_all(rows)
        if (stopped := options.judge.stopped) is not None:
            raise DataError(
                f"stopped: {stopped}. What was paid for is in the judge's cache; the same command goes on"
            )
    finally:
        options.judge.close()
    return judged


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"Error: {error}") from None

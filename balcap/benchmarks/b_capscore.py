"""b-CapScore: precision, recall and language in one figure, on images that nobody trains on (arXiv 2605.07394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from balcap.benchmarks.base import Benchmark, BenchmarkImage, Record
from balcap.benchmarks.scores import Statistic
from balcap.data.columns import REFERENCE_UNITS
from balcap.data.reader import references_of
from balcap.data.settings import DataSettings
from balcap.data.table import load_rows
from balcap.judge import Decompose, Group, Judge, Match, Rate, Verify
from balcap.rewards.b_capscore import b_capscore
from balcap.rewards.linguistic import score_linguistic
from balcap.rewards.precision import score_precision
from balcap.rewards.recall import score_recall


class BCapScore(Benchmark):
    """Mean over captions of the harmonic mean of precision, recall and linguistic, in percent (arXiv 2605.07394).

    ``b_capscore/precision``, ``/recall`` and ``/linguistic`` are the means of its parts.

    Args:
        data: images with reference captions, in any layout of docs/data.md.
        image_root: their folder.
        cache_dir: of the table of rows.
        settings: as of `Benchmark`.
    """

    name = "b_capscore"
    tasks = (Decompose, Verify, Match, Rate)
    source = "images with captions of your own; the paper's own are not published"

    def __init__(self, data: str, cache_dir: str | None = None, **settings: Any) -> None:
        super().__init__(data, **settings)
        self.cache_dir = cache_dir

    def load(self) -> list[BenchmarkImage]:
        table, _ = load_rows(self.data, None, self.cache_dir)
        self.skipped = Counter()
        options, images = DataSettings(), []
        names, first = table.column("sample_id"), table.data.column("first").to_pylist()
        for row, name in enumerate(names):
            if first[row] != row:
                continue
            if problem := table[row]["problem"]:
                self.skipped[problem] += 1
                continue
            rows = [table[other] for other in table.same_image(row)]
            images.append(BenchmarkImage(name, self.reader(name), references_of(rows, options, name, 0)))
        return images

    async def judge_caption(self, judge: Judge, image: BenchmarkImage, caption: str) -> Record:
        reference, extras = image.row
        files = (await image.file(),)
        group = Group(judge, image.id, files, reference, [caption], extras.get(REFERENCE_UNITS))
        judged = await group.judgments((Verify, Match, Rate))
        parts = {
            "precision": _score(judged[Verify.name], score_precision),
            "recall": _score(judged[Match.name], score_recall),
            "linguistic": _score(judged[Rate.name], score_linguistic),
        }
        there = {name: value for name, value in parts.items() if value is not None}
        if len(there) < len(parts):
            return there | {"failed": 1}
        whole = b_capscore(*(torch.tensor(value, dtype=torch.float64) for value in there.values()))
        return there | {"score": float(whole), "failed": 0}

    def statistics(self, ids: Sequence[str], records: Sequence[Record]) -> dict[str, Statistic]:
        statistics = {}
        for name in ("score", "precision", "recall", "linguistic"):
            there = {i: 100 * record[name] for i, record in zip(ids, records, strict=True) if name in record}
            title = self.name if name == "score" else f"{self.name}/{name}"
            statistics[title] = Statistic.of(list(there), list(there.values()))
        return statistics


def _score(answers: Sequence[Sequence[Any | None]], score: Any) -> float | None:
    answer = answers[0][0]
    return None if answer is None else score(answer)

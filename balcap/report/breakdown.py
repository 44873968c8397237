"""Where reward was gained and lost: by what assertions are about, by length, by folder; and verdicts that contradict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from balcap.report.kinds import KINDS, kind_of
from balcap.report.rollouts import Captions
from balcap.report.run import Run

if TYPE_CHECKING:
    import pyarrow as pa

RATIO_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, np.inf)


@dataclass(frozen=True)
class Share:
    """Of statements of one kind: how many there are per caption, and which share of them is right."""

    kind: str
    per_caption: float
    right: float
    n: int


@dataclass(frozen=True)
class Bin:
    """Captions whose length ratio is in ``[low, high)``: how many, and the mean of each score (NaN where missing)."""

    low: float
    high: float
    n: int
    means: dict[str, float]


@dataclass(frozen=True)
class Folder:
    """Images of one folder of the data: how many, and the mean score before and after."""

    name: str
    n: int
    before: float
    after: float


@dataclass(frozen=True)
class Contradiction:
    """One statement about one image that the judge has judged in both ways.

    Attributes:
        sample_id: the image.
        assertion: as it was written first.
        question: ``true`` or ``pointable``.
        yes, no: how often each was the answer.
    """

    sample_id: str
    assertion: str
    question: str
    yes: int
    no: int


def by_kind(captions: Captions, statements: str, right: Sequence[str]) -> list[Share]:
    """Of each kind of statement, the share that is right.

    Args:
        captions: that were judged.
        statements: a column of lists of texts: ``assertions`` or ``reference_units``.
        right: columns of flags that must all be true: ``true`` and ``pointable``, or ``covered``.
    """
    flat = _flat(captions, statements, right)
    if flat is None:
        return []
    _, texts, flags = flat
    encoded = texts.dictionary_encode()
    kinds = np.array([KINDS.index(kind_of(text)) for text in encoded.dictionary.to_pylist()], int)
    kind, good = kinds[encoded.indices.to_numpy()], np.logical_and.reduce(flags)
    counts = np.bincount(kind, minlength=len(KINDS))
    hits = np.bincount(kind, good, minlength=len(KINDS))
    judged = max(1, len(captions) - captions.table[right[0]].null_count)
    return [
        Share(name, int(n) / judged, float(hit) / int(n), int(n))
        for name, n, hit in zip(KINDS, counts, hits, strict=True)
        if n
    ]


def by_length(captions: Captions, names: Sequence[str]) -> list[Bin]:
    """Mean scores of captions by their length over the reference's; empty bins are left out."""
    ratio, values = captions.length_ratio, {name: captions.values(name) for name in names}
    bins = []
    for low, high in pairwise(RATIO_EDGES):
        inside = (ratio >= low) & (ratio < high)
        if n := int(inside.sum()):
            bins.append(Bin(low, high, n, {name: _mean(of[inside]) for name, of in values.items()}))
    return bins


def by_folder(run: Run, score: str = "b_capscore", limit: int = 20) -> list[Folder]:
    """Mean score of the held-out images of each folder of the data before and after, the largest folders first."""
    before, after = run.rollouts.ends
    if before is None or after is None:
        return []
    first, last = before.scores(score), after.scores(score)
    images = [image for image in last if image in first]
    parents = [image.split("/")[:-1] for image in images]
    depth = next((d for d in (1, 2, 3) if len({tuple(p[:d]) for p in parents}) > 1), 1)
    folders: dict[str, list[str]] = {}
    for image, parent in zip(images, parents, strict=True):
        folders.setdefault("/".join(parent[:depth]) or ".", []).append(image)
    rows = [
        Folder(name, len(of), _mean([first[i] for i in of]), _mean([last[i] for i in of]))
        for name, of in folders.items()
    ]
    return sorted(rows, key=lambda row: -row.n)[:limit]


def contradictions(captions: Sequence[Captions], limit: int = 50) -> list[Contradiction]:
    """Statements about one image that were judged both ways, the most often judged first.

    Two statements are the same if they differ in nothing but case, punctuation and articles.
    """
    import pyarrow as pa

    flats = [flat for part in captions if (flat := _flat(part, "assertions", ("true", "pointable")))]
    if not flats:
        return []
    images = pa.concat_arrays([images for images, _, _ in flats]).dictionary_encode()
    texts = pa.concat_arrays([texts for _, texts, _ in flats]).dictionary_encode()
    wordings = texts.dictionary.to_pylist()
    numbers: dict[str, int] = {}
    same = np.array([numbers.setdefault(_normal(text), len(numbers)) for text in wordings], int)
    text_ids = texts.indices.to_numpy().astype(np.int64)
    key = images.indices.to_numpy().astype(np.int64) * max(1, len(numbers)) + same[text_ids]
    _, first, statement = np.unique(key, return_index=True, return_inverse=True)
    total = np.bincount(statement)
    found = []
    names = images.dictionary.to_pylist()
    for column, question in enumerate(("true", "pointable")):
        answers = np.concatenate([flags[column] for _, _, flags in flats])
        yes = np.bincount(statement, answers).astype(int)
        both = np.flatnonzero((yes > 0) & (yes < total))
        order = both[np.argsort(-np.minimum(yes, total - yes)[both], kind="stable")][:limit]
        found += [
            Contradiction(
                names[images.indices[int(first[i])].as_py()],
                wordings[text_ids[first[i]]],
                question,
                int(yes[i]),
                int(total[i] - yes[i]),
            )
            for i in order
        ]
    return sorted(found, key=lambda one: -min(one.yes, one.no))[:limit]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points ``(x, y)`` those that no other one is at least as good as in both, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _flat(
    captions: Captions, statements: str, flags: Sequence[str]
) -> tuple[pa.Array, pa.Array, list[np.ndarray]] | None:
    """Image, text and flags of every statement of the captions that were judged; None without any."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = captions.table
    if not {statements, *flags} <= set(table.column_names) or not len(captions):
        return None
    lengths = [pc.list_value_length(table[name]) for name in (statements, *flags)]
    judged = pc.is_valid(lengths[0])
    for other in lengths[1:]:
        judged = pc.and_(judged, pc.fill_null(pc.equal(lengths[0], other), False))
    table = table.filter(judged)
    if not table.num_rows:
        return None

    def one(name: str) -> Any:
        return pa.concat_arrays(pc.list_flatten(table[name]).chunks)

    parents = pc.list_parent_indices(table[statements].combine_chunks())
    images = table["sample_id"].combine_chunks().take(parents)
    texts = one(statements)
    if not len(texts):
        return None
    images = images.combine_chunks() if hasattr(images, "combine_chunks") else images
    return images, texts, [one(name).to_numpy(zero_copy_only=False).astype(bool) for name in flags]


def _normal(text: str) -> str:
    return " ".join(re.sub(r"\b(?:a|an|the)\b|[^\w\s]", " ", text.lower()).split())


def _mean(values: Any) -> float:
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")

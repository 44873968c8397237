"""Images with their captions: the held-out ones before and after, and groups of training as the judge saw them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from balcap.data.layouts import BETWEEN
from balcap.report.rollouts import Captions
from balcap.report.run import PARTS, Run
from balcap.report.thumbnails import FOLDER, thumbnail_path

SIZES = (384, 256, 160, 96)
"""Pixels of the longer side of an image: the largest with which all fit `IMAGE_BYTES`."""
IMAGE_BYTES = 10_000_000
SHARED = 12
"""Images that runs must have in common to be compared on them."""
SCALES = ("clarity", "fluency", "coherency")


@dataclass(frozen=True)
class Reward:
    """Of one caption: its value, and what the length mask and other transforms left of it; None where missing."""

    name: str
    value: float | None
    shaped: float | None

    @property
    def struck(self) -> bool:
        """Whether a transform changed it."""
        return self.value is not None and self.shaped is not None and self.value != self.shaped


@dataclass(frozen=True)
class Shown:
    """One caption of a card.

    Attributes:
        label: above it, such as ``before``.
        caption: its text.
        tokens, ratio: its length, and that over the reference's; ratio None without a reference.
        masked: outside the bounds of the length mask.
        truncated: cut at the limit of tokens.
        score: its b-CapScore, or its first reward; None where missing.
        rewards: of the run.
        scales: name -> clarity, fluency, coherency in [0, 1].
        advantage: in training.
        assertions: what it says, each with ``yes`` (true and pointable), ``vague`` (true, not pointable), ``no`` (false)
            or ``unknown`` (not judged).
        units: of the reference, each with ``yes`` (covered), ``no`` or ``unknown``.
    """

    label: str
    caption: str
    tokens: int
    ratio: float | None
    masked: bool
    truncated: bool
    score: float | None
    rewards: Sequence[Reward]
    scales: Mapping[str, float]
    advantage: float | None
    assertions: Sequence[tuple[str, str]]
    units: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """One image with its captions.

    Attributes:
        sample_id, prompt, reference: of the row.
        kind: ``held-out`` or ``group``.
        where: such as ``step 40``; may be empty.
        captions: before and after, or a group.
        gain: score after minus before; None in a group or where one is missing.
        spread: standard deviation of the scores in a group; None elsewhere.
        images: data URIs; empty where the image is not at hand.
    """

    sample_id: str
    prompt: str
    reference: str
    kind: str
    where: str
    captions: Sequence[Shown]
    gain: float | None = None
    spread: float | None = None
    images: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of its longest caption after training, or of its group."""
        return max(shown.tokens for shown in (self.captions[1:] or self.captions))

    @property
    def masked(self) -> bool:
        """Whether one of its captions is outside the bounds of the length mask."""
        return any(shown.masked for shown in self.captions)

    @property
    def false(self) -> bool:
        """Whether an assertion of its last caption, or of any of a group, is false."""
        shown = self.captions if self.kind == "group" else self.captions[-1:]
        return any(verdict == "no" for one in shown for _, verdict in one.assertions)

    @property
    def unjudged(self) -> bool:
        """Whether a reward of one of its captions is missing."""
        return any(reward.value is None for shown in self.captions for reward in shown.rewards)


def held_out(runs: Sequence[Run], limit: int) -> list[Card]:
    """Held-out images with the captions before the first update and after the last.

    Of several runs: those images that all of them hold out, with the caption before of the first run and after of each; of
    runs that hold out other images, each run's own.

    Args:
        runs: that are compared.
        limit: of cards. Where there are more images, the largest gains and losses, the longest captions and those
            outside the bounds of the length mask are among them, and the others at even distances.
    """
    ends = [(run, *run.rollouts.ends) for run in runs]
    whole = [(run, before, after) for run, before, after in ends if after is not None]
    shared = set.intersection(*(set(after.texts("sample_id")) for _, _, after in whole)) if whole else set()
    if len(shared) >= SHARED or len(whole) == 1:
        return _held_out(whole, shared, limit)
    each = [
        _held_out([one], set(one[2].texts("sample_id")), limit // len(whole), one[0].name) for one in whole
    ]
    return [card for cards in each for card in cards]


def _held_out(
    ends: Sequence[tuple[Run, Captions | None, Captions]], images: set[str], limit: int, where: str = ""
) -> list[Card]:
    """Cards of these images, which all of the runs have."""
    first_run, before, last = ends[0]
    places, scores = _places(last), _scores(last)
    start = {} if before is None else _places(before)
    names = [image for image in places if image in images and (before is None or image in start)]
    at = [places[image] for image in names]
    gains = np.full(len(names), np.nan)
    if before is not None:
        gains = scores[at] - _scores(before)[[start[image] for image in names]]
    lengths, outside = last.column("length")[at], _outside(last, first_run)[at]
    chosen = _choose([-gains, gains, -lengths, np.where(outside, -lengths, np.nan)], len(names), limit)
    columns: list[tuple[str, Run, Captions]] = [] if before is None else [("before", first_run, before)]
    columns += [("after" if len(ends) == 1 else f"after, {run.name}", run, after) for run, _, after in ends]
    rows = [captions.rows([_places(captions)[names[c]] for c in chosen]) for _, _, captions in columns]
    cards = []
    for of_image in zip(*rows, strict=True):
        shown = [_shown(label, row, run) for (label, run, _), row in zip(columns, of_image, strict=True)]
        gain = _gain(shown) if before is not None else None
        cards.append(_card(of_image[0], "held-out", where, shown, gain=gain))
    return cards


def groups(run: Run, limit: int, where: str = "") -> list[Card]:
    """Groups of training captions: those whose scores differ most, those with captions outside the length mask's bounds,
    and the latest; of the groups whose image was kept where there are enough."""
    train = run.rollouts.train
    if train is None or not len(train):
        return []
    keys = np.stack([train.column(name) for name in ("step", "rank", "batch", "group")], 1)
    ids, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    scores, outside = _scores(train), _outside(train, run)
    spread = _spread(scores, group, len(ids))
    masked = np.bincount(group, outside, len(ids))
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(ids)))
    names = train.table["sample_id"].take(order[starts]).to_pylist()
    there = np.array([bool(_files(run, name)) for name in names])
    if there.sum() >= min(limit, len(ids)):
        spread, masked = np.where(there, spread, np.nan), np.where(there, masked, 0)
    latest = np.where(there | (not there.any()), -np.arange(len(ids)), np.nan)
    chosen = _choose([-spread, np.where(masked > 0, -masked, np.nan), latest], len(ids), limit, rest=False)
    cards = []
    for number in chosen:
        ends = (*starts, len(order))
        rows = train.rows(order[ends[number] : ends[number + 1]])
        shown = [_shown(f"caption {row['rollout'] + 1}", row, run) for row in rows]
        value = None if math.isnan(spread[number]) else float(spread[number])
        cards.append(_card(rows[0], "group", f"{where}step {rows[0]['step']}", shown, spread=value))
    return cards


def add_images(cards: Sequence[Card], runs: Sequence[Run], budget: int = IMAGE_BYTES) -> None:
    """Put the images into the cards, as large as all of them fit into so many bytes."""
    files = {
        card.sample_id: next(filter(None, (_files(run, card.sample_id) for run in runs)), [])
        for card in cards
    }
    for size in SIZES:
        uris, total = {}, 0
        for sample_id, paths in files.items():
            uris[sample_id] = [uri for path in paths if (uri := _data_uri(path, size))]
            total += sum(map(len, uris[sample_id]))
            if total > budget:
                break
        else:
            break
    else:
        return
    for card in cards:
        card.images.extend(uris[card.sample_id])


def _files(run: Run, sample_id: str) -> list[Path]:
    """The images of a row: those that the run has kept, else those of the data set where they are on this machine."""
    number = len(sample_id.split(BETWEEN))
    kept = [thumbnail_path(run.rollouts.folder / FOLDER, sample_id, n) for n in range(number)]
    if kept[0].is_file():
        return [path for path in kept if path.is_file()]
    root = Path(run.setting("data.image_root", "."))
    paths = [(root / name).resolve() for name in sample_id.split(BETWEEN)]
    return [path for path in paths if path.is_relative_to(root.resolve()) and path.is_file()]


def _data_uri(path: Path, size: int) -> str | None:
    """None for a file that is no image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((size, size))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _choose(criteria: Sequence[np.ndarray], total: int, limit: int, rest: bool = True) -> list[int]:
    """Numbers below `total`, at most `limit`: the smallest by each criterion in turn (NaN never), then, with `rest`, others
    at even distances."""
    if total <= limit and rest:
        return list(range(total))
    orders = [
        [int(i) for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
        for values in criteria
    ]
    in_turn = [i for place in zip_longest(*orders) for i in place if i is not None]
    wanted = limit - (limit // (len(criteria) + 1) if rest else 0)
    chosen = list(dict.fromkeys(in_turn))[:wanted]
    if rest:
        others = sorted(set(range(total)) - set(chosen))
        wanted = limit - len(chosen)
        chosen += [others[i * len(others) // wanted] for i in range(wanted)]
    return chosen


def _scores(captions: Captions) -> np.ndarray:
    """``[N]`` b-CapScore, or the first reward of a run that has not its parts."""
    scores = captions.values("b_capscore")
    if np.isnan(scores).all():
        rewards = [name for name in captions.table.column_names if name.startswith("reward/")]
        return captions.column(rewards[0]) if rewards else scores
    return scores


def _outside(captions: Captions, run: Run) -> np.ndarray:
    low, high = run.bounds
    ratio = captions.length_ratio
    return (ratio < low) | (ratio > high)  # False without a reference


def _spread(scores: np.ndarray, group: np.ndarray, number: int) -> np.ndarray:
    """``[number]`` standard deviation (ddof 1) within each group of what is there; NaN below two."""
    there = ~np.isnan(scores)
    count = np.bincount(group, there, number)
    safe = np.where(there, scores, 0.0)
    mean = np.bincount(group, safe, number) / np.maximum(count, 1)
    squares = np.bincount(group, np.where(there, (safe - mean[group]) ** 2, 0.0), number)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def _places(captions: Captions) -> dict[str, int]:
    """Image -> its first row."""
    places: dict[str, int] = {}
    for number, image in enumerate(captions.texts("sample_id")):
        places.setdefault(image, number)
    return places


def _gain(shown: Sequence[Shown]) -> float | None:
    """Mean score after minus score before."""
    after = [one.score for one in shown[1:] if one.score is not None]
    if not after or shown[0].score is None:
        return None
    return sum(after) / len(after) - shown[0].score


def _card(row: Mapping[str, Any], kind: str, where: str, shown: Sequence[Shown], **values: Any) -> Card:
    return Card(
        row["sample_id"], row.get("prompt") or "", row.get("reference") or "", kind, where, shown, **values
    )


def _shown(label: str, row: Mapping[str, Any], run: Run) -> Shown:
    names = [name.split("/", 1)[1] for name in row if name.startswith("reward/")]
    rewards = [Reward(name, row[f"reward/{name}"], row.get(f"shaped/{name}")) for name in names]
    values = {reward.name: reward.value for reward in rewards}
    low, high = run.bounds
    ratio = row["length"] / row["reference_length"] if row["reference_length"] else None
    return Shown(
        label=label,
        caption=row["caption"],
        tokens=row["length"],
        ratio=ratio,
        masked=ratio is not None and not low <= ratio <= high,
        truncated=bool(row.get("truncated")),
        score=_score(values),
        rewards=rewards,
        scales={name: row[name] for name in SCALES if row.get(name) is not None},
        advantage=row.get("advantage"),
        assertions=_verdicts(row.get("assertions"), row.get("true"), row.get("pointable")),
        units=_verdicts(row.get("reference_units"), row.get("covered")),
    )


def _score(values: Mapping[str, float | None]) -> float | None:
    parts = [values.get(name) for name in PARTS]
    if not set(PARTS) <= set(values):
        return next(iter(values.values()), None)
    if any(part is None for part in parts):
        return None
    return 0.0 if 0 in parts else len(parts) / sum(1 / part for part in parts if part)


def _verdicts(
    texts: Sequence[str] | None, true: Sequence[bool] | None, pointable: Sequence[bool] | None = None
) -> list[tuple[str, str]]:
    """Each text with its verdict; `pointable` is left out where it was not asked."""
    texts = texts or []
    if true is None or len(true) != len(texts):
        return [(text, "unknown") for text in texts]
    sure = pointable if pointable is not None and len(pointable) == len(texts) else [True] * len(texts)
    return [
        (text, ("yes" if points else "vague") if is_true else "no")
        for text, is_true, points in zip(texts, true, sure, strict=True)
    ]

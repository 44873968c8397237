"""Kinds of assertions, lengths, folders, contradictions, Pareto fronts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.report import breakdown
from balcap.report.kinds import KINDS, kind_of
from balcap.report.rollouts import Captions
from balcap.report.run import Run
from tests.report_runs import write_run


@pytest.mark.parametrize(
    ("assertion", "kind"),
    [
        ("There is a pink circle.", "object"),
        ("There are two shapes.", "number"),
        ("The pink circle is large.", "size"),
        ("The background is brown.", "colour"),
        ("The red box is to the left of the dog.", "place"),
        ("A man is walking his dog.", "action"),
        ("The table is made of wood.", "material"),
        ("The sign reads STOP.", "text"),
        ("The scene has an inviting atmosphere.", "mood"),
        ("There is a sense of calm.", "mood"),
        ("", "object"),
    ],
)
def test_kind(assertion: str, kind: str) -> None:
    assert kind in KINDS
    assert kind_of(assertion) == kind


def captions(*rows: dict[str, Any]) -> Captions:
    common = {"sample_id": "a/1.jpg", "step": 1, "length": 10, "reference_length": 10}
    types = {
        "true": pa.list_(pa.bool_()),
        "pointable": pa.list_(pa.bool_()),
        "assertions": pa.list_(pa.string()),
    }
    table = pa.Table.from_pylist([common | row for row in rows])
    for name, kind in types.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return Captions(table)


SEEN = "There is a dog."


def test_by_kind_counts_what_was_judged() -> None:
    some = captions(
        {"assertions": [SEEN, "The dog is large."], "true": [True, False], "pointable": [True, True]},
        {"assertions": [SEEN], "true": [True], "pointable": [False]},
        {"assertions": [SEEN, SEEN], "true": None, "pointable": None},  # the judge failed
        {"assertions": [], "true": [], "pointable": []},
    )
    shares = {share.kind: share for share in breakdown.by_kind(some, "assertions", ("true", "pointable"))}
    # 3 captions were judged; of two objects one is true and pointable; the size is false
    assert (shares["object"].n, shares["object"].right) == (2, 0.5)
    assert shares["object"].per_caption == pytest.approx(2 / 3)
    assert (shares["size"].n, shares["size"].right) == (1, 0.0)


def test_by_length_leaves_out_captions_without_reference() -> None:
    some = captions(
        {"length": 4, "reward/recall": 0.2},
        {"length": 20, "reward/recall": 0.6},
        {"length": 24, "reward/recall": None},
        {"length": 24, "reference_length": 0, "reward/recall": 1.0},
    )
    bins = breakdown.by_length(some, ["recall"])
    assert [(one.low, one.high, one.n) for one in bins] == [(0.25, 0.5, 1), (2.0, 3.0, 2)]
    assert [one.means["recall"] for one in bins] == [pytest.approx(0.2), pytest.approx(0.6)]


def test_contradictions() -> None:
    def judged(text: str, true: bool, pointable: bool = True, image: str = "a") -> dict[str, Any]:
        return {"sample_id": image, "assertions": [text], "true": [true], "pointable": [pointable]}

    some = captions(
        judged("There is a dog.", True),
        judged("there is the dog", False),
        judged("There is a dog", False),
        judged("There is a cat.", True),
        judged("There is a cat.", True, pointable=False),
        judged("There is a cat.", False, image="b"),  # another image: no contradiction
    )
    found = breakdown.contradictions([some])
    assert [(one.assertion, one.question, one.yes, one.no) for one in found] == [
        ("There is a dog.", "true", 1, 2),
        ("There is a cat.", "pointable", 1, 1),
    ]
    assert breakdown.contradictions([captions(judged("x", True))]) == []


def test_by_folder(tmp_path: Path) -> None:
    run = Run.read(write_run(tmp_path / "a", steps=2, images=7))
    folders = breakdown.by_folder(run, "recall")
    assert [(row.name, row.n) for row in folders] == [("coco/0", 3), ("coco/1", 2), ("coco/2", 2)]
    before = run.rollouts.ends[0]
    assert before is not None
    own = [value for image, value in before.scores("recall").items() if image.startswith("coco/1/")]
    assert folders[1].before == pytest.approx(sum(own) / 2)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_pareto_front(points: list[tuple[float, float]]) -> None:
    front = breakdown.pareto_front(points)

    def beaten(point: tuple[float, float]) -> bool:
        return any(q != point and q[0] >= point[0] and q[1] >= point[1] for q in points)

    assert front == sorted({point for point in points if not beaten(point)})

"""Worlds in which rewards compete, captions of a third and three times, and spreads within groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.shapes.benchmarks import write_benchmarks
from examples.shapes.competition import COMPETITIONS, Competition
from examples.shapes.dataset import write_dataset, write_rows
from examples.shapes.language import covered, is_true, main_facts, read_facts
from examples.shapes.questions import choose, questions
from examples.shapes.scene import Scene, Thing, scene_of
from examples.shapes.spreads import spreads, table

SCENE = Scene(
    (
        Thing("red", "circle", "large", "top left", ("white", "dot")),
        Thing("blue", "star", "small", "center", ("black", "ring")),
        Thing("green", "cross", "small", "bottom left"),
    ),
    "grey",
)


def rows_of(out: Path, **options: Any) -> list[tuple[dict[str, Any], Scene]]:
    """Rows with their scenes."""
    rows = json.loads(write_dataset(out, **options).read_text())
    return [(row, scene_of((out / row["image"]).read_bytes())) for row in rows]


def reference(row: dict[str, Any]) -> str:
    return row["conversations"][1]["value"]


def test_the_first_world_holds_more_and_its_references_err(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, images=300, competition="first")
    things = [thing for _, scene in rows for thing in scene.things]
    assert {len(scene.things) for _, scene in rows} == {2, 3, 4, 5}
    assert len(things) / len(rows) == pytest.approx(3.85, abs=0.2)  # 2 * .1 + 3 * .25 + 4 * .35 + 5 * .3
    assert np.mean([thing.mark is not None for thing in things]) == pytest.approx(0.9, abs=0.03)
    told = [(read_facts(reference(row)), scene) for row, scene in rows]
    assert np.mean([any(f[0] == "meta" for f in facts) for facts, _ in told]) == pytest.approx(0.3, abs=0.09)
    named = sum(sum(f[0] == "exists" for f in facts) for facts, _ in told)
    assert named / len(things) == pytest.approx(0.9, abs=0.04)
    stated = [
        is_true(f, scene) for facts, scene in told for f in facts if f[0] in ("exists", "size", "place")
    ]
    assert 0.9 < np.mean(stated) < 0.99
    assert any(question["category"] == "mark" for row, _ in rows for question in row["questions"])


def test_a_reference_names_at_least_one_thing() -> None:
    nothing = Competition(left_out=1.0)
    for seed in range(20):
        text = nothing.reference(SCENE, np.random.default_rng(seed), np.random.default_rng(seed))
        assert sum(fact[0] == "exists" for fact in read_facts(text)) == 1


def test_a_world_without_settings_is_the_plain_one(tmp_path: Path) -> None:
    plain = rows_of(tmp_path / "plain", images=20, seed=3)
    assert plain == rows_of(tmp_path / "none", images=20, seed=3, competition="none")
    for row, scene in plain:
        assert all(is_true(fact, scene) for fact in read_facts(reference(row)))
        assert not any(question["category"] == "mark" for question in row["questions"])


@pytest.mark.parametrize("world", ["first", "second"])
def test_benchmarks_of_a_world_have_faultless_references(world: Any, tmp_path: Path) -> None:
    out = write_benchmarks(tmp_path, images=25, competition=world)
    for row in json.loads((out / "shapes.json").read_text()):
        scene = scene_of((out / row["image"]).read_bytes())
        assert len(scene.things) in ({2, 3, 4, 5} if world == "first" else {1, 2, 3})
        facts = set(read_facts(reference(row)))
        assert all(is_true(fact, scene) for fact in facts)
        assert all(covered(fact, facts) for fact in main_facts(scene))
    asked = [q for entry in json.loads((out / "captionqa.json").read_text()) for q in entry["questions"]]
    assert any(q["category"] == "mark" for q in asked) == (world == "first")


def test_the_second_world_differs_in_kind() -> None:
    first, second = COMPETITIONS["first"], COMPETITIONS["second"]
    assert sum(first.counts) == pytest.approx(1)
    assert sum(second.counts) == pytest.approx(1)
    mean = {name: np.dot(range(1, 6), COMPETITIONS[name].counts) for name in COMPETITIONS}
    assert mean["second"] < mean["none"] < mean["first"]
    assert second.left_out > first.left_out
    assert second.wrong > first.wrong


def test_a_question_about_a_mark_rewards_a_guess() -> None:
    asked = [q for q in questions(SCENE, np.random.default_rng(0), 99, marks=True) if q["category"] == "mark"]
    assert [q["question"] for q in asked] == [
        "Which tiny mark does the red circle have?",
        "Which tiny mark does the blue star have?",
    ]
    first = asked[0]
    options = first["choices"]
    assert len(set(options)) == 4
    told = choose(first["question"], options, "There is a red circle with a tiny white dot in the center.")
    assert options[told] == first["answer"] == "white dot"
    wrong = next(option for option in options if option != "white dot")
    assert options[choose(first["question"], options, f"A red circle has a tiny {wrong}.")] == wrong
    cannot = [*options, "Cannot answer from the caption"]
    assert choose(first["question"], cannot, "There is a red circle.") == 4
    assert not [q for q in questions(SCENE, np.random.default_rng(0), 99) if q["category"] == "mark"]


@pytest.mark.parametrize(("captions", "share"), [("short", 1 / 3), ("long", 3.0)])
def test_captions_may_be_a_third_or_three_times_as_long(captions: Any, share: float, tmp_path: Path) -> None:
    options = {"images": 120, "seed": 2}
    plain = write_rows(tmp_path / "a", **options, competition=COMPETITIONS["first"])
    other = write_dataset(tmp_path / "b", **options, competition="first", captions=captions)
    pairs = list(zip(json.loads(plain.read_text()), json.loads(other.read_text()), strict=True))
    ratios = [len(reference(mine).split()) / len(reference(its).split()) for its, mine in pairs]
    assert np.mean(ratios) == pytest.approx(share, rel=0.06)
    assert min(ratios) > 0
    for its, mine in pairs:
        assert its["image"] == mine["image"]
        assert its["questions"] == mine["questions"]
        assert (tmp_path / "a" / its["image"]).read_bytes() == (tmp_path / "b" / mine["image"]).read_bytes()
    facts = [
        (f, scene_of((tmp_path / "b" / mine["image"]).read_bytes()))
        for _, mine in pairs
        for f in read_facts(reference(mine))
    ]
    assert {fact[0] for fact, _ in facts} >= {"exists", "place", "meta"}
    true = np.mean([is_true(fact, scene) for fact, scene in facts if fact[0] == "exists"])
    assert 0.3 < true < 0.95  # some are of things that are there, some are not


def test_a_spread_is_taken_within_images(tmp_path: Path) -> None:
    # a: .2, .4: mean .3, s = .2 / sqrt(2) = .14142; b: .5, .9: s = .4 / sqrt(2) = .28284; c has one that is there
    values = {"a": [0.2, 0.4], "b": [0.5, 0.9], "c": [1.0, None]}
    rows = [
        {"sample_id": image, "reward/recall": value, "length": 10, "reference_length": 5}
        for image, of in values.items()
        for value in of
    ]
    (tmp_path / "rollouts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rollouts/validate-00000000-rank0-000000.parquet")
    found = spreads(tmp_path)
    assert found["recall"] == (pytest.approx(0.6), pytest.approx(0.21213, abs=1e-5), 1)
    assert found["length_ratio"] == (2.0, 0.0, 0)
    assert "| recall | 0.600 | 0.212 | 1 |" in list(table(tmp_path))
    with pytest.raises(ValueError, match=r"main\.py validate"):
        spreads(tmp_path / "elsewhere")

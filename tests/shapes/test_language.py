"""What the embedded world says, and what is read back from it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes.captions import clean, flawed, reference
from examples.shapes.fluency import rate
from examples.shapes.language import covered, is_pointable, is_true, quoted_facts, read_fact, read_facts, say
from examples.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    relation,
    sample_scene,
)

RED = Thing("red", "circle", "large", "top left", ("white", "dot"))
BLUE = Thing("blue", "square", "small", "bottom left")
SCENE = Scene((RED, BLUE), "grey")
R, B = ("red", "circle"), ("blue", "square")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (
            "A large red circle sits at the top left.",
            [("exists", R), ("size", R, "large"), ("place", R, "top left")],
        ),
        ("In the top left corner is a red circle.", [("exists", R), ("place", R, "top left")]),
        ("A red circle. It has a tiny white dot.", [("exists", R), ("mark", R, "white", "dot")]),
        (
            "The red circle is above the blue square.",
            [("exists", R), ("exists", B), ("relation", R, "above", B)],
        ),
        (
            "Below the red circle is a blue square.",
            [("exists", R), ("exists", B), ("relation", B, "below", R)],
        ),
        ("This image shows two shapes on a grey background.", [("count", 2), ("background", "grey")]),
        ("The red circle is large.", [("exists", R), ("size", R, "large")]),
        ("The mood is calm.", [("meta", "the mood is calm")]),
        ("A red circle adds depth.", [("exists", R), ("meta", "a red circle adds depth")]),
        ("Zebra quux.", [("unclear", "zebra quux")]),
        ("Nearby, there is a circle.", [("exists", (None, "circle"))]),
        ("red circle red circle", [("exists", R)]),
        ("This image shows.", []),
        ("", []),
    ],
)
def test_facts_are_read_from_text(text: str, facts: list) -> None:
    assert read_facts(text) == facts


def test_facts_come_with_their_words() -> None:
    text = (
        "On the left is a Large red circle. It has a tiny white dot. Above the red circle is a star. So calm."
    )
    assert quoted_facts(text) == {
        ("exists", R): "red circle",
        ("size", R, "large"): "Large",
        ("place", R, "middle left"): "On the left",
        ("mark", R, "white", "dot"): "tiny white dot",
        ("exists", (None, "star")): "star",
        ("relation", (None, "star"), "above", R): "Above",
        ("meta", "so calm"): "So calm",
    }


@pytest.mark.parametrize("write", [reference, clean, flawed])
def test_every_fact_that_is_said_is_read_back(write) -> None:
    rng = np.random.default_rng(0)
    said = 0
    for _ in range(300):
        for fact in read_facts(write(sample_scene(rng), rng)):
            if is_pointable(fact):
                assert read_fact(say(fact)) == fact
                said += 1
    assert said > 1000


def test_references_are_true_and_flawed_captions_are_not() -> None:
    rng = np.random.default_rng(1)
    shares = {}
    for write in (reference, clean, flawed):
        right = []
        for _ in range(300):
            scene = sample_scene(rng)
            right += [is_true(f, scene) and is_pointable(f) for f in read_facts(write(scene, rng))]
        shares[write.__name__] = np.mean(right)
    assert shares["reference"] == 1
    assert 0.9 < shares["clean"] < 1  # closing remarks cannot be pointed at
    assert 0.4 < shares["flawed"] < 0.75


def test_flawed_captions_have_the_faults_of_real_ones() -> None:
    rng = np.random.default_rng(2)
    ratios, left_out, invented, of = [], 0, 0, 0
    for _ in range(500):
        scene = sample_scene(rng)
        text = flawed(scene, rng)
        ratios.append(len(text.split()) / len(reference(scene, rng).split()))
        named = {f[1] for f in read_facts(text) if f[0] == "exists"}
        there = {(t.colour, t.shape) for t in scene.things}
        of += len(there)
        left_out += len(there - named)
        invented += len(named - there)
    assert 0.25 < left_out / of < 0.55
    assert invented / of > 0.1
    assert np.quantile(ratios, 0.05) < 0.35
    assert np.quantile(ratios, 0.97) > 1.9


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_read_and_rated(text: str) -> None:
    facts = read_facts(text)
    assert len(facts) == len(set(facts))
    assert all(0 <= score <= 1 for score in rate(text))


def test_truth_goldens() -> None:
    assert is_true(("place", R, "top left"), SCENE)
    assert not is_true(("place", R, "center"), SCENE)
    assert is_true(("relation", R, "above", B), SCENE)
    assert not is_true(("relation", B, "above", R), SCENE)
    assert is_true(("exists", (None, "circle")), SCENE)
    assert is_true(("count", 2), SCENE)
    assert not is_true(("meta", "calm"), SCENE)
    assert not is_pointable(("unclear", "quux"))


def test_what_covers_a_reference_unit() -> None:
    assert covered(("relation", R, "above", B), {("relation", B, "below", R)})
    assert covered(("exists", R), {("size", R, "large")})
    assert covered(("count", 2), {("exists", R), ("exists", B)})
    assert not covered(("count", 2), {("exists", R)})
    assert not covered(("size", R, "large"), {("size", R, "small")})


def test_relations_follow_the_longer_axis() -> None:
    assert relation("top left", "bottom middle") == "above"
    assert relation("top right", "middle left") == "right of"
    assert relation("top left", "center") is None


def test_language_is_rated_by_degrees() -> None:
    opening, first = "This image shows two shapes on a grey background.", "A red circle sits at the top left."
    second = "a blue square sits at the bottom left."
    plain = f"{opening} {first} Nearby, {second}"
    closed = f"{plain} Overall, the composition feels calm and balanced."
    broken = f"{opening.lower()} red circle sits at the top left. Nearby nearby, {second[:-1]}"
    listed = "There is a red circle. There is a blue square. There is a green star. There is a pink cross."
    twice = f"{plain} {first} {first}"
    total = {name: sum(rate(text)) / 3 for name, text in
             {"plain": plain, "closed": closed, "broken": broken, "listed": listed, "twice": twice}.items()}  # fmt: skip
    assert total["closed"] > total["plain"] > total["broken"]
    assert total["plain"] > total["listed"]
    assert total["plain"] > total["twice"]
    assert len({round(value, 6) for value in total.values()}) == 5
    # two good sentences, both clear (1, 1), both grammatical (1, 1), opening and no transition: 0.6 + 0.15
    assert rate(
        "The picture shows one shape on a grey background. A red circle sits at the top."
    ) == pytest.approx((1.0, 1.0, 0.75))


def test_the_world_is_as_large_as_it_says() -> None:
    assert len(COLOURS) >= 8
    assert len(SHAPES) >= 5
    assert len(SIZES) in (2, 3)
    assert len(PLACES) == 9
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng) for _ in range(400)]
    assert {len(s.things) for s in scenes} == {1, 2, 3, 4, 5}
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    for scene in scenes:
        assert Scene.from_json(scene.to_json()) == scene
        assert len({t.place for t in scene.things}) == len(scene.things)

"""Which assertions cover a unit: named by the judge, and nobody else notices."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from balcap.judge import Group, InvalidAnswer
from balcap.judge.tasks import DecomposeSpans, Match, MatchSpans, Rate, Verify
from examples.shapes.captions import clean, flawed, reference
from examples.shapes.language import covered, read_fact, read_facts, say
from examples.shapes.oracle import answer, parts_of
from examples.shapes.scene import draw_scene, png_bytes, sample_scene
from tests.judge.test_decompose_spans import Listening

UNITS = ("There is a dog.", "The dog is brown.", "There are two animals.")
SAID = ("A dog sits.", "A cat sits.", "The dog is brown.")


def read(entry: dict[str, Any]) -> Any:
    task = MatchSpans()
    return task.parse(task.read({"captions": [{"id": 1, **entry}]}), [SAID], units=UNITS)[0]


def test_the_prompt_of_match_is_that_of_its_version() -> None:
    prompt = json.dumps(Match().messages([SAID], units=UNITS))
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == "9920f60c32fa57dc"


def test_sources_are_places_of_assertions() -> None:
    assert read({"covered": [[3, 2, 1, 2], [1, 1]], "missing": [2]}) == [[0], None, [0, 1]]
    assert read({"covered": [[1]], "missing": [2, 3]}) == [
        [],
        None,
        None,
    ]  # covered, by nothing in particular


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"covered": [[1, 4]], "missing": [2, 3]}, "it has no assertion 4, only 3"),
        ({"covered": [[1, 0]], "missing": [2, 3]}, "it has no assertion 0"),
        ({"covered": [[1, 1], [1, 2]], "missing": [2, 3]}, "each of the 3 units once"),
        ({"covered": [[1, 1]], "missing": [2]}, "each of the 3 units once"),
        ({"covered": [[]], "missing": [1, 2, 3]}, "an empty list"),
    ],
)
def test_answers_that_do_not_fit_are_refused(entry: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidAnswer, match=why):
        read(entry)


def test_where_sources_are_asked_all_other_judgments_are_the_same() -> None:
    rng = np.random.default_rng(5)
    scene = sample_scene(rng)
    picture = png_bytes(draw_scene(scene, rng), scene)
    captions = [*(flawed(scene, rng) for _ in range(4)), reference(scene, rng)]
    judge = Listening()

    def judged(*more: Any) -> Any:
        judge.asked.clear()
        group = Group(judge, "a", (picture,), reference(scene, np.random.default_rng(0)), captions)
        return judge.run(group.judgments((Verify, Match, Rate, DecomposeSpans, *more)))

    plain = judged()
    sourced = judged(MatchSpans)
    assert "match" not in {name for name, _ in judge.asked}
    assert {name: sourced[name] for name in plain.answers} == dict(plain.answers)
    units = [read_fact(unit) for unit in sourced.units[0]]
    for said, sources in zip(sourced["decompose_spans"][0], sourced["match_spans"][0], strict=True):
        facts = [read_fact(one.text) for one in said]
        for unit, places in zip(units, sources, strict=True):
            assert (places is not None) == covered(unit, set(facts))
            assert places is None or covered(unit, {facts[place] for place in places})
    assert any(places for places in sourced["match_spans"][0][-1])
    judge.close()


def test_what_sources_cost_is_as_the_docs_say() -> None:
    """docs/judges.md: 84 tokens per caption more than 149 to read, 20 more than 47 to write (cl100k_base)."""
    from litellm.litellm_core_utils.default_encoding import encoding

    assert encoding.name == "cl100k_base"
    rng, captions = np.random.default_rng(0), 0
    tokens = dict.fromkeys(("read", "write", "more to read", "more to write"), 0)

    def count(text: str) -> int:
        return len(encoding.encode(text, disallowed_special=()))

    def costs(task: Any, items: Any, units: Any) -> tuple[int, int]:
        messages = task.messages(items, units=units)
        asked = sum(count(part["text"]) for one in messages for part in parts_of(one))
        return asked, count(json.dumps(answer(messages)))

    for _ in range(60):
        scene = sample_scene(rng)
        units = [say(fact) for fact in read_facts(reference(scene, rng))]
        writers = [flawed if rng.random() < 0.5 else clean for _ in range(8)]
        items = [tuple(say(fact) for fact in read_facts(write(scene, rng))) for write in writers]
        items = [said for said in items if said]
        plain, sourced = costs(Match(), items, units), costs(MatchSpans(), items, units)
        captions += len(items)
        for name, value in zip(tokens, (*plain, sourced[0] - plain[0], sourced[1] - plain[1]), strict=True):
            tokens[name] += value
    means = {name: total / captions for name, total in tokens.items()}
    assert means == pytest.approx(
        {"read": 149, "write": 47, "more to read": 84, "more to write": 20}, rel=0.05
    )

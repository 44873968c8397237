"""A judge that knows the truth: litellm provider ``shapes``, model ``shapes/oracle``.

It receives exactly the messages that any judge receives, reads the scene from the image's bytes, and
answers in the JSON that the task asks for. There is no other input: which task it is stands in the
first line of the system message, the data stands in the fences of the user message. Commentary it confirms more often
than not, as a judge does who cannot refute it, and says that nobody could point at it. `noise.py` makes it err.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from litellm import CustomLLM, ModelResponse
from litellm.types.utils import Usage

from balcap.judge.tasks import (
    Answer,
    Assertion,
    CheckRubric,
    Compare,
    Criterion,
    Decompose,
    DecomposeSpans,
    Differences,
    ExtractFacts,
    Fact,
    Grade,
    Match,
    MatchFacts,
    MatchSpans,
    Quiz,
    Rate,
    Rating,
    Recaption,
    Verdict,
    Verify,
    VerifyFacts,
    WriteQuestions,
    WriteRubric,
    WrittenQuestion,
)
from examples.shapes.captions import reference
from examples.shapes.fluency import rate
from examples.shapes.language import (
    covered,
    covering,
    is_pointable,
    is_true,
    main_facts,
    quoted_facts,
    read_fact,
    read_facts,
    say,
)
from examples.shapes.noise import Noise, drawn
from examples.shapes.questions import choose, questions
from examples.shapes.rivals import differences, grades, meets, rubric
from examples.shapes.scene import Scene, scene_of

_FENCE = re.compile(r"<(\w+)>\n(.*?)\n</\1>", re.DOTALL)
_fact = lru_cache(maxsize=65536)(read_fact)


@lru_cache(maxsize=4096)
def _scene(url: str) -> Scene:
    return scene_of(base64.b64decode(url.split(",", 1)[1]))


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as a list of texts and pictures."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def answer(messages: list[dict[str, Any]], noise: Noise = Noise()) -> dict[str, Any]:  # noqa: B008  frozen
    """The oracle's answer to a judge's messages; ValueError where they hold no known task."""
    task = messages[0]["content"].split("\n", 1)[0].removeprefix("Task: ").strip()
    parts = parts_of(messages[1])  # rounds of repair may follow
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    data = {tag: json.loads(body) for tag, body in _FENCE.findall(text)}
    images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    if task == "decompose":
        return Decompose().encode([list(map(say, read_facts(c["text"]))) for c in data["captions"]])
    if task == "decompose_spans":
        quoted = (quoted_facts(caption["text"]).items() for caption in data["captions"])
        return DecomposeSpans().encode([[Assertion(say(fact), words) for fact, words in of] for of in quoted])
    if task == "verify":
        facts = [_fact(item["text"]) for item in data["assertions"]]
        confirmed = zip(facts, _confirmed(facts, images[0], noise), strict=True)
        return Verify().encode([Verdict(one, is_pointable(fact)) for fact, one in confirmed])
    if task == "match":
        units = [_fact(item["text"]) for item in data["reference_units"]]
        stated = [set(map(_fact, caption["assertions"])) for caption in data["captions"]]
        return Match().encode([_covered(units, facts, noise) for facts in stated])
    if task == "match_spans":
        units = [_fact(item["text"]) for item in data["reference_units"]]
        by_caption = [[_fact(one["text"]) for one in caption["assertions"]] for caption in data["captions"]]
        return MatchSpans().encode([_sources(units, facts, noise) for facts in by_caption])
    if task == "rate":
        texts = [caption["text"] for caption in data["captions"]]
        return Rate().encode([Rating(*(noise.rated(one, text) for one in rate(text))) for text in texts])
    if task == "recaption":
        return Recaption().encode([_description(_scene(images[0]), q["text"]) for q in data["questions"]])
    if task == "answer":
        chosen = (
            choose(q["question"], list(q["options"].values()), data["caption"]) for q in data["questions"]
        )
        return Answer().encode(list(chosen))
    if task == "quiz":
        said = _truth(_scene(images[0])) if images else ""
        return Quiz().encode(
            [choose(q["question"], list(q["options"].values()), said) for q in data["questions"]]
        )
    if task == "write_questions":
        asked = questions(_scene(images[0]), _draw(images[0]), data["number"])
        keys = ("question", "choices", "answer")
        return WriteQuestions().encode([[WrittenQuestion(*(one[key] for key in keys)) for one in asked]])
    if task == "write_rubric":
        criteria = rubric(_scene(images[0]), _draw(images[0]), data["number"])
        return WriteRubric().encode([[Criterion(**one) for one in criteria]])
    if task == "compare":
        pairs = [(pair["first"], pair["second"]) for pair in data["pairs"]]
        return Compare().encode([_better(images[0], *pair, noise) for pair in pairs])
    if task == "grade":
        return Grade().encode([grades(_scene(images[0]), caption["text"]) for caption in data["captions"]])
    if task == "differences":
        against, scene = data["reference"], _scene(images[0])
        return Differences().encode([differences(scene, c["text"], against) for c in data["captions"]])
    if task == "rubric":
        wanted = [criterion["text"] for criterion in data["criteria"]]
        return CheckRubric().encode([[meets(c["text"], one) for one in wanted] for c in data["captions"]])
    if task == "extract_facts":
        told = (read_facts(caption["text"]) for caption in data["captions"])
        return ExtractFacts().encode([[Fact(say(fact), is_pointable(fact)) for fact in of] for of in told])
    if task == "match_facts":
        known = [_fact(item["text"]) for item in data["annotated"]]
        return MatchFacts().encode([[_matched(_fact(item["text"]), known) for item in data["facts"]]])
    if task == "verify_facts":
        scene = _scene(images[0])
        return VerifyFacts().encode([[is_true(_fact(item["text"]), scene) for item in data["facts"]]])
    raise ValueError(f"shapes/oracle does not know the task {task!r}")


def _description(scene: Scene, question: str) -> str:
    """All that is true of the scene, in words that depend on the scene and the question alone."""
    seed = hashlib.sha256(f"{scene.to_json()}\n{question}".encode()).digest()
    return reference(scene, np.random.default_rng(list(seed)))


def _truth(scene: Scene) -> str:
    """All that questions ask for, in plain sentences."""
    return " ".join(map(say, main_facts(scene)))


def _draw(image: str) -> np.random.Generator:
    """Random numbers of an image alone."""
    return np.random.default_rng(list(hashlib.sha256(image.encode()).digest()))


def _matched(fact: Any, annotated: list[Any]) -> int | None:
    """The annotated fact that says the same."""
    return next(
        (place for place, other in enumerate(annotated) if covered(other, {fact}) and other[0] == fact[0]),
        None,
    )


CONFIRMED = 0.85
"""Share of commentary, such as an inviting atmosphere, that who sees the picture confirms: it cannot be refuted."""


def _confirmed(facts: Sequence[Any], image: str, noise: Noise) -> list[bool]:
    """Whether each fact is said to be true of a picture."""
    scene = _scene(image)
    right = [
        drawn(image, say(fact)) < CONFIRMED if fact[0] == "meta" else is_true(fact, scene) for fact in facts
    ]
    return [
        noise.said(one, place, len(facts), "true", image, say(fact))
        for place, (fact, one) in enumerate(zip(facts, right, strict=True))
    ]


def _covered(units: Sequence[Any], stated: set[Any], noise: Noise) -> list[bool]:
    """Whether each unit is said to be covered by what a caption states."""
    texts = sorted(map(say, stated))
    return [
        noise.said(covered(unit, stated), place, len(units), "covered", say(unit), *texts)
        for place, unit in enumerate(units)
    ]


def _sources(units: Sequence[Any], told: Sequence[Any], noise: Noise) -> list[list[int] | None]:
    """Which of the facts that a caption tells each unit follows from; None where it is said to be missing."""
    stated = set(told)
    found = zip(units, _covered(units, stated, noise), strict=True)
    return [
        [place for place, fact in enumerate(told) if fact in covering(unit, stated)] if said else None
        for unit, said in found
    ]


def _better(image: str, first: str, second: str, noise: Noise) -> str:
    if noise.first_wins(image, first, second):
        return "first"
    scene = _scene(image)
    gap = quality(scene, first) - quality(scene, second)
    return "tie" if abs(gap) < 0.02 else "first" if gap > 0 else "second"


def quality(scene: Scene, caption: str) -> float:
    """What a reader who cannot see the picture is worth a caption: true facts, for the number of things; false ones weigh
    twice, commentary a little; and half for how it reads."""
    facts = read_facts(caption)
    told = [fact for fact in facts if is_pointable(fact)]
    true = sum(is_true(fact, scene) for fact in told)
    content = true - 2 * (len(told) - true) - 0.3 * (len(facts) - len(told))
    return content / (4 * len(scene.things) + 2) + 0.5 * sum(rate(caption)) / 3


class Oracle(CustomLLM):
    """The litellm provider. It costs nothing."""

    async def acompletion(self, *args: Any, **kwargs: Any) -> ModelResponse:
        """See `litellm.acompletion`."""
        response, messages = kwargs["model_response"], kwargs["messages"]
        noise = Noise(**kwargs["optional_params"].get("noise", {}))
        content = json.dumps(answer(messages, noise))
        response.choices[0].message.content = content
        response.choices[0].finish_reason = "stop"
        response.usage = self.usage(kwargs["model"], messages, content)
        return response

    def usage(self, model: str, messages: list[dict[str, Any]], content: str) -> Usage:
        """Four characters are a token, pictures are none."""
        asked = sum(len(part.get("text", "")) for message in messages for part in parts_of(message)) // 4
        said = len(content) // 4
        return Usage(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)

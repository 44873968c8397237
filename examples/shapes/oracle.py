"""A judge that knows the truth: litellm provider ``shapes``, model ``shapes/oracle``.

It receives exactly the messages that any judge receives, reads the scene from the image's bytes, and
answers in the JSON that the task asks for. There is no other input: which task it is stands in the
first line of the system message, the data stands in the fences of the user message.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
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
    is_pointable,
    is_true,
    main_facts,
    quoted_facts,
    read_fact,
    read_facts,
    say,
)
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


def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
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
        scene, facts = _scene(images[0]), [_fact(item["text"]) for item in data["assertions"]]
        return Verify().encode([Verdict(is_true(fact, scene), is_pointable(fact)) for fact in facts])
    if task == "match":
        units = [_fact(item["text"]) for item in data["reference_units"]]
        stated = [set(map(_fact, caption["assertions"])) for caption in data["captions"]]
        return Match().encode([[covered(unit, facts) for unit in units] for facts in stated])
    if task == "rate":
        return Rate().encode([Rating(*rate(caption["text"])) for caption in data["captions"]])
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
        return Compare().encode([_better(_scene(images[0]), p["first"], p["second"]) for p in data["pairs"]])
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


def _better(scene: Scene, first: str, second: str) -> str:
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
        content = json.dumps(answer(messages))
        response.choices[0].message.content = content
        response.choices[0].finish_reason = "stop"
        response.usage = self.usage(kwargs["model"], messages, content)
        return response

    def usage(self, model: str, messages: list[dict[str, Any]], content: str) -> Usage:
        """Four characters are a token, pictures are none."""
        asked = sum(len(part.get("text", "")) for message in messages for part in parts_of(message)) // 4
        said = len(content) // 4
        return Usage(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)

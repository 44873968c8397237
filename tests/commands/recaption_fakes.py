"""A captioner with faults, and what it was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import litellm

from examples.shapes.oracle import Oracle
from tests.judge_replies import Messages, data_of, image_urls, task_of

Item = tuple[str, str]


def items_of(messages: Messages) -> list[Item]:
    """What a request asks about, item by item: (task, question and image, or caption); others as a
    whole."""
    if task_of(messages) in ("verify", "match", "quiz", "write_questions", "write_rubric"):
        return [(task_of(messages), str(messages[-1]["content"]))]
    if task_of(messages) == "recaption":
        (image,) = image_urls(messages)
        return [("recaption", f"{item['text']} {image['url']}") for item in data_of(messages, "questions")]
    return [(task_of(messages), item["text"]) for item in data_of(messages, "captions")]


class FaultyOracle(Oracle):
    """The oracle, but what `fault` says about a request goes wrong with it.

    Attributes:
        fault: request -> "refusal", "filter", "prose" (no JSON), "empty" (an empty caption), "nothing" (a
            caption that asserts nothing), "400", "401", "429"; None for the right answer.
        asked: how often each item came.
    """

    fault: ClassVar[Callable[[Messages], str | None]]
    asked: ClassVar[Counter[Item]]

    @classmethod
    def reset(cls, fault: Callable[[Messages], str | None] = lambda messages: None) -> None:
        cls.fault, cls.asked = staticmethod(fault), Counter()

    async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
        messages = kwargs["messages"]
        FaultyOracle.asked.update(items_of(messages))
        response = await super().acompletion(*args, **kwargs)
        fault, choice = FaultyOracle.fault(messages), response.choices[0]
        who = {"model": "model", "llm_provider": "faulty"}
        if fault == "refusal":
            choice.message.content, choice.message.refusal = None, "I cannot help with that."
        elif fault == "filter":
            choice.finish_reason = "content_filter"
        elif fault == "prose":
            choice.message.content = "A red circle."
        elif fault in ("empty", "nothing"):
            text = "" if fault == "empty" else "..."
            choice.message.content = f'{{"captions": [{{"id": 1, "caption": "{text}"}}]}}'
        elif fault == "400":
            raise litellm.BadRequestError("this image is not supported", **who)
        elif fault == "401":
            raise litellm.AuthenticationError("no such key", **who)
        elif fault == "429":
            raise litellm.RateLimitError("slow down", **who)
        return response


FAULTY = {
    "judge.model": "faulty/model",
    "judge.providers": "{faulty: tests.commands.recaption_fakes.FaultyOracle}",
    "judge.retries": 0,
}
"""Options that make `FaultyOracle` the judge."""


def about(names: dict[str, str], image_of: Callable[[str], str]) -> Callable[[Messages], str | None]:
    """A fault: image name -> what goes wrong with its caption.

    Args:
        names: sample id -> fault.
        image_of: sample id -> the image as the judge gets it.
    """
    faults = {image_of(name): fault for name, fault in names.items()}

    def fault(messages: Messages) -> str | None:
        urls = image_urls(messages)
        return faults.get(urls[0]["url"]) if urls else None

    return fault

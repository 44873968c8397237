"""What judging an image uses, by a dry run that asks nobody.

Everything is real but the provider: `RewardSuite` decides what is asked, `Judge` what is known already and what
shares a call, tasks write the messages and read the answers. `FakeClient` answers with `Task.example` and counts
what the call would have used.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any

import numpy as np

from balcap.commands.estimate_assumptions import Assumptions
from balcap.commands.estimate_tokens import image_tokens, place_of, reasoning_tokens
from balcap.judge import CallFailed, Judge, JudgeSettings, Question, Reply, Route, Task
from balcap.judge.prompt import response_format
from balcap.judge.settings import price_of
from balcap.rewards import RewardSuite
from balcap.types import CaptionBatch


class Usage(defaultdict[tuple[str, str], np.ndarray]):
    """Task and model -> calls, prompt tokens (images included), tokens of the answers (reasoning included), US
    dollars (NaN where no price is known)."""

    def __init__(self) -> None:
        super().__init__(lambda: np.zeros(4))

    def add(self, other: Mapping[tuple[str, str], np.ndarray], times: float = 1.0) -> None:
        """Add `other`, so many times."""
        for key, figures in other.items():
            self[key] += times * figures

    @property
    def total(self) -> np.ndarray:
        """Over all tasks and models."""
        return sum(self.values(), np.zeros(4))


class FakeClient:
    """Stands in for the client: answers every call with the task's example, and counts it.

    Args:
        settings: of the judge whose calls they would be.
        text: tokens of a text.
        assume: how what is not text counts.

    Attributes:
        used: what the calls so far would have used.
        images: model -> tokens of each image that it was shown.
        reasoning: model -> tokens of reasoning of each call.
    """

    def __init__(self, settings: JudgeSettings, text: Callable[[str], int], assume: Assumptions):
        self.settings, self.assume, self.used = settings, assume, Usage()
        self.images: defaultdict[str, list[int]] = defaultdict(list)
        self.reasoning: dict[str, int] = {}
        self._text = text

    def connect(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to close."""

    async def call(
        self, question: Question, route: Route, messages: Sequence[Mapping[str, Any]], timeout_s: float
    ) -> Reply:
        """See `balcap.judge.Client.call`."""
        task, model, reasoning = question.task, route.model, self.assume.reasoning_tokens
        try:
            encoded = task.encode(task.example(messages[0]["items"], **question.context))
            answer = encoded if task.schema is None else json.dumps(encoded)
        except NotImplementedError:
            raise CallFailed("rejected", "the task has no example() and encode() to answer with") from None
        if reasoning is None:
            reasoning = self.reasoning[model] = reasoning_tokens(model, route.params)
        tokens_in, tokens_out = self._tokens_in(question, model, messages), self._text(answer) + reasoning
        price = price_of(self.settings, place_of(self.settings, model)) or price_of(self.settings, model)
        usd = np.nan if price is None else price.usd(tokens_in, tokens_out, 0)
        self.used[task.name, model] += (1, tokens_in, tokens_out, usd)
        return Reply(answer)

    def _tokens_in(self, question: Question, model: str, messages: Sequence[Mapping[str, Any]]) -> int:
        contents = [message["content"] for message in messages]
        texts = [
            content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)
            for content in contents
        ]
        schema = question.task.schema
        if (
            schema is not None and self.assume.chars_per_token is None
        ):  # who counts characters counts the messages alone
            texts.append(json.dumps(response_format(question.task.name, schema)))
        given = self.assume.image_tokens
        tokens = [
            image_tokens(self.settings, model, image) if given is None else given for image in question.shown
        ]
        self.images[model] += tokens
        return sum(tokens) + sum(map(self._text, texts))


class DryRunJudge(Judge):
    """A judge with the client's settings, which asks that client and remembers in memory alone."""

    def __init__(self, client: FakeClient) -> None:
        cache = client.settings.cache and ":memory:"
        changed = {"fallbacks": None, "ledger": None, "budget_usd": None, "cache": cache}
        super().__init__(**vars(client.settings) | changed)
        self._client = client

    def make_client(self) -> Any:
        return self._client

    async def ask(self, task: type[Task[Any]], items: Sequence[Any], *args: Any, **context: Any) -> list[Any]:
        """See `Judge.ask`."""
        task = _with_items(task, self._client.assume.words_per_assertion)
        return await super().ask(task, items, *args, **context)


@cache
def _with_items(task: type[Task[Any]], words: float) -> type[Task[Any]]:
    """`task`, whose messages also carry the items that they ask about: what `FakeClient` answers."""

    class WithItems(task):  # type: ignore[valid-type, misc]
        words_per_assertion = words

        def messages(self, items: Sequence[Any], **context: Any) -> list[dict[str, Any]]:
            first, *others = super().messages(items, **context)
            return [{**first, "items": items}, *others]

    return WithItems


def dry_run(
    client: FakeClient,
    suite: RewardSuite,
    rows: CaptionBatch,
    captions: Sequence[Sequence[str]],
    visits: tuple[int, int],
) -> list[Usage]:
    """Judge every row with a judge that asks nobody.

    Args:
        client: answers, and counts.
        suite: says what is asked.
        rows: the sampled images.
        captions: of each row; of the first visit, then as many of another.
        visits: images that the run judges for the first time, and again.

    Returns:
        For each row, what the run would use if all of its images were like it.

    Raises:
        ValueError: a task has no example, or one that it cannot read.
    """
    judge, used = DryRunJudge(client), []
    try:
        for row, texts in enumerate(captions):
            used.append(Usage())
            half = len(texts) // 2
            for visit, images in zip((texts[:half], texts[half:]), visits, strict=True):
                if images:
                    client.used = Usage()
                    judgments = judge.run(suite.gather_group(judge, rows, row, visit))
                    if judgments.reasons:
                        raise ValueError(f"the dry run brought no answer: {judgments.reasons[0]}")
                    used[row].add(client.used, images)
    finally:
        judge.close()
    return used


def stand_ins(references: Sequence[str], row: int, count: int, length: int, overlap: float) -> list[str]:
    """Captions of a row that nobody has written yet. They begin with words of its reference, which all have in
    common, and go on in words of other rows' references, in which each begins elsewhere.

    Args:
        references: of all rows.
        row: whose captions.
        count: how many.
        length: words of each.
        overlap: share of the words that all have in common.
    """
    shared = references[row].split()[: round(overlap * length)]
    others = " ".join((*references[row + 1 :], *references[: row + 1])).split()
    # Steps of the golden ratio: no two places are the same, even in a text that repeats itself.
    starts = (int(len(others) * (0.618034 * number % 1)) for number in range(count))
    own = (islice(cycle(others), start, start + length - len(shared)) for start in starts)
    return [" ".join((*shared, *words)) for words in own]

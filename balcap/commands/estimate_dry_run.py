"""The parts of an estimate: how many images a run judges, and what each costs by a dry run.

In the dry run everything is real but the provider: `RewardSuite` decides what is asked, `Judge` what is known
already and what shares a call, tasks write the messages and read the answers. `FakeClient` answers with
`Task.example` and counts what the call would have used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from balcap.commands.estimate_tokens import image_tokens, place_of, reasoning_tokens
from balcap.judge import CallFailed, Decompose, Judge, JudgeSettings, Question, Reply, Route, Task
from balcap.judge.cache import JudgmentCache
from balcap.judge.client import provider_of
from balcap.judge.prompt import response_format
from balcap.rewards import RewardSuite
from balcap.types import CaptionBatch

# ---- how many


@dataclass(frozen=True)
class Plan:
    """What a run judges.

    Attributes:
        batches: training batches on each rank.
        images_per_batch: over all ranks.
        train_rows: different images that are trained on.
        validations: number of training batches before each validation, in order.
        val_images: images of one validation, over all ranks.
    """

    batches: int
    images_per_batch: int
    train_rows: int
    validations: tuple[int, ...]
    val_images: int

    def visits(self) -> tuple[int, int]:
        """Images that training judges for the first time, and again."""
        images = self.batches * self.images_per_batch
        first = min(images, self.train_rows)
        return first, images - first

    def val_visits(self) -> tuple[int, int]:
        """Likewise for validation."""
        count = len(self.validations)
        return self.val_images * min(1, count), self.val_images * max(0, count - 1)


def training_batches(
    batches_per_epoch: int, max_steps: int, max_epochs: int | None, updates_per_rollout: int = 1
) -> int:
    """Batches until Lightning stops; -1 and None are no limit, of which one at least must be given.

    ``max_steps`` counts optimizer steps, of which a batch has `updates_per_rollout`; a batch that has begun
    is finished.
    """
    limits = []
    if max_steps >= 0:
        limits.append(math.ceil(max_steps / updates_per_rollout))
    if max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * batches_per_epoch)
    return min(limits) if batches_per_epoch else 0


def validations(
    batches: int, batches_per_epoch: int, interval: int | float | None, every_n_epochs: int | None
) -> tuple[int, ...]:
    """After how many batches there is a validation: before the first, as the settings say, after the last.

    Args:
        batches: of the whole run, on one rank.
        batches_per_epoch: on one rank.
        interval: ``trainer.val_check_interval``: batches, or a share of the epoch; None for neither (it is a
            time).
        every_n_epochs: ``trainer.check_val_every_n_epoch``; None counts `interval` over epochs.
    """
    if interval is None or not batches:
        return tuple(sorted({0, batches}))
    period = interval if isinstance(interval, int) else max(1, int(batches_per_epoch * interval))

    def is_due(done: int) -> bool:
        epoch, within = divmod(done - 1, batches_per_epoch)
        if every_n_epochs is None:
            return done % period == 0
        return (epoch + 1) % every_n_epochs == 0 and (within + 1) % period == 0

    return (0, *(done for done in range(1, batches) if is_due(done)), batches)


def limited(batches: int, limit: int | float) -> int:
    """``limit_train_batches`` and the like: a number of batches, or a share of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * min(limit, 1.0))


def ranks_of(
    devices: int | str | Sequence[int], nodes: int, accelerator: str, visible: int
) -> tuple[int, bool]:
    """Processes that ``trainer.devices`` and ``num_nodes`` start, and whether that is certain.

    Args:
        devices: as in the config: a number, a list, ``"0,1"``, ``"auto"`` or -1.
        nodes: machines.
        accelerator: as in the config.
        visible: GPUs of this machine.
    """
    if str(devices) in ("auto", "-1"):
        return (nodes, True) if accelerator == "cpu" else (max(1, visible) * nodes, False)
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip()]
    return (int(devices) if isinstance(devices, int | str) else len(devices)) * nodes, True


# ---- captions


def stand_ins(references: Sequence[str], row: int, count: int, most: int) -> list[str]:
    """Captions of a row that nobody has written yet: as long as its reference, in words of other rows' references.

    Args:
        references: of all rows.
        row: whose captions.
        count: how many.
        most: words of the longest.
    """
    length = min(most, len(references[row].split()))
    others = [text.split() for text in (*references[row + 1 :], *references[: row + 1]) if text.strip()]
    captions = []
    for number in range(count):
        other, start = others[number % len(others)] if length else [], number // max(1, len(others))
        captions.append(" ".join(other[(start + index) % len(other)] for index in range(length)))
    return captions


def share_text(captions: Sequence[str], beginning: str, overlap: float) -> list[str]:
    """`captions` in which `overlap` of the words, those at the start, are those of `beginning`.

    Captions of one image say the same in other words; judged word by word, they would seem to share too little.
    """
    shared, texts = beginning.split(), []
    for caption in captions:
        words = caption.split()
        count = min(len(shared), round(overlap * len(words)))
        texts.append(" ".join(shared[:count] + words[count:]))
    return texts


# ---- what each costs

Usage = dict[tuple[str, str], np.ndarray]
"""Task and model -> calls, prompt tokens (images included), tokens of the answers (reasoning included)."""

NOTHING = np.zeros(3)


class FakeClient:
    """Stands in for the client: answers every call with the task's example, and counts it.

    Args:
        settings: of the judge whose calls they would be.
        text: tokens of a text.
        schema: whether the schema of the answer counts as prompt where providers bill it.
        image: tokens of each image; None for the rule of the model.
        reasoning: tokens per call beside the answer; None for an assumption by model and parameters.
        words_per_assertion: words of a caption for each assertion that it makes.

    Attributes:
        used: what the calls so far would have used.
        unknown: names of tasks that have no example; their answers count as short.
    """

    SHORT_ANSWER = 40
    _SCHEMA_IN_PROMPT = frozenset(("openai", "azure", "anthropic", "gemini", "vertex_ai", "bedrock"))

    def __init__(
        self,
        settings: JudgeSettings,
        text: Callable[[str], int],
        schema: bool = True,
        image: int | None = None,
        reasoning: int | None = None,
        words_per_assertion: float = Decompose.words_per_assertion,
    ):
        self.settings, self.words_per_assertion = settings, words_per_assertion
        self.used: Usage = {}
        self.unknown: set[str] = set()
        self._text, self._schema, self._image, self._reasoning = text, schema, image, reasoning

    def connect(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to close."""

    async def call(
        self, question: Question, route: Route, messages: Sequence[Mapping[str, Any]], timeout_s: float
    ) -> Reply:
        """See `balcap.judge.Client.call`."""
        task, tokens_out = question.task, self._reasoning
        if tokens_out is None:
            tokens_out = reasoning_tokens(route.model, route.params)
        try:
            answer = json.dumps(task.encode(task.example(messages[0]["items"], **question.context)))
            tokens_out += self._text(answer)
        except NotImplementedError:
            answer, tokens_out = "", tokens_out + self.SHORT_ANSWER
            self.unknown.add(task.name)
        figures = np.array([1.0, self._tokens_in(question, route, messages), tokens_out])
        key = (task.name, route.model)
        self.used[key] = self.used.get(key, NOTHING) + figures
        if not answer:
            raise CallFailed("rejected", f"{task.name} has no example of an answer")
        return Reply(answer)

    def _tokens_in(self, question: Question, route: Route, messages: Sequence[Mapping[str, Any]]) -> int:
        contents = [message["content"] for message in messages]
        texts = [content for content in contents if isinstance(content, str)]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        texts += [part["text"] for part in parts if part["type"] == "text"]
        images = [part["image"] for part in parts if part["type"] == "image"]
        provider = provider_of(place_of(self.settings, route.model), self.settings.providers)
        if self._schema and provider in self._SCHEMA_IN_PROMPT:
            texts.append(json.dumps(response_format(question.task.name, question.task.schema)))
        if self._image is not None:
            return sum(map(self._text, texts)) + self._image * len(images)
        seen = sum(image_tokens(self.settings, route.model, image) for image in images)
        return sum(map(self._text, texts)) + seen


class MemoryCache(JudgmentCache):
    """A cache that forgets everything in the end."""

    def __init__(self) -> None:
        super().__init__(None)
        self._kept: dict[str, str] = {}

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """See `JudgmentCache.get_many`."""
        return {key: self._kept[key] for key in keys if key in self._kept}

    def put(self, key: str, task: str, model: str, answer: str) -> None:
        """See `JudgmentCache.put`."""
        self._kept[key] = answer


class DryRunJudge(Judge):
    """A judge with the client's settings, which asks that client and remembers in memory alone."""

    def __init__(self, client: FakeClient) -> None:
        changed = {
            "fallbacks": None,
            "ledger": None,
            "budget_usd": None,
            "retries": 0,
            "max_failed_share": 1.0,
        }
        super().__init__(**(vars(client.settings) | changed))
        self._client = client

    def make_client(self) -> Any:
        return self._client

    def make_cache(self) -> JudgmentCache:
        return JudgmentCache(None) if self.settings.cache is None else MemoryCache()

    async def ask(self, task: type[Task[Any]], items: Sequence[Any], *args: Any, **context: Any) -> list[Any]:
        """See `Judge.ask`."""
        task = _with_items(task, self._client.words_per_assertion)
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
        captions: of each row; of the first visit, then as many of another, if there is one.
        visits: images that the run judges for the first time, and again.

    Returns:
        For each row, what the run would use if all of its images were like it.
    """
    judge, used = DryRunJudge(client), []
    try:
        for row, texts in enumerate(captions):
            total: Usage = {}
            count = len(texts) // 2 if visits[1] else len(texts)
            for start, images in zip(range(0, len(texts), count), visits, strict=False):
                client.used = {}
                judge.run(suite.gather_group(judge, rows, row, texts[start : start + count]))
                for key, figures in client.used.items():
                    total[key] = total.get(key, NOTHING) + figures * images
            used.append(total)
    finally:
        judge.close()
    return used

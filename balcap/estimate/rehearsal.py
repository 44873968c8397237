"""A run's judging, played through with a judge that asks nobody.

Everything is real but the provider: `RewardSuite` and `Group` decide what is asked, `Judge` and its session
what is known already, what shares a call and what is remembered; tasks write the messages and read the
answers. In the provider's place an `Understudy` answers in size, and books what the call would have used.
"""

from __future__ import annotations

import json
import re
import sqlite3
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from balcap.estimate.image_tokens import rule_for
from balcap.estimate.language import Language, Said
from balcap.estimate.tokens import TextTokens, reasoning_tokens
from balcap.estimate.usage import Key, Usage, Usages
from balcap.judge import Judge
from balcap.judge.cache import JudgmentCache, node_path
from balcap.judge.client import Bill, CallFailed, Client, Reply, provider_of
from balcap.judge.images import ImagePolicy, image_url
from balcap.judge.prompt import Question, Route, response_format

_FENCE = re.compile(r"<(\w+)>\n(.*?)\n</\1>", re.DOTALL)
_SCHEMA_IN_PROMPT = {"openai", "azure", "anthropic", "gemini", "vertex_ai", "bedrock"}
_KNOWN_TASKS = {"decompose", "verify", "match", "rate"}
_UNKNOWN_TASK_TOKENS = 40
"""Of the answer to one call of a task that this file does not know."""


@dataclass(frozen=True)
class Counting:
    """How tokens are counted.

    Attributes:
        text: tokens of a text.
        image: tokens of each image; None for the rule of the model.
        reasoning: tokens per call beside the answer; None for an assumption by model and parameters.
        schema: count the schema of the answer where providers put it into the prompt.
    """

    text: TextTokens
    image: int | None = None
    reasoning: int | None = None
    schema: bool = True


class Understudy:
    """Stands in for the client: answers every call in size, and books it.

    Args:
        judge: whose calls they would be.
        language: of captions.
        counting: of tokens.

    Attributes:
        used: what the calls so far would have used.
        unknown: names of tasks whose answers it cannot guess.
    """

    def __init__(self, judge: Judge, language: Language, counting: Counting):
        self.used = Usages()
        self.unknown: set[str] = set()
        self._judge, self._language, self._counting = judge, language, counting
        self._captions: dict[str, Said] = {}
        self._assertions: dict[str, list[str]] = {}

    def expect(self, said: Said, captions: Sequence[str]) -> None:
        """`captions` are of the image of `said`; other texts, such as references, stand for themselves."""
        self._captions.update(dict.fromkeys(captions, said))

    def connect(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to close."""

    async def call(
        self, question: Question, route: Route, messages: Sequence[Mapping[str, Any]], timeout_s: float
    ) -> Reply:
        """See `Client.call`."""
        name, counting = question.task.name, self._counting
        texts, images = _parts(messages)
        asked = sum(map(counting.text, texts))
        asked += sum(self._image_tokens(image, question.images, route.model) for image in images)
        if counting.schema and self._provider(route.model) in _SCHEMA_IN_PROMPT:
            asked += counting.text(json.dumps(response_format(name, question.task.schema)))
        reasoning = counting.reasoning
        said = reasoning_tokens(route.model, route.params) if reasoning is None else reasoning
        answer = self._answer(name, texts[-1])
        if answer is None:
            self.unknown.add(name)
            self._book(name, route.model, 1, asked, said + _UNKNOWN_TASK_TOKENS)
            raise CallFailed("rejected", f"nobody knows how {name} would be answered")
        content = json.dumps(answer)
        self._book(name, route.model, len(next(iter(answer.values()))), asked, said + counting.text(content))
        return Reply(content, Bill())

    def _provider(self, model: str) -> str:
        return provider_of(place_of(self._judge, model), self._judge.settings.providers) or ""

    def _book(self, task: str, model: str, items: int, tokens_in: int, tokens_out: int) -> None:
        key: Key = (task, model)
        self.used[key] = self.used[key] + Usage(1, items, tokens_in, tokens_out)

    def _answer(self, task: str, text: str) -> dict[str, Any] | None:
        """An answer of the right form and size; None for a task that is not known here."""
        if task not in _KNOWN_TASKS:
            return None
        data = {tag: json.loads(body) for tag, body in _FENCE.findall(text)}
        if task == "decompose":
            entries = [{"id": c["id"], "assertions": self._decomposed(c["text"])} for c in data["captions"]]
            return {"captions": entries}
        if task == "verify":
            return {
                "verdicts": [{"id": a["id"], "true": True, "pointable": True} for a in data["assertions"]]
            }
        if task == "match":
            ids = [unit["id"] for unit in data["reference_units"]]
            held, missing = ids[: len(ids) // 2], ids[len(ids) // 2 :]
            return {
                "captions": [{"id": c["id"], "covered": held, "missing": missing} for c in data["captions"]]
            }
        scores = {"clarity": 8.5, "fluency": 8.5, "coherency": 8.5}
        return {"captions": [{"id": c["id"], **scores} for c in data["captions"]]}

    def _decomposed(self, text: str) -> list[str]:
        if text not in self._assertions:
            said = self._captions.get(text)
            self._assertions[text] = (said or self._language).assertions(text)
        return self._assertions[text]

    def _image_tokens(self, image: bytes, policy: ImagePolicy, model: str) -> int:
        if self._counting.image is not None:
            return self._counting.image
        return image_tokens(self._judge, model, image)


class Rehearsal(Judge):
    """A judge with the settings of another, which asks its understudy and remembers in memory alone.

    Args:
        judge: the real one; nothing of it is opened.
        understudy: answers.
        grouping: as of `Judge`.
        paid: the answers that the real one has already.
    """

    def __init__(self, judge: Judge, understudy: Understudy, grouping: str, paid: PaidAnswers | None) -> None:
        alone = {"cache": None, "ledger": None, "budget_usd": None, "fallbacks": None}
        settings = (
            vars(judge.settings) | alone | {"retries": 0, "max_failed_share": 1.0, "grouping": grouping}
        )
        super().__init__(**settings)
        self.understudy = understudy
        session = self._open()
        if paid is not None:
            session.cache = Memory(paid)

    def make_client(self) -> Client:
        return self.understudy  # type: ignore[return-value]  # all that a session needs of a client


class PaidAnswers:
    """The cache of a judge, read without leaving a trace.

    Args:
        path: of the file; None, or one that does not exist, holds nothing.
    """

    def __init__(self, path: str | None):
        self._connection = None if path is None else open_to_read(node_path(path))

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Those of `keys` that are there, with their answers' JSON."""
        found: dict[str, str] = {}
        if self._connection is None:
            return found
        for key in keys:
            row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = row[0]
        return found

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Memory(JudgmentCache):
    """A cache that forgets everything in the end, in front of answers that are paid for."""

    def __init__(self, paid: PaidAnswers):
        super().__init__(None)
        self._paid = paid
        self._kept: dict[str, str] = {}

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """See `JudgmentCache.get_many`."""
        new = [key for key in keys if key not in self._kept]
        return {key: self._kept[key] for key in keys if key in self._kept} | self._paid.get_many(new)

    def put(self, key: str, task: str, model: str, answer: str) -> None:
        """See `JudgmentCache.put`."""
        self._kept[key] = answer


def open_to_read(path: str | Path) -> sqlite3.Connection | None:
    """A connection that writes nothing, not even beside the file; None if there is no such file."""
    file = Path(path)
    if not file.is_file():
        return None
    # A write-ahead log that somebody has open lies beside the file; without one, reading would make it.
    mode = "mode=ro" if Path(f"{file}-wal").exists() else "mode=ro&immutable=1"
    return sqlite3.connect(f"{file.absolute().as_uri()}?{mode}", uri=True, check_same_thread=False)


def place_of(judge: Judge, model: str) -> str:
    """Where a model is served, as litellm writes it: the first of its deployments."""
    return (
        judge.settings.deployments[0].model
        if judge.settings.deployments and model == judge.settings.model
        else model
    )


def _parts(messages: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[bytes]]:
    """Texts and images of a chat, in order."""
    texts: list[str] = []
    images: list[bytes] = []
    for message in messages:
        if isinstance(message["content"], str):
            texts.append(message["content"])
            continue
        texts += [part["text"] for part in message["content"] if part["type"] == "text"]
        images += [part["image"] for part in message["content"] if part["type"] == "image"]
    return texts, images


def image_tokens(judge: Judge, model: str, image: bytes) -> int:
    """Tokens of an image file as `judge` sends it to `model`, by the model's rule."""
    place = place_of(judge, model)
    detail = judge.settings.images.detail_for(provider_of(place, judge.settings.providers) or "")
    return rule_for(place).tokens(*_size(image, judge.settings.images), detail)


@lru_cache(maxsize=1024)
def _size(image: bytes, policy: ImagePolicy) -> tuple[int, int]:
    """Pixels of an image file as it is sent."""
    from PIL import Image

    url = image_url(image, policy)
    with Image.open(BytesIO(b64decode(url.partition(",")[2]))) as sent:
        return sent.size

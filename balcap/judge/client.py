"""The one place that calls litellm: one call, what it cost, and what its failure means."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from balcap.judge.errors import FailureKind, InvalidAnswer
from balcap.judge.http import ANSWERS, AnswerTooLarge, new_session
from balcap.judge.images import ImageError, as_sent
from balcap.judge.models import Price, import_litellm, listed_price, register_providers
from balcap.judge.prompt import Question, Route, extract_json, response_format
from balcap.judge.task import Message
from balcap.utils.loop import process_loop
from balcap.utils.redact import redact, resolve

# Set here, or a matter of how a question is asked; in `params` they would be silently overruled.
RESERVED = {
    "model", "messages", "response_format", "n", "timeout", "drop_params", "num_retries", "max_retries",
    "fallbacks", "caching", "rpm", "tpm", "max_parallel_requests",
}  # fmt: skip
COOLDOWN_S = 5.0
"""Seconds for which the router asks other deployments than one that has failed."""
# litellm's words where the router's own limits, not the provider's, keep a call from being sent.
_HELD_BACK = (
    "over defined",
    "max_parallel_requests slots in use",
    "No deployments available for selected model",
)
# Exceptions of litellm, the first that fits -> what sort of failure it is.
_FAILURES: dict[str, FailureKind] = {
    "AuthenticationError": "denied",
    "PermissionDeniedError": "denied",
    "NotFoundError": "denied",
    "RateLimitError": "limited",
    "Timeout": "timeout",
    "APIConnectionError": "connection",
    "ContextWindowExceededError": "too_long",
    "ContentPolicyViolationError": "filtered",
    "APIError": "server",
}
_MAY_PASS = {"invalid", "limited", "timeout", "server", "connection"}

_CONNECTED: set[Client] = set()  # of this process


@dataclass(frozen=True)
class Deployment:
    """One place where the judge's model is served.

    Args:
        model: litellm model string, such as ``azure/<deployment>``.
        params: added to, and stronger than, ``model.judge.params``; a key as ``api_key: os.environ/<NAME>``.
        rpm: requests per minute, of all ranks together, at least 1; null for no limit.
        tpm: tokens per minute, of all ranks together, at least 1; null for no limit.
        max_parallel: calls under way at once, of all ranks together, at least 1; null leaves it to
            ``model.judge.concurrency``.
    """

    model: str
    params: dict[str, Any] | None = None
    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None


@dataclass(frozen=True)
class Reply:
    """What came back, and what it used.

    Attributes:
        text: of the answer; empty where nothing was written.
        tokens_in: prompt tokens billed, image and cached tokens included.
        tokens_out: completion tokens billed, reasoning included.
        tokens_cached: those of `tokens_in` that the provider had in its prefix cache.
        usd: US dollars; None where no price is known. A provider does not say what it bills for a call that
            timed out: 0.
    """

    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    usd: float | None = 0.0


@dataclass(eq=False)
class CallFailed(Exception):
    """A call that brought no answer that can be used.

    Attributes:
        kind: what sort of failure it is.
        reason: why, for a person; free of secrets.
        after: seconds that the provider asks to wait.
        reply: what came back all the same.
        sent: whether anybody was asked: not where our own limits held it back, where all deployments cool down, or
            where the image cannot be sent.
    """

    kind: FailureKind
    reason: str
    after: float = 0.0
    reply: Reply = Reply()
    sent: bool = True

    @property
    def may_pass(self) -> bool:
        """A repetition may succeed."""
        return self.kind in _MAY_PASS


def invalid(route: Route, why: str, reply: Reply) -> CallFailed:
    """The failure of an answer that is not what was asked for."""
    return CallFailed("invalid", f"invalid answer of {route.model}: {redact(why)}", reply=reply)


@dataclass(eq=False)
class Client:
    """One call at a time, through a litellm `Router`.

    The router chooses among the deployments of a judge, keeps their limits and gives those that fail time to cool
    down; it repeats nothing and falls back to nothing by itself, so that every call can be counted. Lives on one
    event loop.

    Args:
        model: the judge that `deployments` belong to.
        deployments: where `model` is served; empty: it is reached by its own name.
        providers: litellm provider name -> import path of a `CustomLLM` subclass.
        prices: litellm model string -> what it costs, stronger than litellm's own table.
    """

    model: str
    deployments: Sequence[Deployment]
    providers: Mapping[str, str]
    prices: Mapping[str, Price]
    _routers: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict, init=False)
    _refused: dict[str, set[str]] = field(default_factory=dict, init=False)
    """Route -> what its server does not take: ``schema``, ``system``."""

    async def call(
        self, question: Question, route: Route, messages: Sequence[Message], timeout_s: float
    ) -> Reply:
        """One call to `route`.

        Args:
            question: what is asked, for the form of the answer and how images are sent.
            messages: the chat.
            timeout_s: seconds.

        Raises:
            CallFailed: whatever went wrong.
        """
        refused, chat, answers = self._refused.setdefault(route.name, set()), list[Message](), list[int]()
        ANSWERS.set(answers)
        try:
            router, settings = self._router(route)
            schema = question.task.schema
            if schema is not None and "schema" not in refused:  # litellm drops it where a model takes none
                settings = settings | {"response_format": response_format(question.task.name, schema)}
            # Decoding and encoding a picture takes long enough to hold up everybody else's answers.
            chat = await asyncio.to_thread(as_sent, messages, question.images, "system" not in refused)
            async with asyncio.timeout(timeout_s):
                response = await router.acompletion(route.name, chat, timeout=timeout_s, **settings)
                if hasattr(response, "__aiter__"):  # params.stream: true
                    chunks = [chunk async for chunk in response]
                    response = import_litellm().stream_chunk_builder(chunks, messages=chat)
        except ImageError as error:
            raise CallFailed("image", str(error), sent=False) from None
        except TimeoutError:
            raise CallFailed("timeout", f"no answer of {route.model} within {timeout_s:.3g} s") from None
        except Exception as error:  # providers, also our users' own, raise whatever they like
            what = _refuses(error)
            if what and what not in refused:
                # Not every server knows schemas (the prompt states the form as well), nor every chat template a system.
                refused.add(what)
                return await self.call(question, route, messages, timeout_s)
            failed = _failure(route, error)
            if 200 in answers:  # it is billed, whatever it was
                failed.reply = self._reply(route, None, "", chat)
            raise failed from None
        return self._read(route, response, chat, is_json=question.task.schema is not None)

    def connect(self) -> None:
        """Import litellm and register our providers; the first time it takes seconds."""
        if self not in _CONNECTED:
            register_providers(self.providers)
            if not _CONNECTED:
                import_litellm().aclient_session = new_session()
                atexit.register(_close_at_exit)  # before the loop, which began earlier, ends
            _CONNECTED.add(self)

    async def close(self) -> None:
        """Close the connections: litellm shares them, so the last client of the process to close does it."""
        if self not in _CONNECTED:
            return
        for router, _ in self._routers.values():
            router.discard()
        self._routers.clear()
        _CONNECTED.discard(self)
        if not _CONNECTED:
            atexit.unregister(_close_at_exit)
            await _close_connections()

    def _router(self, route: Route) -> tuple[Any, dict[str, Any]]:
        """What reaches a route, and the settings of each of its calls."""
        if route.name not in self._routers:
            own = self.deployments if route.model == self.model else ()
            places = list(own) or [Deployment(route.model)]
            for place in places:
                listed_price(place.model)  # looked up once, before the router writes into that table
            limited, alone = any(place.rpm or place.tpm for place in places), len(places) == 1
            deployed = [_deployed(route, place) for place in places]
            router = import_litellm().Router(
                model_list=[{"model_name": route.name, "litellm_params": params} for params in deployed],
                num_retries=0,
                cooldown_time=COOLDOWN_S,
                disable_cooldowns=alone,  # there is no other place to ask meanwhile
                # the one strategy that counts requests and tokens itself
                routing_strategy="usage-based-routing-v2" if limited else "simple-shuffle",
            )
            settings = {"drop_params": True, "max_retries": 0, "num_retries": 0}
            settings["stream"] = bool(route.params.get("stream"))
            # Callbacks keep limits and cooldowns. Where there is no choice they are a third of the time.
            settings["no-log"] = alone and not limited
            self._routers[route.name] = router, settings
        return self._routers[route.name]

    def _read(self, route: Route, response: Any, chat: list[Message], is_json: bool) -> Reply:
        """The answer with what it used; raises `CallFailed`."""
        if not getattr(response, "choices", None):
            raise invalid(route, "it holds no choice", self._reply(route, response, "", chat))
        message, finish = response.choices[0].message, response.choices[0].finish_reason
        reply = self._reply(route, response, _written(message), chat)
        fields = getattr(message, "provider_specific_fields", None) or {}
        if getattr(message, "refusal", None) or fields.get("refusal"):
            raise CallFailed("refused", f"{route.model} refused to answer", reply=reply)
        if finish == "content_filter":
            raise CallFailed("filtered", f"the content filter of {route.model} stopped it", reply=reply)
        if finish == "length" and is_json:
            try:
                extract_json(reply.text)
            except InvalidAnswer:
                reason = f"the answer of {route.model} was cut short: raise model.judge.params.max_tokens"
                raise CallFailed("cut", reason, reply=reply) from None
        if not reply.text.strip():
            raise invalid(route, "it is empty", reply)
        return reply

    def _reply(self, route: Route, response: Any, text: str, chat: list[Message]) -> Reply:
        """What an answer used: as the provider says, or as we count where it says nothing that can be."""
        usage = getattr(response, "usage", None)
        details = getattr(usage, "prompt_tokens_details", None)
        counted = (usage, "prompt_tokens"), (usage, "completion_tokens"), (details, "cached_tokens")
        tokens_in, tokens_out, cached = (getattr(holder, name, 0) or 0 for holder, name in counted)
        hidden = getattr(response, "_hidden_params", None) or {}
        model = hidden.get("litellm_model_name") or route.model
        own = model.partition("/")[0] in self.providers
        usd, price = hidden.get("response_cost"), self.prices.get(model) or self.prices.get(route.model)
        if not (tokens_in > 0 and tokens_out >= 0 and 0 <= cached <= tokens_in) and not own:
            tokens_in, tokens_out, cached = _count(model, chat), _count(model, text), 0
            price = price or listed_price(model)
            usd = None
        if price:
            usd = price.usd(tokens_in, tokens_out, cached)
        elif not usd and not own and listed_price(model) is None:
            usd = None  # litellm says 0 for models that it does not know
        return Reply(text, tokens_in, tokens_out, cached, usd)


def _written(message: Any) -> str:
    """The text of an answer: its content, or the arguments of the one tool that is called in its place, or what a server
    that knows no better calls reasoning."""
    content = message.content
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = getattr(message, "tool_calls", None) or []
    arguments = calls[0].function.arguments if len(calls) == 1 else ""
    return content or arguments or getattr(message, "reasoning_content", None) or ""


def _count(model: str, of: list[Message] | str) -> int:
    """Tokens of a chat or a text, by litellm's tokenizer for the model."""
    chat = [{"role": "assistant", "content": of}] if isinstance(of, str) else of
    return import_litellm().token_counter(model, messages=chat, use_default_image_token_count=True)


async def _close_connections() -> None:
    litellm = import_litellm()
    session, litellm.aclient_session = litellm.aclient_session, None
    if session is not None:
        await session.aclose()
    await litellm.close_litellm_async_clients()
    litellm.in_memory_llm_clients_cache.flush_cache()


def _close_at_exit() -> None:
    """Where nobody has closed a judge: litellm's own clean-up would wait for connections of another loop."""
    closing = _close_connections()
    with contextlib.suppress(Exception):
        process_loop().submit(closing).result(timeout=5)
    with contextlib.suppress(Exception):
        closing.close()  # where the loop is gone already


def _deployed(route: Route, place: Deployment) -> dict[str, Any]:
    params = resolve({"model": place.model, **route.params, **(place.params or {})})
    if (params.get("api_base") or params.get("base_url")) and not params.get("api_key"):
        # The environment's key is the provider's: another host gets it only where the config says so. The clients insist
        # on one, even for a server that asks for none.
        params["api_key"] = "none"
    return params | {"rpm": place.rpm, "tpm": place.tpm, "max_parallel_requests": place.max_parallel}


def _refuses(error: Exception) -> str:
    """What a server does not take, ``schema`` or ``system``; empty for any other error."""
    text = str(error).lower()
    if not isinstance(error, import_litellm().exceptions.BadRequestError):
        return ""
    if any(word in text for word in ("response_format", "json_schema", "structured output")):
        return "schema"
    return "system" if "system" in text and ("role" in text or "message" in text or "prompt" in text) else ""


def _failure(route: Route, error: Exception) -> CallFailed:
    """What an exception of litellm means for us, free of secrets."""
    exceptions, router = import_litellm().exceptions, import_litellm().types.router
    too_large: BaseException | None = error
    while too_large is not None and not isinstance(too_large, AnswerTooLarge):
        too_large = too_large.__cause__ or too_large.__context__
    if too_large is not None:
        return invalid(route, str(too_large), Reply())
    text = str(error).partition(" LiteLLM: model group")[0].partition("\nLiteLLM: model group")[0]
    text = text.removeprefix(f"litellm.{type(error).__name__}: ")
    reason = redact(f"{route.model}: {type(error).__name__}: {text}")
    held_back = isinstance(error, router.RouterRateLimitErrorBasic | router.RouterRateLimitError)
    if held_back or any(words in text for words in _HELD_BACK):
        after = getattr(error, "cooldown_time", 1.0)  # where all deployments cool down
        return CallFailed("limited", reason, min(after, COOLDOWN_S), sent=False)
    body, status = getattr(error, "body", None), getattr(error, "status_code", None)
    no_quota = isinstance(body, dict) and body.get("code") == "insufficient_quota"  # comes as a rate limit
    if no_quota or status == 403:
        return CallFailed("denied", reason)
    for name, kind in _FAILURES.items():
        if isinstance(error, getattr(exceptions, name)):
            return CallFailed(kind, reason, _retry_after(error))
    if isinstance(status, int) and status >= 500:
        return CallFailed("server", reason, _retry_after(error))
    return CallFailed("rejected", reason)


def _retry_after(error: Exception) -> float:
    response = getattr(error, "response", None)
    headers = getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None) or {}
    try:
        return float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0

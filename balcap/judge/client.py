"""The one place that calls litellm.

litellm takes seconds to import and reads a price table from the network unless told otherwise, so it is
imported when the first question is asked, never by importing this file.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import logging
import os
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from balcap.judge.answers import extract_json
from balcap.judge.errors import InvalidAnswer, JudgeFailure
from balcap.judge.redact import redact
from balcap.judge.request import Request, response_format
from balcap.judge.stats import Counters

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF_S = 0.5  # before the first retry; doubles with each
LONGEST_BACKOFF_S = 30.0
# Set here, or a matter of how a question is asked; in `params` they would be silently overruled.
RESERVED = {"model", "messages", "response_format", "stream", "n", "timeout", "drop_params"}
RESERVED |= {"num_retries", "max_retries", "fallbacks", "caching"}


class _Transient(Exception):
    """A failed call that may succeed when it is repeated; waits at least `after` seconds."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class Client:
    """Asks one provider at a time through litellm, with a limit of concurrency, a timeout and retries.

    Lives on one event loop. Retried, with exponential back-off and jitter: rate limits, timeouts, server
    and connection errors, and answers that are not what was asked for. Not retried, since they would fail
    and cost again: bad requests, wrong keys, unknown models, refusals, content policy, contexts that are
    too long, answers cut at ``max_tokens``, exhausted quotas.

    Args:
        counters: where calls, tokens and cost are counted.
        concurrency: calls under way at once, at least 1.
        timeout_s: seconds per call.
        retries: repetitions after the first call.
        providers: litellm provider name -> import path of a `CustomLLM` subclass.
    """

    def __init__(
        self,
        counters: Counters,
        concurrency: int,
        timeout_s: float,
        retries: int,
        providers: Mapping[str, str],
    ):
        self._counters = counters
        self._timeout_s = timeout_s
        self._retries = retries
        self._providers = providers
        self._slots = asyncio.Semaphore(concurrency)
        self._litellm: Any = None
        self._schema_refused: set[str] = set()
        self._keyless: dict[str, bool] = {}
        self._warned: set[tuple[str, str]] = set()

    async def ask(self, request: Request, parse: Callable[[dict[str, Any]], T]) -> tuple[T, str]:
        """The parsed answer and its JSON text.

        Args:
            request: the question.
            parse: from the JSON object to the answer; raises `InvalidAnswer`.

        Raises:
            JudgeFailure: when retries are used up or cannot help.
        """
        reason = ""
        for attempt in range(self._retries + 1):
            self._counters.retries += attempt > 0
            try:
                async with self._slots:
                    text = await self._call(request)
                answer = extract_json(text)
                return parse(answer), json.dumps(answer)
            except InvalidAnswer as error:
                reason = f"invalid answer of {request.model}: {redact(str(error))}"
            except _Transient as error:
                reason = str(error)
                if attempt < self._retries:
                    await asyncio.sleep(_pause(attempt, error.after))
            except JudgeFailure as final:
                self._failed(final)
                raise
        failure = JudgeFailure(request.task, f"{reason} (after {self._retries + 1} calls)")
        self._failed(failure)
        raise failure

    async def _call(self, request: Request) -> str:
        """One call; the text of the answer."""
        litellm = self._connect()
        self._counters.calls += 1
        try:
            settings = self._settings(litellm, request)
            async with asyncio.timeout(self._timeout_s):
                response = await litellm.acompletion(**settings)
        except TimeoutError:
            raise _Transient(f"no answer of {request.model} within {self._timeout_s:g} s") from None
        except Exception as error:  # providers, also our users' own, raise whatever they like
            if request.model not in self._schema_refused and _refuses_schema(litellm, error):
                # Not every OpenAI-compatible server knows schemas. The prompt states the form as well.
                self._schema_refused.add(request.model)
                return await self._call(request)
            raise _classified(litellm, request, error) from None
        self._bill(response)
        return _content(request, response)

    def _settings(self, litellm: Any, request: Request) -> dict[str, Any]:
        settings = {
            "model": request.model,
            "messages": request.messages,
            "timeout": self._timeout_s,
            "drop_params": True,
            "max_retries": 0,  # ours are the only retries
            "num_retries": 0,
            "no-log": True,  # litellm's callbacks cost a third of the time of an in-process call
            **self._placeholder_key(litellm, request),
            **request.params,
        }
        if request.model not in self._schema_refused and _takes_schema(litellm, request.model):
            settings["response_format"] = response_format(request.task, request.schema)
        return settings

    def _placeholder_key(self, litellm: Any, request: Request) -> dict[str, str]:
        """A server of one's own rarely asks for a key, but the clients insist on one."""
        if not request.params.get("api_base"):
            return {}
        if request.model not in self._keyless:
            self._keyless[request.model] = bool(missing_keys(litellm, request.model))
        return {"api_key": "none"} if self._keyless[request.model] else {}

    def _connect(self) -> Any:
        if self._litellm is None:
            self._litellm = import_litellm()
            _forget_clients(self._litellm)
            register_providers(self._litellm, self._providers)
        return self._litellm

    def _bill(self, response: Any) -> None:
        counters, usage = self._counters, getattr(response, "usage", None)
        counters.tokens_in += getattr(usage, "prompt_tokens", 0) or 0
        counters.tokens_out += getattr(usage, "completion_tokens", 0) or 0
        cost = (getattr(response, "_hidden_params", None) or {}).get("response_cost")
        counters.cost_usd += cost or 0.0
        counters.unpriced_calls += cost is None

    def _failed(self, failure: JudgeFailure) -> None:
        self._counters.failures[failure.task] += 1
        kind = (failure.task, failure.reason[:40])
        if kind not in self._warned:  # one line per kind of trouble, not one per caption
            self._warned.add(kind)
            logger.warning("judge: %s", failure)

    async def close(self) -> None:
        """Close the connections that belong to this client's event loop."""
        if self._litellm is not None:
            for client in _forget_clients(self._litellm):
                close = getattr(client, "close", None) or getattr(client, "aclose", None)
                result = close() if close is not None else None
                if inspect.isawaitable(result):
                    await result


@functools.cache
def import_litellm() -> Any:
    """litellm, quiet: no price table from the network, no help texts on the console."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    litellm.suppress_debug_info = True
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm


def register_providers(litellm: Any, providers: Mapping[str, str]) -> None:
    """Make ``<name>/<model>`` reach our own providers; doing it again changes nothing.

    Raises:
        ImportError, AttributeError, TypeError: as `load_provider`.
    """
    for name, path in providers.items():
        provider = load_provider(litellm, path)
        others = [item for item in litellm.custom_provider_map if item["provider"] != name]
        registered = [item for item in litellm.custom_provider_map if item["provider"] == name]
        if not registered or type(registered[-1]["custom_handler"]) is not provider:
            litellm.custom_provider_map = [*others, {"provider": name, "custom_handler": provider()}]


def load_provider(litellm: Any, path: str) -> Any:
    """The class at import path `path`.

    Raises:
        ImportError, AttributeError: if there is none.
        TypeError: if it is not a subclass of `litellm.CustomLLM`.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError(f"{path!r} is not an import path of the form package.module.Class")
    provider = getattr(importlib.import_module(module), name)
    if not (isinstance(provider, type) and issubclass(provider, litellm.CustomLLM)):
        raise TypeError(f"{path} is not a subclass of litellm.CustomLLM")
    return provider


def missing_keys(litellm: Any, model: str) -> list[str]:
    """Environment variables that the provider of `model` needs and that are not set."""
    checked = litellm.validate_environment(model)
    return [] if checked["keys_in_environment"] else list(checked["missing_keys"])


def provider_of(litellm: Any, model: str, providers: Mapping[str, str]) -> str | None:
    """Name of the provider that `model` goes to, None if litellm knows none."""
    if model.partition("/")[0] in providers:
        return model.partition("/")[0]
    try:
        return litellm.get_llm_provider(model)[1]
    except litellm.exceptions.BadRequestError:
        return None


def _pause(attempt: int, after: float) -> float:
    # Full jitter on the upper half: clients that were refused together do not come back together.
    pause = min(BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
    return max(pause, min(after, LONGEST_BACKOFF_S))


@functools.lru_cache(maxsize=64)
def _takes_schema(litellm: Any, model: str) -> bool:
    name, provider = litellm.get_llm_provider(model)[:2]
    if litellm.supports_response_schema(name, provider):
        return True
    return "response_format" in (litellm.get_supported_openai_params(name, provider) or ())


def _refuses_schema(litellm: Any, error: Exception) -> bool:
    text = str(error).lower()
    refused = any(word in text for word in ("response_format", "json_schema", "structured output"))
    return refused and isinstance(error, litellm.exceptions.BadRequestError)


def _classified(litellm: Any, request: Request, error: Exception) -> Exception:
    """What an exception of litellm means for us: `_Transient` or `JudgeFailure`, free of secrets."""
    kinds = litellm.exceptions
    reason = redact(f"{request.model}: {type(error).__name__}: {error}")
    transient = (
        kinds.RateLimitError,
        kinds.Timeout,
        kinds.ServiceUnavailableError,
        kinds.BadGatewayError,
        kinds.InternalServerError,
        kinds.APIConnectionError,
    )
    status = getattr(error, "status_code", None)
    server = isinstance(error, kinds.APIError) and isinstance(status, int) and status >= 500
    body = getattr(error, "body", None)
    spent = isinstance(body, dict) and body.get("code") == "insufficient_quota"  # comes as a rate limit
    if (isinstance(error, transient) or server) and not spent:
        return _Transient(reason, _retry_after(error))
    return JudgeFailure(request.task, reason)


def _retry_after(error: Exception) -> float:
    headers = getattr(error, "litellm_response_headers", None)
    headers = headers or getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0


def _content(request: Request, response: Any) -> str:
    choice = response.choices[0]
    text = choice.message.content or ""
    fields = getattr(choice.message, "provider_specific_fields", None) or {}
    if getattr(choice.message, "refusal", None) or fields.get("refusal"):
        raise JudgeFailure(request.task, f"{request.model} refused to answer")
    if choice.finish_reason == "content_filter":
        raise JudgeFailure(request.task, f"the content filter of {request.model} stopped the answer")
    if choice.finish_reason == "length":
        try:
            extract_json(text)
        except InvalidAnswer:
            hint = "raise model.judge.params.max_tokens"
            raise JudgeFailure(request.task, f"the answer of {request.model} was cut short: {hint}") from None
    if not text.strip():
        raise InvalidAnswer("it is empty")
    return text


def _forget_clients(litellm: Any) -> list[Any]:
    """Take the HTTP clients of the running loop out of litellm's cache, which keys them by the loop's id.

    Ids are used again: without this, a new loop could be handed the connections of a dead one.
    """
    cache, mine = litellm.in_memory_llm_clients_cache, f"-{id(asyncio.get_running_loop())}"
    keys = [key for key in cache.cache_dict if str(key).endswith(mine)]
    for key in keys:
        cache.ttl_dict.pop(key, None)
    return [cache.cache_dict.pop(key) for key in keys]

"""What litellm knows of models: providers, prices, keys, the days on which they end.

litellm takes seconds to import and reads a price table from the network unless set otherwise, so it is imported when it is
first asked for something, never by importing this file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, each at least 0.

    Args:
        input: of the prompt, images included.
        output: of the answer, reasoning included.
        cached: of the part of the prompt that the provider had in its prefix cache; null for `input`.
    """

    input: float
    output: float
    cached: float | None = None

    def usd(self, tokens_in: int, tokens_out: int, tokens_cached: int) -> float:
        """Dollars for a call."""
        cached = self.input if self.cached is None else self.cached
        fresh = tokens_in - tokens_cached
        return (fresh * self.input + tokens_cached * cached + tokens_out * self.output) / 1e6


@functools.cache
def import_litellm() -> Any:
    """litellm, quiet: no price table from the network, no help texts on the console."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm
    import litellm.types.router  # `Router` itself is a lazy attribute

    litellm.suppress_debug_info = True
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm


def register_providers(providers: Mapping[str, str]) -> None:
    """Make ``<name>/<model>`` reach our own providers; doing it again changes nothing.

    Raises:
        ImportError, AttributeError, ValueError, TypeError: as `load_provider`.
    """
    litellm = import_litellm()
    for name, path in providers.items():
        others = [item for item in litellm.custom_provider_map if item["provider"] != name]
        entry = {"provider": name, "custom_handler": load_provider(path)}
        litellm.custom_provider_map = [*others, entry]


@functools.cache
def load_provider(path: str) -> Any:
    """An instance of the class at import path `path`, the same every time.

    Raises:
        ImportError, AttributeError, ValueError: if there is none.
        TypeError: if it is not a subclass of `litellm.CustomLLM`.
    """
    provider = pkgutil.resolve_name(path)
    if not (isinstance(provider, type) and issubclass(provider, import_litellm().CustomLLM)):
        raise TypeError(f"{path} is not a subclass of litellm.CustomLLM")
    return provider()


def missing_keys(model: str) -> list[str]:
    """Environment variables that the provider of `model` needs and that are not set."""
    return import_litellm().validate_environment(model)["missing_keys"]


def takes_sampling_parameters(model: str) -> bool:
    """Whether a model takes a temperature; what it does not take is dropped. True where litellm does not know."""
    try:
        supported = import_litellm().get_supported_openai_params(model)
    except Exception:  # it raises whatever it likes for models that it does not know
        return True
    return supported is None or "temperature" in supported


def provider_of(model: str, providers: Mapping[str, str] | None = None) -> str | None:
    """Name of the provider that `model` goes to, None if litellm knows none."""
    if model.partition("/")[0] in (providers or ()):
        return model.partition("/")[0]
    litellm = import_litellm()
    with contextlib.suppress(litellm.exceptions.BadRequestError):
        return litellm.get_llm_provider(model)[1]
    return None


@functools.lru_cache(maxsize=64)
def listed_price(model: str) -> Price | None:
    """litellm's own price of a model, None if its table does not hold it."""
    try:
        info = import_litellm().get_model_info(model)
    except Exception:  # it raises plain exceptions for models that it does not know
        return None
    given, made = info.get("input_cost_per_token"), info.get("output_cost_per_token")
    if given is None or made is None:
        return None
    cached = info.get("cache_read_input_token_cost")
    return Price(given * 1e6, made * 1e6, None if cached is None else cached * 1e6)


@functools.lru_cache(maxsize=64)
def end_of(model: str) -> date | None:
    """The day on which its provider ends a model, None if litellm's table holds none."""
    litellm = import_litellm()
    try:
        listed = litellm.model_cost[litellm.get_model_info(model)["key"]]
        return date.fromisoformat(listed.get("deprecation_date") or "")
    except Exception:  # as in `listed_price`; or the table has a text there
        return None

"""The settings of a judge, checked before anything is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from balcap.judge.cache import cache_problem
from balcap.judge.client import (
    RESERVED,
    Deployment,
    Price,
    import_litellm,
    listed_price,
    load_provider,
    missing_keys,
    provider_of,
    register_providers,
)
from balcap.judge.ledger import ledger_problem
from balcap.judge.secrets import secret_problems
from balcap.judge.tasks import Task

if TYPE_CHECKING:
    from balcap.judge.judge import Judge

Place = tuple[str, Deployment]  # key of its settings, and where it is


def problems(judge: Judge, key: str) -> list[str]:
    """What is wrong, each message with the key that mends it. Calls no provider."""
    found = [*_numbers(judge, key), *judge.images.problems(f"{key}.images")]
    for path, problem in ((judge.cache, cache_problem), (judge.ledger, ledger_problem)):
        if path is not None and (said := problem(path)):
            found.append(said.replace("model.judge", key))
    names = {task.name for task in tasks()}
    found += [
        f"{key}.{setting}.{name}: no such task; there are {', '.join(sorted(names))}"
        for setting, given in (("per_task", judge.per_task), ("per_call", judge.per_call))
        for name in given
        if name not in names
    ]
    return found + _params(judge, key) + _models(judge, key)


def tasks(kind: type[Task[Any]] = Task) -> Iterator[type[Task[Any]]]:
    """Every kind of judgment that is loaded, the user's own included."""
    for task in kind.__subclasses__():
        if hasattr(task, "name"):
            yield task
        yield from tasks(task)


def _numbers(judge: Judge, key: str) -> list[str]:
    rules: list[tuple[str, Any, bool, str]] = [
        ("concurrency", judge.concurrency, judge.concurrency >= 1, "must be at least 1"),
        ("timeout_s", judge.timeout_s, judge.timeout_s > 0, "must be above 0"),
        (
            "deadline_s",
            judge.deadline_s,
            judge.deadline_s >= judge.timeout_s,
            f"must be at least {key}.timeout_s: {judge.timeout_s:g}",
        ),
        ("retries", judge.retries, judge.retries >= 0, "must be at least 0"),
        ("max_failed_share", judge.max_failed_share, 0 < judge.max_failed_share <= 1, "is outside (0, 1]"),
    ]
    if judge.budget_usd is not None:
        rules.append(("budget_usd", judge.budget_usd, judge.budget_usd > 0, "must be above 0, or null"))
    rules += [
        (f"per_call.{task}", most, most >= 1, "must be at least 1") for task, most in judge.per_call.items()
    ]
    for model, price in judge.prices.items():
        for name in ("input", "output", "cached"):
            value = getattr(price, name)
            rules.append((f"prices.{model}.{name}", value, value is None or value >= 0, "must be at least 0"))
    for number, place in enumerate(judge.deployments):
        for name in ("rpm", "tpm", "max_parallel"):
            value = getattr(place, name)
            right = value is None or value >= 1
            rules.append((f"deployments[{number}].{name}", value, right, "must be at least 1, or null"))
    return [f"{key}.{name}: {value} {rule}" for name, value, holds, rule in rules if not holds]


def _given(judge: Judge, key: str) -> Iterator[tuple[str, str | None, Mapping[str, Any] | None]]:
    """Key, model and parameters of everyone who is named in the settings."""
    yield key, judge.model, judge.params
    for number, place in enumerate(judge.deployments):
        yield f"{key}.deployments[{number}]", place.model, place.params
    for number, other in enumerate(judge.fallbacks):
        yield f"{key}.fallbacks[{number}]", other.model, other.params
    for name, other in judge.per_task.items():
        yield f"{key}.per_task.{name}", other.model, other.params


def _params(judge: Judge, key: str) -> list[str]:
    found = []
    for where, _, params in _given(judge, key):
        for name in params or {}:
            if name in RESERVED:
                found.append(f"{where}.params.{name}: set by the judge itself; remove it")
        found += secret_problems(params or {}, f"{where}.params")
    return found


def _places(judge: Judge, key: str) -> Iterator[Place]:
    """Everywhere that may be asked, with the parameters that hold there."""
    for where, model, params in _given(judge, key):
        if ".deployments[" in where:
            merged = {**judge.params, **(params or {})}
            yield where, Deployment(str(model), merged)
        elif not (where == key and judge.deployments) and (model is not None or params is not None):
            own = judge.params if params is None else dict(params)
            if not (model is None and judge.deployments):
                yield where, Deployment(model or judge.model, own)


def _models(judge: Judge, key: str) -> list[str]:
    litellm, found, usable = import_litellm(), [], {}
    for name, path in judge.providers.items():
        try:
            load_provider(litellm, path)
        except (ImportError, AttributeError, TypeError) as error:
            found.append(f"{key}.providers.{name}: cannot load {path}: {error}")
        else:
            usable[name] = path
    register_providers(litellm, usable)
    for where, place in _places(judge, key):
        found += _place(litellm, judge, key, where, place)
    return found


def _place(litellm: Any, judge: Judge, key: str, where: str, place: Deployment) -> list[str]:
    model, params, found = place.model, place.params or {}, []
    provider = provider_of(litellm, model, judge.providers)
    if provider is None:
        return [
            f"{where}.model: litellm knows no provider for {model!r}; write <provider>/<model>, such as "
            f"openai/gpt-4o-mini or hosted_vllm/<name>, or name its class in {key}.providers"
        ]
    own = provider in judge.providers
    if provider in ("hosted_vllm", "vllm") and not (params.get("api_base") or params.get("base_url")):
        found.append(f"{where}.params.api_base: {model} needs the address of its server")
    elif not own and not params.get("api_base") and not params.get("api_key"):
        missing = missing_keys(litellm, model)
        if missing:
            found.append(f"{where}.model: {model} needs in the environment: {', '.join(missing)}")
    if judge.budget_usd is not None and not own and price_of(litellm, judge, model) is None:
        found.append(
            f"{key}.prices: {key}.budget_usd needs the price of {model}; write {model}: "
            "{input: <US$ per 1M tokens>, output: <...>}, 0 for a server of your own"
        )
    return found


def price_of(litellm: Any, judge: Judge, model: str) -> Price | None:
    """What `model` costs: by the settings, else by litellm's table; None if neither knows."""
    return judge.prices.get(model) or listed_price(litellm, model)

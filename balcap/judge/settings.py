"""The settings of a judge, which check themselves before anything is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from balcap.judge.cache import JudgmentCache
from balcap.judge.client import (
    RESERVED,
    Deployment,
    Price,
    listed_price,
    load_provider,
    missing_keys,
    provider_of,
    register_providers,
)
from balcap.judge.images import ImagePolicy
from balcap.judge.ledger import Ledger
from balcap.judge.prompt import Route
from balcap.judge.tasks import Task
from balcap.utils.redact import secret_problems


@dataclass(frozen=True)
class TaskModel:
    """Another model, or other parameters: for one kind of judgment, or as a fallback.

    Args:
        model: litellm model string; null keeps ``model.judge.model``.
        params: replaces ``model.judge.params``; null keeps them.
    """

    model: str | None = None
    params: dict[str, Any] | None = None


@dataclass
class JudgeSettings:
    """What a YAML sets of a `Judge`.

    Args:
        model: litellm model string, ``<provider>/<model>``, such as ``openai/gpt-4o-mini``.
        deployments: where `model` is served, with their limits; null: it is reached by its own name.
        fallbacks: other judges, asked in this order when `model` (or a task's own model) fails; null for
            none. Their answers are kept under their own names.
        providers: litellm provider name -> import path of a `litellm.CustomLLM` subclass, for judges that
            run in this process; null for none.
        per_task: task name (``decompose``, ``verify``, ``match``, ``rate``) -> another model or other
            parameters for it.
        params: passed on with every call, such as ``temperature``, ``reasoning_effort``, ``max_tokens`` or
            ``api_base``. What a model does not know is dropped. Keys come from the environment, never from
            here.
        grouping: ``group`` judges the captions of an image together: their assertions, without repetitions,
            are verified in one call with one image, and every verdict is remembered. ``per_rollout`` makes
            a call of its own for each caption and kind, several times as expensive: the baseline.
        per_call: task name -> most items in one call (captions; assertions for ``verify``), each at least
            1; null for each task's own (4, 128, 8 and, for ``rate``, 1).
        images: how images are sent.
        prices: litellm model string -> US dollars per million tokens, for models that litellm has no price
            for, or another one; null for none.
        concurrency: calls under way at once, at least 1.
        timeout_s: seconds until a call counts as failed, above 0.
        deadline_s: seconds until a judgment counts as failed, all its calls included, at least `timeout_s`;
            null for three times that.
        retries: repetitions of a call that failed in a way that may pass, at least 0.
        max_failed_share: the run ends, with a checkpoint, when more than this share of the recent judgments
            of a kind failed, in (0, 1], or when none comes any more; 1 never ends it.
        budget_usd: the run ends, with a checkpoint, when so many dollars are spent, above 0; calls that are
            under way then are still paid. Counts the whole `ledger`; null for no limit.
        cache: SQLite file that keeps the answers, shared by the processes of one machine; null for none.
        ledger: SQLite file with a row for every call; null for none. ``fit`` keeps it in the run's folder.
    """

    model: str
    deployments: list[Deployment] | None = None
    fallbacks: list[TaskModel] | None = None
    providers: dict[str, str] | None = None
    per_task: dict[str, TaskModel] | None = None
    params: dict[str, Any] | None = None
    grouping: Literal["group", "per_rollout"] = "group"
    per_call: dict[str, int] | None = None
    images: ImagePolicy = ImagePolicy()  # noqa: RUF009  frozen
    prices: dict[str, Price] | None = None
    concurrency: int = 64
    timeout_s: float = 60.0
    deadline_s: float | None = None
    retries: int = 3
    max_failed_share: float = 0.5
    budget_usd: float | None = None
    cache: str | None = "runs/judge_cache.sqlite"
    ledger: str | None = None

    @property
    def deadline(self) -> float:
        """`deadline_s`, or its default."""
        return 3 * self.timeout_s if self.deadline_s is None else self.deadline_s

    def routes(self, task: str) -> list[Route]:
        """Who is asked for a kind of judgment: its judge, then the fallbacks."""
        own = (self.per_task or {}).get(task, TaskModel())
        return [
            Route(one.model or self.model, (self.params or {}) if one.params is None else one.params)
            for one in (own, *(self.fallbacks or ()))
        ]

    def problems(self, key: str = "model.judge") -> list[str]:
        """What is wrong, each message with the key that fixes it. Calls no provider.

        Args:
            key: where the judge stands in the config.
        """
        problems = [*self._number_problems(key), *self.images.problems(f"{key}.images")]
        for path, store in ((self.cache, JudgmentCache), (self.ledger, Ledger)):
            if path is not None and (problem := store.problem(path)):
                problems.append(problem.replace("model.judge", key))
        names = {task.name for task in _tasks()}
        problems += [
            f"{key}.{setting}.{name}: no such task; there are {', '.join(sorted(names))}"
            for setting, given in (("per_task", self.per_task), ("per_call", self.per_call))
            for name in given or ()
            if name not in names
        ]
        for where, _, params in self._models(key):
            reserved = [name for name in params or () if name in RESERVED]
            problems += [f"{where}.params.{name}: set by the judge itself; remove it" for name in reserved]
            problems += secret_problems(params or {}, f"{where}.params")
        return problems + self._model_problems(key)

    def _number_problems(self, key: str) -> list[str]:
        limits: list[tuple[str, float | None]] = [
            (name, getattr(self, name))
            for name in ("concurrency", "timeout_s", "retries", "max_failed_share", "budget_usd")
        ]
        limits += [(f"per_call.{task}", most) for task, most in (self.per_call or {}).items()]
        for model, price in (self.prices or {}).items():
            limits += [(f"prices.{model}.{name}", value) for name, value in vars(price).items()]
        for index, place in enumerate(self.deployments or ()):
            limits += [
                (f"deployments[{index}].{n}", getattr(place, n)) for n in ("rpm", "tpm", "max_parallel")
            ]
        problems = []
        for name, value in limits:
            rule, holds = _LIMITS[name.partition(".")[0].partition("[")[0]]
            if value is not None and not holds(value):
                problems.append(f"{key}.{name}: {value} {rule}")
        if self.deadline < self.timeout_s:
            problems.append(
                f"{key}.deadline_s: {self.deadline} must be at least {key}.timeout_s: {self.timeout_s:g}"
            )
        return problems

    def _models(self, key: str) -> Iterator[tuple[str, str | None, Mapping[str, Any] | None]]:
        """Key, model and parameters of everyone who is named in the settings."""
        yield key, self.model, self.params or {}
        for index, place in enumerate(self.deployments or ()):
            yield f"{key}.deployments[{index}]", place.model, place.params
        for index, other in enumerate(self.fallbacks or ()):
            yield f"{key}.fallbacks[{index}]", other.model, other.params
        for name, other in (self.per_task or {}).items():
            yield f"{key}.per_task.{name}", other.model, other.params

    def _model_problems(self, key: str) -> list[str]:
        problems, usable = [], {}
        for name, path in (self.providers or {}).items():
            try:
                load_provider(path)
            except (ImportError, AttributeError, TypeError) as error:
                problems.append(f"{key}.providers.{name}: cannot load {path}: {error}")
            else:
                usable[name] = path
        register_providers(usable)
        own = self.params or {}
        for where, model, params in self._models(key):
            if ".deployments[" in where:
                problems += self._place_problems(key, where, str(model), {**own, **(params or {})})
            elif self.deployments and model in (None, self.model):
                continue  # asked at its deployments
            elif model is not None or params is not None:
                asked = own if params is None else params
                problems += self._place_problems(key, where, model or self.model, asked)
        return problems

    def _place_problems(self, key: str, where: str, model: str, params: Mapping[str, Any]) -> list[str]:
        """What is wrong with a model that is asked with these parameters."""
        provider = provider_of(model, self.providers)
        if provider is None:
            return [
                f"{where}.model: litellm knows no provider for {model!r}; write <provider>/<model>, such as "
                f"openai/gpt-4o-mini or hosted_vllm/<name>, or name its class in {key}.providers"
            ]
        if provider in (self.providers or ()):
            return []
        problems = []
        has_address = params.get("api_base") or params.get("base_url")
        if provider in ("hosted_vllm", "vllm") and not has_address:
            problems.append(f"{where}.params.api_base: {model} needs the address of its server")
        elif not params.get("api_base") and not params.get("api_key") and (missing := missing_keys(model)):
            problems.append(f"{where}.model: {model} needs in the environment: {', '.join(missing)}")
        if self.budget_usd is not None and price_of(self, model) is None:
            problems.append(
                f"{key}.prices: {key}.budget_usd needs the price of {model}; write {model}: "
                "{input: <US$ per 1M tokens>, output: <...>}, 0 for a server of your own"
            )
        return problems


_AT_LEAST_1, _POSITIVE = ("must be at least 1", lambda v: v >= 1), ("must be above 0", lambda v: v > 0)
_NOT_NEGATIVE = ("must be at least 0", lambda v: v >= 0)
_LIMITS: dict[str, tuple[str, Any]] = {
    "concurrency": _AT_LEAST_1,
    "timeout_s": _POSITIVE,
    "retries": _NOT_NEGATIVE,
    "max_failed_share": ("is outside (0, 1]", lambda v: 0 < v <= 1),
    "budget_usd": ("must be above 0, or null", lambda v: v > 0),
    "per_call": _AT_LEAST_1,
    "prices": _NOT_NEGATIVE,
    "deployments": ("must be at least 1, or null", lambda v: v >= 1),
}
"""Setting -> what its numbers must be, and whether one is."""


def price_of(settings: JudgeSettings, model: str) -> Price | None:
    """What `model` costs: by the settings, else by litellm's table; None if neither knows."""
    return (settings.prices or {}).get(model) or listed_price(model)


def _tasks(kind: type[Task[Any]] = Task) -> Iterator[type[Task[Any]]]:
    """Every kind of judgment that is loaded, the user's own included."""
    for task in kind.__subclasses__():
        if hasattr(task, "name"):
            yield task
        yield from _tasks(task)

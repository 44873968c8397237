"""The settings of a judge, which check themselves before anything is asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from typing import Any, Literal

from balcap.judge import models
from balcap.judge.cache import JudgmentCache
from balcap.judge.client import RESERVED, Deployment
from balcap.judge.images import LEAST_SIDE, ImagePolicy
from balcap.judge.ledger import Ledger
from balcap.judge.models import Price
from balcap.judge.prompt import Route
from balcap.judge.redis_cache import RedisCache, is_redis
from balcap.judge.task import Task
from balcap.utils.redact import secret_problems

SOON = timedelta(days=30)
"""A run says so where a judge ends within this time."""


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
        concurrency: calls under way at once, of all ranks together, at least 1; null for 64 of each rank.
        timeout_s: seconds until a call counts as failed, above 0.
        deadline_s: seconds until a judgment counts as failed, all its calls included, at least `timeout_s`;
            null for three times that.
        retries: repetitions of a call that failed in a way that may pass, at least 0.
        max_failed_share: the run ends, with a checkpoint, when more than this share of the recent judgments
            of a kind failed, in (0, 1], or when none comes any more; 1 never ends it.
        budget_usd: the run ends, with a checkpoint, when so many dollars are spent, above 0; calls that are
            under way then are still paid. Counts the whole `ledger`, and those of a job's other machines as of the last
            step; null for no limit.
        cache: SQLite file that keeps the answers, shared by the processes of one machine; or ``redis://host:6379/0`` for
            all machines of a job (``os.environ/<NAME>`` reads the URL from a variable); null for none.
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
    concurrency: int | None = None
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

    @property
    def slots(self) -> int:
        """`concurrency`, or its default."""
        return 64 if self.concurrency is None else self.concurrency

    def share(self, ranks: int) -> JudgeSettings:
        """What each of so many ranks may do for all of them to keep the limits: calls under way at once, requests and tokens
        a minute; at least 1 of each."""

        def part(limit: int | None) -> int | None:
            return None if limit is None else max(1, limit // ranks)

        places = [
            replace(one, rpm=part(one.rpm), tpm=part(one.tpm), max_parallel=part(one.max_parallel))
            for one in self.deployments or ()
        ]
        return replace(self, concurrency=part(self.concurrency), deployments=places or None)

    def routes(self, task: str, params: Mapping[str, Any] | None = None) -> list[Route]:
        """Who is asked for a kind of judgment, whose own `params` are given: its judge, then the fallbacks."""
        own, shared = (self.per_task or {}).get(task, TaskModel()), {**(self.params or {}), **(params or {})}
        return [
            Route(one.model or self.model, shared if one.params is None else one.params)
            for one in (own, *(self.fallbacks or ()))
        ]

    def problems(self, key: str = "model.judge") -> list[str]:
        """What is wrong, each message with the key that fixes it. Calls no provider.

        Args:
            key: where the judge stands in the config.
        """
        problems = self._number_problems(key)
        caches = RedisCache if self.cache and is_redis(self.cache) else JudgmentCache
        for path, store in ((self.cache, caches), (self.ledger, Ledger)):
            if path is not None and (problem := store.problem(path)):
                problems.append(problem.replace("model.judge", key))
        names = {task.name for task in _tasks()}
        problems += [
            f"{key}.{setting}.{name}: no such task; there are {', '.join(sorted(names))}"
            for setting, given in (("per_task", self.per_task), ("per_call", self.per_call))
            for name in given or ()
            if name not in names
        ]
        for name, path in (self.providers or {}).items():
            try:
                models.register_providers({name: path})
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                problems.append(f"{key}.providers.{name}: cannot load {path}: {error}")
        return problems + self._model_problems(key)

    def endings(self, instead: str, today: date | None = None) -> list[str]:
        """A line for each model that its provider has ended, or ends within `SOON`.

        Args:
            instead: what to do, in words.
            today: null for the day of the machine.
        """
        asked = [self.model] if not self.deployments else [one.model for one in self.deployments]
        others = (*(self.fallbacks or ()), *(self.per_task or {}).values())
        asked += [one.model for one in others if one.model is not None]
        lines, today = [], today or date.today()
        for model in dict.fromkeys(asked):
            end = None if model.partition("/")[0] in (self.providers or ()) else models.end_of(model)
            if end is not None and end - today <= SOON:
                days = (end - today).days
                when = f"ends on {end}, in {days} days" if days > 0 else f"ended on {end}"
                lines.append(f"judge: {model} {when} (by litellm's table); {instead}")
        return lines

    def _number_problems(self, key: str) -> list[str]:
        late = f"at least {key}.timeout_s: {self.timeout_s:g}"
        rules: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
            (r"deadline_s$", late, lambda number: number >= self.timeout_s),
            (r"(timeout_s|budget_usd)$", "above 0", lambda number: number > 0),
            (r"max_mb$", "above 0 and finite", lambda number: 0 < number < math.inf),
            (r"max_failed_share$", "above 0 and at most 1", lambda share: 0 < share <= 1),
            (r"images\.max_side$", f"at least {LEAST_SIDE}", lambda side: side >= LEAST_SIDE),
            (r"images\.quality$", "from 1 to 95", lambda quality: 1 <= quality <= 95),
            (r"retries$|\.prices\.", "at least 0", lambda number: number >= 0),
            (r"", "at least 1", lambda number: number >= 1),
        )
        problems = []
        for name, number in _numbers({**asdict(self), "deadline_s": self.deadline}, key):
            _, rule, holds = next(entry for entry in rules if re.search(entry[0], name))
            if not holds(number):  # NaN too
                problems.append(f"{name}: {number} must be {rule}")
        return problems

    def _model_problems(self, key: str) -> list[str]:
        """What is wrong with everyone who is named in the settings, and their parameters."""
        named: dict[str, JudgeSettings | Deployment | TaskModel] = {key: self}
        named |= {f"{key}.deployments[{index}]": one for index, one in enumerate(self.deployments or ())}
        named |= {f"{key}.fallbacks[{index}]": one for index, one in enumerate(self.fallbacks or ())}
        named |= {f"{key}.per_task.{task}": one for task, one in (self.per_task or {}).items()}
        problems, own = [], self.params or {}
        for where, one in named.items():
            params = one.params or {}
            reserved = sorted(RESERVED.intersection(params))
            problems += [f"{where}.params.{name}: set by the judge itself; remove it" for name in reserved]
            problems += secret_problems(params, f"{where}.params")
            if isinstance(one, Deployment):
                problems += self._place_problems(key, where, one.model, {**own, **params})
            elif self.deployments and one.model in (None, self.model):
                continue  # asked at its deployments
            elif one.model is not None or one.params is not None:
                asked = own if one.params is None else params
                problems += self._place_problems(key, where, one.model or self.model, asked)
        return problems

    def _place_problems(self, key: str, where: str, model: str, params: Mapping[str, Any]) -> list[str]:
        """What is wrong with a model that is asked with these parameters."""
        provider = models.provider_of(model, self.providers)
        if provider is None:
            return [
                f"{where}.model: litellm knows no provider for {model!r}; write <provider>/<model>, such as "
                f"openai/gpt-4o-mini or hosted_vllm/<name>, or name its class in {key}.providers"
            ]
        if provider in (self.providers or ()):
            return []
        problems, reachable = [], params.get("api_base") or params.get("api_key")
        if provider in ("hosted_vllm", "vllm") and not (params.get("api_base") or params.get("base_url")):
            problems.append(f"{where}.params.api_base: {model} needs the address of its server")
        elif not reachable and (missing := models.missing_keys(model)):
            problems.append(f"{where}.model: {model} needs in the environment: {', '.join(missing)}")
        if self.budget_usd is not None and price_of(self, model) is None:
            problems.append(
                f"{key}.prices: {key}.budget_usd needs the price of {model}; write {model}: "
                "{input: <US$ per 1M tokens>, output: <...>}, 0 for a server of your own"
            )
        return problems


def _numbers(settings: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every number in these settings under its key; not in ``params``, which are the provider's matter."""
    if isinstance(settings, Mapping):
        for name, inner in settings.items():
            if name != "params":
                yield from _numbers(inner, f"{key}.{name}")
    elif isinstance(settings, list):
        for index, inner in enumerate(settings):
            yield from _numbers(inner, f"{key}[{index}]")
    elif isinstance(settings, int | float):
        yield key, settings


def price_of(settings: JudgeSettings, model: str) -> Price | None:
    """What `model` costs: by the settings, else by litellm's table; None if neither knows."""
    return (settings.prices or {}).get(model) or models.listed_price(model)


def _tasks(kind: type[Task[Any]] = Task) -> Iterator[type[Task[Any]]]:
    """Every kind of judgment that is loaded, the user's own included."""
    for task in kind.__subclasses__():
        if hasattr(task, "name"):
            yield task
        yield from _tasks(task)

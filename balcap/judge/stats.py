"""What a judge has done and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balcap.judge.client import Bill


@dataclass(frozen=True)
class JudgeStats:
    """Counters since the judge was made. Take two snapshots and subtract them to see a step.

    Attributes:
        calls: requests sent to a provider, retries included.
        retries: those of them that repeat a failed one.
        cache_hits: answers that came from the cache: about a caption or an assertion, not a request.
        shared: answers that came from an equal question which was already under way.
        failures: task -> items (captions, assertions) that failed for good, each once, however many
            captions of a group share it; `Judgments.failures` counts per caption.
        tokens_in: prompt tokens billed, image tokens included.
        tokens_out: completion tokens billed, reasoning tokens included.
        tokens_cached: those of `tokens_in` that the provider had in its prefix cache.
        cost_usd: US dollars, from ``model.judge.prices`` or litellm's price table.
        unpriced_calls: calls that no price is known for; `cost_usd` holds 0 for them.
    """

    calls: int = 0
    retries: int = 0
    cache_hits: int = 0
    shared: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0

    @property
    def failed(self) -> int:
        """Items that failed for good, over all tasks."""
        return sum(self.failures.values())

    def __add__(self, other: JudgeStats) -> JudgeStats:
        return self._combine(other, 1)

    def __sub__(self, other: JudgeStats) -> JudgeStats:
        return self._combine(other, -1)

    def _combine(self, other: JudgeStats, sign: int) -> JudgeStats:
        values: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "failures":
                values[item.name] = {
                    task: count
                    for task in {**mine, **theirs}
                    if (count := mine.get(task, 0) + sign * theirs.get(task, 0))
                }
            else:
                values[item.name] = mine + sign * theirs
        return JudgeStats(**values)


class Counters:
    """The counters behind `JudgeStats`: written on the judge's event loop, read from anywhere."""

    def __init__(self) -> None:
        self.calls = self.retries = self.cache_hits = self.shared = 0
        self.tokens_in = self.tokens_out = self.tokens_cached = self.unpriced_calls = 0
        self.cost_usd = 0.0
        self.failures: Counter[str] = Counter()

    def bill(self, bill: Bill) -> None:
        """Add what a call used."""
        self.tokens_in += bill.tokens_in
        self.tokens_out += bill.tokens_out
        self.tokens_cached += bill.tokens_cached
        self.cost_usd += bill.usd or 0.0
        self.unpriced_calls += bill.usd is None

    def snapshot(self) -> JudgeStats:
        values = {item.name: getattr(self, item.name) for item in fields(JudgeStats)}
        return JudgeStats(**{**values, "failures": dict(self.failures)})

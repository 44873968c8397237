"""What calls use, added up per kind of judgment and model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Calls and what they hold; expectations, so fractions are fine.

    Attributes:
        calls: requests to a provider.
        items: captions or assertions in them.
        tokens_in: prompt tokens, images included.
        tokens_out: tokens of the answers, reasoning included.
    """

    calls: float = 0.0
    items: float = 0.0
    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.items + other.items,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    def __mul__(self, factor: float) -> Usage:
        return Usage(
            self.calls * factor, self.items * factor, self.tokens_in * factor, self.tokens_out * factor
        )


Key = tuple[str, str]
"""Task and model."""


class Usages(dict[Key, Usage]):
    """Usage per task and model; what is missing is none."""

    def __missing__(self, key: Key) -> Usage:
        return Usage()

    def __add__(self, other: Mapping[Key, Usage]) -> Usages:
        return total([self, other])

    def __mul__(self, factor: float) -> Usages:
        return Usages({key: usage * factor for key, usage in self.items()})

    @property
    def all(self) -> Usage:
        """Everything together."""
        return sum(self.values(), Usage())


def total(parts: Iterable[Mapping[Key, Usage]]) -> Usages:
    """The sum of several."""
    found = Usages()
    for part in parts:
        for key, usage in part.items():
            found[key] = found[key] + usage
    return found

"""What can go wrong with a judgment, and with a judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from balcap.utils.errors import RunStopped, UserError

FailureKind = Literal[
    "refused",  # the model declines
    "filtered",  # the provider's content filter
    "invalid",  # not what was asked for: no JSON, a wrong length, unknown ids, empty
    "cut",  # ran into max_tokens
    "too_long",  # does not fit the context window
    "rejected",  # bad request
    "denied",  # wrong key, unknown model, spent quota
    "image",  # cannot be decoded
    "limited",  # rate limit
    "timeout",
    "server",  # 5xx
    "connection",
    "stopped",  # not asked: the run is ending
]


class InvalidAnswer(ValueError):
    """The judge answered, but not with what was asked for: no JSON, a wrong length, an unknown id.

    The message is for a person and quotes no text of the caption.
    """


@dataclass(eq=False)
class JudgeFailure(RuntimeError):
    """A judgment that is missing for good: retries are used up, or a retry cannot help.

    Never a score of 0: whoever catches it stores None, which becomes NaN.

    Args:
        task: name of the task.
        reason: why, for a person; free of secrets.
        kind: what sort of failure it is.
    """

    task: str
    reason: str
    kind: FailureKind = "rejected"

    def __str__(self) -> str:
        return f"{self.task}: {self.reason}"


class JudgeUnavailable(RunStopped):
    """Too many of the recent judgments failed: going on would train on nothing."""


class BudgetSpent(RunStopped):
    """``budget_usd`` is spent: no further call is made."""


class StoreError(UserError):
    """A file that keeps judgments or their cost cannot be used.

    Args:
        message: with the key of the setting and what to do.
        why: the reason alone.
    """

    def __init__(self, message: str, why: str = ""):
        super().__init__(message)
        self.why = why

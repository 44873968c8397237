"""Judgments about captions, asked of any model that litellm reaches.

`judge.py`        `Judge`, the one class that a YAML and the rewards know
`tasks/`          what is asked: schema -> prompt -> parser, one file per kind of judgment
`group.py`        one image's captions while they are judged: every question once
`judgments.py`    the answers, as the rewards read them
`session.py`      one process at work: event loop (`loop.py`), memory, how questions are packed into calls
`asking.py`       one question until it is answered or given up: retries, repair, fallbacks, deadline, budget
`client.py`       the one place that calls litellm: one call, what it cost, what its failure means
`cache.py`, `ledger.py`: answers and calls on disk (`store.py`)
`settings.py`     what is wrong with a config, before anything is asked
`health.py`, `images.py`, `fence.py`, `answers.py`, `request.py`, `redact.py`, `stats.py`, `errors.py`: the
small parts

A question travels `Judge.ask` -> cache -> an equal question under way -> a call that it may share with
others -> validation. What comes back wrong, late or not at all is a `JudgeFailure`, and in the end a NaN:
never a 0, never a crash. Too many of them, or a spent budget, end the run with a `RunStopped`.
"""

from balcap.judge import errors, tasks
from balcap.judge.client import Bill, CallFailed, Client, Deployment, Price, Reply
from balcap.judge.errors import (
    BudgetSpent,
    CacheError,
    InvalidAnswer,
    JudgeFailure,
    JudgeUnavailable,
    LedgerError,
    StoreError,
)
from balcap.judge.group import Group
from balcap.judge.images import ImagePolicy
from balcap.judge.judge import Judge, TaskModel
from balcap.judge.judgments import Judgments
from balcap.judge.request import Question, Route
from balcap.judge.stats import JudgeStats
from balcap.judge.tasks import Decompose, Match, Rate, Rating, Recaption, Task, Verdict, Verify

__all__ = [
    "Bill",
    "BudgetSpent",
    "CacheError",
    "CallFailed",
    "Client",
    "Decompose",
    "Deployment",
    "Group",
    "ImagePolicy",
    "InvalidAnswer",
    "Judge",
    "JudgeFailure",
    "JudgeStats",
    "JudgeUnavailable",
    "Judgments",
    "LedgerError",
    "Match",
    "Price",
    "Question",
    "Rate",
    "Rating",
    "Recaption",
    "Reply",
    "Route",
    "StoreError",
    "Task",
    "TaskModel",
    "Verdict",
    "Verify",
    "errors",
    "tasks",
]

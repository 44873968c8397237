"""Judgments about captions, asked of any model that litellm reaches.

`judge.py`      `Judge`, the one class that a YAML and the rewards know
`settings.py`   `JudgeSettings`: what a YAML may set, checked before anything is asked
`tasks/`        what is asked: schema -> prompt -> parser, one file per kind of judgment
`task.py`       `Task`, their base; `Group`, an image's captions while they are judged; `Judgments`, the answers
`questions.py`  multiple-choice questions, as they are asked
`prompt.py`     fences, numbered items, JSON in prose; a `Question` and its keys in the cache
`images.py`     how an image is sent
`session.py`    one process at work: event loop, cache, and how questions share calls
`retry.py`      one question until it is answered or given up: retries, repair, fallbacks, deadline, budget
`client.py`     the one place that asks litellm: one call, what it cost, what its failure means
`models.py`     what litellm knows of models: providers, prices, keys, the days on which they end
`cache.py`      answers on disk
`ledger.py`     calls on disk, and `JudgeStats`, the counts
`errors.py`     what can go wrong

A question travels `Judge.ask` -> cache -> an equal question under way -> a call that it may share with
others -> validation. What comes back wrong, late or not at all is a `JudgeFailure`, and in the end a NaN:
never a 0, never a crash. Too many of them, or a spent budget, end the run with a `RunStopped`.
"""

from balcap.judge.client import CallFailed, Client, Deployment, Reply
from balcap.judge.errors import (
    BudgetSpent,
    InvalidAnswer,
    JudgeFailure,
    JudgeUnavailable,
    StoreError,
)
from balcap.judge.images import ImagePolicy
from balcap.judge.judge import Judge
from balcap.judge.ledger import JudgeStats
from balcap.judge.models import Price
from balcap.judge.prompt import Question, Route
from balcap.judge.settings import JudgeSettings, TaskModel
from balcap.judge.task import Group, Judgments, Task
from balcap.judge.tasks import Decompose, Match, Rate, Rating, Recaption, Verdict, Verify

__all__ = [
    "BudgetSpent", "CallFailed", "Client", "Decompose", "Deployment", "Group",
    "ImagePolicy", "InvalidAnswer", "Judge", "JudgeFailure", "JudgeSettings", "JudgeStats", "JudgeUnavailable",
    "Judgments", "Match", "Price", "Question", "Rate", "Rating", "Recaption", "Reply", "Route",
    "StoreError", "Task", "TaskModel", "Verdict", "Verify",
]  # fmt: skip

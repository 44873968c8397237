"""Judgments about captions, asked of any model that litellm reaches.

`judge.py`        `Judge`, the one class that a YAML and the rewards know
`tasks/`          what is asked: schema -> prompt -> parser, one file per kind of judgment
`group.py`        one image's captions while they are judged: every question once
`judgments.py`    the answers, as the rewards read them
`session.py`      one process at work: event loop (`loop.py`), cache (`cache.py`), client
`client.py`       the one place that calls litellm: retries, timeouts, prices
`images.py`, `fence.py`, `answers.py`, `request.py`, `redact.py`, `stats.py`, `errors.py`: the small parts

A question travels `Judge.ask` -> cache -> an equal question under way -> provider -> validation. What comes
back wrong, late or not at all is a `JudgeFailure`, and in the end a NaN: never a 0, never a crash.
"""

from balcap.judge.errors import CacheError, InvalidAnswer, JudgeFailure
from balcap.judge.group import Group
from balcap.judge.judge import Judge, TaskModel
from balcap.judge.judgments import Judgments
from balcap.judge.stats import JudgeStats
from balcap.judge.tasks import Decompose, Match, Rate, Rating, Task, Verdict, Verify

__all__ = [
    "CacheError",
    "Decompose",
    "Group",
    "InvalidAnswer",
    "Judge",
    "JudgeFailure",
    "JudgeStats",
    "Judgments",
    "Match",
    "Rate",
    "Rating",
    "Task",
    "TaskModel",
    "Verdict",
    "Verify",
]

"""What can go wrong with a judgment."""

from __future__ import annotations


class InvalidAnswer(ValueError):
    """The judge answered, but not with what was asked for: no JSON, a wrong length, an unknown id.

    The message is for a person and quotes no text of the caption.
    """


class JudgeFailure(RuntimeError):
    """A judgment that is missing for good: retries are used up, or a retry cannot help.

    Never a score of 0: whoever catches it stores None, which becomes NaN.

    Args:
        task: name of the task.
        reason: why, for a person; free of secrets.
    """

    def __init__(self, task: str, reason: str):
        super().__init__(f"{task}: {reason}")
        self.task = task
        self.reason = reason

    def __reduce__(self) -> tuple[type[JudgeFailure], tuple[str, str]]:
        return type(self), (self.task, self.reason)


class CacheError(RuntimeError):
    """The file named by ``model.judge.cache`` cannot serve as a cache of judgments."""

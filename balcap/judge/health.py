"""Whether asking on makes sense."""

from __future__ import annotations

from collections import deque

LEAST = 8  # failures before anything is concluded
RECENT = 100  # judgments that count


class Health:
    """The share of recent judgments that failed.

    Args:
        max_failed_share: above this share the judge counts as unavailable, in (0, 1].
    """

    def __init__(self, max_failed_share: float):
        self.max_failed_share = max_failed_share
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self.reason = ""

    def succeeded(self) -> None:
        """A judgment came."""
        self._recent.append(False)

    def failed(self, reason: str) -> bool:
        """A judgment is missing for good; whether that makes the judge unavailable."""
        self._recent.append(True)
        self.reason = reason
        failures = sum(self._recent)
        return failures >= LEAST and failures > self.max_failed_share * len(self._recent)

    def describe(self) -> str:
        """For a person."""
        return f"{sum(self._recent)} of the last {len(self._recent)} judgments failed, the last with: {self.reason}"

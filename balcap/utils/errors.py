"""What ends a run on purpose."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """The run ends here on purpose, with a checkpoint; the message says why and how to go on."""

"""What ends a run with one message: the command line prints it without a traceback."""

from __future__ import annotations


class UserError(RuntimeError):
    """Something that whoever started the run can put right; the message says what, and how."""


class RunStopped(UserError):
    """The run ends here on purpose, with a checkpoint; the message says why and how to go on."""

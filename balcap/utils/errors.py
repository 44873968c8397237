"""What ends a run with one message: the command line prints it without a traceback."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence


class UserError(RuntimeError):
    """Something that whoever started the run can put right; the message says what, and how."""


class RunStopped(UserError):
    """The run ends here on purpose, with a checkpoint; the message says why and how to go on."""


_VALUES = {
    "run_dir": "FOLDER",
    "data.data": "FILE_OR_HUB_ID",
    "data.image_root": "FOLDER",
    "data.predict_from": "FOLDER",
    "model.policy.model": "FOLDER_OR_HUB_ID",
}
"""Settings that another value puts right, and what it is."""


def next_line(given: Sequence[str], problems: Sequence[str], otherwise: str | None = None) -> str:
    """A last line with the command that gets on, or nothing where none is known.

    Args:
        given: the command that failed, and its arguments.
        problems: each begins with the key to change.
        otherwise: flags to show where no problem has a command of its own, such as ``--changed``.
    """
    exports, flags, again = [], [], list(given)
    for problem in problems:
        key, names = (
            re.split(r"[:=]? ", problem, maxsplit=1)[0],
            re.search(r"in the environment: (.+)", problem),
        )
        if names:
            exports += [f"export {name}=..." for name in names[1].split(", ")]
        elif key == "run_dir" and "continue it with" in problem:
            flags.append("--resume auto")  # also where the run has ended before its first checkpoint
        elif key == "model.reward_transforms" and "acts on the reward" in problem:
            flags.append("--model.reward_transforms '[]'")
        elif key == "ckpt_path" and "start with" in problem:
            again = _without(again, "--ckpt_path")
            flags.append("--resume auto")
        elif key == "model.policy.model" and (run := re.search(r"(\S+)/export is no folder", problem)):
            return f"\nNext: python main.py fit --config {run[1]}/config.yaml --ckpt_path last"
        elif key in _VALUES:
            again = _without(again, f"--{key}")
            flags.append(f"--{key} {_VALUES[key]}")
    if not exports and not flags and otherwise is None:
        return ""
    flags = list(dict.fromkeys(flags)) or ([otherwise] if otherwise and not exports else [])
    command = " ".join(["python main.py", shlex.join(again), *flags])
    return f"\nNext: {'; '.join([*dict.fromkeys(exports), command])}"


def _without(words: Sequence[str], flag: str) -> list[str]:
    """`words` without a flag and its value."""
    joined = [word for word in words if not word.startswith(f"{flag}=")]
    at = joined.index(flag) if flag in joined else len(joined)
    return joined[:at] + joined[at + 2 :]

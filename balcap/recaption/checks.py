"""Settings of a run, checked before anything is read or paid."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from balcap.data.images import PILLOW_MAX_PIXELS
from balcap.data.settings import folder_problems, prompt_problems, source_problems

if TYPE_CHECKING:
    from balcap.recaption.run import Recaptioner

_DATA_KEY = re.compile(r"\bdata\.(data|name|image_root|folders|cache_dir|link_targets|max_pixels_in_file)\b")


def problems(settings: Recaptioner) -> list[str]:
    """What is wrong, each message beginning with the key to change. Reads no data, calls no provider."""
    found = source_problems(settings.data, prefix="")
    found += folder_problems(settings.image_root, settings.folders, settings.link_targets, prefix="")
    found += prompt_problems(settings.prompts, prefix="")
    if settings.max_rows is not None and settings.max_rows < 1:
        found.append(f"max_rows must be >= 1 or null (it is {settings.max_rows})")
    if settings.seed < 0:
        found.append(f"seed must be >= 0 (it is {settings.seed})")
    if not 1 <= settings.max_pixels_in_file <= PILLOW_MAX_PIXELS:
        found.append(
            f"max_pixels_in_file must be in 1 .. {PILLOW_MAX_PIXELS}, Pillow's own limit "
            f"(it is {settings.max_pixels_in_file})"
        )
    found += _out(settings)
    if settings.judge is None:
        found.append(
            "judge is required: the model that writes captions, such as judge.model openai/gpt-5-mini"
        )
    else:
        found += settings.judge.problems(key="judge")
    if settings.decompose_judge is not None:
        found += settings.decompose_judge.problems(key="decompose_judge")
        if not settings.decompose:
            found.append(
                "decompose_judge is set, but decompose is false: set it to true, or remove the judge"
            )
    return found


def _out(settings: Recaptioner) -> list[str]:
    if settings.out is None:
        return ["out is required: the .json file to write"]
    out = settings.files.out
    if out.suffix != ".json":
        return [f"out: {settings.out} must end in .json"]
    if out.is_dir():
        return [f"out: {settings.out} is a folder"]
    if settings.data and Path(settings.data).expanduser().resolve() == out.resolve():
        return [f"out: {settings.out} is the data set itself (data); name another file"]
    if out.exists() and not settings.files.journal.exists():
        return [
            f"out: {settings.out} exists and was not written by recaption (there is no "
            f"{settings.files.journal.name} beside it); name another file, or move it away"
        ]
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        return [f"out: {folder} is not a folder"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"out: {folder} cannot be written to"]
    return []


def own_keys(text: str, judge: str = "judge") -> str:
    """A message of `balcap.data` or of a judge, with the keys that its settings have here.

    Args:
        text: the message, which names keys as they are in training.
        judge: key of the judge it comes from.
    """
    return _DATA_KEY.sub(r"\1", text).replace("model.judge", judge)

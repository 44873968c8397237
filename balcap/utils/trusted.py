"""``--trusted_only``: a config may name code of this project and its frameworks alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from balcap.utils.errors import UserError

TRUSTED = ("balcap", "callbacks", "examples", "torch", "lightning", "transformers", "peft", "bitsandbytes")
"""Packages whose classes and functions may be named."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_FILE_ENDINGS = ("json", "jsonl", "yaml", "yml", "csv", "sqlite", "ckpt", "png", "txt", "parquet")


def check_trusted(args: Sequence[str]) -> None:
    """Refuse command-line arguments, and YAML files among them, that name code of other packages.

    Nothing is imported to find out. A class may be named under many keys, so every value that looks like an import path
    counts, but for file names.

    Raises:
        UserError: naming all such values.
    """
    words = [word for arg in args for word in arg.split("=", 1)]
    values: list[Any] = []
    for word in words:  # grows: a study names the configs of its runs
        if word.endswith((".yaml", ".yml")) and Path(word).is_file():
            values.append(yaml.safe_load(Path(word).read_text(encoding="utf-8")))
            words += [
                text for text in _texts(values[-1]) if text.endswith((".yaml", ".yml")) and text not in words
            ]
        elif not word.startswith("--"):
            try:
                values.append(yaml.safe_load(word))
            except yaml.YAMLError:
                values.append(word)
    others = sorted(
        {text for text in _texts(values) if _IMPORT_PATH.fullmatch(text) and not _is_trusted(text)}
    )
    if others:
        raise UserError(
            f"--trusted_only: {', '.join(others)} would run code of another package; trusted are {', '.join(TRUSTED)}. "
            "Read that code, then leave the flag out"
        )


def _is_trusted(path: str) -> bool:
    return path.partition(".")[0] in TRUSTED or path.rpartition(".")[2].lower() in _FILE_ENDINGS


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)

"""Settings of the data, checked before anything is read or loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from balcap.data.images import PILLOW_MAX_PIXELS

if TYPE_CHECKING:
    from balcap.data.datamodule import CaptionDataModule

STAGES = ("fit", "validate", "predict")


def problems(data: CaptionDataModule, stage: str) -> list[str]:
    """What is wrong with the settings for this stage, each message beginning with the key to change.

    Looks at the file system, but reads no data and reaches no network.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")
    found = _numbers(data) + prompt_problems(data.prompts)
    if stage == "predict":
        return found + _prediction(data)
    return found + source_problems(data.data) + _image_root(data)


def prompt_problems(prompts: Sequence[str] | None, prefix: str = "data.") -> list[str]:
    """What is wrong with a choice of prompts; `prefix` goes before the names of the settings."""
    if prompts is None or (prompts and all(prompt.strip() for prompt in prompts)):
        return []
    return [f"{prefix}prompts must hold at least one prompt and no empty one; null asks the row's question"]


def source_problems(data: str | None, prefix: str = "data.") -> list[str]:
    """What is wrong with the name of a data set, as `load_rows` takes it."""
    if data is None:
        wanted = "a ShareGPT4V .json or .jsonl file, or a hub id such as owner/name"
        return [f"{prefix}data is required: {wanted}"]
    return _source(data, f"{prefix}data", hub=True)


def folder_problems(
    image_root: str | None,
    folders: Sequence[str] | None,
    link_targets: Sequence[str] | None,
    prefix: str = "data.",
) -> list[str]:
    """What is wrong with the folders that images are read from."""
    if image_root is None:
        return [f"{prefix}image_root is required: the folder that the image paths of the data set start from"]
    root = Path(image_root).expanduser()
    if not root.is_dir():
        why = "is not a folder" if root.exists() else "does not exist"
        return [f"{prefix}image_root: {image_root} {why}"]
    found = []
    for folder in folders or ():
        if not (root / folder.strip("/")).is_dir():
            found.append(f"{prefix}folders: {folder} does not exist under {prefix}image_root={image_root}")
    for target in link_targets or ():
        if not Path(target).expanduser().is_dir():
            found.append(f"{prefix}link_targets: {target} does not exist")
    return found


def _numbers(data: CaptionDataModule) -> list[str]:
    rules = {
        "data.batch_size must be >= 1": data.batch_size >= 1,
        "data.val_size must be >= 0": data.val_size >= 0,
        "data.val_batch_size must be >= 1 or null": data.val_batch_size is None or data.val_batch_size >= 1,
        "data.num_workers must be >= 0": data.num_workers >= 0,
        "data.seed must be >= 0": data.seed >= 0,
        "data.max_rows must be >= 1 or null": data.max_rows is None or data.max_rows >= 1,
        "data.max_bad_share must be in (0, 1]": 0 < data.max_bad_share <= 1,
        f"data.max_pixels_in_file must be in 1 .. {PILLOW_MAX_PIXELS}, Pillow's own limit": (
            1 <= data.max_pixels_in_file <= PILLOW_MAX_PIXELS
        ),
    }
    values = vars(data)
    return [f"{rule} (it is {values[_key(rule)]})" for rule, holds in rules.items() if not holds]


def _key(rule: str) -> str:
    return rule.split()[0].removeprefix("data.")


def _source(value: str, key: str, hub: bool) -> list[str]:
    path = Path(value).expanduser()
    if path.is_file():
        return []
    if path.is_dir():
        return [f"{key}: {value} is a folder; name the .json or .jsonl file in it"]
    if hub and looks_like_hub_id(value):
        return []
    wanted = "a file, nor does it look like a hub id (owner/name)" if hub else "a file or folder"
    return [f"{key}: {value} is not {wanted}"]


def looks_like_hub_id(value: str) -> bool:
    """``owner/name``, and not a relative path to a JSON file."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value)) and not value.lower().endswith(
        (".json", ".jsonl")
    )


def _image_root(data: CaptionDataModule) -> list[str]:
    return folder_problems(data.image_root, data.folders, data.link_targets)


def _prediction(data: CaptionDataModule) -> list[str]:
    if data.predict_from is None:
        return ["data.predict_from is required to predict: a folder of images, or a ShareGPT4V JSON file"]
    if Path(data.predict_from).expanduser().is_dir():
        return []
    return _source(data.predict_from, "data.predict_from", hub=False) + _image_root(data)

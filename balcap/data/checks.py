"""Settings of the data, checked before anything is read or loaded."""

from __future__ import annotations

import re
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
    found = _numbers(data)
    if data.prompts is not None and not (data.prompts and all(p.strip() for p in data.prompts)):
        found.append(
            "data.prompts must hold at least one prompt and no empty one; null asks the row's question"
        )
    if stage == "predict":
        return found + _prediction(data)
    if data.data is None:
        found.append(
            "data.data is required: a ShareGPT4V .json or .jsonl file, or a hub id such as owner/name"
        )
    else:
        found += _source(data.data, "data.data", hub=True)
    return found + _image_root(data)


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
    if data.image_root is None:
        return ["data.image_root is required: the folder that the image paths of the data set start from"]
    root = Path(data.image_root).expanduser()
    if not root.is_dir():
        return [
            f"data.image_root: {data.image_root} {'is not a folder' if root.exists() else 'does not exist'}"
        ]
    found = []
    for folder in data.folders or ():
        if not (root / folder.strip("/")).is_dir():
            found.append(f"data.folders: {folder} does not exist under data.image_root={data.image_root}")
    for target in data.link_targets or ():
        if not Path(target).expanduser().is_dir():
            found.append(f"data.link_targets: {target} does not exist")
    return found


def _prediction(data: CaptionDataModule) -> list[str]:
    if data.predict_from is None:
        return ["data.predict_from is required to predict: a folder of images, or a ShareGPT4V JSON file"]
    if Path(data.predict_from).expanduser().is_dir():
        return []
    return _source(data.predict_from, "data.predict_from", hub=False) + _image_root(data)

"""A small data set on disk: ordinary PNG files and ShareGPT4V rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from balcap.data.datamodule import CaptionDataModule


def _row(image: str, caption: str = "A caption.", question: str = "What is this?\n<image>") -> dict:
    return {
        "id": "7",
        "image": image,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption}],
    }


@pytest.fixture
def row() -> Callable[..., dict]:
    """``row(image, caption, question)`` -> one ShareGPT4V row."""
    return _row


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., list[str]]:
    """``make_images(n, folder="coco")`` -> names of n images of distinct colours under tmp_path/images."""

    def make(number: int, folder: str = "coco") -> list[str]:
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        names = [f"{folder}/{i:04d}.png" for i in range(number)]
        for i, name in enumerate(names):
            Image.new("RGB", (32, 32), (i % 256, i // 256, 9)).save(tmp_path / "images" / name)
        return names

    return make


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., CaptionDataModule]:
    """``make_data(rows, **settings)`` -> a data module on these rows; settings override."""

    def make(rows: list, **settings: object) -> CaptionDataModule:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        (tmp_path / "images").mkdir(exist_ok=True)
        defaults = {
            "data": str(path),
            "image_root": str(tmp_path / "images"),
            "batch_size": 4,
            "val_size": 0,
            "num_workers": 0,
            "run_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path / "cache"),
        }
        return CaptionDataModule(**(defaults | settings))

    return make

"""Small copies of a run's images, so that its captions can be read beside them on any machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from balcap.utils.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "_images"
"""In the folder of the Parquet files. Those who read that folder as one data set skip names with an underscore."""

QUALITY = 80  # of JPEG, in [0, 95]


def thumbnail_path(folder: str | Path, sample_id: str, number: int = 0) -> Path:
    """Where the small copy of an image is; the same for an id on every machine.

    Args:
        folder: of the copies: `FOLDER` in a run's ``rollouts``.
        sample_id: of a row, any text.
        number: of the image in a row of several, from 0.
    """
    name = hashlib.sha256(sample_id.encode()).hexdigest()[:32]
    return Path(folder) / (f"{name}-{number}.jpg" if number else f"{name}.jpg")


def write_thumbnail(image: Image.Image, path: str | Path, size: int = 384) -> None:
    """Write a small copy of an image as JPEG, whole or not at all; nothing where the file is there already.

    Args:
        image: of any mode; not changed.
        path: the file; its folder is made if it is missing.
        size: pixels of the longer side at most; smaller images keep their size.
    """
    if Path(path).exists():
        return
    small = image.convert("RGB")
    small.thumbnail((size, size))
    with atomic_write(path, "wb") as file:
        small.save(file, "JPEG", quality=QUALITY)

"""One row of the table -> one sample: its image file, its prompt and its reference, or a line in bad_rows.jsonl.

Nothing outside `data.image_root` is ever read. An image goes to a judge, who may be a third party, so a path in a
downloaded data set must not be able to name a file that its owner did not mean to share.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from balcap.data.bad_rows import BadRowLog
from balcap.data.columns import read_columns, storable
from balcap.data.images import MAX_PIXELS, BadImage, decode_image
from balcap.data.order import image_hash
from balcap.data.settings import DataSettings
from balcap.data.sharegpt4v import flat_row
from balcap.types import CaptionBatch, Cursor

DEFAULT_PROMPT = "Describe this image in detail."
"""For images that come without a question."""

Table = Sequence[Mapping[str, Any]]
"""Rows as `balcap.data.sharegpt4v.flat_rows` makes them."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".mpo")
)
"""What `folder_rows` takes for an image."""


class ImageFolder:
    """Reads images by name from one folder.

    Args:
        root: the folder that names are relative to.
        max_pixels: limit of width x height of an image.
        link_targets: further folders that symbolic links under `root` may lead to.
    """

    def __init__(
        self, root: str | Path, max_pixels: int = MAX_PIXELS, link_targets: Sequence[str | Path] = ()
    ) -> None:
        self.root = Path(root).expanduser()
        self.max_pixels = max_pixels
        self._allowed = [Path(os.path.realpath(Path(p).expanduser())) for p in (self.root, *link_targets)]

    def read(self, name: str) -> tuple[bytes, Image.Image]:
        """The bytes of the file and the decoded image; raises `BadImage` with the cause."""
        path = self.locate(name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
                raise BadImage("unreadable_file", f"{path} is not a regular file")
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise BadImage("missing_file", f"{path} does not exist") from error
        except OSError as error:
            raise BadImage("unreadable_file", f"{path}: {error.strerror}") from error
        return data, decode_image(data, self.max_pixels)

    def locate(self, name: str) -> Path:
        """The real path of the file, all links followed.

        Raises:
            BadImage: ``outside_image_root``, ``missing_file`` or ``unreadable_file``.
        """
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name:
            raise BadImage("unreadable_file", f"{name!r} is not a file name")
        if parts[0] == "/" or ".." in parts:
            raise BadImage("outside_image_root", f"{name!r} is not a path below data.image_root")
        for spelling in spellings(name):
            path = self.root / spelling
            try:
                os.lstat(path)
                real = Path(os.path.realpath(path))
            except PermissionError as error:
                raise BadImage("unreadable_file", f"{path}: {error.strerror}") from error
            except (OSError, ValueError):  # not there, or no name at all, under this spelling
                continue
            if not any(real.is_relative_to(folder) for folder in self._allowed):
                detail = f"{path} leads to {real}; if that is meant, list its folder in data.link_targets"
                raise BadImage("outside_image_root", detail)
            return real
        raise BadImage("missing_file", f"{self.root / name} does not exist")


def spellings(name: str) -> list[str]:
    """The name as written, with ``#Uxxxx`` escapes resolved, and with other characters escaped so.

    unzip writes ``#U00e9`` for é (``#L01f600`` beyond 16 bits) where it does not trust the file system:
    WikiArt exists in both spellings, in the data set as well as on people's disks.
    """
    plain = re.sub(
        r"#U([0-9a-fA-F]{4})|#L([0-9a-fA-F]{6})", lambda m: chr(min(int(m[1] or m[2], 16), 0x10FFFF)), name
    )
    escaped = re.sub(
        r"[^\0-\x7f]", lambda m: f"#U{c:04x}" if (c := ord(m[0])) < 0x10000 else f"#L{c:06x}", plain
    )
    return list(dict.fromkeys((name, plain, escaped)))


def folder_rows(folder: str | Path) -> list[dict[str, Any]]:
    """The images below `folder` as rows of a table, without captions and columns.

    In order of their names, those of a folder before those of its subfolders; hidden files and folders are
    left out.
    """
    root = Path(folder).expanduser()
    rows: list[dict[str, Any]] = []
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES:
                name = (Path(here) / file).relative_to(root).as_posix()
                row = flat_row(len(rows), sample_id=name)
                if storable(name) != name:  # Python's stand-in for bytes that are not UTF-8
                    row |= {"problem": "not_utf8", "detail": f"file name {name!r}: rename it"}
                rows.append(row)
    return rows


def prompt_for(sample_id: str, question: str, prompts: Sequence[str] = (), seed: int = 0) -> str:
    """The instruction for one image, the same in every epoch, process and run.

    Args:
        sample_id: the image.
        question: the row's own, "" if it has none.
        prompts: one of these instead, picked by `seed` and `sample_id`; empty for the row's own question.
        seed: of the choice among `prompts`.
    """
    if prompts:
        return prompts[image_hash(seed, sample_id) % len(prompts)]
    return question or DEFAULT_PROMPT


@dataclass(frozen=True)
class Sample:
    """What one row gives to a batch; fields as in `CaptionBatch`."""

    sample_id: str
    image: Image.Image
    image_bytes: bytes
    prompt: str
    reference: str
    extras: Mapping[str, Any]


@dataclass(frozen=True)
class RowReader:
    """Reads rows by index.

    Attributes:
        table: the rows.
        images: where their files are.
        settings: which prompt an image gets.
        bad_rows: where bad ones are listed.
        ignored_causes: causes on the row itself that do not matter here.
    """

    table: Table
    images: ImageFolder
    settings: DataSettings
    bad_rows: BadRowLog
    ignored_causes: frozenset[str] = frozenset()

    def read(self, index: int) -> Sample | None:
        """The sample, or None if the row is bad; it is then listed."""
        row = self.table[index]
        try:
            if row["problem"] and row["problem"] not in self.ignored_causes:
                raise BadImage(row["problem"], row["detail"])
            data, image = self.images.read(row["sample_id"])
        except BadImage as bad:
            self.bad_rows.add(row["row"], row["sample_id"], bad.cause, bad.detail)
            return None
        prompt = prompt_for(
            row["sample_id"], row["question"], self.settings.prompts or (), self.settings.seed
        )
        extras = read_columns(row["columns"])
        return Sample(row["sample_id"], image, data, prompt, row["caption"], extras)


def to_batch(samples: Sequence[Sample], cursor: Cursor | None = None) -> CaptionBatch:
    """Samples side by side; at least one."""
    return CaptionBatch(
        sample_ids=[s.sample_id for s in samples],
        images=[s.image for s in samples],
        image_bytes=[s.image_bytes for s in samples],
        prompts=[s.prompt for s in samples],
        references=[s.reference for s in samples],
        extras={name: [s.extras[name] for s in samples] for name in samples[0].extras},
        cursor=cursor,
    )

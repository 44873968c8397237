"""One row of the table -> one sample: its image files, its prompt and its reference, or a line in bad_rows.jsonl.

Nothing outside `data.image_root` is ever read. An image goes to a judge, who may be a third party, so a path in a
downloaded data set must not be able to name a file that its owner did not mean to share.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from balcap.data.bad_rows import BadRowLog
from balcap.data.columns import REFERENCE_UNITS, read_columns, storable
from balcap.data.images import MAX_PIXELS, BadImage, decode_image
from balcap.data.layouts import PLACEHOLDER, flat_row, image_paths
from balcap.data.order import image_hash
from balcap.data.settings import DataSettings
from balcap.data.table import Table
from balcap.types import CaptionBatch, Cursor

DEFAULT_PROMPT = "Describe this image in detail."
"""For images that come without a question."""

LARGE = 16_000_000
"""Pixels. Processors scale larger images down, and so do judges (`balcap.judge.images`)."""

MAX_BYTES = 400_000_000
"""A file beyond this is not read: an image of 100 million pixels is no larger, whatever its format."""


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
        return self.load(self.locate(name))

    def load(self, path: Path) -> tuple[bytes, Image.Image]:
        """The same of a path that `locate` has found."""
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
                raise BadImage("unreadable_file", f"{path} is not a regular file")
            if status.st_size > MAX_BYTES:
                raise BadImage(
                    "file_too_large", f"{path} has {status.st_size:,} bytes, more than {MAX_BYTES:,}"
                )
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise BadImage("missing_file", f"{path} does not exist") from error
        except OSError as error:
            raise BadImage("unreadable_file", f"{path}: {error.strerror}") from error
        return within_large(data, decode_image(data, self.max_pixels))

    def locate(self, name: str) -> Path:
        """The real path of the file, all links followed.

        Raises:
            BadImage: ``outside_image_root``, ``missing_file`` or ``unreadable_file``.
        """
        for root in (
            self.root,
            self.root.absolute(),
        ):  # written absolutely, below a root that may be relative
            name = name.removeprefix(f"{str(root).rstrip('/')}/")
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


def within_large(data: bytes, image: Image.Image) -> tuple[bytes, Image.Image]:
    """File and image, or both anew with `LARGE` pixels where there are more: a policy and a judge that see no more of it
    need not decode it twice."""
    if image.width * image.height <= LARGE:
        return data, image
    scale = math.sqrt(LARGE / (image.width * image.height))
    image.thumbnail((max(1, int(image.width * scale)), max(1, int(image.height * scale))), reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue(), image


def spellings(name: str) -> list[str]:
    """The name as written, with ``#Uxxxx`` escapes resolved, with other characters escaped so, and as macOS writes
    it (é in two characters).

    unzip writes ``#U00e9`` for é (``#L01f600`` beyond 16 bits) where it does not trust the file system:
    WikiArt exists in both spellings, in the data set as well as on people's disks.
    """
    plain = re.sub(
        r"#U([0-9a-fA-F]{4})|#L([0-9a-fA-F]{6})", lambda m: chr(min(int(m[1] or m[2], 16), 0x10FFFF)), name
    )
    escaped = re.sub(
        r"[^\0-\x7f]", lambda m: f"#U{c:04x}" if (c := ord(m[0])) < 0x10000 else f"#L{c:06x}", plain
    )
    return list(dict.fromkeys((name, plain, escaped, unicodedata.normalize("NFD", name))))


def folder_rows(folder: str | Path, link_targets: Sequence[str | Path] = ()) -> Table:
    """The files below `folder` as rows, without captions and columns; hidden files and folders are left out.

    Whether a file is an image is decided when it is read, by its content. Links to folders are followed where
    `link_targets` allows it; others are bad rows, and so are loops.
    """
    images = ImageFolder(folder, link_targets=link_targets)
    rows: list[dict[str, Any]] = []

    def add(name: str, problem: str = "", detail: str = "") -> None:
        if storable(name) != name:  # Python's stand-in for bytes that are not UTF-8
            problem, detail = "not_utf8", f"file name {name!r}: rename it"
        rows.append(flat_row(len(rows), sample_id=storable(name), problem=problem, detail=detail))

    def walk(here: Path, name: str, above: tuple[Path, ...]) -> None:
        """Files of a folder in the order of their names, then its subfolders."""
        entries = sorted((e for e in os.scandir(here) if not e.name.startswith(".")), key=lambda e: e.name)
        for entry in entries:
            if not entry.is_dir():
                add(name + entry.name)
        for entry in entries:
            if entry.is_dir():
                below = name + entry.name
                try:
                    real = images.locate(below) if entry.is_symlink() else above[-1] / entry.name
                    if real in above:
                        raise BadImage("unreadable_file", f"{here / entry.name} leads back to {real}")
                    walk(here / entry.name, f"{below}/", (*above, real))
                except BadImage as bad:
                    add(below, bad.cause, bad.detail)
                except OSError as error:
                    add(below, "unreadable_file", f"{here / entry.name}: {error.strerror}")

    walk(images.root, "", (Path(os.path.realpath(images.root)),))
    return Table.of(rows)


def prompt_for(sample_id: str, question: str, prompts: Sequence[str] = (), seed: int = 0) -> str:
    """The instruction for one row, the same in every epoch, process and run.

    Args:
        sample_id: of the row.
        question: the row's own, "" if it has none.
        prompts: one of these instead, picked by `seed` and `sample_id`; empty for the row's own question. The
            placeholder ``<image>`` in them says nothing: images come before the text.
        seed: of the choice among `prompts`.
    """
    if prompts:
        return prompts[image_hash(seed, sample_id) % len(prompts)].replace(PLACEHOLDER, "").strip()
    return question or DEFAULT_PROMPT


@dataclass(frozen=True)
class Sample:
    """What one row gives to a batch; fields as in `CaptionBatch`."""

    sample_id: str
    images: tuple[Image.Image, ...]
    image_bytes: tuple[bytes, ...]
    prompt: str
    reference: str
    extras: Mapping[str, Any]


@dataclass(frozen=True)
class RowReader:
    """Reads rows by index.

    Attributes:
        table: the rows.
        images: where their files are.
        settings: which prompt and which captions an image gets.
        bad_rows: where bad ones are listed.
        ignored_causes: causes on the row itself that do not matter here.
        held_out: files that must not be read: what is validated is not trained on, by whatever name or link, nor
            in another row of several images.
    """

    table: Table
    images: ImageFolder
    settings: DataSettings
    bad_rows: BadRowLog
    ignored_causes: frozenset[str] = frozenset()
    held_out: frozenset[Path] = frozenset()

    def read(self, index: int, visit: int = 0) -> Sample | None:
        """The sample, or None if the row is bad; it is then listed. `visit` counts the epochs."""
        row = self.table[index]
        name = row["sample_id"]
        try:
            if row["problem"] and row["problem"] not in self.ignored_causes:
                raise BadImage(row["problem"], row["detail"])
            paths = [self.images.locate(path) for path in image_paths(name)]
            if validated := [path for path in paths if path in self.held_out]:
                raise BadImage(
                    "held_out", f"{validated[0]} is validated, under another name or in another row"
                )
            files, images = zip(*map(self.images.load, paths), strict=True)
        except BadImage as bad:
            self.bad_rows.add(row["row"], name, bad.cause, bad.detail)
            return None
        prompt = prompt_for(name, row["question"], self.settings.prompts or (), self.settings.seed)
        rows = [row if r == index else self.table[r] for r in self.table.same_image(index)]
        reference, extras = references_of(rows, self.settings, name, visit)
        return Sample(name, images, files, prompt, reference, extras)


def references_of(
    rows: Sequence[Mapping[str, Any]], settings: DataSettings, name: str, visit: int
) -> tuple[str, dict[str, Any]]:
    """The reference of an image, and its columns, from all its captions: see `DataSettings.references`."""
    captions = [(caption, row) for row in rows for caption in row["captions"]]
    if len(captions) < 2:
        return next((caption for caption, _ in captions), ""), read_columns(rows[0]["columns"])
    if settings.references == "one":
        caption, row = captions[(image_hash(settings.seed, name) + visit) % len(captions)]
        return caption, read_columns(row["columns"])
    extras = read_columns(rows[0]["columns"])
    units = [read_columns(row["columns"])[REFERENCE_UNITS] for row in rows]
    extras[REFERENCE_UNITS] = [unit for of_row in units for unit in of_row] if all(units) else None
    return "\n".join(dict.fromkeys(caption for caption, _ in captions)), extras


def to_batch(samples: Sequence[Sample], cursor: Cursor | None = None) -> CaptionBatch:
    """Samples side by side; at least one."""
    return CaptionBatch(
        sample_ids=[s.sample_id for s in samples],
        images=[s.images for s in samples],
        image_bytes=[s.image_bytes for s in samples],
        prompts=[s.prompt for s in samples],
        references=[s.reference for s in samples],
        extras={name: [s.extras[name] for s in samples] for name in samples[0].extras},
        cursor=cursor,
    )

"""From a sample id to a file inside `data.image_root`: nothing outside it is ever read.

An image goes to a judge, who may be a third party, so a path in a downloaded data set must not be able to
name a file that its owner did not mean to share.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from balcap.data.images import MAX_PIXELS, BadImage, decode_image

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".mpo")
)
"""What `find_images` takes for an image."""


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
                raise BadImage(
                    "outside_image_root",
                    f"{path} leads to {real}; if that is meant, list its folder in data.link_targets",
                )
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
    escaped = "".join(_escape(c) for c in plain)
    return list(dict.fromkeys((name, plain, escaped)))


def _escape(character: str) -> str:
    code = ord(character)
    if code < 128:
        return character
    return f"#U{code:04x}" if code < 0x10000 else f"#L{code:06x}"


def find_images(folder: str | Path) -> Iterator[str]:
    """Names of the images below `folder`, in order of their names, hidden files and folders left out."""
    root = Path(folder).expanduser()
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES:
                yield (Path(here) / file).relative_to(root).as_posix()


def folder_rows(folder: str | Path) -> list[dict[str, Any]]:
    """The images of a folder as rows, with the columns of `balcap.data.sharegpt4v.normalise`."""
    rows = []
    for number, name in enumerate(find_images(folder)):
        bad = not _is_utf8(name)
        rows.append(
            {
                "row": number,
                "sample_id": name,
                "question": "",
                "caption": "",
                "reference_units": None,
                "problem": "not_utf8" if bad else "",
                "detail": f"file name {name!r}: rename it" if bad else "",
            }
        )
    return rows


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python's stand-in for bytes that are not UTF-8
        return False
    return True

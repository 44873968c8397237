"""Bytes of an image file -> upright 8-bit RGB, as the policy's processor wants it.

Pixels are otherwise left alone: resizing to the model's grid is the processor's work. Colour profiles are
not applied. An alpha channel is composited on white, the page that most transparent pictures are drawn for.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is decoded. Other formats that Pillow knows, such as EPS, would start programs."""

MAX_PIXELS = 100_000_000
"""Default limit of width x height, read from the header before anything is decoded."""

PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Pillow refuses larger images by itself, so no higher limit can be set."""

MAX_ASPECT = 200
"""Long side / short side. Processors of the Qwen-VL family refuse more; thinner images get white margins."""

MIN_SIDE = 28
"""Pixels: one visual token of the Qwen-VL family. Smaller images are enlarged by a whole factor."""

_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|BM|II\*\0|MM\0\*|.{4}ftyp|RIFF(.{4}WEBP|.{0,4}\Z)", re.DOTALL
)

_HEIC = re.compile(rb".{4}ftyp(hei|mif)", re.DOTALL)


class BadImage(Exception):
    """A row or file that cannot be used.

    Attributes:
        cause: one word for counting, such as ``truncated_image``.
        detail: one line for the person who looks into it.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to upright RGB that every processor accepts.

    - EXIF rotation is applied; the first frame of an animation is taken; transparency is put on white.
    - 16-bit images are scaled to 8 bit over their full range: 32768 becomes 128.
    - Images thinner than `MAX_ASPECT` get white margins on both long sides.
    - Images with a side below `MIN_SIDE` are enlarged by the smallest sufficient whole factor, so a
      1x1 image becomes 28x28 of the same colour.

    Args:
        data: the file as it is on disk.
        max_pixels: refuse images with more pixels than this, before decoding them.

    Returns:
        A plain RGB image without metadata: nothing but pixels reaches the policy.

    Raises:
        BadImage: ``not_an_image`` (no known format), ``truncated_image`` (a known format whose pixels cannot
            be read to the end), ``decompression_bomb`` (more than `max_pixels`).
    """
    # Pillow warns about odd metadata in files that decode well; what matters arrives as an exception.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        _check_size(image.size, max_pixels)
        try:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF does not make the picture unusable
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
        # Broken bytes make Pillow's format modules raise whatever they run into, RuntimeError and TypeError
        # included; none of it may end a run.
        except Exception as error:
            raise BadImage("truncated_image", f"{image.format} of {len(data)} bytes: {error}") from error
        # Metadata may hold what the policy must not see, and would travel to the workers' queue.
        rgb.info.clear()
        return _fit_processors(rgb)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("decompression_bomb", str(error)) from error
    except Image.UnidentifiedImageError as error:
        if _MAGIC.match(data) and not _HEIC.match(data):
            raise BadImage("truncated_image", f"the header is incomplete ({len(data)} bytes)") from error
        starts = f"starts with {data[:16]!r}" if data else "the file is empty"
        starts += " (HEIC: convert it to JPEG)" if _HEIC.match(data) else ""
        raise BadImage("not_an_image", f"{starts}; readable are {', '.join(FORMATS)}") from error
    except Exception as error:  # as in `decode_image`: broken headers raise whatever they lead to
        bomb = isinstance(error, ValueError) and "too" in str(error).lower()  # Pillow's limits on text chunks
        cause = "decompression_bomb" if bomb else "truncated_image"
        raise BadImage(cause, f"the header cannot be read: {error}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    short, long = sorted(size)
    shape = f"{size[0]}x{size[1]} pixels"
    if short == 0:
        raise BadImage("not_an_image", f"the header says {shape}")
    pixels = long * max(short, math.ceil(long / MAX_ASPECT))  # white margins count: they are memory too
    if pixels > max_pixels:
        detail = f"{shape} ({pixels} with margins), more than data.max_pixels_in_file={max_pixels}"
        raise BadImage("decompression_bomb", detail)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits: by the full range of 16 bits, or of 32 bits where values go beyond.

    Pillow's own conversion clips at 255, which turns such images white.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = values.max(initial=0.0)
    if image.mode == "F" and top <= 1.0:
        scale = 255.0
    elif image.mode in ("I", "F") and top <= 255.0:
        scale = 1.0
    else:
        scale = 255.0 / max(top, 65535.0)
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _fit_processors(image: Image.Image) -> Image.Image:
    width, height = image.size
    least = math.ceil(max(width, height) / MAX_ASPECT)
    if min(width, height) < least:
        page = Image.new("RGB", (max(width, least), max(height, least)), "white")
        page.paste(image, ((page.width - width) // 2, (page.height - height) // 2))
        image = page
    factor = math.ceil(MIN_SIDE / min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image

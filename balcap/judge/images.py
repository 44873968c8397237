"""The image as the judge gets it: the file as it is where that fits, else the pixels that the policy sees."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Images = bytes | tuple[bytes, ...]
"""What a question shows: an image file, or those of a row in their order."""

LEAST_SIDE = 28
"""Pixels that an image is never made smaller than: one visual token of the Qwen-VL family."""

_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_LOSSLESS = {"PNG", "GIF", "BMP", "TIFF"}  # stay lossless when they are re-encoded
_PLAIN_MODES = {"1", "L", "P", "RGB"}  # not CMYK, 16 bits or floating point
_ORIENTATION = 0x0112
_LOWER_QUALITIES = (75, 50)  # tried before the picture is made smaller than max_side
_SMALLER = 0.7  # of the side, at each further step


class ImageError(ValueError):
    """The bytes are not an image that can be sent."""


@dataclass(frozen=True)
class ImagePolicy:
    """How images are sent to the judge.

    A file travels as it is, metadata included, where every provider sees in it what the policy sees: JPEG,
    PNG, WEBP or GIF, upright, still, opaque, at most 8 bits a channel, not CMYK, within `max_side` and
    `max_mb`. Everything else is re-encoded from the policy's own pixels, without metadata.

    Args:
        max_side: pixels of the longer side, at least 28; larger images are scaled down. Lower it to pay less
            where a provider counts image tokens by size.
        max_mb: megabytes (10^6 bytes) of the file, above 0. Providers count base64, a third more: their
            usual limit of 20 MB is 15 here.
        quality: of re-encoded JPEGs, 1 to 95. It is lowered, and then the size, for a file above `max_mb`.
        detail: how closely the provider looks; null for its default.
    """

    max_side: int = 2048
    max_mb: float = 15.0
    quality: int = 90
    detail: Literal["low", "high", "auto"] | None = None


def images_in(value: Any) -> tuple[bytes, ...]:
    """The image files in a value of a question's context, in order; none in any other value."""
    values = value if isinstance(value, tuple) else (value,)
    return values if all(isinstance(one, bytes) for one in values) else ()


@lru_cache(maxsize=16)  # the questions about an image come together
def image_url(image: bytes, policy: ImagePolicy) -> str:
    """The image as a ``data:`` URL, deterministic: the original bytes where `policy` lets them pass.

    Else its pixels as `balcap.data.images.decode_image` gives them to the policy's processor (first frame,
    upright, transparency on white, 16 bits scaled to 8), scaled down to ``max_side``: PNG, GIF, BMP and TIFF
    as PNG, or as JPEG where the PNG is above ``max_mb``; other formats as JPEG.

    Raises:
        ImageError: if the policy could not see it either, or no small version of it is within ``max_mb``.
    """
    from balcap.data.images import PILLOW_MAX_PIXELS, BadImage, decode_image

    kind, plain = _inspect(image, policy.max_side)
    if plain and kind in _MIME and len(image) <= policy.max_mb * 1e6:
        return _url(_MIME[kind], image)
    try:
        pixels = decode_image(image, PILLOW_MAX_PIXELS)  # the data module has its own, lower limit
    except BadImage as bad:
        raise ImageError(f"the image cannot be decoded ({bad.cause})") from None
    for content_kind, content in _files(pixels, policy, lossless=kind in _LOSSLESS):
        if len(content) <= policy.max_mb * 1e6:
            return _url(_MIME[content_kind], content)
    raise ImageError(f"no version of the image is within {policy.max_mb:g} MB: raise images.max_mb")


def as_sent(
    messages: Sequence[dict[str, Any]], images: ImagePolicy, system: bool = True
) -> list[dict[str, Any]]:
    """The chat as a provider takes it: images as ``data:`` URLs under the policy, text without an image as a string.

    Without `system`, its message is the beginning of the user's.

    Raises:
        ImageError: if an image cannot be decoded, or not be made to fit.
    """

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        url = {"url": image_url(given["image"], images)}
        return {"type": "image_url", "image_url": url | ({"detail": images.detail} if images.detail else {})}

    chat: list[dict[str, Any]] = []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if chat and chat[-1]["role"] == "system" and not system:
            parts = [{"type": "text", "text": f"{chat.pop()['content']}\n\n"}, *parts]
        content = list(map(part, parts))
        only_text = all(one["type"] == "text" for one in content)
        chat.append({**message, "content": "".join(one["text"] for one in content) if only_text else content})
    return chat


def _inspect(image: bytes, max_side: int) -> tuple[str, bool]:
    """Pillow's name of the format, and whether every reader sees in the file what the policy sees."""
    from PIL import Image

    from balcap.data.images import FORMATS

    kind = ""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            kind = str(opened.format)
            plain = opened.mode in _PLAIN_MODES and not opened.has_transparency_data
            if not plain or max(opened.size) > max_side or getattr(opened, "n_frames", 1) != 1:
                return kind, False
            opened.load()  # a file that breaks off is refused here, not by a provider
            return kind, opened.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # broken bytes raise whatever they lead to; decoding then says what is wrong
        return kind, False


def _files(pixels: Image, policy: ImagePolicy, lossless: bool) -> Iterator[tuple[str, bytes]]:
    """Format and content of files of the image: first of lower quality, then of smaller size. Shrinks `pixels`."""
    from PIL.Image import Resampling

    qualities = (policy.quality, *(low for low in _LOWER_QUALITIES if low < policy.quality))
    side = policy.max_side
    while side >= LEAST_SIDE:
        pixels.thumbnail((side, side), Resampling.LANCZOS, reducing_gap=None)
        if lossless and side == policy.max_side:
            yield "PNG", _encoded(pixels, "PNG")
        for quality in qualities:
            yield "JPEG", _encoded(pixels, "JPEG", quality=quality, subsampling=0)
        side = int(max(pixels.size) * _SMALLER)


def _encoded(pixels: Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **options)
    return buffer.getvalue()


def _url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"

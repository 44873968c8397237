"""The image as the judge gets it."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_ORIENTATION = 0x0112


class ImageError(ValueError):
    """The bytes are not an image that can be decoded."""


@lru_cache(maxsize=32)  # a group asks for the same image once per caption
def data_url(image: bytes) -> str:
    """The image as a ``data:`` URL, deterministic.

    JPEG, PNG, WEBP and GIF files travel as they are, metadata included. A file that providers refuse or
    show differently from what the policy sees (another format, CMYK, animated, EXIF rotation) is
    re-encoded upright in RGB, its first frame: JPEG if it was JPEG, else PNG.

    Raises:
        ImageError: if Pillow cannot read it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(image)) as opened:
            kind = "JPEG" if opened.format == "MPO" else str(opened.format)
            upright = opened.getexif().get(_ORIENTATION, 1) == 1
            still = getattr(opened, "n_frames", 1) == 1
            if opened.format in _MIME and upright and still and opened.mode != "CMYK":
                return _url(_MIME[opened.format], image)
            rgb = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"the image cannot be decoded ({type(error).__name__})") from None
    buffer = io.BytesIO()
    if kind == "JPEG":
        rgb.save(buffer, "JPEG", quality=95, subsampling=0)
        return _url("image/jpeg", buffer.getvalue())
    rgb.info.clear()  # a colour profile or gamma of the source does not fit the converted pixels
    rgb.save(buffer, "PNG")
    return _url("image/png", buffer.getvalue())


def _url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"

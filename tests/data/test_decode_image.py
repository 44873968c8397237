"""Pixels that come out of files as people have them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.Image import MAX_IMAGE_PIXELS

from balcap.data.images import MAX_ASPECT, MIN_SIDE, BadImage, decode_image

SIZE = (40, 30)


def encode(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def colour_of(data: bytes) -> tuple[int, ...]:
    """The one colour of a flat image."""
    pixels = np.asarray(decode_image(data)).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(int(c) for c in pixels[0])


@pytest.mark.parametrize(
    ("image", "fmt", "expected"),
    [
        (Image.new("RGB", SIZE, (10, 200, 30)), "PNG", (10, 200, 30)),
        (Image.new("RGB", SIZE, (10, 200, 30)), "BMP", (10, 200, 30)),
        (Image.new("RGB", SIZE, (10, 200, 30)), "TIFF", (10, 200, 30)),
        (Image.new("L", SIZE, 77), "PNG", (77, 77, 77)),
        (Image.new("L", SIZE, 77), "GIF", (77, 77, 77)),
        (Image.new("1", SIZE, 1), "PNG", (255, 255, 255)),
        (Image.new("1", SIZE, 0), "TIFF", (0, 0, 0)),
        # On white: 255 * (1 - 51/255) + c * 51/255 = 204 + c / 5.
        (Image.new("RGBA", SIZE, (0, 100, 250, 51)), "PNG", (204, 224, 254)),
        (Image.new("RGBA", SIZE, (9, 9, 9, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", SIZE, (100, 51)), "PNG", (224, 224, 224)),
        # 16 bits: 32768 * 255 / 65535 = 127.5..., and the brightest value stays white.
        (Image.fromarray(np.full((30, 40), 32768, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((30, 40), 32768, np.uint16)), "TIFF", (128, 128, 128)),
        (Image.fromarray(np.full((30, 40), 65535, np.uint16)), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((30, 40), 300, np.uint16)), "PNG", (1, 1, 1)),
        (Image.fromarray(np.full((30, 40), 40000, np.int32)), "TIFF", (156, 156, 156)),
        (Image.fromarray(np.full((30, 40), 200, np.int32)), "TIFF", (200, 200, 200)),
        (Image.fromarray(np.full((30, 40), 0.5, np.float32)), "TIFF", (128, 128, 128)),
        (Image.new("CMYK", SIZE, (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
    ],
)
def test_every_mode_becomes_the_colour_that_it_shows(
    image: Image.Image, fmt: str, expected: tuple[int, int, int]
) -> None:
    assert colour_of(encode(image, fmt)) == expected


@pytest.mark.parametrize(
    ("image", "fmt", "expected"),
    [
        (Image.new("RGB", SIZE, (10, 200, 30)), "JPEG", (10, 200, 30)),
        (Image.new("RGB", SIZE, (10, 200, 30)), "WEBP", (10, 200, 30)),
        (Image.new("RGB", SIZE, (10, 200, 30)), "AVIF", (10, 200, 30)),
        (Image.new("L", SIZE, 77), "JPEG", (77, 77, 77)),
        (Image.new("L", SIZE, 77), "MPO", (77, 77, 77)),
        (Image.new("CMYK", SIZE, (255, 0, 0, 0)), "JPEG", (0, 255, 255)),
        (Image.new("RGBA", SIZE, (0, 0, 0, 0)), "WEBP", (255, 255, 255)),
    ],
)
def test_lossy_formats_are_close(image: Image.Image, fmt: str, expected: tuple[int, int, int]) -> None:
    pixels = np.asarray(decode_image(encode(image, fmt)), dtype=int)
    assert abs(pixels - np.array(expected)).max() <= 6


def test_a_16_bit_ramp_keeps_its_order_instead_of_clipping() -> None:
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp))))[..., 0].reshape(-1).astype(int)
    assert (decoded[0], decoded[-1]) == (0, 255)
    assert (np.diff(decoded) >= 0).all()
    assert len(np.unique(decoded)) == 256


def test_palette_with_transparency_is_put_on_white() -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (0, 0, 10, 30))
    decoded = decode_image(encode(image, transparency=0))
    assert decoded.getpixel((5, 5)) == (0, 0, 200)
    assert decoded.getpixel((20, 5)) == (255, 255, 255)


def test_a_transparent_colour_of_a_png_without_alpha_is_put_on_white() -> None:
    image = Image.new("RGB", SIZE, (1, 2, 3))
    image.paste((50, 60, 70), (0, 0, 10, 30))
    decoded = decode_image(encode(image, transparency=(1, 2, 3)))
    assert decoded.getpixel((5, 5)) == (50, 60, 70)
    assert decoded.getpixel((20, 5)) == (255, 255, 255)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(fmt: str) -> None:
    frames = [Image.new("RGB", SIZE, c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.asarray(decode_image(data), dtype=int)[0, 0] == pytest.approx([250, 0, 0], abs=6)


# EXIF orientation -> where the file's top left pixel belongs in the upright picture (x, y in 0..1).
CORNERS = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_rotation_is_applied(orientation: int) -> None:
    image = Image.new("RGB", (60, 30), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(image, "JPEG", exif=exif, quality=95))
    assert decoded.size == ((60, 30) if orientation < 5 else (30, 60))
    right, bottom = CORNERS[orientation]
    x, y = right * (decoded.width - 5) + 2, bottom * (decoded.height - 5) + 2
    assert decoded.getpixel((x, y))[0] > 200
    assert sum(p[0] > 128 for p in decoded.get_flattened_data()) == pytest.approx(64, abs=12)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encode(Image.new("L", SIZE, 80), "JPEG", exif=b"Exif\x00\x00garbage that is not TIFF")
    assert decode_image(data).size == SIZE


def test_nothing_but_pixels_reaches_the_policy() -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("scene", "the answer")
    decoded = decode_image(encode(Image.new("RGB", SIZE), pnginfo=text))
    assert decoded.info == {}
    assert type(decoded) is Image.Image


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg"])
def test_photographs_are_decoded_as_skimage_does(name: str) -> None:
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    ours = np.asarray(decode_image(path.read_bytes()))
    theirs = skimage.io.imread(path)
    assert np.array_equal(ours, theirs)


@given(width=st.integers(1, 700), height=st.integers(1, 700), scale=st.sampled_from([1, 1, 40]))
@settings(max_examples=40, deadline=None)
def test_processors_accept_every_shape(width: int, height: int, scale: int) -> None:
    decoded = decode_image(encode(Image.new("L", (width * scale, height), 128), compress_level=1))
    short, long = sorted(decoded.size)
    assert short >= MIN_SIDE
    assert long / short <= MAX_ASPECT


def test_one_pixel_is_enlarged() -> None:
    data = encode(Image.new("RGB", (1, 1), (5, 6, 7)))
    assert decode_image(data).size == (28, 28)
    assert colour_of(data) == (5, 6, 7)


def test_a_line_gets_white_margins() -> None:
    # 8000 / 200 = 40 pixels are needed across, 1 is there: 19 above and 20 below are white.
    decoded = decode_image(encode(Image.new("RGB", (8000, 1), (0, 0, 0))))
    assert decoded.size == (8000, 40)
    assert [decoded.getpixel((4000, y))[0] for y in (0, 18, 19, 20, 39)] == [255, 255, 0, 255, 255]


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_file_that_breaks_off_is_truncated(fmt: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    data = encode(noise, fmt)
    for kept in (len(data) // 2, 20):
        with pytest.raises(BadImage) as caught:
            decode_image(data[:kept])
        assert caught.value.cause == "truncated_image"


@pytest.mark.parametrize(
    "data", [b"", b"<!DOCTYPE html><html>404", b"\x00" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_something_else_is_not_an_image(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert caught.value.cause == "not_an_image"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (body, idat)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(20_000, 6_000), (50_000, 50_000), (10_000_000, 1)])
def test_a_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(png_header(*size))
    assert caught.value.cause == "decompression_bomb"


def test_the_limit_of_pixels_can_be_set() -> None:
    data = encode(Image.new("L", (100, 100)))
    assert decode_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(BadImage, match="100x100"):
        decode_image(data, max_pixels=9_999)


def outcome(data: bytes) -> str:
    """The mode of the decoded image, or the cause why there is none."""
    try:
        return decode_image(data).mode
    except BadImage as bad:
        return bad.cause


def test_pillow_is_left_as_it_was() -> None:
    before = list(warnings.filters)
    with pytest.raises(BadImage):
        decode_image(png_header(20_000, 6_000))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == MAX_IMAGE_PIXELS
    assert warnings.filters == before


@given(
    data=st.binary(max_size=200),
    head=st.sampled_from(
        [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0"]
    ),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_bytes_the_answer_is_an_image_or_a_cause(data: bytes, head: bytes) -> None:
    assert outcome(head + data) in {"RGB", "not_an_image", "truncated_image", "decompression_bomb"}


@given(
    at=st.integers(0, 10_000),
    value=st.integers(0, 255),
    fmt=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"]),
)
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_never_escapes_as_another_error(at: int, value: int, fmt: str) -> None:
    noise = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    data = bytearray(encode(noise, fmt))
    data[at % len(data)] = value
    assert outcome(bytes(data)) in {"RGB", "not_an_image", "truncated_image", "decompression_bomb"}


def test_heic_is_named() -> None:
    with pytest.raises(BadImage, match=r"^not_an_image: .*HEIC: convert it"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(100))


@pytest.mark.parametrize("kind", ["JPEG2000", "PPM"])
def test_more_formats(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(buffer, kind)
    assert decode_image(buffer.getvalue()).getpixel((3, 3)) == (200, 10, 10)

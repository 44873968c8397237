"""What a judge is sent of an image: the file itself where that fits, else what the policy sees."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from balcap.data.images import decode_image
from balcap.judge import Judge
from balcap.judge.images import ImageError, ImagePolicy, as_sent, image_url

SIZE = (96, 64)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sent(image: bytes, **policy: object) -> tuple[str, bytes]:
    """MIME type and file that the judge gets."""
    head, _, content = image_url(image, ImagePolicy(**policy)).partition(",")
    assert head.startswith("data:image/")
    assert head.endswith(";base64")
    return head.removeprefix("data:").removesuffix(";base64"), base64.b64decode(content, validate=True)


def shown(image: bytes, **policy: object) -> Image.Image:
    return Image.open(io.BytesIO(sent(image, **policy)[1]))


def difference(file: bytes, pixels: Image.Image) -> float:
    """Mean absolute difference of a file to pixels, of 255."""
    ours = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=float)
    return float(np.abs(ours - np.asarray(pixels, dtype=float)).mean())


def photographs() -> dict[str, Path]:
    import skimage
    import sklearn.datasets

    folder, others = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
    names = ("astronaut.png", "chelsea.png", "camera.png", "rocket.jpg", "hubble_deep_field.jpg")
    return {name: folder / name for name in names} | {
        name: others / name for name in ("china.jpg", "flower.jpg")
    }


# ---- files that travel as they are


@pytest.mark.parametrize("name", photographs())
def test_photographs_travel_byte_for_byte(name: str) -> None:
    file = photographs()[name].read_bytes()
    mime, content = sent(file)
    assert mime == ("image/png" if name.endswith("png") else "image/jpeg")
    assert content == file


PLAIN = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L", "P", "1"), "WEBP": ("RGB",), "GIF": ("P", "L", "1")}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in PLAIN.items() for mode in modes])
def test_the_four_formats_travel_in_every_plain_mode(kind: str, mode: str) -> None:
    file = encode(Image.new("RGB", SIZE, (200, 10, 10)).convert(mode), kind)
    assert sent(file) == (f"image/{kind.lower()}", file)


def test_the_chunk_with_the_scene_travels_along() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("scene", '{"things": []}')
    assert shown(encode(Image.new("RGB", SIZE), pnginfo=info)).info["scene"] == '{"things": []}'


def test_the_limits_are_bounds_included() -> None:
    file = encode(NOISE)
    assert sent(file, max_side=400, max_mb=len(file) / 1e6)[1] == file
    assert shown(file, max_side=399).size == (399, 299)  # 300 * 399 / 400 = 299.25
    assert sent(file, max_mb=(len(file) - 1) / 1e6)[1] != file


# ---- files that are re-encoded


def rotated(image: Image.Image, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


ODD = {
    "cmyk": encode(NOISE.convert("CMYK"), "JPEG"),
    "rotated": rotated(NOISE),
    "rotated_png": rotated(NOISE, "PNG"),
    "rotated_webp": rotated(NOISE, "WEBP"),
    "mpo": encode(NOISE, "MPO", save_all=True, append_images=[NOISE.rotate(180)]),
    "animated_gif": encode(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(180)]),
    "animated_webp": encode(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(180)], lossless=True),
    "animated_png": encode(NOISE, save_all=True, append_images=[NOISE.rotate(180)]),
    "16_bit": encode(Image.fromarray(np.linspace(0, 65535, 96 * 64).astype(np.uint16).reshape(64, 96))),
    "rgba": encode(Image.new("RGBA", SIZE, (0, 100, 250, 51))),
    "la": encode(Image.new("LA", SIZE, (100, 51))),
    "transparent_gif": encode(Image.new("P", SIZE, 3), "GIF", transparency=3),
    "transparent_colour": encode(Image.new("RGB", SIZE, (1, 2, 3)), transparency=(1, 2, 3)),
    "transparent_webp": encode(Image.new("RGBA", SIZE, (9, 9, 9, 0)), "WEBP"),
    "bmp": encode(NOISE, "BMP"),
    "tiff": encode(NOISE, "TIFF"),
    "float_tiff": encode(Image.fromarray(np.full((64, 96), 0.5, np.float32)), "TIFF"),
    "avif": encode(NOISE, "AVIF", quality=80),
}
LOSSY = {"cmyk", "rotated", "rotated_webp", "mpo", "animated_webp", "transparent_webp", "avif"}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_show_the_judge_what_the_policy_sees(name: str) -> None:
    policy_sees = decode_image(ODD[name])
    mime, content = sent(ODD[name])
    assert content != ODD[name]
    assert mime == ("image/jpeg" if name in LOSSY else "image/png")
    assert difference(content, policy_sees) <= (8 if name in LOSSY else 0)  # JPEG of noise
    with Image.open(io.BytesIO(content)) as image:
        assert (image.mode, getattr(image, "n_frames", 1)) == ("RGB", 1)
        assert image.size == policy_sees.size
        assert dict(image.getexif()) == {}


def test_colours_of_16_bit_and_transparent_pictures() -> None:
    grey = encode(Image.fromarray(np.full((64, 96), 32768, np.uint16)))
    assert shown(grey).getpixel((5, 5)) == (
        128,
        128,
        128,
    )  # 32768 * 255 / 65535; clipping would make it white
    assert shown(ODD["rgba"]).getpixel((5, 5)) == (
        204,
        224,
        254,
    )  # 255 * (1 - 51/255) + c * 51/255 = 204 + c/5
    assert shown(ODD["transparent_gif"]).getpixel((5, 5)) == (255, 255, 255)


def test_a_photograph_on_its_side_is_turned() -> None:
    china = Image.open(photographs()["china.jpg"])
    turned = shown(rotated(china))
    assert turned.size == china.size[::-1]
    assert np.abs(np.asarray(turned, float) - np.asarray(china.rotate(-90, expand=True), float)).mean() < 5


def test_what_is_re_encoded_carries_no_metadata() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "GPS of my house")
    info.add_itxt("XML:com.adobe.xmp", "GPS of my house")
    exif = Image.Exif()
    exif[0x010E] = "GPS of my house"
    profile = b"GPS of my house" + bytes(200)
    for file in (
        encode(NOISE, pnginfo=info, exif=exif, icc_profile=profile),
        encode(NOISE, "JPEG", exif=exif, comment=b"GPS of my house", icc_profile=profile),
        encode(NOISE, "WEBP", exif=exif, xmp=b"GPS of my house", icc_profile=profile),
    ):
        assert b"GPS" in sent(file)[1]
        assert b"GPS" not in sent(file, max_side=100)[1]
        assert set(shown(file, max_side=100).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


# ---- limits


def test_a_large_photograph_is_scaled_down_like_lanczos() -> None:
    path = photographs()["hubble_deep_field.jpg"]  # 1000 x 872
    mime, content = sent(path.read_bytes(), max_side=500)
    expected = decode_image(path.read_bytes()).resize((500, 436), Image.Resampling.LANCZOS)
    assert mime == "image/jpeg"
    assert difference(content, expected) < 4
    assert len(content) < path.stat().st_size


def test_png_stays_png_until_it_is_too_large() -> None:
    file = photographs()["astronaut.png"].read_bytes()  # 512 x 512
    mime, small = sent(file, max_side=256)
    assert mime == "image/png"
    assert difference(small, decode_image(file).resize((256, 256), Image.Resampling.LANCZOS)) == 0
    mime, smaller = sent(file, max_side=256, max_mb=(len(small) - 1) / 1e6)
    assert mime == "image/jpeg"
    assert Image.open(io.BytesIO(smaller)).size == (256, 256)


def test_quality_goes_down_before_size_does() -> None:
    file = photographs()["china.jpg"].read_bytes()
    sizes = {}
    for kilobytes in (150, 60, 20, 5):
        content = sent(file, max_mb=kilobytes / 1e3)[1]
        assert len(content) <= kilobytes * 1000
        sizes[kilobytes] = Image.open(io.BytesIO(content)).size
    assert sizes[150] == sizes[60] == (640, 427)
    assert sizes[60][0] > sizes[20][0] > sizes[5][0]


def test_the_quality_is_the_one_that_is_set() -> None:
    file = encode(NOISE, "BMP")
    lengths = [len(sent(file, max_mb=0.2, quality=quality)[1]) for quality in (30, 60, 90)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[1]
    tables = shown(file, max_mb=0.1, quality=60).quantization
    assert tables == Image.open(io.BytesIO(encode(NOISE, "JPEG", quality=60, subsampling=0))).quantization


def test_a_limit_that_nothing_meets_is_an_error() -> None:
    with pytest.raises(ImageError, match=r"images\.max_mb"):
        image_url(encode(NOISE), ImagePolicy(max_mb=0.0001))


@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    max_side=st.integers(28, 600),
    kilobytes=st.floats(2, 60),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF"]),
)
@settings(max_examples=30)
def test_limits_hold_for_every_shape(
    width: int, height: int, max_side: int, kilobytes: float, kind: str
) -> None:
    file = encode(NOISE.resize((width, height)), kind)
    content = sent(file, max_side=max_side, max_mb=kilobytes / 1e3)[1]
    size = Image.open(io.BytesIO(content)).size
    assert len(content) <= kilobytes * 1e3
    assert max(size) <= max_side
    policy_sees = decode_image(file).size
    if min(size) > 20 and content != file:  # no distortion beyond rounding
        assert size[0] / size[1] == pytest.approx(policy_sees[0] / policy_sees[1], rel=0.1)


# ---- what cannot be sent


@pytest.mark.parametrize("file", [b"", b"text", b"<svg></svg>", b"\x00" * 100])
def test_no_image_is_an_error(file: bytes) -> None:
    with pytest.raises(ImageError, match="not_an_image"):
        image_url(file, ImagePolicy())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_that_breaks_off_is_an_error_and_not_sent(kind: str) -> None:
    file = encode(NOISE, kind)
    for kept in (len(file) // 2, 20):
        with pytest.raises(ImageError, match="truncated_image"):
            image_url(file[:kept], ImagePolicy())


@given(at=st.integers(0, 10_000), value=st.integers(0, 255), kind=st.sampled_from(["JPEG", "PNG", "GIF"]))
@settings(max_examples=100)
def test_a_flipped_byte_is_an_image_or_an_image_error(at: int, value: int, kind: str) -> None:
    file = bytearray(encode(NOISE.resize(SIZE), kind))
    file[at % len(file)] = value
    assert outcome(bytes(file)) in {
        "JPEG",
        "PNG",
        "GIF",
        "not_an_image",
        "truncated_image",
        "decompression_bomb",
    }


def outcome(file: bytes) -> str:
    """Format of what is sent, or the cause why nothing is."""
    try:
        return str(Image.open(io.BytesIO(sent(file)[1])).format)
    except ImageError as error:
        return str(error).partition("(")[2].rstrip(")")


def test_errors_quote_nothing_of_the_file() -> None:
    with pytest.raises(ImageError) as caught:
        image_url(b"my secret diary", ImagePolicy())
    assert "diary" not in str(caught.value)


# ---- the policy


def test_urls_are_deterministic_and_kept() -> None:
    file = ODD["avif"]
    first = image_url(file, ImagePolicy(detail="low"))
    hits = image_url.cache_info().hits
    assert image_url(bytes(bytearray(file)), ImagePolicy(detail="low")) is first
    assert image_url.cache_info().hits == hits + 1
    image_url.cache_clear()
    assert image_url(file, ImagePolicy()) == first


def test_the_detail_is_sent_where_it_is_set() -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": ODD["bmp"]}]}]
    for policy, detail in ((ImagePolicy(), None), (ImagePolicy(detail="low"), "low")):
        (part,) = as_sent(chat, policy)[0]["content"]
        assert part["image_url"].get("detail") == detail


def test_settings_that_fit_have_no_problems() -> None:
    for images in (ImagePolicy(), ImagePolicy(28, 0.1, 1, "low")):
        assert image_problems(images) == []


def test_all_problems_are_reported_with_their_key() -> None:
    assert image_problems(ImagePolicy(max_side=27, max_mb=0, quality=96)) == [
        "model.judge.images.max_side: 27 must be at least 28",
        "model.judge.images.max_mb: 0 must be above 0 and finite",
        "model.judge.images.quality: 96 must be from 1 to 95",
    ]
    assert len(image_problems(ImagePolicy(max_mb=float("nan"), quality=0))) == 2


def image_problems(images: ImagePolicy) -> list[str]:
    params = {"api_base": "http://localhost:1/v1"}
    return Judge("hosted_vllm/x", params=params, images=images, cache=None).problems()

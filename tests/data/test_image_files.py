"""Sample ids -> files, and nothing but files below the root."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from balcap.data import reader
from balcap.data.images import BadImage
from balcap.data.reader import ImageFolder, folder_rows, spellings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(root / "a" / "ok.png")
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "secret.png")
    return root


def cause_of(folder: ImageFolder, name: str) -> str:
    with pytest.raises(BadImage) as caught:
        folder.read(name)
    return caught.value.cause


def test_bytes_and_pixels_of_a_file(root: Path) -> None:
    data, image = ImageFolder(root).read("a/ok.png")
    assert data == (root / "a" / "ok.png").read_bytes()
    assert image.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "a/..", ".."])
def test_paths_out_of_the_root_are_refused(root: Path, name: str) -> None:
    assert cause_of(ImageFolder(root), name) == "outside_image_root"


def test_links_out_of_the_root_are_refused_unless_named(root: Path, tmp_path: Path) -> None:
    (root / "a" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "b").symlink_to(tmp_path)
    (root / "inside.png").symlink_to(root / "a" / "ok.png")
    folder = ImageFolder(root)
    assert cause_of(folder, "a/link.png") == "outside_image_root"
    assert cause_of(folder, "b/secret.png") == "outside_image_root"
    assert folder.read("inside.png")[1].getpixel((0, 0)) == (255, 0, 0)
    allowed = ImageFolder(root, link_targets=[tmp_path])
    assert allowed.read("b/secret.png")[1].getpixel((0, 0)) == (0, 0, 255)


def test_a_root_that_is_a_link_itself_is_fine(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root)
    assert ImageFolder(tmp_path / "linked").read("a/ok.png")[1].size == (30, 30)


def test_causes_of_files_that_cannot_be_read(root: Path) -> None:
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "page.png").write_text("<html>404</html>")
    (root / "cut.png").write_bytes((root / "a" / "ok.png").read_bytes()[:40])
    os.mkfifo(root / "pipe.png")
    folder = ImageFolder(root)
    causes = {
        name: cause_of(folder, name)
        for name in (
            "a/none.png", "a", "loop.png", "dangling.png", "page.png", "cut.png", "pipe.png",
            "nul\0.png", "x" * 300, "a/ok.png/b", ".",
        )
    }  # fmt: skip
    assert causes == {
        "a/none.png": "missing_file",
        "a": "unreadable_file",
        "loop.png": "unreadable_file",
        "dangling.png": "missing_file",
        "page.png": "not_an_image",
        "cut.png": "truncated_image",
        "pipe.png": "unreadable_file",
        "nul\0.png": "unreadable_file",
        "x" * 300: "missing_file",
        "a/ok.png/b": "missing_file",
        ".": "unreadable_file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(root: Path) -> None:
    (root / "a" / "ok.png").chmod(0)
    assert cause_of(ImageFolder(root), "a/ok.png") == "unreadable_file"


def test_the_limit_of_pixels_is_passed_on(root: Path) -> None:
    assert cause_of(ImageFolder(root, max_pixels=100), "a/ok.png") == "decompression_bomb"


@pytest.mark.parametrize(
    ("in_data", "on_disk"),
    [
        ("wikiart/caf#U00e9.png", "wikiart/café.png"),
        ("wikiart/café.png", "wikiart/caf#U00e9.png"),
        ("wikiart/#U4e2d_1.png", "wikiart/中_1.png"),
        ("wikiart/#L01f600.png", "wikiart/😀.png"),
        ("wikiart/a#U00e9.png", "wikiart/a#U00e9.png"),
    ],
)
def test_escaped_names_are_found_in_either_spelling(root: Path, in_data: str, on_disk: str) -> None:
    (root / "wikiart").mkdir()
    Image.new("RGB", (30, 30), "green").save(root / on_disk)
    assert ImageFolder(root).locate(in_data) == root / on_disk


def test_an_escape_cannot_smuggle_a_path_out(root: Path) -> None:
    assert cause_of(ImageFolder(root), "a/#U002e#U002e/#U002e#U002e/secret.png") == "outside_image_root"
    assert cause_of(ImageFolder(root), "#U0000.png") == "missing_file"


@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30))
def test_the_literal_name_comes_first_and_escaping_can_be_undone(name: str) -> None:
    tried = spellings(name)
    assert tried[0] == name
    if "#" not in name and not name.isascii():
        plain, escaped = tried[:2]
        assert escaped.isascii()
        assert spellings(escaped)[:2] == [escaped, plain]


def test_images_of_a_folder_are_found_recursively_in_order(root: Path) -> None:
    (root / "a" / "deep").mkdir()
    for name in ("b.JPG", "a/deep/z.webp", "a/notes.txt", "._b.jpg", ".hidden.png", "rows.json"):
        (root / name).write_bytes(b"x")
    (root / ".cache").mkdir()
    (root / ".cache" / "c.png").write_bytes(b"x")
    rows = [(row["row"], row["sample_id"]) for row in folder_rows(root)]
    names = ["b.JPG", "rows.json", "a/notes.txt", "a/ok.png", "a/deep/z.webp"]
    assert rows == list(enumerate(names))


def test_links_to_folders_are_followed_where_that_is_allowed(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (30, 30)).save(other / "x.png")
    (root / "linked").symlink_to(other)
    (root / "loop").symlink_to(root)
    problems = {row["sample_id"]: row["problem"] for row in folder_rows(root)}
    assert problems == {"a/ok.png": "", "linked": "outside_image_root", "loop": "unreadable_file"}
    problems = {row["sample_id"]: row["problem"] for row in folder_rows(root, [other])}
    assert problems == {"a/ok.png": "", "linked/x.png": "", "loop": "unreadable_file"}


def test_an_absolute_path_below_the_root_is_fine(root: Path) -> None:
    assert ImageFolder(root).locate(str(root / "a/ok.png")) == root / "a/ok.png"


def test_a_huge_file_is_not_read(root: Path) -> None:
    with open(root / "huge.png", "wb") as file:
        file.truncate(1 << 31)  # sparse
    assert cause_of(ImageFolder(root), "huge.png") == "file_too_large"


def test_a_file_name_that_is_not_utf8_is_a_bad_row(root: Path) -> None:
    try:
        (root / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert [row["problem"] for row in folder_rows(root)] == ["not_utf8", ""]


def test_a_large_image_is_scaled_down_once_for_policy_and_judge(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (300, 200), (200, 10, 10)).save(root / "large.png")
    data, image = ImageFolder(root).read("large.png")
    assert image.size == (300, 200)
    assert data == (root / "large.png").read_bytes()
    monkeypatch.setattr(reader, "LARGE", 15_000)
    data, image = ImageFolder(root).read("large.png")
    assert image.size == (150, 100)
    assert Image.open(io.BytesIO(data)).size == (150, 100)
    assert ImageFolder(root).read("large.png")[0] == data  # caches key on it

from __future__ import annotations

import os
from pathlib import Path

import pytest

from balcap.utils.files import append_jsonl, atomic_write, read_jsonl, replaced_folder


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as file:
        file.write("öld")
        assert not path.exists()
    with atomic_write(path, "wb") as file:
        file.write(b"new")
        assert path.read_text(encoding="utf-8") == "öld"
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines(["half", None])
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def test_writers_by_path_may_use_the_name(tmp_path: Path):
    with atomic_write(tmp_path / "a", "wb") as file:
        Path(file.name).write_bytes(b"by path")
    assert (tmp_path / "a").read_bytes() == b"by path"


@pytest.mark.parametrize("torn", [b"", b'{"n": ', b'{"text": "a\xc3'])
def test_lines_survive_one_that_was_cut_short(tmp_path: Path, torn: bytes):
    path = tmp_path / "runs" / "rows.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, [{"n": 1}, {"n": 2, "text": "a\u2028b\n"}])
    with path.open("ab") as file:
        file.write(torn)
    rows = [{"n": 1}, {"n": 2, "text": "a\u2028b\n"}]
    assert read_jsonl(path) == rows
    append_jsonl(path, [{"n": 4}])
    assert read_jsonl(path) == [*rows, {"n": 4}]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "export"
    with replaced_folder(path) as folder:
        (folder / "old.txt").write_text("old")
        (folder / "shard").mkdir()
        (folder / "shard" / "1").write_text("1")
        assert not path.exists()
    with pytest.raises(FileNotFoundError), replaced_folder(path) as folder:
        (folder / "nowhere" / "half.txt").write_text("half")
    assert sorted(os.listdir(path)) == ["old.txt", "shard"]
    with replaced_folder(path) as folder:
        (folder / "new.txt").write_text("new")
    assert os.listdir(path) == ["new.txt"]
    assert os.listdir(path.parent) == ["export"]

"""The journal: what is there after every accident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.recaption.journal import Journal, JournalError, Quarantined
from tests.support import ROOT

SETTINGS = {"judge.model": "a/b", "prompts": None, "judge.params": {"temperature": 0}}
REFUSED = Quarantined(2, "c.png", "refused", "recaption: a/b refused to answer")


def filled(path: Path) -> bytes:
    """A journal of three rows: one complete, one with its caption only, one refused. Its bytes."""
    journal = Journal(path, SETTINGS)
    journal.add_caption(0, "a.png", "A red circle\u2028 – rouge.", "a/b")
    journal.add_units(0, "a.png", ["There is a circle."], "c/d")
    journal.add_caption(1, "b.png", "A star.", "a/b")
    journal.add_quarantined(REFUSED)
    journal.close()
    journal.close()
    return path.read_bytes()


def contents(path: Path) -> list:
    journal = Journal(path, SETTINGS)
    found = [
        [journal.caption(row) if journal.has_caption(row) else None for row in range(3)],
        [journal.units(row) if journal.has_units(row) else None for row in range(3)],
        journal.quarantined,
    ]
    journal.close()
    return found


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "j.jsonl"
    filled(path)
    captions = [("A red circle\u2028 – rouge.", "a/b"), ("A star.", "a/b"), None]
    assert contents(path) == [captions, [(["There is a circle."], "c/d"), None, None], {2: REFUSED}]
    assert [len(json.loads(line)) for line in path.read_text().splitlines()] == [3, 4, 4, 4, 4]


@given(cut=st.integers(0, 1000))
def test_a_journal_that_is_cut_anywhere_loses_the_cut_line_at_most(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("j") / "j.jsonl"
    whole = filled(path)
    path.write_bytes(whole[:cut])
    journal = Journal(path, SETTINGS)
    kept = whole[:cut].count(b"\n")
    assert journal.has_caption(0) == (kept >= 2)
    assert journal.has_units(0) == (kept >= 3)
    assert journal.has_caption(1) == (kept >= 4)
    assert journal.quarantined == ({2: REFUSED} if kept >= 5 else {})
    journal.add_caption(7, "h.png", "A cross.", "a/b")  # and it is written on after the last whole line
    assert journal.caption(7) == ("A cross.", "a/b")
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[: max(kept, 1)] == whole.splitlines(keepends=True)[: max(kept, 1)]
    assert len(lines) == max(kept, 1) + 1


def test_a_power_cut_that_leaves_zeros_behind_is_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = filled(path)
    path.write_bytes(whole + b'{"row": 9, "ima\n' + b"\0" * 500)
    assert contents(path)[2] == {2: REFUSED}
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = filled(path).splitlines(keepends=True)
    lines[2] = b"rubbish\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match=r"line 3 of .* is damaged. Remove it"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "text", ["my notes", '[{"image": "a.png"}]', '{"a": 1}\n', '{"row": 1, "image": "a"}\n']
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises(JournalError, match=r"out: .* is no journal .*move that file away"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


def test_other_settings_are_refused_with_what_differs_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    filled(path)
    with pytest.raises(JournalError) as refused:
        Journal(path, {**SETTINGS, "judge.model": "a/c", "decompose": True})
    changed, new, way_out = refused.value.problems
    assert changed == 'judge.model was "a/b", is "a/c"'
    assert new == "decompose was null, is true"
    assert "Set them back" in way_out
    assert "another out" in way_out
    assert contents(path)[2] == {2: REFUSED}  # it is free again, and whole


def test_what_comes_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    filled(path)
    journal = Journal(path, SETTINGS)
    journal.add_caption(2, "c.png", "A cross.", "a/b")  # asked again, and answered
    journal.add_caption(0, "a.png", "Another circle.", "a/b")
    journal.close()
    captions = [("Another circle.", "a/b"), ("A star.", "a/b"), ("A cross.", "a/b")]
    assert contents(path) == [captions, [None, None, None], {}]  # the units were those of another caption


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, SETTINGS)
    code = "import sys; from pathlib import Path; from balcap.recaption.journal import Journal; "
    code += f"Journal(Path(sys.argv[1]), {SETTINGS!r})"
    other = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "another process is writing" in other.stderr
    journal.close()
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)

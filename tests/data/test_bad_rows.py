"""bad_rows.jsonl: each row once, whoever writes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

from balcap.data.bad_rows import BadRowLog


def test_a_row_is_listed_once_over_processes_and_resumes(tmp_path: Path) -> None:
    log = BadRowLog(tmp_path / "run")
    assert log.counts() == {}
    assert log.add(3, "a.png", "missing_file", "a.png does not exist")
    assert not log.add(3, "a.png", "missing_file", "a.png does not exist")
    later = BadRowLog(tmp_path / "run")
    assert not later.add(3, "a.png", "missing_file", "a.png does not exist")
    assert later.add(4, "é\n.png", "not_an_image", "page")
    assert log.counts() == {"missing_file": 1, "not_an_image": 1}
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines[0] == {"row": 3, "image": "a.png", "cause": "missing_file", "detail": "a.png does not exist"}
    assert lines[1]["image"] == "é\n.png"
    assert log.summary() == f"2 bad rows (missing_file 1, not_an_image 1), listed in {log.path}"


def test_half_a_line_of_a_killed_process_does_no_harm(tmp_path: Path) -> None:
    log = BadRowLog(tmp_path)
    log.add(1, "a.png", "missing_file", "")
    with open(log.path, "a") as file:
        file.write('{"row": 2, "ima')
    log.add(3, "c.png", "missing_file", "")
    assert log.counts() == {"missing_file": 2}
    assert log.path.read_text().splitlines()[-1].startswith('{"row": 3')


def test_a_file_that_was_emptied_is_begun_again(tmp_path: Path) -> None:
    log = BadRowLog(tmp_path)
    log.add(1, "a.png", "missing_file", "")
    log.counts()
    log.path.write_text("")
    assert log.counts() == {}
    assert log.add(1, "a.png", "missing_file", "")


def _write(folder: Path, rows: range) -> None:
    log = BadRowLog(folder)
    for row in rows:
        log.add(row, f"{row}.png", "missing_file", "x" * 500)


def test_processes_that_write_at_once_neither_tear_nor_repeat_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, range(0, 60 + i))) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = [json.loads(line)["row"] for line in BadRowLog(tmp_path).path.read_text().splitlines()]
    assert sorted(rows) == list(range(63))

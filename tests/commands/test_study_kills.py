"""A study that is killed at random moments, alone or with its runs, goes on to the same table and pays nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from balcap.commands.study import main as study
from balcap.commands.study_work import Work
from tests.commands.study_fakes import Here, table
from tests.judge_server import server_process
from tests.support import ROOT, metrics

KILLS = int(os.environ.get("BALCAP_KILLS", "2"))
CONCURRENCY = 3
STEPS = 3


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not until() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert until(), "nothing has happened for four minutes"


def _holders(out: Path) -> list[int]:
    """Processes that hold run folders."""
    pids = [int(path.read_text().split()[1]) for path in out.glob("*/.lock")]
    return [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _killed(command: list[str], out: Path, log: Path, draw: random.Random, with_runs: bool) -> float:
    """Start a study, kill it some judge calls later, and wait for its runs; returns when the last of them ended."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough = len(_lines(log)) + draw.randint(1, 25)
    _wait(lambda: len(_lines(log)) >= enough or process.poll() is not None)
    time.sleep(draw.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in _holders(out) if with_runs else []:  # as when the machine dies
        os.kill(pid, signal.SIGKILL)
    _wait(lambda: not _holders(out))
    return time.time()


@pytest.mark.skipif(sys.platform != "linux", reason="runs of a killed study end with it on Linux alone")
def test_killed_at_random_moments_the_table_is_the_same_and_nothing_is_paid_twice(
    study_file, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, draw = tmp_path / "items.jsonl", random.Random()
    monkeypatch.setenv("ITEM_LOG", str(log))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-nobody-at-all")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with server_process(answer="tests.judge_kill_log.answer", latency=0.03) as server:
        settings = {
            "trainer.max_steps": STEPS,
            "model.judge.model": "openai/gpt-4o-mini",
            "model.judge.providers": None,
            "model.judge.params": {"api_base": server.url},
            "model.judge.concurrency": CONCURRENCY,
        }
        study(
            [
                study_file(settings | {"model.judge.cache": str(tmp_path / "other.sqlite")}, seeds=[0]),
                f"--out={whole}",
            ],
            Work(start=Here(cli)),
        )
        asked_by_whole = {item for line in _lines(log) for item in json.loads(line)["items"]}
        log.unlink()

        file = study_file(settings, seeds=[0])
        command = [sys.executable, str(ROOT / "main.py"), "study", file, f"--out={killed}"]
        died = [_killed(command, killed, log, draw, bool(number % 2)) for number in range(KILLS)]
        study([file, f"--out={killed}"], Work(start=Here(cli)))
    assert table(killed) == table(whole)
    for name in ("ours-0", "grpo-0"):
        rows = metrics(killed / name)
        assert [row["step"] for row in rows if row["train/loss"]] == [str(n + 1) for n in range(STEPS)]

    calls = [json.loads(line) for line in _lines(log)]
    assert {item for call in calls for item in call["items"]} == asked_by_whole
    first: dict[str, int] = {}
    for index, call in enumerate(calls):
        for item in call["items"]:
            before = first.setdefault(item, index)
            if before != index:  # asked again: then its first call was under way when its run died
                end = next(when for when in died if when >= calls[before]["at"])
                later = [one for one in calls[before + 1 :] if one["at"] <= end]
                assert len(later) <= CONCURRENCY, (item, len(later))
                first[item] = index

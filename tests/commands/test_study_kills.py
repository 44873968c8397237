"""A study that is killed at random moments, alone or with its runs, goes on to the same table and pays nothing twice."""

from __future__ import annotations

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
from tests.judge_kill_log import calls, lost
from tests.judge_server import server_process
from tests.support import ROOT, metrics

KILLS = int(os.environ.get("BALCAP_KILLS", "2"))
CONCURRENCY = 3
STEPS = 3


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


def _killed(command: list[str], out: Path, log: Path, draw: random.Random, with_runs: bool) -> None:
    """Start a study, kill it some judge calls later, and wait until its runs have ended."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough = len(calls(log)) + draw.randint(1, 25)
    _wait(lambda: len(calls(log)) >= enough or process.poll() is not None)
    time.sleep(draw.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in _holders(out) if with_runs else []:  # as when the machine dies
        os.kill(pid, signal.SIGKILL)
    _wait(lambda: not _holders(out))


@pytest.mark.slow
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
        asked_by_whole = calls(log)
        log.unlink()

        file = study_file(settings, seeds=[0])
        command = [sys.executable, str(ROOT / "main.py"), "study", file, f"--out={killed}"]
        for number in range(KILLS):
            _killed(command, killed, log, draw, bool(number % 2))
        study([file, f"--out={killed}"], Work(start=Here(cli)))
    assert table(killed) == table(whole)
    for name in ("ours-0", "grpo-0"):
        rows = metrics(killed / name)
        assert [row["step"] for row in rows if row["train/loss"]] == [str(n + 1) for n in range(STEPS)]

    assert not lost(asked_by_whole)
    asked = calls(log)
    assert {item for call in asked for item in call} == {item for call in asked_by_whole for item in call}
    assert len(lost(asked)) <= KILLS * CONCURRENCY  # those that were under way when a run died

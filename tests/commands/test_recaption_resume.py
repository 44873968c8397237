"""Killed at any moment, continued with the same command: the same file, and nothing paid twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.recaption_fakes import items_of
from tests.judge_server import JudgeServer
from tests.support import ROOT

KILLS = int(
    os.environ.get("BALCAP_KILLS", "2")
)  # more of them: BALCAP_KILLS=20 pytest tests/commands -k kill
CONCURRENCY = 4


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cached(cache: Path) -> Counter[str]:
    """Answers in the judge's cache, by task."""
    if not cache.exists():
        return Counter()
    with sqlite3.connect(f"file:{cache}?mode=ro", uri=True) as answers:
        try:
            return Counter(
                dict(answers.execute("SELECT task, count(*) FROM answers GROUP BY task").fetchall())
            )
        except sqlite3.OperationalError:  # the table is not there yet
            return Counter()


def wait_for(process: subprocess.Popen, cache: Path, number: int) -> None:
    """Until the cache has so many answers."""
    deadline = time.monotonic() + 120
    while cached(cache).total() < number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def answered(server: JudgeServer) -> list[tuple[str, str]]:
    """Items of all requests that were answered, as often as they were."""
    of = {
        hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest(): body["messages"]
        for body in server.requests
    }
    done = [record["sha256"] for record in server.records if record["answered"]]
    return [item for digest in done for item in items_of(of[digest])]


@pytest.fixture
def arguments(recaption_arguments, over_http, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a run with a cache of its own."""

    def make(name: str, **options: object) -> list[str]:
        own = {"out": tmp_path / name / "new.json", "judge.cache": tmp_path / f"{name}.sqlite"}
        return recaption_arguments(**{**over_http, **own, "judge.concurrency": CONCURRENCY, **options})

    return make


def test_kill_9_at_any_moment_loses_no_row_and_pays_for_none_twice(
    arguments, cli, server: JudgeServer, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole" / "new.json", tmp_path / "killed" / "new.json"
    cli(arguments("whole"))
    assert len(answered(server)) == 120
    server.requests.clear()
    server.records.clear()
    server.latency = 0.08
    rng, before = random.Random(time.time_ns()), []
    for kill in range(KILLS):
        process = start(arguments("killed"))
        share = 0.85 * (kill + rng.random()) / KILLS
        wait_for(process, tmp_path / "killed.sqlite", max(2 + kill, int(share * 120)))
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        before.append((len(server.requests), cached(tmp_path / "killed.sqlite")))
        assert not killed.exists()
        assert not list(killed.parent.glob("*.part"))
    server.latency = 0.0
    cli(arguments("killed"))
    assert killed.read_bytes() == whole.read_bytes()
    for number, known in before:  # what is in the cache is not asked for again: the rest is, each item
        later = {item for body in server.requests[number:] for item in items_of(body["messages"])}
        tasks = Counter(task for task, _ in later)
        assert tasks == {"recaption": 60 - known["recaption"], "decompose": 60 - known["decompose"]}
    counts = Counter(answered(server))
    assert len(counts) == 120
    # In flight when it was killed: so many calls at once, each about one image or up to four captions.
    again = sum(count - 1 for count in counts.values())
    assert again <= KILLS * CONCURRENCY * 4
    assert sum(count - 1 for (task, _), count in counts.items() if task == "recaption") <= KILLS * CONCURRENCY


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_keeps_what_arrives_and_goes_on(
    arguments, cli, server: JudgeServer, tmp_path: Path, sign: signal.Signals
) -> None:
    out = tmp_path / "run" / "new.json"
    server.latency = 0.3
    process = start(arguments("run"))
    wait_for(process, tmp_path / "run.sqlite", 12)
    sent = time.monotonic()
    process.send_signal(sign)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sign, error
    assert f"Stopped by {sign.name}; the same command goes on from here." in error
    assert "Traceback" not in error
    assert time.monotonic() - sent < 15
    assert not out.exists()
    done = answered(server)
    assert 12 <= cached(tmp_path / "run.sqlite").total() == len(done) < 120  # all that was answered is kept
    server.latency = 0.0
    cli(arguments("run"))
    assert len(json.loads(out.read_text())) == 60
    assert set(Counter(answered(server)).values()) == {1}


def test_answers_that_do_not_come_do_not_hold_an_interrupted_run(
    arguments, server: JudgeServer, tmp_path: Path
) -> None:
    server.script = [None] * 20 + ["hang"] * 100
    process = start(arguments("run"))
    wait_for(process, tmp_path / "run.sqlite", 16)
    while server.calls < 20 + CONCURRENCY and process.poll() is None:
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert 4 < time.monotonic() - sent < 60  # the grace of five seconds, then the end; machines may be slow
    assert "left for the next run" in error
    assert len(answered(server)) == cached(tmp_path / "run.sqlite").total()

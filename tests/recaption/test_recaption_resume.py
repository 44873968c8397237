"""Killed at any moment, continued with the same command: the same file, and nothing paid twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from balcap.judge.images import ImagePolicy, image_url
from tests.judge_server import JudgeServer
from tests.recaption.recaption_fakes import items_of
from tests.support import ROOT

KILLS = int(
    os.environ.get("BALCAP_KILLS", "2")
)  # more of them: BALCAP_KILLS=20 pytest tests/recaption -k kill
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


def lines(out: Path) -> list[bytes]:
    path = out.with_name(f"{out.name}.journal.jsonl")
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def wait_for(process: subprocess.Popen, out: Path, number: int) -> None:
    """Until the journal has so many lines."""
    deadline = time.monotonic() + 120
    while len(lines(out)) < number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def answered(server: JudgeServer) -> list[tuple[str, str]]:
    """Items of all requests that were answered, as often as they were."""
    of = {
        hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest(): body["messages"]
        for body in server.requests
    }
    done = [record["sha256"] for record in server.records if record["answered"]]
    return [item for digest in done for item in items_of(of[digest])]


def journalled(found: list[bytes], world: Path) -> set[tuple[str, str]]:
    """What need not be asked again: (recaption, the image as it is sent), (decompose, caption)."""
    whole = [json.loads(line) for line in found[1:] if line.endswith(b"\n")]
    captions = {line["row"]: line["caption"] for line in whole if "caption" in line}
    urls = {line["row"]: image_url((world / line["image"]).read_bytes(), ImagePolicy()) for line in whole}
    return {
        ("recaption", urls[line["row"]]) if "caption" in line else ("decompose", captions[line["row"]])
        for line in whole
    }


@pytest.fixture
def arguments(recaption_arguments, over_http, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a run with a cache of its own."""

    def make(name: str, **options: object) -> list[str]:
        own = {"out": tmp_path / name / "new.json", "judge.cache": tmp_path / f"{name}.sqlite"}
        return recaption_arguments(**{**over_http, **own, "judge.concurrency": CONCURRENCY, **options})

    return make


@pytest.mark.parametrize("cache", [True, False], ids=["with a cache", "without a cache"])
def test_kill_9_at_any_moment_loses_no_row_and_pays_for_none_twice(
    arguments, cli, server: JudgeServer, world: Path, tmp_path: Path, cache: bool
) -> None:
    whole, killed = tmp_path / "whole" / "new.json", tmp_path / "killed" / "new.json"
    cli(arguments("whole"))
    expected, number = sorted(lines(whole)), len(lines(whole))
    assert number == 1 + 60 + 60
    assert len(answered(server)) == 120
    server.requests.clear()
    server.records.clear()
    server.latency = 0.08
    rng, options = random.Random(time.time_ns()), {} if cache else {"judge.cache": "null"}
    kills, settled = KILLS if cache else max(1, KILLS // 2), []
    for kill in range(kills):
        process = start(arguments("killed", **options))
        share = 0.85 * (kill + rng.random()) / kills
        wait_for(process, killed, max(2 + kill, int(share * number)))
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        before = lines(killed)
        settled.append((len(server.requests), journalled(before, world)))
        assert not killed.exists()
        if before and rng.random() < 0.5:  # and half a line more, as a power cut may leave it
            with killed.with_name("new.json.journal.jsonl").open("ab") as file:
                file.write(b'{"row": 3, "image": "shapes/0')
    server.latency = 0.0
    cli(arguments("killed", **options))
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(lines(killed)) == expected  # no line lost, none twice
    for number, known in settled:
        asked = {item for body in server.requests[number:] for item in items_of(body["messages"])}
        assert not {
            (task, text.rpartition(" data:")[2] if task == "recaption" else text) for task, text in asked
        } & {(task, text.removeprefix("data:")) for task, text in known}
    counts = Counter(answered(server))
    assert len(counts) == 120
    again = sum(count - 1 for count in counts.values())
    # In flight when it was killed: so many calls at once, each about one image or up to four captions.
    assert again <= kills * CONCURRENCY * 4
    print(f"{kills} kills: {again} items were asked about again")
    captions = sum(count - 1 for (task, _), count in counts.items() if task == "recaption")
    assert captions <= kills * CONCURRENCY


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_keeps_what_arrives_and_goes_on(
    arguments, cli, server: JudgeServer, tmp_path: Path, sign: signal.Signals
) -> None:
    out = tmp_path / "run" / "new.json"
    server.latency = 0.3
    process = start(arguments("run"))
    wait_for(process, out, 12)
    sent = time.monotonic()
    process.send_signal(sign)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sign, error
    assert f"Stopped by {sign.name}; the same command goes on from here." in error
    assert "Traceback" not in error
    assert time.monotonic() - sent < 15
    assert not out.exists()
    done = answered(server)
    assert 12 <= len(lines(out)) == 1 + len(done) < 121  # all that was answered is in the journal
    server.latency = 0.0
    cli(arguments("run", **{"judge.cache": "null"}))
    assert len(json.loads(out.read_text())) == 60
    assert set(Counter(answered(server)).values()) == {1}


def test_answers_that_do_not_come_do_not_hold_an_interrupted_run(
    arguments, server: JudgeServer, tmp_path: Path
) -> None:
    out = tmp_path / "run" / "new.json"
    server.script = [None] * 20 + ["hang"] * 100
    process = start(arguments("run"))
    wait_for(process, out, 16)
    while server.calls < 20 + CONCURRENCY and process.poll() is None:
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert 4 < time.monotonic() - sent < 20  # the grace of five seconds, then the end
    assert "left for the next run" in error
    assert len(answered(server)) == len(lines(out)) - 1

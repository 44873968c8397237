"""Whole runs with a judge behind HTTP: misbehaving, gone, too dear, and killed in the middle."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.shapes.oracle import answer
from tests import judge_kill_log
from tests.judge_server import ODD, PASSING, JudgeServer, server_process
from tests.support import ROOT, metrics

STEPS = 3
KILLS = int(os.environ.get("BALCAP_KILLS", "2"))  # more of them: how the claim of the README was checked


@pytest.fixture
def http(fit_arguments, monkeypatch):
    """Arguments of a fit whose judge is gpt-4o-mini behind a server on loopback."""
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-0123456789")

    def arguments(server, command: str = "fit", **options: object) -> list[str]:
        defaults = {
            "model.judge.params.api_base": server.url,
            "model.judge.timeout_s": 15,
            "model.judge.deadline_s": 30,
            "trainer.max_steps": STEPS,
            "data.val_size": 2,
        }
        args = fit_arguments(command, **{**defaults, **options})
        return [*args[:3], "--config", str(ROOT / "configs/judge/gpt-4o-mini.yaml"), *args[3:]]

    return arguments


@pytest.fixture
def server():
    server = JudgeServer(answer)
    yield server
    server.close()


def trained(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row.get("train/loss")] if (run / "metrics.csv").exists() else []


def ledger(run: Path) -> list[sqlite3.Row]:
    with sqlite3.connect(run / "judge_ledger.sqlite") as database:
        database.row_factory = sqlite3.Row
        return database.execute("SELECT * FROM calls").fetchall()


def test_a_judge_that_misbehaves_costs_judgments_not_the_run(http, cli, tmp_path: Path) -> None:
    server = JudgeServer(answer, fault_share=0.3, faults=(*PASSING, *ODD), seed=1)
    server.retry_after = 0.1
    try:
        # One call per question and no retry: some judgments must be missing
        options = {"retries": 0, "max_failed_share": 1.0, "timeout_s": 1}
        cli(http(server, **{f"model.judge.{name}": value for name, value in options.items()}))
        without = trained(tmp_path / "run")
    finally:
        server.close()
    faults = {record["fault"] for record in server.records} - {None}
    assert len(faults) > 6  # which of them, is up to the order in which requests arrive
    assert len(without) == STEPS
    assert sum(float(row["judge/failed"]) for row in without) > 0
    table = pq.read_table(sorted((tmp_path / "run/rollouts").glob("train-*")))
    rewards = [table[f"reward/{name}"].to_pylist() for name in ("precision", "recall", "linguistic")]
    missing = sum(value is None for column in rewards for value in column)
    assert missing > 0
    assert all(value is None or 0 <= value <= 1 for column in rewards for value in column)
    assert all(math.isfinite(float(row["train/loss"])) for row in without)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_judge_that_is_gone_ends_the_run_with_a_checkpoint(
    http, cli, server, tmp_path: Path, capsys, lag: int
) -> None:
    options = {"trainer.max_steps": 6, "model.judge.retries": 1, "model.lag": lag}
    whole = http(server, **options, run_dir=tmp_path / "whole")
    whole[whole.index(next(a for a in whole if a.startswith("--model.judge.cache")))] = (
        "--model.judge.cache=null"
    )
    cli(whole)
    first = server.calls
    server.down_after = first + first // 2
    start = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        cli(http(server, **options))
    assert time.monotonic() - start < 60
    message = str(stopped.value)
    assert "the judge is not available" in message
    assert "503" in message or "ServiceUnavailable" in message
    assert "--ckpt_path last" in message
    run = tmp_path / "run"
    done = len(trained(run))
    assert 0 < done < 6
    assert (run / "checkpoints/last.ckpt").exists()
    server.down_after = None  # it is back
    cli([*http(server, **options), "--ckpt_path", "last"])
    columns = [key for key in trained(run)[0] if key.startswith("train/")]
    again, undisturbed = trained(run), trained(tmp_path / "whole")
    assert [[row[key] for key in columns] for row in again] == [
        [row[key] for key in columns] for row in undisturbed
    ]


def test_a_judge_that_was_never_there_says_so_at_once(http, cli, server, tmp_path: Path) -> None:
    server.always = "401"
    with pytest.raises(SystemExit, match=r"not available.*AuthenticationError") as stopped:
        cli(http(server))
    assert "planted-key" not in str(stopped.value)
    assert server.calls < 40
    server.always = None
    cli([*http(server), "--resume", "auto"])
    assert len(trained(tmp_path / "run")) == STEPS


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_budget_ends_the_run_cleanly(http, cli, server, tmp_path: Path, capsys, share: float) -> None:
    cli(http(server, run_dir=tmp_path / "whole", **{"model.judge.cache": tmp_path / "whole.sqlite"}))
    spent = sum(row["usd"] for row in ledger(tmp_path / "whole"))
    concurrency = 2
    options = {"model.judge.budget_usd": share * spent, "model.judge.concurrency": concurrency}
    cli(http(server, **options))  # status 0
    said = capsys.readouterr().out
    assert "model.judge.budget_usd" in said
    run = tmp_path / "run"
    calls = ledger(run)
    total = sum(row["usd"] for row in calls)
    dearest = max(row["usd"] for row in calls)
    assert share * spent <= total <= share * spent + concurrency * dearest
    last = [row for row in metrics(run) if row.get("judge/cost_usd")]
    assert not last or float(last[-1]["judge/cost_usd"]) <= total + 1e-9
    if share > 0.5:
        assert (run / "checkpoints/last.ckpt").exists()
        assert (run / "export/config.json").exists()
        before = server.calls
        cli([*http(server, **options), "--ckpt_path", "last"])  # still spent: nothing is paid
        assert server.calls == before
        cli([*http(server), "--ckpt_path", "last"])
        assert len(trained(run)) == STEPS
        # what was paid for before the end was not paid for again
        assert sum(row["usd"] for row in ledger(run)) <= spent * 1.0001


def test_costs_are_in_the_metrics(http, cli, server, tmp_path: Path) -> None:
    cli(http(server))
    run = tmp_path / "run"
    calls = ledger(run)
    assert len(calls) == server.calls
    total = sum(row["usd"] for row in calls)
    rows = metrics(run)
    costs = [float(row["judge/cost_usd"]) for row in rows if row.get("judge/cost_usd")]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(total)
    # 2 validations of 2 images; 3 steps of 2 images with 3 captions
    rollouts = 2 * 2 + STEPS * 2 * 3
    rates = [float(row["judge/usd_per_1k_rollouts"]) for row in rows if row.get("judge/usd_per_1k_rollouts")]
    assert rates[-1] == pytest.approx(1000 * total / rollouts)


def test_killed_at_random_moments_nothing_is_lost_or_paid_twice(
    http, cli, tmp_path: Path, monkeypatch
) -> None:
    log = tmp_path / "items.jsonl"
    monkeypatch.setenv("ITEM_LOG", str(log))
    concurrency, draw = 3, random.Random(KILLS)
    steps = 2 + 2 * KILLS
    options = {
        "trainer.max_steps": steps,
        "model.judge.concurrency": concurrency,
        "model.judge.timeout_s": 30,
        "model.judge.deadline_s": 90,
    }
    run = tmp_path / "run"
    with server_process(answer="tests.judge_kill_log.answer", latency=0.03) as server:
        for number in range(KILLS):
            args = http(server, **options)
            if number:
                args += ["--ckpt_path", "last"]
            process = subprocess.Popen(
                [sys.executable, "main.py", *args],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            until = len(judge_kill_log.calls(log)) + draw.randint(3, 30)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                if len(judge_kill_log.calls(log)) >= until:
                    break
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.wait()
            with sqlite3.connect(tmp_path / "judge.sqlite") as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        cli([*http(server, **options), "--ckpt_path", "last"])
    assert [int(row["step"]) for row in trained(run)] == list(range(1, steps + 1))
    assert all(float(row["judge/failed"]) == 0 for row in trained(run))
    calls = judge_kill_log.calls(log)
    assert len(judge_kill_log.lost(calls)) <= KILLS * concurrency  # those that were under way when a run died
    assert len({item for call in calls for item in call}) > 20

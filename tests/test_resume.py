"""Killed at any moment, continued with the same command: the same numbers, and nothing paid twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, metrics

STEPS = 5


def _trained(run: Path) -> dict[int, dict[str, str]]:
    """Step -> what training logged, but for clocks and who paid."""
    rows = [row for row in metrics(run) if row.get("train/loss")] if (run / "metrics.csv").exists() else []
    return {
        int(row["step"]): {k: v for k, v in row.items() if k.startswith("train/")}
        for row in rows
        if row["train/lr"]
    }


@pytest.mark.parametrize(
    ("sign", "lag"),
    [(signal.SIGKILL, 0), (signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 1)],
    ids=["kill -9", "SIGTERM", "Ctrl-C", "kill -9 with a lag", "SIGTERM with a lag"],
)
def test_a_killed_run_continues_as_if_nothing_had_happened(
    fit_arguments, cli, tmp_path: Path, monkeypatch, sign, lag
) -> None:
    log = tmp_path / "requests.log"
    monkeypatch.setenv("ORACLE_LOG", str(log))
    shared = {
        "trainer.max_steps": STEPS,
        "checkpoint.every_n_train_steps": 2,
        "model.judge.providers": "{shapes: tests.fakes.CountingOracle}",
        "data.val_size": 2,
        "model.lag": lag,
    }
    whole = {**shared, "run_dir": tmp_path / "whole", "model.judge.cache": tmp_path / "whole.sqlite"}
    cli(fit_arguments(**whole))
    expected = _trained(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))
    log.unlink()

    run = tmp_path / "killed"
    command = [sys.executable, "main.py", *fit_arguments(**shared, run_dir=run)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while len(_trained_now(run)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0, error
    done = len(_trained_now(run))
    assert 3 <= done < STEPS, error
    assert (run / "checkpoints/last.ckpt").exists()

    cli([*fit_arguments(**shared, run_dir=run), "--ckpt_path", "last"])
    assert _trained(run) == expected
    rows = {int(row["step"]): row for row in metrics(run) if row["train/loss"]}
    if sign == signal.SIGKILL:  # the checkpoint is of step 2: step 3 runs again, from the cache alone
        assert float(rows[3]["judge/calls"]) == 0
        assert float(rows[3]["judge/cache_hits"]) > 0
    twice = [n for n in Counter(log.read_text().split()).values() if n > 1]
    if (
        sign == signal.SIGKILL
    ):  # what was in flight when the run died: less than a step asks for, of each batch
        calls = [float(row["judge/calls"]) for row in rows.values() if float(row["judge/calls"])]
        assert len(twice) < (min(calls) if lag == 0 else 2 * max(calls))
    else:
        assert not twice
    assert [row["step"] for row in metrics(run) if row["val/b_capscore"]] == ["0", str(STEPS)]


def _trained_now(run: Path) -> dict[int, dict[str, str]]:
    """The same of a file that is being written."""
    try:
        return _trained(run)
    except (KeyError, ValueError, OSError):
        return {}


def test_a_killed_supervised_run_continues_as_if_nothing_had_happened(
    fit_arguments, cli, tmp_path: Path
) -> None:
    overlay = ["--config", str(ROOT / "configs/methods/sft.yaml")]
    shared = {"trainer.max_steps": 30, "checkpoint.every_n_train_steps": 2, "data.val_size": 0}

    def arguments(run: Path) -> list[str]:
        command, *given = fit_arguments(**shared, run_dir=run)
        return [command, *given[:2], *overlay, *given[2:]]

    cli(arguments(tmp_path / "whole"))
    expected, run = _trained(tmp_path / "whole"), tmp_path / "killed"
    assert sorted(expected) == list(range(1, 31))
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments(run)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 240
    while len(_trained_now(run)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 3 <= len(_trained_now(run)) < 30
    cli([*arguments(run), "--ckpt_path", "last"])
    assert _trained(run) == expected


QUANTISED = "__bnb_optimizer_quant_state__"


def test_a_run_with_an_8_bit_optimizer_goes_on_as_if_nothing_had_happened(
    fit_arguments, cli, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    optimizer = {"model.optimizer": "bitsandbytes.optim.AdamW8bit", "model.optimizer.lr": 1e-3}
    for run, ends in (("whole", [3]), ("parts", [2, 3])):
        for steps in ends:
            more = {"trainer.max_steps": steps, "data.val_size": 0, "run_dir": tmp_path / run}
            cli([*fit_arguments(**optimizer, **more), "--resume", "auto"])
    last = [
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "parts")
    ]
    for whole, parts in zip(*(checkpoint["state_dict"].items() for checkpoint in last), strict=True):
        assert whole[0] == parts[0]
        assert torch.equal(whole[1], parts[1]), whole[0]
    (state,) = last[0]["optimizer_states"]
    kept = [
        value for of in state["state"].values() for value in (*of.values(), *of.get(QUANTISED, {}).values())
    ]
    assert any(torch.is_tensor(value) and value.dtype == torch.uint8 for value in kept)


def test_a_checkpoint_of_another_policy_is_refused(fit_arguments, cli, tmp_path: Path) -> None:
    cli(fit_arguments(**{"trainer.max_steps": 1}))
    lora = "{r: 4, alpha: 8, target_modules: [q_proj]}"
    with pytest.raises(SystemExit, match=r"model\.policy\.lora"):
        cli([*fit_arguments(**{"model.policy.lora": lora}), "--ckpt_path", "last"])

"""Whole runs whose captions come from vLLM servers: one that dies, and two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.rollout.vllm.server import VLLMServer
from tests.rollout.with_vllm.server_fixtures import LORA, LORA_PIXELS, Pool, VLLMProcess, pool  # noqa: F401
from tests.support import ROOT, metrics
from tests.test_fsdp2 import DDP, SHARDED

Arguments = Callable[..., list[str]]
CLI = Callable[[list[str]], None]


@pytest.fixture
def served(fit_arguments: Arguments, folders: dict[str, Path]) -> Arguments:
    """Arguments of a fit of the tiny Qwen2.5-VL with these servers."""

    def arguments(servers: list[VLLMProcess], **options: Any) -> list[str]:
        engine = {
            "model.policy.model": folders["qwen"],
            "model.engine": "balcap.rollout.VLLMServer",
            "model.engine.urls": f"[{','.join(server.url for server in servers)}]",
            "model.engine.start_timeout_s": 20,
            "model.engine.deadline_s": 60,
        }
        return fit_arguments(**engine | options)

    return arguments


def steps(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row.get("train/loss")]


def held(server: VLLMProcess) -> int:
    """The version of the weights that the server reports."""
    reply = httpx.post(f"{server.url}/collective_rpc", json={"method": "balcap_about"}, trust_env=False)
    return int(reply.json()["results"][0]["version"].rpartition("-")[2])


def test_a_server_that_is_killed_ends_the_run_with_a_checkpoint_and_a_new_one_goes_on(
    served: Arguments,
    cli: CLI,
    pool: Pool,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    servers = pool.get("full", 2)
    victim, sync = servers[1], VLLMServer.sync

    @wraps(sync)
    def sync_and_kill(engine: VLLMServer, policy: Any, version: int) -> None:
        sync(engine, policy, version)
        if version == 1:
            victim.kill()

    monkeypatch.setattr(VLLMServer, "sync", sync_and_kill)
    arguments = {"trainer.max_steps": 3, "data.batch_size": 4}
    with pytest.raises(SystemExit) as stopped:
        cli(served(servers, **arguments))
    said = str(stopped.value)
    assert said.startswith(f"Stopped: the vLLM server {victim.url} is gone")
    assert "main.py serve" in said
    assert said.endswith(f"Go on with: --run_dir {tmp_path / 'run'} --ckpt_path last")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert len(steps(tmp_path / "run")) == 1
    monkeypatch.undo()
    fresh = pool.get("full", 2)
    assert fresh[1].url != victim.url
    cli([*served(fresh, **arguments), "--ckpt_path", "last"])
    rows = steps(tmp_path / "run")
    assert len(rows) == 3
    assert [held(server) for server in fresh] == [3, 3]
    for row in rows:
        assert float(row["train/mismatch_share"]) < 0.1, (
            "the servers sampled from the weights that were updated"
        )


def test_a_fit_of_an_adapter(served: Arguments, cli: CLI, pool: Pool, tmp_path: Path):  # noqa: F811
    servers = pool.get("lora")
    options = {f"model.policy.lora.{name}": value for name, value in LORA.items()}
    options |= {"model.policy.max_pixels": LORA_PIXELS, "trainer.precision": "32-true"}
    cli(served(servers, **options))
    assert [held(server) for server in servers] == [2]
    for row in steps(tmp_path / "run"):
        assert float(row["train/mismatch_mean"]) < 1e-3


@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["ddp", "fsdp2"])
def test_two_ranks_sample_on_two_servers_one_sends_the_weights_and_both_end_with_a_server(
    served: Arguments,
    pool: Pool,  # noqa: F811
    tmp_path: Path,
    strategy: dict[str, Any],
):
    servers = pool.get("full", 2)
    options = {**strategy, "trainer.precision": "32-true"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "main.py", *served(servers, **options | {"trainer.max_steps": 500})],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (tmp_path / "run/metrics.csv").exists() or len(steps(tmp_path / "run")) < 2:
                assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.1)
            assert held(servers[0]) == held(servers[1]) >= 2
            servers[1].kill()
            assert run.wait(timeout=120) != 0
        finally:
            run.kill()
    assert f"the vLLM server {servers[1].url} is gone" in (tmp_path / "log").read_text()
    rows = steps(tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert 2 <= len(rows) <= checkpoint["global_step"] < 500
    for row in rows:
        assert float(row["train/mismatch_mean"]) < 1e-3, "nats, over the images of both ranks"
        assert float(row["train/staleness"]) == 0

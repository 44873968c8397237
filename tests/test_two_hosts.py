"""Two hosts, each a network namespace of this machine, joined by one cable: the command of docs/scaling.md, a cable that is
pulled, a process that dies, and going on with the host that is left."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT, metrics, run_fit
from tests.test_fsdp2 import SHARDED

HOSTS = (f"balcap-a-{os.getpid()}", f"balcap-b-{os.getpid()}")
STEPS = 24
TOGETHER: dict[str, dict[str, Any]] = {
    "ddp": {"trainer.devices": 1, "trainer.num_nodes": 2, "trainer.strategy": "ddp"},
    "fsdp2": {**SHARDED, "trainer.devices": 1, "trainer.num_nodes": 2},
}


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[None]:
    """10.77.0.1 and 10.77.0.2, which reach each other and nothing else."""
    if shutil.which("ip") is None or not _ip("netns", "add", HOSTS[0]):
        pytest.skip("needs the right to make network namespaces")
    try:
        made = _ip("netns", "add", HOSTS[1])
        made &= _ip(
            "link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "cable1", "netns", HOSTS[1]
        )
        for rank, host in enumerate(HOSTS):
            made &= _ip("-n", host, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"cable{rank}")
            made &= _ip("-n", host, "link", "set", "lo", "up") and _cable(rank, "up")
        assert made
        yield
    finally:
        for host in HOSTS:
            _ip("netns", "del", host)


def _cable(rank: int, state: str) -> bool:
    return _ip("-n", HOSTS[rank], "link", "set", f"cable{rank}", state)


Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(hosts: None, fit_arguments: Callable[..., list[str]], tmp_path: Path) -> Iterator[Start]:
    """`start(strategy, **options)`: the documented command on both hosts; they share a disk, as the run folder says."""
    running: list[subprocess.Popen[str]] = []

    def begin(strategy: str, **options: Any) -> list[subprocess.Popen[str]]:
        arguments = fit_arguments(**{**_common(), **TOGETHER[strategy], "resume": "auto", **options})
        for rank, host in enumerate(HOSTS):
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc_per_node",
                "1",
            ]
            launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29500", "--rdzv_id", "job"]
            # Both have the name of this machine, by which they would find out who is who.
            launcher += ["--local_addr", f"10.77.0.{rank + 1}", "--rdzv_conf", f"is_host={int(rank == 0)}"]
            own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{rank}"}
            process = subprocess.Popen(
                ["ip", "netns", "exec", host, *launcher, "main.py", *arguments],
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=subprocess.DEVNULL,
                stderr=(tmp_path / f"{host}.log").open("w"),
                text=True,
                start_new_session=True,
            )
            running.append(process)
        return running[-2:]

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _common() -> dict[str, Any]:
    return {
        "model.engine": "tests.fakes.FixedEngine",
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-3,
        "model.optimizer.eps": 1e-3,  # else a gradient of nearly 0 is a full step, whose sign is rounding
        "model.policy.lora.r": 4,
        "data.val_size": 0,
        "trainer.precision": "32-true",
        "trainer.max_steps": STEPS,
    }


def _steps(run: Path) -> int:
    if not (run / "metrics.csv").exists():
        return 0
    return max((int(row["step"]) for row in metrics(run) if row.get("train/loss")), default=0)


def _reached(run: Path, step: int, processes: list[subprocess.Popen[str]], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while _steps(run) < step and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), "it ended before"
        time.sleep(0.05)
    assert _steps(run) >= step


def _ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    return [process.wait(timeout=max(1.0, deadline - time.monotonic())) for process in processes]


def _said(tmp_path: Path, *ranks: int) -> str:
    logs = (tmp_path / f"{HOSTS[rank]}.log" for rank in ranks or range(2))
    return "\n".join(log.read_text()[-5000:] for log in logs)


def _trained(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TOGETHER)
def test_two_hosts_train_what_one_process_trains_though_the_cable_is_pulled(
    strategy: str, start: Start, fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    run_fit(fit_arguments(**{**_common(), "trainer.devices": 1, "data.batch_size": 4, "run_dir": alone}))
    processes = start(strategy, run_dir=both, **{"data.batch_size": 2})
    _reached(both, 2, processes)
    assert _cable(1, "down")
    time.sleep(30)
    before = _steps(both)
    assert before < STEPS, "it ended before the cable was pulled"
    assert _cable(1, "up")
    assert _ended(processes, 300) == [0, 0], _said(tmp_path)
    one, two = _trained(alone), _trained(both)
    assert one.keys() == two.keys()
    far = max(float((value - two[name]).abs().max()) for name, value in one.items())
    assert far < 1e-4
    assert (both / "export/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TOGETHER)
def test_a_process_that_dies_ends_the_job_on_both_hosts_and_one_goes_on(
    strategy: str, start: Start, fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    processes = start(strategy, run_dir=run, **{"trainer.max_steps": 500})
    _reached(run, 3, processes)
    (worker,) = _workers(processes[1])
    os.kill(int(worker), signal.SIGKILL)
    codes = _ended(processes, 120)
    assert 0 not in codes, _said(tmp_path)
    done = _steps(run)
    left = {"trainer.devices": 1, "data.batch_size": 4, "run_dir": run, "resume": "auto"}
    run_fit(fit_arguments(**{**_common(), **left, "trainer.max_steps": done + 2}))
    assert _steps(run) == done + 2


@pytest.mark.slow
def test_a_host_that_falls_silent_ends_the_job_within_the_deadline(start: Start, tmp_path: Path) -> None:
    deadline = {
        "trainer.strategy": "lightning.pytorch.strategies.DDPStrategy",
        "trainer.strategy.timeout": "0:00:40",
    }
    processes = start("ddp", run_dir=tmp_path / "run", **deadline, **{"trainer.max_steps": 500})
    _reached(tmp_path / "run", 2, processes)
    assert _cable(1, "down")
    assert _ended(processes[:1], 240) != [0], _said(tmp_path)
    # The host that is cut off gives up as well; its processes look for the other one for minutes before they end.
    log, until = tmp_path / f"{HOSTS[1]}.log", time.monotonic() + 60
    while "Timed out waiting 40000ms" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.5)
    assert "Timed out waiting 40000ms" in log.read_text(), _said(tmp_path, 1)
    assert _steps(tmp_path / "run") < 500


@pytest.mark.slow
def test_two_hosts_spend_one_budget(
    start: Start, fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    budget, run = 1.0, tmp_path / "run"
    judge = {
        "model.judge.prices": "{shapes/oracle: {input: 5, output: 5}}",
        "model.judge.cache": "null",
        "model.judge.budget_usd": budget,
    }
    processes = start("ddp", run_dir=run, **judge, **{"trainer.max_steps": 500})
    assert _ended(processes, 300) == [0, 0], _said(tmp_path)
    spent = [_spent(run / f"judge_ledger{node}.sqlite") for node in ("", ".node1")]
    last = float([row for row in metrics(run) if row.get("judge/cost_usd")][-1]["judge/cost_usd"])
    steps = _steps(run)
    assert min(spent) > 0.3 * budget
    assert (
        budget <= sum(spent) < budget + 2 * last / steps
    )  # what each spends in a step without word from the other
    left = {"trainer.devices": 1, "data.batch_size": 4, "run_dir": run, "resume": "auto"}
    run_fit(fit_arguments(**{**_common(), **judge, **left, "trainer.max_steps": 500}))
    assert _steps(run) == steps  # the host that is left knows what both have spent


def _spent(ledger: Path) -> float:
    with closing(sqlite3.connect(ledger)) as connection:
        return float(connection.execute("SELECT total(usd) FROM calls").fetchone()[0])


def _workers(process: subprocess.Popen[str]) -> list[str]:
    """Processes of a torchrun; `ip netns exec` becomes what it runs."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return found.stdout.split()

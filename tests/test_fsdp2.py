"""Runs of two processes that share a policy (FSDP2, gloo): their checkpoints, what goes on from them, what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from balcap.config import ConfigError, strategy_problems
from balcap.trainer.checkpoint import load_checkpoint
from balcap.trainer.sharded_checkpoint import is_folder
from tests.support import ROOT, metrics, run_fit

SHARDED = {
    "trainer.devices": 2,
    "trainer.strategy": "ModelParallelStrategy",
    "trainer.strategy.data_parallel_size": 2,
    "trainer.strategy.tensor_parallel_size": 1,
    "trainer.strategy.save_distributed_checkpoint": False,
    "data.batch_size": 2,
}
IN_PARTS = {"trainer.strategy.save_distributed_checkpoint": True}
ALONE = {"trainer.devices": 1, "data.batch_size": 4}
DDP = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 2}
FOUR = {"trainer.devices": 4, "trainer.strategy.data_parallel_size": 4, "data.batch_size": 1}


def trained(run: Path) -> dict[str, Tensor]:
    return load_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "others"),
    [
        (
            {"model.policy.lora.r": 4},
            {"to one": (ALONE, "sharded"), "to two": (SHARDED, "alone")},
        ),
        (
            IN_PARTS,
            {
                "to one": (ALONE, "sharded"),
                "to two": ({**SHARDED, **IN_PARTS}, "alone"),
                "to ddp": (DDP, "sharded"),
                "to four": ({**SHARDED, **IN_PARTS, **FOUR}, "sharded"),
            },
        ),
    ],
    ids=["adapter in one file", "weights in parts"],
)
def test_a_run_goes_on_from_its_checkpoint_on_any_number_of_ranks(
    fit_arguments, tmp_path: Path, how: dict[str, Any], others: dict[str, Any]
) -> None:
    sharded = SHARDED | how
    shared: dict[str, Any] = {
        "model.engine": "tests.fakes.FixedEngine",
        **{name: value for name, value in how.items() if name.startswith("model.")},
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-3,
        "model.optimizer.eps": 1e-3,  # else a gradient of nearly 0 is a full step, whose sign is rounding
        "model.kl_coef": 0.1,
        "data.val_size": 0,
        "trainer.precision": "32-true",
    }

    def fit(name: str, steps: int, how: dict[str, Any], begins_at: str = "") -> dict[str, Tensor]:
        more = {"run_dir": tmp_path / name, "trainer.max_steps": steps}
        if begins_at:
            shutil.copytree(tmp_path / begins_at, tmp_path / name)
            more["ckpt_path"] = "last"
        run_fit(fit_arguments(**{**shared, **how, **more}))
        return trained(tmp_path / name)

    whole = fit("whole", 3, sharded)
    fit("sharded", 2, sharded)
    fit("alone", 2, ALONE)
    resumed = fit("resumed", 3, sharded, "sharded")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name, (where, begins_at) in others.items():
        other = fit(name, 3, where, begins_at)
        assert whole.keys() == other.keys()
        far = {key: float((value - other[key]).abs().max()) for key, value in whole.items()}
        assert max(far.values()) < 1e-4, (name, far)
    last = tmp_path / "whole/checkpoints/last.ckpt"
    assert is_folder(last) == (how == IN_PARTS)
    assert {path.name for path in last.glob("*.distcp")} == (
        {"__0_0.distcp", "__1_0.distcp"} if how == IN_PARTS else set()
    )
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "step-00000003.ckpt"]
    names = {path.name for path in (tmp_path / "whole/export").iterdir()}
    assert ({"model.safetensors"} if how == IN_PARTS else {"adapter_model.safetensors"}) <= names


@pytest.mark.slow
@pytest.mark.parametrize("to", ["all", "the first"])
@pytest.mark.parametrize("strategy", [DDP, {**SHARDED, **IN_PARTS}], ids=["ddp", "fsdp2"])
def test_a_run_of_two_ranks_that_is_asked_to_end_goes_on_as_if_nothing_had_happened(
    fit_arguments, tmp_path: Path, strategy: dict[str, Any], to: str
) -> None:
    """SIGTERM, as schedulers send it, or as a user does."""
    shared: dict[str, Any] = {
        **strategy,
        "model.engine": "tests.fakes.FixedEngine",
        "model.policy.lora.r": 4,
        "data.val_size": 0,
        "trainer.precision": "32-true",
        "resume": "auto",
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "main.py", *fit_arguments(**shared, **{"trainer.max_steps": 500, "run_dir": run})],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (run / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM) if to == "all" else process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0, said[-2000:]
    done = load_checkpoint(run / "checkpoints/last.ckpt")["global_step"]
    assert 1 <= done < 500
    for folder in (run, whole):
        run_fit(fit_arguments(**shared, **{"trainer.max_steps": done + 1, "run_dir": folder}))
    assert all(torch.equal(value, trained(run)[name]) for name, value in trained(whole).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [{}, {"model.policy.lora.r": 4, "model.policy.dtype": "bfloat16"}], ids=["full", "lora"]
)
def test_in_16_bits_two_ranks_take_the_steps_of_one_but_for_rounding(
    fit_arguments, tmp_path: Path, policy: dict[str, Any]
) -> None:
    """As on GPUs: weights are gathered in bfloat16, gradients summed in float32; an adapter's are float32 on others."""
    shared = {
        "model.engine": "tests.fakes.FixedEngine",
        "model.kl_coef": 0.1,
        "data.val_size": 0,
        "trainer.precision": "bf16-mixed",
    }
    for name, how in (("one", ALONE), ("two", SHARDED)):
        run_fit(fit_arguments(**shared, **policy, **how, run_dir=tmp_path / name))
    one, two = ([row for row in metrics(tmp_path / name) if row["train/loss"]] for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for name, rel in (("train/entropy", 0.01), ("train/grad_norm", 0.05)):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=rel), name
    states = [trained(tmp_path / name) for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    assert {value.dtype for value in states[1].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"trainer.strategy.data_parallel_size": "auto"},
            "data_parallel_size: auto: all ranks share one policy; set it",
        ),
        ({"trainer.strategy.tensor_parallel_size": 2}, "tensor_parallel_size: 2: weights are cut over ranks"),
        (
            {"model.optimizer": "bitsandbytes.optim.AdamW8bit", "model.optimizer.lr": 1e-6},
            "model.optimizer: AdamW8bit of bitsandbytes cannot step",
        ),
        ({"model.engine": None}, "model.engine: no rank holds the policy's weights"),
        (
            {"trainer.precision": "bf16-true"},
            "trainer.precision: bf16-true is not supported with a sharded policy",
        ),
        (
            {"model.policy.load_in_4bit": True, "model.policy.lora.r": 4},
            "load_in_4bit: 4-bit weights cannot be cut",
        ),
        (
            {
                "model.engine": "VLLMServer",
                "model.engine.urls": "[http://a]",
                "model.engine.transfer_backend": "nccl",
            },
            "transfer_backend: nccl sends weights that one rank holds",
        ),
    ],
)
def test_what_does_not_work_is_refused_before_anything_is_loaded(
    fit_arguments, cli, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        cli(fit_arguments(**{"model.engine": "tests.fakes.FixedEngine", **SHARDED, **options}))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_other_strategies_that_cut_the_policy_are_refused(name: str) -> None:
    strategy = type(name, (), {})()
    (problem,) = strategy_problems(SimpleNamespace(strategy=strategy), None)  # type: ignore[arg-type]
    assert f"trainer.strategy: {name} is not supported; shard the policy with" in problem

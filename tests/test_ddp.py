"""Several processes (gloo) take the step that one takes on the same data, whether each holds the policy or a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT, metrics, run_fit
from tests.test_fsdp2 import DDP, SHARDED


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [DDP, {**DDP, "trainer.devices": 4, "data.batch_size": 1}, SHARDED],
    ids=["ddp", "ddp of four", "fsdp2"],
)
def test_ranks_take_the_step_of_one(fit_arguments, tmp_path: Path, strategy: dict[str, Any]) -> None:
    shared = {
        "model.engine": "tests.fakes.FixedEngine",
        "model.optimizer": "torch.optim.SGD",  # Adam's first step is the sign of the gradient: it hides its size
        "model.optimizer.lr": 0.5,
        "model.max_grad_norm": 0.05,
        "model.kl_coef": 0.1,
        "model.updates_per_rollout": 2,
        "model.micro_batch_size": 1,
        "data.val_size": 4,
        "trainer.max_steps": 4,
        "trainer.precision": "32-true",
    }
    one = {**shared, "run_dir": tmp_path / "one", "data.batch_size": 4, "trainer.devices": 1}
    several = {**shared, "run_dir": tmp_path / "several", **strategy}
    run_fit(fit_arguments(**one))
    run_fit(fit_arguments(**several))
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "several")
    ]
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(ROOT / "assets/shapes-base", dtype=torch.float32)
    moved = 0.0
    for key, value in states[0].items():
        torch.testing.assert_close(
            value, states[1][key], atol=2e-6, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
        start = base.get_parameter(key.removeprefix("policy.model."))
        moved = max(moved, float((value - start.detach()).abs().max()))
    assert moved > 1e-4  # both went somewhere
    rows = [[r for r in metrics(tmp_path / name) if r["train/loss"]] for name in ("one", "several")]
    for a, b in zip(*rows, strict=True):
        for name in (
            "train/precision",
            "train/recall",
            "train/kl",
            "train/grad_norm",
            "train/loss",
            "train/entropy",
        ):
            assert abs(float(a[name]) - float(b[name])) < 1e-4, (name, a[name], b[name])
    val = [
        [r["val/b_capscore"] for r in metrics(tmp_path / name) if r["val/b_capscore"]]
        for name in ("one", "several")
    ]
    for a, b in zip(*val, strict=True):
        assert abs(float(a) - float(b)) < 1e-4


def test_a_budget_that_one_rank_finds_spent_ends_all_ranks_well(fit_arguments, tmp_path: Path) -> None:
    arguments = fit_arguments(
        **{
            "model.engine": "tests.fakes.FixedEngine",
            "model.num_captions": 2,
            "model.kl_coef": 0,
            "data.val_size": 0,
            "trainer.max_steps": 5,
            "trainer.devices": 2,
            "trainer.strategy": "ddp",
            "trainer.callbacks+": "tests.fakes.SpendOnOneRank",
        }
    )
    said = run_fit(
        arguments, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"
    )
    assert said.count("Stopped: the budget is spent") == 1
    assert (tmp_path / "run/export/config.json").is_file()
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 1

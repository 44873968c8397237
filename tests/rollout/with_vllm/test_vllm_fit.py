"""Whole runs on the embedded world with vLLM in process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from tests.rollout.with_vllm.support import Shared
from tests.support import metrics, run_fit
from tests.test_fsdp2 import DDP, IN_PARTS, SHARDED
from tests.wide_heads import write_wide_base

Arguments = Callable[..., list[str]]

ENGINE = {
    "model.engine": "balcap.rollout.VLLMInProcess",
    "model.engine.enforce_eager": True,
}
LORA = {"model.policy.lora": "{r: 4, target_modules: [q_proj, v_proj, down_proj]}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's base policy with heads of a size that vLLM has on a CPU."""
    folder = tmp_path_factory.mktemp("base")
    write_wide_base(folder)
    return folder


def steps(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row["train/loss"]]


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_a_run_learns_from_vllms_captions_and_resumes(
    fit_arguments: Arguments,
    cli: Callable,
    tmp_path: Path,
    base: Path,
    shared: Shared,
    tuning: dict[str, object],
):
    shared.close()
    # not the world's own base: vLLM has no attention on a CPU for its heads of 40 dimensions
    options = {
        **ENGINE,
        **tuning,
        "model.policy.model": base,
        "trainer.max_steps": 2,
        "trainer.precision": "bf16-mixed",
    }
    cli(fit_arguments(**options))
    first = steps(tmp_path / "run")
    assert len(first) == 2
    for row in first:
        assert float(row["train/staleness"]) == 0
        # bfloat16 against float32; another prompt, image or set of weights would be off by far more
        assert float(row["train/mismatch_mean"]) < 0.1
        assert float(row["train/caption_tokens"]) > 1
    cli([*fit_arguments(**{**options, "trainer.max_steps": 3}), "--ckpt_path", "last"])
    rows = steps(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert float(rows[-1]["train/mismatch_mean"]) < 0.1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("shared_by", [1, 2], ids=["an engine for each", "an engine for both"])
@pytest.mark.parametrize(
    "strategy", [DDP, {**SHARDED, **IN_PARTS}, {**SHARDED, **LORA}], ids=["ddp", "fsdp2", "fsdp2 with lora"]
)
def test_two_ranks_learn_from_their_own_captions(
    fit_arguments: Arguments,
    tmp_path: Path,
    base: Path,
    shared: Shared,
    strategy: dict[str, object],
    shared_by: int,
):
    shared.close()
    options = {
        **ENGINE,
        "model.engine.tensor_parallel_size": shared_by,
        "model.policy.model": base,
        "trainer.max_steps": 2,
        "trainer.precision": "32-true",
        "trainer.limit_val_batches": 0,
        **strategy,
    }
    run_fit(fit_arguments(**options))
    rows = steps(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        # the second step's captions come from the weights that both ranks made together
        assert float(row["train/mismatch_max"]) < 2e-3

"""On a CUDA device: the CPU's log-probs, and a whole step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from tests.support import metrics
from tests.tiny_models import mixed_batch, rollouts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_log_probs_equal_the_cpus(folders: dict[str, Path], family: str) -> None:
    policy = Policy.load(PolicyConfig(model=str(folders[family]), dtype="float32"), with_reference=False)
    batch = mixed_batch()
    rollouts = rollouts_of(batch, [[4, 7]] * len(batch), range(20, 60))
    prompts, rows = policy.encode(batch), range(len(batch))
    here, _ = policy.logps(rollouts, prompts, rows)
    there, _ = policy.cuda().logps(rollouts, prompts, rows)
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)


def test_a_step_on_the_gpu_logs_what_a_step_on_the_cpu_logs(fit_arguments, cli, tmp_path: Path) -> None:
    shared = {
        "model.engine": "tests.fakes.FixedEngine",
        "trainer.max_steps": 1,
        "trainer.precision": "32-true",
    }
    cli(fit_arguments(**shared, run_dir=tmp_path / "cpu"))
    gpu = {"trainer.accelerator": "gpu", "trainer.devices": 1}
    cli(fit_arguments(**shared, **gpu, run_dir=tmp_path / "gpu"))
    cpu_row, gpu_row = (
        next(r for r in metrics(tmp_path / name) if r["train/loss"]) for name in ("cpu", "gpu")
    )
    for name in ("train/precision", "train/recall", "train/linguistic", "train/entropy", "train/grad_norm"):
        assert float(gpu_row[name]) == pytest.approx(float(cpu_row[name]), rel=1e-3, abs=1e-4), name

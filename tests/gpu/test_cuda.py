"""On a CUDA device: the CPU's log-probs, and a whole step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from balcap.policy import PolicyConfig, attention
from balcap.policy.compiled import Compiled
from balcap.policy.layout import Layout
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
    here, _ = policy.logps(rollouts, policy.encode(batch), range(len(batch)))
    policy.cuda()
    there, _ = policy.logps(rollouts, policy.encode(batch), range(len(batch)))
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


@pytest.mark.parametrize("captions", [[[7, 3, 1], [5, 5, 0]], [[200, 301, 250], [1, 30, 2]]])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flash_attention_over_sequences_of_any_lengths(captions: list[list[int]], kv_heads: int) -> None:
    """In bfloat16, against torch's attention with a mask in float32."""
    layout = Layout([130, 40], captions, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def rows(heads: int) -> torch.Tensor:
        made = torch.randn(layout.tokens, heads, 128, generator=generator, device="cuda").bfloat16()
        return made.requires_grad_()

    query, key, value, weights = rows(4), rows(kv_heads), rows(kv_heads), rows(4)
    assert layout.attention.varlen is not None

    def outputs(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        out = attend(query.to(dtype), key.to(dtype), value.to(dtype), 128**-0.5, layout.attention)
        return [out, *torch.autograd.grad((out * weights).float().sum(), (query, key, value))]

    found = outputs(attention._varlen, torch.bfloat16)
    for mine, other in zip(found, outputs(attention._expanded, torch.float32), strict=True):
        assert float((mine.float() - other.float()).norm() / other.float().norm()) < 1e-2


def test_one_compiled_layer_serves_all_lengths(folders: dict[str, Path], family: str) -> None:
    settings = {"model": str(folders[family]), "dtype": "bfloat16"}
    plain, compiled = (
        Policy.load(PolicyConfig(**settings, compile=wanted), with_reference=False).cuda()
        for wanted in (False, True)
    )
    batch = mixed_batch()
    for lengths in ([[4, 7]] * len(batch), [[9, 2]] * len(batch), [[1, 12]] * len(batch)):
        rollouts, rows = rollouts_of(batch, lengths, range(20, 60)), range(len(batch))
        found, wanted = (
            policy.logps(rollouts, policy.encode(batch), rows)[0] for policy in (compiled, plain)
        )
        torch.testing.assert_close(found, wanted, atol=0.1, rtol=0.05)
    assert not Compiled.failed


def test_features_of_a_tower_on_the_gpu(folders: dict[str, Path]) -> None:
    """All windows in one call of a compiled block, against those of the CPU."""
    policy = Policy.load(
        PolicyConfig(str(folders["qwen"]), dtype="bfloat16", compile=True), with_reference=False
    )
    batch = mixed_batch()
    features = {}
    for device in ("cpu", "cuda"):
        policy.to(device)
        pixels = policy.encode(batch).images(range(len(batch)), policy.device)
        with torch.no_grad():
            tower = policy.model.model.visual
            features[device] = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
    error = (features["cuda"].cpu().float() - features["cpu"].float()).norm() / features["cpu"].float().norm()
    assert float(error) < 0.02
    assert not Compiled.failed

"""Methods of others, each an overlay: they parse on top of a small and of a large config, and train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, metrics
from tests.test_cli import ParsedCLI

METHODS = sorted(ROOT.glob("configs/methods/*.yaml"))
REWARDS = {
    "grpo": {"precision": 1.0, "recall": 1.0, "linguistic": 1.0},
    "feedquill": {"precision": 1.0, "recall": 1.0},
}
"""What each method trains on."""
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)


@pytest.mark.filterwarnings("ignore")
@by_method
def test_a_method_is_a_short_overlay_on_a_large_config(
    method: Path, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    local = ["--data.image_root", str(world), "--data.data", str(world / "shapes.json")]
    local += ["--run_dir", str(tmp_path), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    base = str(ROOT / "configs/qwen3vl-4b.yaml")
    model = ParsedCLI(args=["fit", "--config", base, "--config", str(method), *local]).model
    assert {name: model.weights.get(name, 0.0) for name in model.rewards.names} == REWARDS[method.stem]
    assert type(model.advantage).__name__ == "GRPO"
    assert model.reward_transforms == []
    lines = method.read_text().splitlines()
    assert len(lines) < 40
    assert lines[0].startswith("# Method: ")
    assert (
        f"#   python main.py fit --config configs/<run>.yaml --config configs/methods/{method.name}" in lines
    )


@by_method
def test_a_method_trains_on_the_embedded_world(
    method: Path, fit_arguments: Any, cli: Any, tmp_path: Path
) -> None:
    arguments = fit_arguments(**{"data.val_size": 2, "data.val_batch_size": 2})
    cli([*arguments[:3], "--config", str(method), *arguments[3:]])
    steps = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert len(steps) == 2
    for row in steps:
        assert math.isfinite(float(row["train/loss"]))
        assert float(row["judge/failed"]) == 0
        assert all(0 <= float(row[f"train/{name}"]) <= 1 for name in REWARDS[method.stem])
    assert any(float(row["train/grad_norm"]) > 0 for row in steps)

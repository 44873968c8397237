"""Methods of others, each an overlay: they parse on top of a small and of a large config, and train."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from balcap.config import ConfigError
from tests.support import ROOT, metrics
from tests.test_cli import ParsedCLI

OURS = ("sft", "reference_free")
METHODS = sorted(path for path in ROOT.glob("configs/methods/*.yaml") if path.stem not in OURS)
REWARDS = {
    "grpo": {"precision": 1.0, "recall": 1.0, "linguistic": 1.0},
    "feedquill": {"precision": 1.0, "recall": 1.0},
    "caprl": {"caprl": 1.0, "caprl_length": 0.2},
    "vcap": {"correctness": 0.5, "completeness": 0.4, "text": 0.1},
    "claimdiff": {"claim_diff": 1.0},
    "rubicap": {"rubicap": 1.0},
}
"""What each method trains on."""
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)


@pytest.mark.filterwarnings("ignore")
@by_method
def test_a_method_is_an_overlay_on_a_large_config(
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


@pytest.mark.parametrize("method", ROOT.glob("configs/methods/*.yaml"), ids=lambda path: path.stem)
def test_a_method_is_a_short_overlay_that_says_what_it_is(method: Path) -> None:
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


def test_a_method_is_priced_before_it_runs(
    fit_arguments: Any, cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *arguments = fit_arguments("estimate", **{"trainer.max_steps": 1})
    overlay = ["--config", str(ROOT / "configs/methods/caprl.yaml")]
    cli([command, *arguments[:2], *overlay, *arguments[2:], "--rows", "3", "--chars_per_token", "4"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "answer" in line)
    # 2 images x 3 captions, and 4 held-out images twice (a first time, and again), 6 to 8 questions each
    calls = int(re.findall(r"\d[\d,]*", line)[0].replace(",", ""))
    assert 6 * (6 + 4 + 4) <= calls <= 8 * (6 + 4 + 4)


@pytest.mark.parametrize("command", ["fit", "check", "estimate"])
def test_a_column_that_a_reward_reads_must_be_named(fit_arguments: Any, cli: Any, command: str) -> None:
    rewards = {"model.rewards": "[balcap.rewards.CapRL]", "model.weights": "{caprl: 1}"}
    with pytest.raises(ConfigError) as refused:
        cli(fit_arguments(command, **rewards))
    assert any(
        p.startswith("data.columns: the reward caprl reads questions; write") for p in refused.value.problems
    )


def test_a_rubric_that_cannot_be_read_is_a_bad_row(
    fit_arguments: Any, cli: Any, world: Path, tmp_path: Path
) -> None:
    rows = json.loads((world / "shapes.json").read_text())[:12]
    bad = [{"weight": 3}, {"criterion": " ", "weight": 3}, {"criterion": "It says so.", "weight": 0}]
    for row, entry in zip(rows[2:], bad, strict=False):
        row["rubric"].append(entry)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {
        "data.data": tmp_path / "rows.json",
        "data.val_size": 2,
        "data.max_bad_share": 0.5,
        "trainer.max_steps": 6,
    }
    command, *arguments = fit_arguments(**options)
    cli([command, *arguments[:2], "--config", str(ROOT / "configs/methods/rubicap.yaml"), *arguments[2:]])
    listed = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert {row["cause"] for row in listed} == {"malformed_column"}
    assert all(
        'column "rubric": an object lacks a criterion, and a weight above 0' in row["detail"]
        for row in listed
    )
    assert 1 <= len(listed) <= 3
    assert len([row for row in metrics(tmp_path / "run") if row["train/loss"]]) == 6

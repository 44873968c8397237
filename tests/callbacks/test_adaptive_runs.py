"""Callbacks that change the algorithm by what the rollouts show: in whole runs, and over several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from balcap.algorithms import LengthMask
from balcap.cli import ConfigError
from callbacks.balance_weights import BalanceWeights, balanced_weights
from callbacks.length_mask import TargetBand
from tests.support import metrics

BOTH = [
    {"class_path": "callbacks.length_mask.TargetBand", "init_args": {"target_low": 0.9, "target_high": 1.1}},
    {"class_path": "callbacks.balance_weights.BalanceWeights"},
]
NAMES = ("precision", "recall", "linguistic")


def _trained(run: Path) -> list[dict[str, str]]:
    """What training logged, step by step."""
    return [
        {name: value for name, value in row.items() if name.startswith("train/") or name == "step"}
        for row in metrics(run)
        if row["train/loss"]
    ]


def test_bounds_and_weights_move_and_go_on_from_a_checkpoint(fit_arguments, cli, tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "trainer.callbacks": json.dumps(BOTH),
        "data.val_size": 0,
        "export.enabled": False,
        "run_dir": tmp_path,
    }
    cli(fit_arguments(**shared, trainer__max_steps=2))
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    cli([*fit_arguments(**shared, trainer__max_steps=3), "--ckpt_path", "last"])
    first, second, third = _trained(tmp_path)
    assert first["train/tau_low"] == ""
    assert float(first["train/length_masked"]) == 0
    bounds = saved["TargetBand"]["bounds"]
    assert [float(third[f"train/{name}"]) for name in ("tau_low", "tau_high")] == pytest.approx(bounds)
    assert float(second["train/tau_low"]) <= bounds[0] <= 0.9

    weights = [{name: float(row[f"train/weight_{name}"]) for name in NAMES} for row in (first, second, third)]
    assert set(weights[0].values()) == {1.0}
    assert sum(weights[1].values()) == pytest.approx(3.0)
    rewards = {name: float(first[f"train/{name}"]) for name in NAMES}
    assert sorted(NAMES, key=weights[1].__getitem__) == sorted(NAMES, key=rewards.__getitem__, reverse=True)
    levels = saved["BalanceWeights"]["levels"]
    assert weights[2] == pytest.approx(balanced_weights(dict.fromkeys(NAMES, 1.0), levels, 0.5))


def test_all_ranks_observe_the_rollouts_of_all() -> None:
    lengths = torch.tensor([[2, 4]]), torch.tensor([[6, 8]])
    rewards = torch.tensor([[[0.2, 0.5], [0.4, torch.nan]]]), torch.tensor([[[0.6, torch.nan]] * 2])
    moved = []
    for rank in (0, 1):
        band, weights = TargetBand(quantile=0.0), BalanceWeights()
        for callback, there in ((band, "lengths"), (weights, "rewards")):
            of_all = [
                SimpleNamespace(
                    rollouts=SimpleNamespace(lengths=lengths[r], reference_lengths=torch.tensor([10])),
                    rewards=rewards[r],
                    reward_names=("a", "b"),
                )
                for r in (0, 1)
            ]
            # what the other rank hands over: its ratios, or its sums and counts
            other = {
                "lengths": lengths[1 - rank].double() / 10,
                "rewards": (torch.tensor([1.2, 0.0, 2, 0]), torch.tensor([0.6, 0.5, 2, 1]))[rank].double(),
            }[there]
            strategy = SimpleNamespace(
                all_gather=lambda mine, other=other: torch.stack([mine, other.to(mine.dtype)]),
                root_device="cpu",
            )
            trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[])
            callback.on_train_batch_end(trainer, None, {"records": [of_all[rank]]}, None, 0)  # type: ignore[attr-defined]
        moved.append((band.bounds, weights.levels))
    assert moved[0][0] == moved[1][0] == (0.2, 2.0)
    for _, levels in moved:  # (0.2 + 0.4 + 0.6 + 0.6) / 4, and the only b that is there
        assert levels == pytest.approx({"a": 0.45, "b": 0.5})


def test_nothing_is_masked_before_the_first_captions() -> None:
    mask, logged = LengthMask(), {}
    module: Any = SimpleNamespace(
        reward_transforms=[mask], log=lambda name, value, **_: logged.update({name: value})
    )
    band = TargetBand(quantile=0.0)
    band.on_fit_start(SimpleNamespace(callbacks=[]), module)  # type: ignore[arg-type]
    band.on_train_batch_start(None, module, None, 0)  # type: ignore[arg-type]
    assert (mask.tau_low, mask.tau_high) == (0.0, float("inf"))
    assert logged == {}
    band.observe(torch.tensor([0.3, 2.5]).double())
    band.on_train_batch_start(None, module, None, 1)  # type: ignore[arg-type]
    assert (mask.tau_low, mask.tau_high) == pytest.approx((0.3, 2.5))
    assert logged == pytest.approx({"train/tau_low": 0.3, "train/tau_high": 2.5})


def test_callbacks_that_contradict_the_config_are_refused_before_anything_is_loaded(
    fit_arguments, cli
) -> None:
    schedule = "[{step: 0, tau_low: 0.5, tau_high: 2.0}]"
    callbacks = (
        "[{class_path: callbacks.length_mask.TargetBand}, {class_path: callbacks.mastery.Mastery}, "
        f"{{class_path: callbacks.length_mask.LengthMaskSchedule, init_args: {{schedule: {schedule}}}}}]"
    )
    settings = {
        "trainer.callbacks": callbacks,
        "model.reward_transforms": "[]",
        "model.rewards": "[balcap.rewards.Precision]",
        "model.weights": "{precision: 1.0}",
    }
    with pytest.raises(ConfigError) as caught:
        cli(fit_arguments(**settings))
    text = "\n".join(caught.value.problems)
    assert "trainer.callbacks: TargetBand: model.reward_transforms holds no" in text
    assert "trainer.callbacks: LengthMaskSchedule: model.reward_transforms holds no" in text
    assert "TargetBand and LengthMaskSchedule both set the length mask" in text
    assert "Mastery goes by b-CapScore, and model.rewards lacks recall, linguistic" in text

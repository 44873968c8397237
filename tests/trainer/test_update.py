"""How a batch of rollouts is cut into forward passes, and what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from balcap.algorithms import cgdpo
from balcap.trainer.update import UpdateSettings, micro_batches, rows_with_nonzero_advantage
from tests.support import metrics
from tests.tiny_models import mixed_batch, rollouts_of

LENGTHS = [[3, 1, 5], [7, 2, 2], [4, 6, 1]]


def packs(policy, micro_batch_size=None, max_tokens=None, rows=(0, 1, 2)) -> list[list[int]]:
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    prompts = policy.encode(rollouts.batch)
    settings = UpdateSettings(micro_batch_size=micro_batch_size, max_tokens_per_forward=max_tokens)
    return list(micro_batches(policy, settings, rollouts, prompts, rows))


def test_images_are_packed_by_tokens_and_by_number(load):
    policy = load()
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    prompts = policy.encode(rollouts.batch)
    sizes = [policy.size(rollouts, prompts, [row]).forwarded for row in range(3)]
    # each prompt once, and of a caption all but its last token: 9 - 3, 11 - 3, 11 - 3
    lengths = [item["input_ids"].shape[1] for item in prompts.items]
    assert sizes == [lengths[0] + 6, lengths[1] + 8, lengths[2] + 8]
    assert packs(policy) == [[0, 1, 2]]
    assert packs(policy, micro_batch_size=2) == [[0, 1], [2]]
    assert packs(policy, max_tokens=sum(sizes)) == [[0, 1, 2]]
    assert packs(policy, max_tokens=sum(sizes) - 1) == [[0, 1], [2]]
    assert packs(policy, max_tokens=1) == [[0], [1], [2]]  # an image is never cut
    assert packs(policy, max_tokens=10**6, micro_batch_size=1, rows=[2, 0]) == [[2], [0]]


def test_what_sharing_saves(load):
    shared, separate = load(), load(shared_prefix=False)
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    prompts = shared.encode(rollouts.batch)
    ours, naive = (p.size(rollouts, prompts, [0, 1, 2]) for p in (shared, separate))
    lengths = [item["input_ids"].shape[1] for item in prompts.items]
    assert ours.separate == naive.separate == 3 * sum(lengths) + 31
    assert naive.forwarded == 9 * (max(lengths) + 7)
    assert naive.padding == pytest.approx(1 - naive.separate / naive.forwarded)
    assert ours.forwarded == sum(lengths) + 31 - 9


def test_groups_without_an_advantage_are_left_out_unless_kl_needs_them():
    advantages = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 0.5]])
    assert rows_with_nonzero_advantage(advantages, kl_coef=0.0) == [1, 2]
    assert rows_with_nonzero_advantage(advantages, kl_coef=0.1) == [0, 1, 2]
    per_token = torch.zeros(3, 2, 4)
    per_token[1, 0, 3] = 0.5
    assert rows_with_nonzero_advantage(per_token, kl_coef=0.0) == [1]
    assert rows_with_nonzero_advantage(torch.zeros(2, 2), kl_coef=0.0) == [0]  # every rank takes part


def test_groups_without_spread_have_no_advantage_whatever_whitening_rounds():
    rewards = torch.rand(8, 6, 3, generator=torch.Generator().manual_seed(0))
    rewards[[1, 4, 6]] = torch.tensor([0.3, 0.7, 0.9])
    advantages = cgdpo(rewards, torch.tensor([1.0, 2.0, 0.5]))
    assert rows_with_nonzero_advantage(advantages, kl_coef=0.0) == [0, 2, 3, 5, 7]


@pytest.mark.parametrize("tokens", [None, 60])
def test_the_size_of_an_update_is_in_the_metrics(fit_arguments, cli, tmp_path: Path, tokens) -> None:
    cli(fit_arguments(**{"trainer.max_steps": 1, "model.max_tokens_per_forward": tokens}))
    (row,) = [row for row in metrics(tmp_path / "run") if row.get("train/loss")]
    assert float(row["train/tokens_forwarded"]) > 0
    assert 0 < float(row["train/tokens_saved"]) < 1
    assert 0 <= float(row["train/padding"]) < 1


def test_packs_change_no_number(fit_arguments, cli, tmp_path: Path) -> None:
    rows = []
    for name, options in {
        "whole": {},
        "packs": {"model.max_tokens_per_forward": 60},
        "separate": {"model.policy.shared_prefix": "false"},
    }.items():
        shared = {"trainer.precision": "32-true", "trainer.max_steps": 2, "run_dir": tmp_path / name}
        cli(fit_arguments(**shared, **options))
        rows.append([row for row in metrics(tmp_path / name) if row.get("train/loss")])
    for key in ("train/loss", "train/grad_norm", "train/kl", "train/entropy", "train/b_capscore"):
        whole, packed, separate = ([float(row[key]) for row in run] for run in rows)
        assert packed == pytest.approx(whole, rel=1e-3, abs=1e-6), key
        assert separate == pytest.approx(whole, rel=1e-3, abs=1e-6), key

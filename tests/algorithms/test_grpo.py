"""Vanilla GRPO: the baseline."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import grpo

NAN = math.nan
many = settings(max_examples=60, deadline=None)


def test_golden():
    # Weights 1, 2. Sums: 0.2 + 1.0 = 1.2; 0.4 + 0.4 = 0.8; 0.6 + 1.0 = 1.6: mean 1.2
    # std sqrt((0 + 0.16 + 0.16) / 2) = 0.4; eps 0.1 -> 0, -0.4 / 0.5 = -0.8, 0.8
    rewards = torch.tensor([[[0.2, 0.5], [0.4, 0.2], [0.6, 0.5]]])
    advantages = grpo(rewards, torch.tensor([1.0, 2.0]), eps=0.1)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, -0.8, 0.8]]))


def test_golden_incomplete_rollout_is_left_out():
    # The second rollout misses recall: out. Sums of the others 0.5, 1.5: mean 1, std 0.707107.
    rewards = torch.tensor([[[0.5, 0.0], [0.9, NAN], [0.5, 1.0]]])
    advantages = grpo(rewards, torch.ones(2), eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-0.707107, 0.0, 0.707107]]))
    assert advantages[0, 1] == 0


def test_reward_of_weight_zero_may_be_missing():
    rewards = torch.tensor([[[0.5, NAN], [0.9, 0.1], [0.1, NAN]]])
    expected = grpo(rewards[..., :1], torch.ones(1))
    assert torch.equal(grpo(rewards, torch.tensor([1.0, 0.0])), expected)
    assert (grpo(rewards, torch.zeros(2)) == 0).all()


def test_constant_group_is_exactly_zero_for_every_group_size():
    for G in range(1, 17):
        assert (grpo(torch.full((2, G, 3), 0.7), torch.tensor([1.0, 0.5, 2.0]), eps=0.0) == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one weight for each reward"):
        grpo(torch.rand(2, 3, 2), torch.ones(3))


def test_fewer_than_two_complete_rollouts_are_zero():
    rewards = torch.tensor([[[0.5, 0.2], [0.9, NAN], [NAN, 1.0]], [[NAN, NAN]] * 3])
    assert (grpo(rewards, torch.ones(2)) == 0).all()


@many
@given(st.integers(0, 2**31), st.integers(2, 9), st.floats(0.05, 20), st.floats(-3, 3))
def test_zero_mean_permutation_shift_and_scale(seed, G, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(3, G, 3, generator=generator).double()
    rewards[torch.rand(3, G, 3, generator=generator) < 0.15] = NAN
    weights = torch.rand(3, generator=generator)
    advantages = grpo(rewards, weights, eps=1e-12)
    torch.testing.assert_close(advantages.mean(dim=1), torch.zeros(3).double(), atol=1e-6, rtol=0)
    order = torch.randperm(G, generator=generator)
    torch.testing.assert_close(grpo(rewards[:, order], weights, eps=1e-12), advantages[:, order])
    # All rewards together: a shift or scale of one alone changes the sum's composition.
    moved = grpo(rewards * scale + shift, weights, eps=1e-12)
    torch.testing.assert_close(moved, advantages, atol=1e-5, rtol=1e-5)

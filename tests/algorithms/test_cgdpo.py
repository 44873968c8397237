"""c-GDPO: one hand-worked golden, then what must hold for any rewards."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import cgdpo, grpo

NAN = math.nan
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


def make_rewards(seed: int, B: int = 3, G: int = 4, K: int = 3, missing: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(B, G, K, generator=generator)
    gone = torch.rand(B, G, K, generator=generator) < missing
    return rewards.masked_fill(gone, NAN)


seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(1, 4))
many = settings(max_examples=60, deadline=None)


def test_golden_without_whitening():
    # Precision 0.2, 0.4, 0.6: mean 0.4, std (ddof 1) sqrt((0.04 + 0 + 0.04) / 2) = 0.2 -> -1, 0, 1
    # Recall    0.9, 0.5, 0.1: mean 0.5, std sqrt((0.16 + 0 + 0.16) / 2) = 0.4            ->  1, 0, -1
    # Linguistic 0.5, 0.5, 1.0: mean 2/3, std sqrt((1/36 + 1/36 + 4/36) / 2) = 0.288675
    #                           -1/6 / 0.288675 = -0.577350, the same, 1/3 / 0.288675 = 1.154701
    # Weights 1, 0.5, 2: -1 + 0.5 - 1.154701 = -1.654701; -1.154701; 1 - 0.5 + 2.309401 = 2.809401
    rewards = torch.tensor([[[0.2, 0.9, 0.5], [0.4, 0.5, 0.5], [0.6, 0.1, 1.0]]])
    expected = torch.tensor([[-1.654701, -1.154701, 2.809401]])
    torch.testing.assert_close(cgdpo(rewards, WEIGHTS, eps=0.0, whiten=False), expected)


def test_golden_whitening_and_eps():
    # One reward, two groups. Group 1: 0, 1 -> mean 0.5, std 0.707107; eps 0.1 -> ±0.5 / 0.807107 = ±0.619497
    # Group 2: 0.5, 0.5 is constant -> 0, 0.
    # Batch: -0.619497, 0.619497, 0, 0: mean 0, std sqrt(2 * 0.383776 / 3) = 0.505817
    # Whitened: ±0.619497 / (0.505817 + 0.1) = ±1.022582
    rewards = torch.tensor([[0.0, 1.0], [0.5, 0.5]])[..., None]
    expected = torch.tensor([[-1.022582, 1.022582], [0.0, 0.0]])
    torch.testing.assert_close(cgdpo(rewards, torch.ones(1), eps=0.1), expected)


def test_golden_missing_reward():
    # Precision 0, missing, 1: over the two that are there mean 0.5, std 0.707107 -> -0.707107, -, 0.707107
    # Recall 0, 1, missing:    -0.707107, 0.707107, -
    # Sums: -1.414214, 0.707107, 0.707107; the last rollout misses both: 0.
    rewards = torch.tensor([[[0.0, 0.0], [NAN, 1.0], [1.0, NAN], [NAN, NAN]]])
    expected = torch.tensor([[-1.414214, 0.707107, 0.707107, 0.0]])
    torch.testing.assert_close(cgdpo(rewards, torch.ones(2), eps=0.0, whiten=False), expected)
    # Whitening over the three scored ones: mean 0, std sqrt((2 + 0.5 + 0.5) / 2) = 1.224745
    # -> -1.154701, 0.577350, 0.577350; the fourth stays exactly 0 and is not counted.
    whitened = cgdpo(rewards, torch.ones(2), eps=0.0)
    torch.testing.assert_close(whitened, torch.tensor([[-1.154701, 0.577350, 0.577350, 0.0]]))
    assert whitened[0, 3] == 0


def test_constant_reward_is_exactly_zero_for_every_group_size():
    for G in range(2, 17):
        rewards = torch.full((2, G, 3), 0.7)  # a constant whose float32 mean misses it for some G
        for eps in (1e-4, 0.0):
            assert (cgdpo(rewards, WEIGHTS, eps=eps, whiten=False) == 0).all()
            assert (cgdpo(rewards, WEIGHTS, eps=eps) == 0).all()
        others = make_rewards(G, G=G, K=2)
        with_constant = torch.cat([others, torch.full((3, G, 1), 0.7)], dim=-1)
        assert torch.equal(cgdpo(with_constant, WEIGHTS), cgdpo(others, WEIGHTS[:2]))


def test_single_value_in_a_group_contributes_nothing():
    rewards = torch.tensor([[[0.1, 0.4], [0.9, NAN], [0.5, NAN]]])
    alone = cgdpo(rewards[..., :1], torch.ones(1), whiten=False)
    assert torch.equal(cgdpo(rewards, torch.ones(2), whiten=False), alone)


@pytest.mark.parametrize("whiten", [True, False])
def test_a_single_rollout_or_nothing_at_all_is_zero(whiten):
    assert (cgdpo(torch.rand(3, 1, 3), WEIGHTS, whiten=whiten) == 0).all()
    assert (cgdpo(torch.full((2, 4, 3), NAN), WEIGHTS, whiten=whiten) == 0).all()


def test_reward_of_weight_zero_is_ignored_even_when_missing():
    rewards = make_rewards(0)
    expected = cgdpo(rewards[..., :2], torch.tensor([1.0, 2.0]))
    plain = cgdpo(rewards[..., :2], torch.tensor([1.0, 2.0]), whiten=False)
    rewards[:, 1, 2] = NAN
    assert torch.equal(cgdpo(rewards, torch.tensor([1.0, 2.0, 0.0]), whiten=False), plain)
    assert torch.equal(cgdpo(rewards, torch.tensor([1.0, 2.0, 0.0])), expected)
    # A rollout that has only the ignored reward is not scored: 0, and outside the whitening.
    rewards[0, 0, :2] = NAN
    rewards[0, 0, 2] = 0.3
    assert cgdpo(rewards, torch.tensor([1.0, 2.0, 0.0]))[0, 0] == 0
    assert (cgdpo(rewards, torch.zeros(3)) == 0).all()


def test_low_precision_rewards_are_normalised_in_float32():
    rewards = make_rewards(1).bfloat16()
    advantages = cgdpo(rewards, WEIGHTS)
    assert advantages.dtype == torch.float32
    assert torch.equal(advantages, cgdpo(rewards.float(), WEIGHTS))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weights \[K\]"):
        cgdpo(torch.rand(2, 4, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"\[B, G, K\]"):
        cgdpo(torch.rand(4, 3), torch.ones(3))


@many
@given(seeds, shapes, st.sampled_from([0.0, 0.3]))
def test_zero_mean(seed, shape, missing):
    rewards = make_rewards(seed, *shape, missing=missing)
    weights = torch.ones(shape[2])
    groups = cgdpo(rewards, weights, whiten=False).mean(dim=1)
    torch.testing.assert_close(groups, torch.zeros_like(groups), atol=1e-4, rtol=0)
    assert abs(cgdpo(rewards, weights).mean()) < 1e-4


@many
@given(seeds, shapes, st.sampled_from([0.0, 0.3]), st.booleans())
def test_permutation_of_rollouts_groups_and_rewards(seed, shape, missing, whiten):
    B, G, K = shape
    rewards = make_rewards(seed, *shape, missing=missing).double()
    weights = torch.rand(K, generator=torch.Generator().manual_seed(seed)).double()
    generator = torch.Generator().manual_seed(seed + 1)
    b, g, k = (torch.randperm(n, generator=generator) for n in (B, G, K))
    moved = cgdpo(rewards[b][:, g][..., k], weights[k], whiten=whiten)
    torch.testing.assert_close(moved, cgdpo(rewards, weights, whiten=whiten)[b][:, g], atol=1e-8, rtol=1e-8)


@many
@given(seeds, shapes, st.floats(0.05, 20), st.floats(-3, 3), st.sampled_from([0.0, 0.3]))
def test_scale_and_shift_of_one_reward(seed, shape, scale, shift, missing):
    rewards = make_rewards(seed, *shape, missing=missing).double()
    weights = torch.ones(shape[2])
    changed = rewards.clone()
    changed[..., 0] = changed[..., 0] * scale + shift
    kwargs = {"eps": 1e-12, "whiten": False}
    torch.testing.assert_close(
        cgdpo(changed, weights, **kwargs), cgdpo(rewards, weights, **kwargs), atol=1e-5, rtol=1e-5
    )


def test_what_eps_does_to_scale_invariance():
    # Group 0, 1: std 0.707107. Scaled by 0.001 the std is 7.07107e-4 and eps 1e-4 is no longer small:
    # 0.0005 / (0.000707107 + 0.0001) = 0.619497, against 0.5 / 0.707207 = 0.707007.
    rewards = torch.tensor([[0.0, 1.0]])[..., None]
    advantage = cgdpo(rewards, torch.ones(1), whiten=False)[0, 1]
    shrunk = cgdpo(rewards * 1e-3, torch.ones(1), whiten=False)[0, 1]
    assert advantage == pytest.approx(0.707007, abs=1e-6)
    assert shrunk == pytest.approx(0.619497, abs=1e-6)


@many
@given(seeds, st.tuples(st.integers(1, 4), st.integers(2, 9)), st.sampled_from([0.0, 0.3]))
def test_a_single_reward_is_grpo(seed, shape, missing):
    rewards = make_rewards(seed, *shape, 1, missing=missing)
    weight = torch.ones(1)
    assert torch.equal(cgdpo(rewards, weight, whiten=False), grpo(rewards, weight))


@many
@given(seeds, shapes, st.integers(1, 4), st.sampled_from([0.0, 0.3]))
def test_whitening_over_ranks_is_whitening_of_the_concatenation(seed, shape, ranks, missing):
    B, G, K = shape
    rewards = make_rewards(seed, ranks * B, G, K, missing=missing)
    weights = torch.ones(K)
    whole = cgdpo(rewards, weights).view(ranks, B, G)

    sent: list[torch.Tensor] = []
    for local in rewards.view(ranks, B, G, K):  # what each rank hands to the collective
        cgdpo(local, weights, all_gather=lambda tensor: sent.append(tensor) or tensor)
    assert len(sent) == ranks, "every rank joins the collective exactly once"
    for rank, local in enumerate(rewards.view(ranks, B, G, K)):
        mine = cgdpo(local, weights, all_gather=lambda tensor: torch.stack(sent))
        torch.testing.assert_close(mine, whole[rank], atol=1e-6, rtol=1e-6)


def test_a_rank_without_any_reward_still_joins_and_gets_zero():
    other = torch.tensor([[-1.0, 1.0]])
    calls: list[torch.Tensor] = []

    def all_gather(tensor):
        calls.append(tensor)
        return torch.stack([tensor, other])

    assert (cgdpo(torch.full((1, 2, 3), NAN), WEIGHTS, all_gather=all_gather) == 0).all()
    assert len(calls) == 1


def test_two_triples_of_equal_sum_differ_where_grpo_sees_none():
    # The reason for the method: 0.9 + 0.1 = 0.1 + 0.9 hides that precision spreads less than recall.
    rewards = torch.tensor([[[0.75, 0.25], [0.25, 0.75], [0.50, 0.50], [0.50, 0.00]]])
    summed = grpo(rewards, torch.ones(2))
    decoupled = cgdpo(rewards, torch.ones(2), whiten=False)
    assert summed[0, 0] == summed[0, 1]
    assert abs(decoupled[0, 0] - decoupled[0, 1]) > 0.05

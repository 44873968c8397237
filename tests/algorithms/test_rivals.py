"""CorrGRPO, GR³, QGLAS: what c-GDPO and the length mask are compared with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import GR3, QGLAS, CorrGRPO, corr_grpo, gr3, qglas

NAN = math.nan
many = settings(max_examples=60, deadline=None)


def test_corr_grpo_golden():
    # Reward 1: 0, 1, 2 around 1 -> -1, 0, 1; reward 2: 0.2, 0, 0.4 around 0.2 -> 0, -0.2, 0.2
    # correlation: (0 + 0 + 0.2) / (sqrt 2 * sqrt 0.08) = 0.2 / 0.4 = 0.5; sum of all four: 1 + 1 + 2 * 0.5 = 3
    # sums with weights 1, 2: -1, -0.4, 1.4; divided by sqrt 3 + 0.1 = 1.832051
    rewards = torch.tensor([[[0.0, 0.2], [1.0, 0.0], [2.0, 0.4]]])
    expected = torch.tensor([[-1.0, -0.4, 1.4]]) / 1.832051
    torch.testing.assert_close(corr_grpo(rewards, torch.tensor([1.0, 2.0]), eps=0.1), expected)


def test_corr_grpo_divides_equal_rewards_by_their_number():
    one = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(0))
    twice = corr_grpo(one.expand(-1, -1, 2), torch.ones(2), eps=0.0)
    torch.testing.assert_close(twice, corr_grpo(one, torch.ones(1), eps=0.0))


def test_corr_grpo_leaves_out_what_is_missing_or_constant():
    rewards = torch.tensor(
        [[[0.2, 0.7], [0.9, NAN], [0.6, 0.7]]]
    )  # the second reward is constant where complete
    # the first around 0.4: -0.2, 0.2; one correlation: 1
    torch.testing.assert_close(corr_grpo(rewards, torch.ones(2), eps=0.0), torch.tensor([[-0.2, 0.0, 0.2]]))
    assert (corr_grpo(torch.full((1, 4, 2), 0.3), torch.ones(2), eps=1e-4) == 0).all()
    assert (corr_grpo(torch.tensor([[[0.1, 0.2], [NAN, 0.4]]]), torch.ones(2)) == 0).all()
    assert (corr_grpo(rewards, torch.zeros(2)) == 0).all()


@many
@given(st.integers(0, 2**31), st.integers(2, 8), st.integers(1, 4))
def test_corr_grpo_against_numpy(seed, G, K):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(2, G, K, generator=generator).double()
    rewards[torch.rand(2, G, K, generator=generator) < 0.1] = NAN
    weights = torch.rand(K, generator=generator).double() + 0.1
    found = corr_grpo(rewards, weights)
    for group, of_group in zip(rewards, found, strict=True):
        complete = ~group.isnan().any(-1)
        assert (of_group[~complete] == 0).all()
        if complete.sum() < 2:
            assert (of_group == 0).all()
            continue
        own = group[complete]
        total = torch.corrcoef(own.T).sum().clamp(min=0)
        if total < 1e-3:  # rewards that cancel: nothing but eps and roundings to divide by
            continue
        centred = ((own - own.mean(0)) * weights).sum(-1)
        torch.testing.assert_close(of_group[complete], centred / (total.sqrt() + 1e-4), rtol=1e-6, atol=1e-6)
        assert of_group.sum().abs() < 1e-6 * (1 + of_group.abs().max())


def test_gr3_golden():
    # lengths 10, 30: mean 20; 1 + 0.5 * 0.5 = 1.25 and 1 + 0.5 * 1.5 = 1.75
    rewards = torch.tensor([[[1.0, 0.5], [0.7, NAN]]])
    expected = torch.tensor([[[0.8, 0.4], [0.4, NAN]]])
    torch.testing.assert_close(gr3(rewards, torch.tensor([[10, 30]]), 0.5), expected, equal_nan=True)
    assert torch.equal(gr3(rewards, torch.tensor([[10, 30]]), 0.0).nan_to_num(), rewards.nan_to_num())
    assert torch.isfinite(gr3(torch.ones(1, 2, 1), torch.zeros(1, 2, dtype=torch.long))).all()
    assert GR3(-1.0).problems(["a"]) == ["model.reward_transforms: GR3's alpha: -1.0 must be at least 0"]


def test_qglas_golden():
    # Good: lengths 10, 30, 20: mean 20. (20 - 10) / 20 = 0.5 -> capped at 0.4: + 2 * 1; 30: none; 20: none
    # The bad one of length 5 gains nothing.
    advantages = torch.tensor([[0.5, 1.0, -1.0, 0.1]])
    found = qglas(advantages, torch.tensor([[10, 30, 5, 20]]), scale=2.0, cap=0.4)
    torch.testing.assert_close(found, torch.tensor([[2.5, 1.0, -1.0, 0.1]]))
    # with a cap of 1 the gain is in proportion: 2 * 0.5
    found = qglas(advantages, torch.tensor([[10, 30, 5, 20]]), scale=2.0, cap=1.0)
    torch.testing.assert_close(found, torch.tensor([[1.5, 1.0, -1.0, 0.1]]))


@many
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_qglas_never_lowers_and_changes_no_sign(seed, G):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(3, G, generator=generator)
    lengths = torch.randint(0, 50, (3, G), generator=generator)
    found = qglas(advantages, lengths)
    assert (found >= advantages).all()
    assert torch.equal(found.sign(), advantages.sign())
    assert torch.equal(found[advantages <= 0], advantages[advantages <= 0])


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="cap > 0"):
        QGLAS(cap=0.0)
    with pytest.raises(ValueError, match="one advantage per caption"):
        qglas(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))
    assert CorrGRPO(0.0).problems() == ["model.advantage.init_args.eps: 0.0 must be above 0"]

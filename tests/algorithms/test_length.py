"""The length-conditional mask and the linear penalty."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import length_mask, length_ratio, linear_length_penalty, within_length_bounds

NAN = math.nan


def test_gate_golden():
    # Reference 10: lengths 4, 5, 20, 21 are ρ = 0.4, 0.5, 2.0, 2.1; [0.5, 2] keeps the middle two.
    lengths = torch.tensor([[4, 5, 20, 21]])
    rewards = torch.full((1, 4, 3), 0.6)
    shaped = length_mask(rewards, lengths, torch.tensor([10]), 0.5, 2.0, index=2)
    assert torch.equal(shaped[0, :, 2], torch.tensor([0.0, 0.6, 0.6, 0.0]))
    assert torch.equal(shaped[..., :2], rewards[..., :2])
    assert (rewards == 0.6).all(), "the argument is left alone"


def test_missing_stays_missing_inside_and_outside():
    rewards = torch.tensor([[[NAN], [NAN]]])
    shaped = length_mask(rewards, torch.tensor([[10, 100]]), torch.tensor([10]), 0.5, 2.0, index=0)
    assert shaped.isnan().all()


def test_reference_without_tokens_gates_nothing():
    lengths, references = torch.tensor([[1, 500], [1, 500]]), torch.tensor([0, 10])
    assert length_ratio(lengths, references).isnan().tolist() == [[True, True], [False, False]]
    assert within_length_bounds(lengths, references, 0.5, 2.0).tolist() == [[True, True], [False, False]]
    rewards = torch.ones(2, 2, 1)
    assert (linear_length_penalty(rewards, lengths, references, index=0)[0] == 1).all()


def test_empty_caption_is_outside_unless_everything_short_is_inside():
    lengths, references = torch.tensor([[0]]), torch.tensor([10])
    assert not within_length_bounds(lengths, references, 0.5, 2.0).item()
    assert within_length_bounds(lengths, references, 0.0, math.inf).item()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(0, 400), st.integers(0, 400))
def test_bounds_are_exact_for_decimal_bounds(length, reference, low, width):
    low_exact, high_exact = Fraction(low, 100), Fraction(low + width, 100)
    inside = low_exact <= Fraction(length, reference) <= high_exact
    mask = within_length_bounds(
        torch.tensor([[length]]), torch.tensor([reference]), float(low_exact), float(high_exact)
    )
    assert mask.item() == inside


def test_a_ratio_that_equals_a_bound_is_inside():
    hundredths = torch.arange(1, 301)
    for reference in (100, 300, 700):
        ratios = length_ratio((hundredths * reference // 100)[:, None], torch.full((300,), reference))[:, 0]
        assert ratios.tolist() == [h / 100 for h in range(1, 301)]  # as a user writes the bound
        assert within_length_bounds(torch.tensor([[reference]]), torch.tensor([reference]), 1.0, 1.0).item()


def test_the_penalty_takes_all_of_the_reward_at_twice_the_length_unless_told_otherwise():
    rewards, references = torch.full((1, 3, 1), 1.0), torch.tensor([10])
    lowered = linear_length_penalty(rewards, torch.tensor([[10, 15, 20]]), references, index=0)
    torch.testing.assert_close(lowered[0, :, 0], torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize(("low", "high"), [(2.0, 0.5), (-0.1, 1.0), (NAN, 1.0)])
def test_impossible_bounds_are_refused(low, high):
    with pytest.raises(ValueError, match="tau_low"):
        within_length_bounds(torch.tensor([[1]]), torch.tensor([1]), low, high)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"reference_lengths \[B\]"):
        length_ratio(torch.ones(2, 3), torch.ones(3))


def test_linear_penalty_golden():
    # Reference 10, slope 0.5: ρ = 1 loses 0; 0.5 loses 0.25; 1.4 loses 0.2; 4 loses 1.5, clamped at 0.
    lengths = torch.tensor([[10, 5, 14, 40]])
    rewards = torch.full((1, 4, 2), 0.8)
    penalised = linear_length_penalty(rewards, lengths, torch.tensor([10]), index=1, slope=0.5)
    torch.testing.assert_close(penalised[0, :, 1], torch.tensor([0.8, 0.55, 0.6, 0.0]))
    assert torch.equal(penalised[..., 0], rewards[..., 0])


def test_linear_penalty_keeps_missing_and_refuses_a_bonus():
    rewards = torch.tensor([[[NAN]]])
    assert linear_length_penalty(rewards, torch.tensor([[5]]), torch.tensor([10]), index=0).isnan().all()
    with pytest.raises(ValueError, match="slope"):
        linear_length_penalty(rewards, torch.tensor([[5]]), torch.tensor([10]), index=0, slope=-1)

"""Weights that move towards the reward that lags."""

import pytest

from callbacks.balance_weights import BalanceWeights, balanced_weights


def test_the_reward_that_lags_gains_and_the_sum_stays():
    weights = {"precision": 1.0, "recall": 1.0, "linguistic": 2.0}
    levels = {"precision": 0.6, "recall": 0.2, "linguistic": 0.9}
    # s = (0.6 + 0.2 + 2 * 0.9) / 4 = 0.65; 1 + 0.5 * 0.05, 1 + 0.5 * 0.45, 2 (1 - 0.5 * 0.25)
    moved = balanced_weights(weights, levels, 0.5)
    assert moved == pytest.approx({"precision": 1.025, "recall": 1.225, "linguistic": 1.75})
    assert sum(moved.values()) == pytest.approx(4.0)
    assert list(moved) == list(weights)


def test_weights_stay_within_their_bounds_at_the_extremes():
    # s = 0.1; the two factors are 1 - 0.9 and 1 + 0.1
    moved = balanced_weights({"a": 0.1, "b": 0.9}, {"a": 1.0, "b": 0.0}, 1.0)
    assert moved == pytest.approx({"a": 0.01, "b": 0.99})


def test_weights_without_a_level_or_of_0_stay():
    weights = {"a": 1.0, "b": 0.0, "c": 2.0}
    assert balanced_weights(weights, {}, 1.0) == weights
    assert balanced_weights(weights, {"a": 0.3, "b": 0.9}, 1.0) == weights  # a alone lags behind nobody
    assert balanced_weights(weights, {"a": 0.4, "b": 0.0, "c": 0.4}, 1.0) == pytest.approx(weights)


def test_levels_are_moving_averages_that_go_on_from_a_state():
    weights = BalanceWeights(smoothing=0.75)
    weights.observe({"a": 0.8, "b": 0.4})
    weights.observe({"a": 0.4})  # 0.75 * 0.8 + 0.25 * 0.4; b is missing in this step
    assert weights.levels == pytest.approx({"a": 0.7, "b": 0.4})
    resumed = BalanceWeights(smoothing=0.75)
    resumed.load_state_dict(weights.state_dict())
    for one in (weights, resumed):
        one.observe({"a": 0.1, "b": 0.2})
    assert resumed.levels == weights.levels


def test_every_setting_that_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"BalanceWeights\.strength: 0.0") as error:
        BalanceWeights(strength=0.0, smoothing=1.0)
    assert "BalanceWeights.smoothing: 1.0" in str(error.value)

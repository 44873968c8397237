"""Scores against numbers worked out by hand, and what happens to missing ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from balcap.judge import Judgments, Rating, Verdict
from balcap.rewards import (
    BCapScore,
    Linguistic,
    Precision,
    Recall,
    Reward,
    b_capscore,
    score_linguistic,
    score_precision,
    score_recall,
)

NAN = math.nan
BOTH, UNPOINTABLE, FALSE = Verdict(True, True), Verdict(True, False), Verdict(False, True)
REWARDS = [Precision, Recall, Linguistic, BCapScore]


def judgments(verify=((None,),), match=((None,),), rate=((None,),)) -> Judgments:
    return Judgments({"verify": verify, "match": match, "rate": rate}, units=[None] * len(verify))


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), equal_nan=True)


def test_precision_by_hand():
    # four assertions: two true and pointable, one true only, one false: 2/4 and (2 + 1)/4
    verdicts = [BOTH, UNPOINTABLE, FALSE, BOTH]
    assert score_precision(verdicts) == 0.5
    assert score_precision(verdicts, pointable=False) == 0.75


def test_a_caption_that_asserts_nothing_has_no_precision():
    assert score_precision([]) == 0.0


def test_recall_by_hand():
    assert score_recall([True, False, True, True]) == 0.75  # 3 of 4 units
    assert score_recall([False]) == 0.0
    assert math.isnan(score_recall([]))


def test_linguistic_by_hand():
    assert score_linguistic(Rating(0.9, 0.6, 0.3)) == pytest.approx(0.6)  # 1.8 / 3


def test_b_capscore_by_hand():
    # 3 / (1/0.5 + 1/0.25 + 1/1) = 3 / 7; equal parts give themselves; a 0 gives 0; a missing part is missing
    score = b_capscore(
        torch.tensor([0.5, 0.4, 0.0, NAN, NAN]),
        torch.tensor([0.25, 0.4, 1.0, 0.5, 0.0]),
        torch.tensor([1.0, 0.4, 1.0, 0.5, 0.0]),
    )
    close(score, [3 / 7, 0.4, 0.0, NAN, NAN])


unit = st.floats(0, 1, width=32)


@given(unit, unit, unit)
def test_b_capscore_lies_between_its_parts(p, r, l):  # noqa: E741
    score = b_capscore(torch.tensor(p), torch.tensor(r), torch.tensor(l)).item()
    assert min(p, r, l) - 1e-6 <= score <= max(p, r, l) + 1e-6
    assert score == pytest.approx(b_capscore(*torch.tensor([l, p, r])).item(), abs=1e-6)


def test_mean_of_scores_and_score_of_means_differ():
    # captions (1, 1, 1) and (0.5, 0.5, 0.25): 1 and 3 / (2 + 2 + 4) = 0.375, mean 0.6875
    # means (0.75, 0.75, 0.625): 3 / (4/3 + 4/3 + 8/5) = 3 / (64/15) = 0.703125
    both = judgments(
        verify=[[[BOTH], [BOTH, FALSE]]],
        match=[[[True], [True, False]]],
        rate=[[Rating(1, 1, 1), Rating(0.25, 0.25, 0.25)]],
    )
    metric, parts = BCapScore(), [Precision(), Recall(), Linguistic()]
    close(metric(None, both), [[1.0, 0.375]])
    assert metric.compute().item() == pytest.approx(0.6875)
    for part in parts:
        part.update(None, both)
    assert b_capscore(*(part.compute() for part in parts)).item() == pytest.approx(0.703125)


def test_b_capscore_counts_pointability_whatever_the_run_trains_on():
    said = judgments([[[UNPOINTABLE, BOTH]]], [[[True]]], [[Rating(1, 1, 1)]])
    close(Precision(pointable=False)(None, said), [[1.0]])
    close(BCapScore()(None, said), [[3 / (1 / 0.5 + 1 + 1)]])  # 0.75


def test_b_capscore_without_one_kind_of_judgment_is_missing():
    only = Judgments({"verify": [[[BOTH], [BOTH]]]}, units=[None])
    close(BCapScore()(None, only), [[NAN, NAN]])


def test_missing_is_nan_and_left_out_of_the_mean():
    precision = Precision()
    scores = precision(None, judgments(verify=[[[BOTH], None], [[FALSE, BOTH], [FALSE]]]))
    close(scores, [[1.0, NAN], [0.5, 0.0]])
    assert precision.compute().item() == pytest.approx(0.5)  # (1 + 0.5 + 0) / 3
    assert precision._forward_cache.item() == pytest.approx(0.5)
    precision.update(None, judgments(verify=[[[BOTH], None]]))
    assert precision.compute().item() == pytest.approx(0.625)  # (1 + 0.5 + 0 + 1) / 4
    precision.reset()
    precision.update(None, judgments(verify=[[None, None]]))
    assert precision.compute().isnan()


def test_a_reference_without_units_is_missing_for_its_group():
    recall = Recall()
    close(recall(None, judgments(match=[[[], []], [[True, False], [True, True]]])), [[NAN, NAN], [0.5, 1.0]])
    assert recall.compute().item() == pytest.approx(0.75)


@pytest.mark.parametrize("make", REWARDS)
def test_every_reward_is_a_metric_that_sums_over_ranks(make):
    reward = make()
    assert isinstance(reward, Reward)
    assert reward.higher_is_better is True
    assert {name: reduce.__name__ for name, reduce in reward._reductions.items()} == {
        "total": "dim_zero_sum",
        "count": "dim_zero_sum",
    }
    assert reward(None, judgments()).isnan().all()
    assert reward(None, judgments()).dtype == torch.float32


def test_two_ranks_together():
    # what synchronisation does: sum the states. Rank 0: 1 score of 1; rank 1: 3 scores of 0: mean 1/4
    ranks = [Precision(), Precision()]
    ranks[0].update(None, judgments(verify=[[[BOTH], None]]))
    ranks[1].update(None, judgments(verify=[[[FALSE], [FALSE], [FALSE]]]))
    gathered = {
        name: torch.stack([getattr(rank, name) for rank in ranks]).sum(0) for name in ("total", "count")
    }
    both = copy.deepcopy(ranks[0])
    both.total, both.count = gathered["total"], gathered["count"]
    assert both.compute().item() == pytest.approx(0.25)


def test_forward_while_synchronised_is_refused():
    reward = Precision()
    reward._is_synced = True
    with pytest.raises(TorchMetricsUserError, match="unsync"):
        reward(None, judgments())


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), st.randoms())
def test_precision_ignores_order_and_never_grows_by_pointability(pairs, random):
    verdicts = [Verdict(*pair) for pair in pairs]
    shuffled = random.sample(verdicts, len(verdicts))
    assert score_precision(shuffled) == score_precision(verdicts)
    assert 0 <= score_precision(verdicts) <= score_precision(verdicts, pointable=False) <= 1

"""Means over micro-batches and ranks, missing values left out."""

from __future__ import annotations

import math

import pytest
import torch

from balcap.trainer.tally import Tally


def test_missing_values_are_left_out_and_nothing_is_nan() -> None:
    tally = Tally()
    tally.add_values("recall", torch.tensor([[0.5, torch.nan], [1.0, 0.0]]))
    tally.add_values("precision", torch.tensor([torch.nan]))
    means = tally.means()
    assert means["recall"] == pytest.approx(0.5)  # (0.5 + 1 + 0) / 3
    assert math.isnan(means["precision"])


def test_ranks_weigh_by_their_counts() -> None:
    one, two = Tally(), Tally()
    one.add("kl", 3.0, 1)
    two.add("kl", 1.0, 3)
    others: list[torch.Tensor] = []
    two.means(lambda t: others.append(t) or t)
    assert one.means(lambda t: torch.stack([t, others[0]]))["kl"] == pytest.approx(1.0)  # (3 + 1) / (1 + 3)


def test_pieces_add_up() -> None:
    tally = Tally()
    tally.add("loss", 1.0, 0.5)
    tally.add("loss", 2.0, 0.5)
    assert tally.means() == {"loss": pytest.approx(3.0)}
    assert Tally().means() == {}

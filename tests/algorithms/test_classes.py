"""What a YAML names is thin: each class is its function with its settings, and says what is wrong with them."""

from __future__ import annotations

from inspect import signature
from types import SimpleNamespace

import pytest
import torch

from balcap.algorithms import (
    CGDPO,
    GRPO,
    LengthMask,
    LinearLengthPenalty,
    cgdpo,
    grpo,
    length_mask,
    linear_length_penalty,
)

NAMES = ("precision", "linguistic", "recall")
REWARDS = torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])
ROLLOUTS = SimpleNamespace(
    lengths=torch.tensor([[4, 5, 20, 21], [9, 10, 11, 12], [30, 1, 5, 20]]),
    reference_lengths=torch.tensor([10, 10, 10]),
)


def test_estimators_pass_their_settings_on() -> None:
    gathered: list[torch.Tensor] = []
    one = CGDPO(eps=0.3).advantages(REWARDS, WEIGHTS, lambda t: gathered.append(t) or t)
    assert torch.equal(one, cgdpo(REWARDS, WEIGHTS, 0.3))
    assert len(gathered) == 1
    assert torch.equal(
        CGDPO(whiten=False).advantages(REWARDS, WEIGHTS), cgdpo(REWARDS, WEIGHTS, whiten=False)
    )
    assert torch.equal(GRPO(eps=0.3).advantages(REWARDS, WEIGHTS), grpo(REWARDS, WEIGHTS, 0.3))
    for kind, function in (
        (CGDPO, cgdpo),
        (GRPO, grpo),
    ):  # a YAML that sets nothing gets the function's defaults
        for name, parameter in signature(kind).parameters.items():
            assert parameter.default == signature(function).parameters[name].default


def test_transforms_act_on_the_reward_that_they_name() -> None:
    lengths, references = ROLLOUTS.lengths, ROLLOUTS.reference_lengths
    before = REWARDS.clone()
    masked = LengthMask().transform(REWARDS, NAMES, ROLLOUTS)
    assert torch.equal(masked, length_mask(REWARDS, lengths, references, 0.5, 2.0, index=1))
    masked = LengthMask(0.2, 1.0, reward="recall").transform(REWARDS, NAMES, ROLLOUTS)
    assert torch.equal(masked, length_mask(REWARDS, lengths, references, 0.2, 1.0, index=2))
    lowered = LinearLengthPenalty(slope=0.25, reward="precision").transform(REWARDS, NAMES, ROLLOUTS)
    assert torch.equal(lowered, linear_length_penalty(REWARDS, lengths, references, 0, 0.25))
    lowered = LinearLengthPenalty().transform(REWARDS, NAMES, ROLLOUTS)
    assert torch.equal(lowered, linear_length_penalty(REWARDS, lengths, references, 1, 1.0))
    assert torch.equal(REWARDS, before)


@pytest.mark.parametrize(
    "right", [LengthMask(), LengthMask(0.0, 0.0), LengthMask(0.4), LinearLengthPenalty(0.0)]
)
def test_settings_that_work_are_not_refused(right) -> None:
    assert right.problems(NAMES) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (LengthMask(-0.1), ["LengthMask's tau_low: -0.1"]),
        (LengthMask(3.0), ["tau_high: 2.0"]),
        (LengthMask(float("nan")), ["tau_low: nan"]),
        (LinearLengthPenalty(-0.5), ["LinearLengthPenalty's slope: -0.5"]),
        (LinearLengthPenalty(float("inf")), ["slope: inf"]),
        (
            LengthMask(3.0, reward="beauty"),
            ["tau_low: 3.0", "'beauty'; there are precision, linguistic, recall"],
        ),
    ],
)
def test_every_problem_names_the_key(wrong, words) -> None:
    problems = wrong.problems(NAMES)
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert problem.startswith("model.reward_transforms: ")
        assert word in problem

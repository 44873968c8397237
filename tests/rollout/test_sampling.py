"""Settings of sampling: what is out of range is named by its key."""

from __future__ import annotations

import pytest

from balcap.rollout import RolloutEngine, Sampling
from balcap.rollout.hf import HFGenerate


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.01, 0.01, 1), Sampling(2.0, 1.0, 4096)])
def test_sound_sampling_has_no_problems(sampling: Sampling):
    assert sampling.problems() == []


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        (Sampling(temperature=0.0), "temperature: 0.0 must be above 0"),
        (Sampling(temperature=-1.0), "temperature: -1.0 must be above 0"),
        (Sampling(top_p=0.0), "top_p: 0.0 is outside (0, 1]"),
        (Sampling(top_p=1.1), "top_p: 1.1 is outside (0, 1]"),
        (Sampling(max_tokens=0), "max_tokens: 0 must be at least 1"),
    ],
)
def test_each_problem_names_its_key(sampling: Sampling, problem: str):
    (found,) = sampling.problems()
    assert found.startswith(f"model.sampling.{problem}")
    assert sampling.problems("here")[0].startswith(f"here.{problem}")


def test_all_problems_are_reported_together():
    assert len(Sampling(0.0, 2.0, -1).problems()) == 3


def test_hf_generate_is_a_rollout_engine():
    assert isinstance(HFGenerate(), RolloutEngine)
    assert not isinstance(object(), RolloutEngine)


def test_the_number_of_sequences_is_checked():
    with pytest.raises(ValueError, match=r"model\.engine\.init_args\.max_sequences: 0 must be at least 1"):
        HFGenerate(max_sequences=0)

"""The advantages of TRL, run from its installed source, against ours; and every place where they differ.

TRL computes advantages in the middle of one long method of `GRPOTrainer`. The statements from
``unscorable_mask = ...`` to ``advantages = torch.nan_to_num(...)`` are found in the installed file and
executed on the test's tensors: it is TRL's own code that runs, whichever 1.x is installed.
"""

import ast
import importlib.util
import math
from pathlib import Path
from types import CodeType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import cgdpo, grpo

NAN = math.nan
many = settings(max_examples=60, deadline=None)


def _source(module: str) -> ast.Module:
    """Syntax tree of a module of TRL, without importing it: the import alone takes many seconds."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed: no peer to compare advantages with", allow_module_level=True)
    return ast.parse(Path(spec.origin).with_name("trainer").joinpath(f"{module}.py").read_text())


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def _advantage_code() -> CodeType:
    body = _function(_source("grpo_trainer"), "_generate_and_score_completions").body

    def find(prefix: str) -> int:
        hits = [i for i, node in enumerate(body) if ast.unparse(node).startswith(prefix)]
        if len(hits) != 1:
            pytest.skip(f"this version of trl has no single statement {prefix!r}", allow_module_level=True)
        return hits[0]

    block = body[find("unscorable_mask =") : find("advantages = torch.nan_to_num(") + 1]
    return compile(ast.Module(block, type_ignores=[]), "trl/trainer/grpo_trainer.py", "exec")


TRL_ADVANTAGES = _advantage_code()
TRL_NANSTD = compile(
    ast.Module([_function(_source("utils"), "nanstd")], type_ignores=[]), "trl/trainer/utils.py", "exec"
)


def trl(rewards: torch.Tensor, weights: torch.Tensor, aggregation: str) -> torch.Tensor:
    """Advantages ``[B, G]`` by TRL's own statements; groups are rows of G completions there."""
    B, G, K = rewards.shape
    config = SimpleNamespace(
        multi_objective_aggregation=aggregation,
        scale_rewards="group",
        reward_weights=weights,
        reward_funcs=[None] * K,
    )
    names: dict = {"torch": torch}
    exec(TRL_NANSTD, names)
    names.update(
        self=config,
        device=rewards.device,
        num_generations=G,
        rewards_per_func=rewards.reshape(B * G, K).clone(),
    )
    exec(TRL_ADVANTAGES, names)
    return names["advantages"].view(B, G)


def trl_gdpo(rewards, weights):
    return trl(rewards, weights, "normalize_then_sum")


def trl_grpo(rewards, weights):
    return trl(rewards, weights, "sum_then_normalize")


def make_rewards(seed: int, B: int, G: int, K: int, missing: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(B, G, K, generator=generator)
    rewards[torch.rand(B, G, K, generator=generator) < missing] = NAN
    return rewards, torch.rand(K, generator=generator) + 0.1


@many
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 5), st.integers(2, 9), st.integers(1, 4)),
    st.sampled_from([0.0, 0.2, 0.6]),
)
def test_cgdpo_agrees_with_and_without_missing_rewards(seed, shape, missing):
    rewards, weights = make_rewards(seed, *shape, missing)
    ours = cgdpo(rewards, weights)
    # Where everything that is left is constant TRL divides a rounding by eps: another test.
    if (ours == 0).all():
        return
    torch.testing.assert_close(ours, trl_gdpo(rewards, weights), atol=2e-5, rtol=2e-5)


@many
@given(st.integers(0, 2**31), st.tuples(st.integers(1, 5), st.integers(2, 9), st.integers(1, 4)))
def test_grpo_agrees_where_every_rollout_is_complete_or_missing_altogether(seed, shape):
    rewards, weights = make_rewards(seed, *shape, 0.0)
    gone = torch.rand(shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.2
    rewards[gone] = NAN
    torch.testing.assert_close(grpo(rewards, weights), trl_grpo(rewards, weights), atol=2e-5, rtol=2e-5)


def test_agrees_on_groups_with_a_single_value():
    rewards, weights = make_rewards(0, 3, 4, 2, 0.0)
    rewards[1, 1:, 0] = NAN
    torch.testing.assert_close(cgdpo(rewards, weights), trl_gdpo(rewards, weights), atol=2e-5, rtol=2e-5)


def test_difference_constant_rewards_are_exactly_zero_here():
    largest = 0.0
    for G in range(2, 17):
        for constant in (0.1, 0.7, 1 / 3):
            rewards, weights = torch.full((3, G, 3), constant), torch.ones(3)
            assert (cgdpo(rewards, weights) == 0).all()
            assert (grpo(rewards, weights) == 0).all()
            largest = max(largest, trl_gdpo(rewards, weights).abs().max().item())
    assert 0 < largest < 1e-5, "TRL's eps of 1e-4 keeps the rounding small, but not 0"


def test_difference_a_constant_group_among_others():
    ours, theirs = 0.0, 0.0
    for G in range(2, 17):
        rewards, weights = make_rewards(G, 4, G, 1, 0.0)
        rewards[1] = 0.7
        ours = max(ours, cgdpo(rewards, weights)[1].abs().max().item())
        theirs = max(theirs, trl_gdpo(rewards, weights)[1].abs().max().item())
    assert ours < 1e-6, "what the mean of the batch misses 0 by"
    assert 1e-4 < theirs < 2e-3, "what the mean of the group misses 0.7 by, divided by eps"


def test_difference_whitening_population_leaves_out_rollouts_with_only_unweighted_rewards():
    rewards, _ = make_rewards(1, 3, 4, 2, 0.0)
    weights = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(cgdpo(rewards, weights), trl_gdpo(rewards, weights), atol=2e-5, rtol=2e-5)
    # Rollout (0, 0) keeps only the reward of weight 0. TRL counts it as scored, with a sum of 0, and the
    # 12 instead of 11 values lower the std of the batch; its own advantage is 0 up to rounding.
    rewards[0, 0, 0] = NAN
    ours, theirs = cgdpo(rewards, weights), trl_gdpo(rewards, weights)
    assert ours[0, 0] == 0
    scored = torch.ones(3, 4, dtype=torch.bool)
    scored[0, 0] = False
    ratio = (theirs / ours)[scored]
    # std over 12 values with one 0: sqrt(S / 11); over the 11: sqrt(S / 10). Ratio sqrt(11 / 10) = 1.0488.
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(1.1)), atol=1e-3, rtol=0)


def test_difference_grpo_leaves_out_an_incomplete_rollout_where_trl_counts_the_missing_reward_as_zero():
    rewards = torch.tensor([[[0.5, 0.5], [0.6, NAN], [0.5, 0.7]]])
    weights = torch.ones(2)
    ours, theirs = grpo(rewards, weights), trl_grpo(rewards, weights)
    assert ours[0, 1] == 0
    # TRL sums 1.0, 0.6, 1.2: the rollout whose judge failed is the worst of its group.
    assert theirs[0, 1] < -1


def test_difference_a_missing_reward_of_weight_zero_does_not_poison_grpo():
    rewards = torch.tensor([[[0.5, NAN], [0.6, 0.1], [0.9, NAN]]])
    weights = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(grpo(rewards, weights), trl_grpo(rewards, weights), atol=2e-5, rtol=2e-5)
    # The rollout that has only the unweighted reward: 0 here, a sum of 0 in TRL.
    rewards[0, 1, 0] = NAN
    assert grpo(rewards, weights)[0, 1] == 0
    assert trl_grpo(rewards, weights)[0, 1] < -0.5


@pytest.mark.parametrize("peer", [trl_gdpo, trl_grpo])
def test_a_rollout_without_any_reward_is_zero_in_both(peer):
    rewards, weights = make_rewards(2, 3, 4, 2, 0.0)
    rewards[1, 2] = NAN
    assert peer(rewards, weights)[1, 2] == 0
    assert cgdpo(rewards, weights)[1, 2] == 0
    assert grpo(rewards, weights)[1, 2] == 0

"""The clipped surrogate, the k3 estimate, and that pieces add up to the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import (
    aggregate,
    clipped_surrogate,
    kl_k3,
    loss_normalizer,
    policy_loss,
    truncated_importance,
)

MODES = ["token_mean", "sequence_mean"]
many = settings(max_examples=40, deadline=None)


def make_step(seed: int, B: int = 4, G: int = 3, T: int = 5):
    """Random log-probs, advantages and ragged captions, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, G, T, generator=generator) * 3
    old = logps + torch.randn(B, G, T, generator=generator) * 0.3
    ref = logps + torch.randn(B, G, T, generator=generator) * 0.3
    advantages = torch.randn(B, G, generator=generator)
    lengths = torch.randint(0, T + 1, (B, G, 1), generator=generator)
    return logps, old, ref, advantages, torch.arange(T) < lengths


def test_surrogate_golden():
    # Ratios 1.5, 0.5, 1.1 and clip range [0.8, 1.3].
    # A = 2:  min(3.0, 2.6) = 2.6, clipped; min(1.0, 1.6) = 1.0; min(2.2, 2.2) = 2.2
    # A = -2: min(-3.0, -2.6) = -3.0;       min(-1.0, -1.6) = -1.6, clipped; -2.2
    ratios = torch.tensor([1.5, 0.5, 1.1])
    logps = ratios.log().expand(1, 2, 3)
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    loss, clipped = clipped_surrogate(
        logps, torch.zeros(1, 2, 3), torch.tensor([[2.0, -2.0]]), mask, clip_eps_low=0.2, clip_eps_high=0.3
    )
    torch.testing.assert_close(loss, torch.tensor([[[-2.6, -1.0, -2.2], [3.0, 1.6, 2.2]]]))
    assert clipped.tolist() == [[[True, False, False], [False, True, False]]]


def test_small_advantages_are_clipped_by_their_sign_at_the_paper_s_range():
    # Ratios 1.25 and 0.75 with the default range [0.8, 1.2]: only the side that would pay on is cut.
    logps = torch.tensor([1.25, 0.75]).log().expand(1, 3, 2)
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    advantages = torch.tensor([[0.5, -0.5, 0.0]])
    loss, clipped = clipped_surrogate(logps, torch.zeros(1, 3, 2), advantages, mask)
    torch.testing.assert_close(loss, torch.tensor([[[-0.6, -0.375], [0.625, 0.4], [0.0, 0.0]]]))
    assert clipped.tolist() == [[[True, False], [False, True], [False, False]]]
    hidden = clipped_surrogate(logps, torch.zeros(1, 3, 2), advantages, torch.zeros_like(mask))
    assert (hidden[0] == 0).all()
    assert policy_loss(logps, torch.zeros(1, 3, 2), advantages, mask).clipped == 2


def test_log_ratios_are_limited_to_20():
    logps = torch.tensor([[[20.5, 19.5]]])
    loss, _ = clipped_surrogate(
        logps, torch.zeros(1, 1, 2), torch.tensor([[-1.0]]), torch.ones(1, 1, 2).bool()
    )
    torch.testing.assert_close(loss, torch.tensor([[[20.0, 19.5]]]).exp())


def test_one_advantage_per_token_is_taken_as_it_is():
    logps, old, _, advantages, mask = make_step(0)
    shared = clipped_surrogate(logps, old, advantages, mask)
    spread = clipped_surrogate(logps, old, advantages[..., None].expand_as(logps), mask)
    assert torch.equal(shared[0], spread[0])
    assert torch.equal(shared[1], spread[1])
    only = torch.zeros_like(logps)
    only[..., 1] = 1.0
    loss, _ = clipped_surrogate(logps, logps, only, torch.ones_like(mask))
    assert torch.equal(loss, -only)


def test_clipped_tokens_have_no_gradient_and_the_others_have():
    logps = torch.tensor([1.5, 0.5, 1.1]).log().repeat(1, 2, 1).requires_grad_()
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    loss, clipped = clipped_surrogate(logps, torch.zeros(1, 2, 3), torch.tensor([[2.0, -2.0]]), mask)
    loss.sum().backward()
    assert logps.grad is not None
    assert torch.equal(logps.grad == 0, clipped)
    # d(-ratio A) / d logp = -ratio A: -0.5 * 2 = -1 for the second token of the first rollout.
    assert logps.grad[0, 0, 1].item() == pytest.approx(-1.0)


def test_on_policy_loss_is_minus_the_advantage_with_the_policy_gradient():
    logps = torch.full((1, 2, 3), -1.0, requires_grad=True)
    advantages = torch.tensor([[1.5, -0.5]])
    loss, clipped = clipped_surrogate(
        logps, logps.detach(), advantages, torch.ones(1, 2, 3, dtype=torch.bool)
    )
    loss.sum().backward()
    assert torch.equal(loss.detach(), -advantages[..., None].expand(1, 2, 3))
    assert torch.equal(logps.grad, -advantages[..., None].expand(1, 2, 3))
    assert not clipped.any()


def test_k3_golden():
    # ref - logp = ln 2: 2 - 0.693147 - 1 = 0.306853; -ln 2: 0.5 + 0.693147 - 1 = 0.193147; equal: 0
    logps = torch.tensor([[[-2.0, -2.0, -2.0]]])
    ref = logps + torch.tensor([math.log(2), -math.log(2), 0.0])
    torch.testing.assert_close(kl_k3(logps, ref), torch.tensor([[[0.306853, 0.193147, 0.0]]]))


def test_k3_is_unbiased_for_the_reverse_kl():
    # Over a whole vocabulary the expectation under the policy is KL(policy || reference) itself.
    policy = torch.randn(7, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    reference = torch.randn(7, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    expected = (policy.exp() * (policy - reference)).sum()
    estimate = (policy.exp() * kl_k3(policy.view(1, 1, 7), reference.view(1, 1, 7))).sum()
    torch.testing.assert_close(estimate, expected)


@many
@given(st.integers(0, 2**31), st.sampled_from([1e-4, 1.0, 30.0]))
def test_k3_is_never_negative_or_infinite(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logps, ref = -torch.rand(2, 2, 3, 4, generator=generator) * scale
    kl = kl_k3(logps, ref)
    assert (kl >= 0).all()
    assert kl.isfinite().all()


@pytest.mark.parametrize(("mode", "expected"), [("token_mean", 3.75), ("sequence_mean", 4.5)])
def test_aggregate_golden(mode, expected):
    # Caption 1 has tokens 1, 2, 6; caption 2 has 6; caption 3 has none.
    # Tokens: (1 + 2 + 6 + 6) / 4 = 3.75. Captions: (9 / 3 + 6 / 1) / 2 = 4.5; the empty one is not counted.
    per_token = torch.tensor([[[1.0, 2.0, 6.0], [6.0, 99.0, 99.0], [99.0, 99.0, 99.0]]])
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0], [0, 0, 0]]]).bool()
    assert aggregate(per_token, mask, mode).item() == pytest.approx(expected)


@many
@given(st.integers(0, 2**31), st.sampled_from(MODES), st.integers(1, 3))
def test_micro_batches_and_ranks_add_up_to_the_whole_step(seed, mode, size):
    logps, old, ref, advantages, mask = make_step(seed)
    kwargs = {"kl_coef": 0.1, "mode": mode}
    whole_logps = logps.clone().requires_grad_()
    whole = policy_loss(whole_logps, old, advantages, mask, ref, **kwargs)
    whole.loss.backward()

    normalizer = loss_normalizer(mask, mode)
    parts_logps = logps.clone().requires_grad_()
    pieces = [
        policy_loss(parts_logps[i], old[i], advantages[i], mask[i], ref[i], normalizer=normalizer, **kwargs)
        for i in torch.arange(len(logps)).split(size)
    ]
    total = torch.stack([piece.loss for piece in pieces]).sum()
    total.backward()
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(parts_logps.grad, whole_logps.grad)
    for name in ("tokens", "clipped", "kl"):
        torch.testing.assert_close(sum(getattr(piece, name) for piece in pieces), getattr(whole, name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_positions_reach_neither_loss_nor_gradient(mode, garbage):
    logps, old, ref, advantages, mask = make_step(3)
    clean = logps.clone().requires_grad_()
    expected = policy_loss(clean, old, advantages, mask, ref, kl_coef=0.1, mode=mode)
    expected.loss.backward()

    dirty = logps.masked_fill(~mask, garbage).requires_grad_()
    result = policy_loss(
        dirty,
        old.masked_fill(~mask, garbage),
        advantages,
        mask,
        ref.masked_fill(~mask, garbage),
        0.1,
        mode=mode,
    )
    result.loss.backward()
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(dirty.grad, clean.grad)
    assert torch.equal(result.kl, expected.kl)


@pytest.mark.parametrize("mode", MODES)
def test_step_of_empty_captions_is_zero_not_nan(mode):
    logps, old, ref, advantages, mask = make_step(4)
    logps.requires_grad_()
    result = policy_loss(logps, old, advantages, torch.zeros_like(mask), ref, kl_coef=0.1, mode=mode)
    result.loss.backward()
    assert result.loss == result.tokens == result.clipped == result.kl == 0
    assert (logps.grad == 0).all()


def test_an_exploding_ratio_stays_finite_and_advantage_zero_stays_zero():
    logps = torch.full((1, 2, 1), 500.0, requires_grad=True)
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    result = policy_loss(
        logps, torch.zeros(1, 2, 1), torch.tensor([[0.0, -1.0]]), mask, torch.zeros(1, 2, 1), 0.1
    )
    result.loss.backward()
    assert result.loss.isfinite()
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logps_are_computed_in_float32(dtype):
    logps, old, ref, advantages, mask = make_step(5)
    low = [x.to(dtype) for x in (logps, old, ref)]
    result = policy_loss(low[0], low[1], advantages.to(dtype), mask, low[2], kl_coef=0.1)
    expected = policy_loss(
        low[0].float(), low[1].float(), advantages.to(dtype).float(), mask, low[2].float(), kl_coef=0.1
    )
    assert result.loss.dtype == torch.float32
    assert torch.equal(result.loss, expected.loss)


def test_normalizer_counts():
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0], [0, 0, 0]]]).bool()
    assert loss_normalizer(mask, "token_mean") == 4
    assert loss_normalizer(mask, "sequence_mean") == 2
    # A rank's share of the denominator may be below 1 and is then used as it is: 2 ranks, 1 token.
    one = torch.tensor([[[1, 0]]]).bool()
    assert aggregate(torch.ones(1, 1, 2), one, "token_mean", normalizer=0.5) == 2


def test_measured_but_not_paid_kl_leaves_the_loss_alone():
    logps, old, ref, advantages, mask = make_step(6)
    without = policy_loss(logps, old, advantages, mask)
    measured = policy_loss(logps, old, advantages, mask, ref, kl_coef=0.0)
    assert torch.equal(without.loss, measured.loss)
    assert without.kl is None
    assert measured.kl > 0


def test_kl_without_reference_names_the_key():
    logps, old, _, advantages, mask = make_step(7)
    with pytest.raises(ValueError, match="kl_coef"):
        policy_loss(logps, old, advantages, mask, kl_coef=0.1)


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match="sequence_mean"):
        loss_normalizer(torch.ones(1, 1, 1, dtype=torch.bool), "mean")  # type: ignore[arg-type]


# ---- truncated importance sampling


def test_importance_by_hand():
    logps = torch.log(torch.tensor([[[0.2, 0.5, 0.9]]]))
    sampler = torch.log(torch.tensor([[[0.4, 0.5, 0.1]]]))
    mask = torch.tensor([[[True, True, True]]])
    weights = truncated_importance(logps, sampler, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 1.0, 2.0]]]))
    assert truncated_importance(logps, sampler, mask & False, 2.0).tolist() == [[[1.0, 1.0, 1.0]]]
    assert not truncated_importance(logps.requires_grad_(), sampler, mask, 2.0).requires_grad


def test_importance_weighs_the_surrogate_and_not_the_kl():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 5)
    logps, ref = (-torch.rand(shape, generator=generator) for _ in range(2))
    advantages = torch.randn(shape[:2], generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.3
    weights = 2 * torch.rand(shape, generator=generator)
    weighted = policy_loss(logps, logps, advantages, mask, importance=weights).loss
    by_hand = -(weights * advantages[..., None] * mask).sum() / mask.sum()
    torch.testing.assert_close(weighted, by_hand)
    with_kl = policy_loss(logps, logps, advantages, mask, ref, kl_coef=0.3, importance=weights).loss
    torch.testing.assert_close(with_kl - weighted, 0.3 * kl_k3(logps, ref, mask).sum() / mask.sum())


def test_importance_makes_the_gradient_of_other_samples_that_of_ones_own():
    """Tokens drawn from q and weighed with p / q have, in expectation, the policy gradient under p."""
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    q = torch.tensor([0.5, 0.2, 0.3])
    reward = torch.tensor([1.0, -1.0, 0.5])
    p = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(p.exp() * reward).sum(), logits, retain_graph=True)
    total = torch.zeros(3)
    for token in range(3):
        logp = p[token].reshape(1, 1, 1)
        mask = torch.ones(1, 1, 1, dtype=torch.bool)
        weight = truncated_importance(logp, q[token].log().reshape(1, 1, 1), mask, cap=100.0)
        loss = policy_loss(logp, logp.detach(), reward[token].reshape(1, 1), mask, importance=weight).loss
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        total += q[token] * gradient
    torch.testing.assert_close(total, expected)

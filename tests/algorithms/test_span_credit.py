"""SpanCredit: only how a caption's advantage is spread over its tokens differs from c-GDPO."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap.algorithms import (
    CGDPO,
    SpanCredit,
    SpanPenalty,
    cgdpo,
    cgdpo_terms,
    span_credit,
    span_penalty,
)
from balcap.types import AssertionSpans

NAN = math.nan
many = settings(max_examples=60, deadline=None)
B, G, N, T, K = 2, 4, 5, 9, 3


def one_caption(*of: list[int]) -> torch.Tensor:
    """``[1, 1, N, 6]``: the tokens of each assertion."""
    return torch.tensor([[[[place in tokens for place in range(6)] for tokens in of]]])


def test_golden() -> None:
    # Tokens 0 and 1 come from a good assertion, 1 and 2 from a bad one: g = 1, 1/2, 0 on C = 3 tokens.
    tokens = one_caption([0, 1], [1, 2])
    verdicts = torch.tensor([[[[1.0, NAN], [0.0, NAN]]]])
    mask = torch.tensor([[[True] * 5 + [False]]])
    # A_1 = 1: q = g, its sum 1.5, f = q * 3 / 1.5 = 2, 1, 0; A = 1.5, kappa 0.5: 1.5 + 0.5 * 1 * (f - 1) = 2, 1.5, 1
    better = span_credit(
        torch.tensor([[1.5]]), torch.tensor([[[1.0, 0.5]]]), verdicts, tokens, mask, kappa=0.5
    )
    torch.testing.assert_close(better, torch.tensor([[[2.0, 1.5, 1.0, 1.5, 1.5, 0.0]]]))
    # A_1 = -2: q = 1 - g, f = 0, 1, 2; A = -1, kappa 1: -1 - 2 * (f - 1) = 1, -1, -3
    worse = span_credit(
        torch.tensor([[-1.0]]), torch.tensor([[[-2.0, 1.0]]]), verdicts, tokens, mask, kappa=1.0
    )
    torch.testing.assert_close(worse, torch.tensor([[[1.0, -1.0, -3.0, -1.0, -1.0, 0.0]]]))


def test_penalty_golden() -> None:
    verdicts = torch.tensor([[[[1.0, NAN], [0.0, NAN]]]])
    mask = torch.tensor([[[True] * 5 + [False]]])
    penalised = span_penalty(
        torch.tensor([[1.5]]), verdicts, one_caption([0, 1], [1, 2, 5]), mask, penalty=2.0
    )
    assert penalised.tolist() == [[[1.5, -0.5, -0.5, 1.5, 1.5, 0.0]]]


@pytest.mark.parametrize(
    ("term", "verdicts", "tokens"),
    [
        (1.0, [[1.0], [1.0]], ([0, 1], [1, 2])),  # all right
        (-1.0, [[0.0], [0.0]], ([0, 1], [1, 2])),  # all wrong
        (1.0, [[0.0], [0.0]], ([0, 1], [1, 2])),  # nobody earned it
        (1.0, [[1.0], [0.0]], ([], [])),  # no words
        (1.0, [[NAN], [NAN]], ([0, 1], [1, 2])),  # no verdicts
        (0.0, [[1.0], [0.0]], ([0, 1], [1, 2])),  # a constant group
        (1.0, [[1.0], [0.0]], ([5], [5])),  # words that were cut
    ],
)
def test_where_nothing_tells_tokens_apart_all_is_as_in_cgdpo(term, verdicts, tokens) -> None:
    mask = torch.tensor([[[True] * 5 + [False]]])
    told = torch.tensor([[verdicts]])
    spread = span_credit(
        torch.tensor([[0.7]]), torch.tensor([[[term]]]), told, one_caption(*tokens), mask, 1.0
    )
    assert torch.equal(spread, torch.where(mask, torch.tensor(0.7), 0.0))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    rewards = (random(B, G, K) * 4).round() / 4
    rewards[random(B, G, K) < 0.15] = NAN
    verdicts = random(B, G, N, K).round()
    verdicts[random(B, G, N, K) < 0.3] = NAN
    verdicts[..., 2] = NAN
    lengths = (random(B, G) * (T + 1)).long()
    advantages, terms = cgdpo_terms(rewards, torch.tensor([1.0, 0.5, 2.0]))
    return {
        "advantages": advantages,
        "terms": terms,
        "verdicts": verdicts,
        "tokens": random(B, G, N, T) < 0.25,
        "completion_mask": torch.arange(T) < lengths[..., None],
    }


@given(case=cases(), kappa=st.floats(0, 1))
@many
def test_a_captions_tokens_add_up_to_what_cgdpo_gives_it(case, kappa) -> None:
    spread, mask = span_credit(**case, kappa=kappa), case["completion_mask"]
    assert spread.shape == (B, G, T)
    assert (spread[~mask] == 0).all()
    expected = case["advantages"] * mask.sum(-1)
    torch.testing.assert_close(spread.sum(-1), expected, atol=1e-4, rtol=1e-4)


@given(case=cases())
@many
def test_kappa_0_is_cgdpo(case) -> None:
    expected = torch.where(case["completion_mask"], case["advantages"][..., None], 0.0)
    assert torch.equal(span_credit(**case, kappa=0.0), expected)


@given(case=cases(), order=st.permutations(range(N)))
@many
def test_the_order_of_assertions_does_not_matter(case, order) -> None:
    other = case | {"verdicts": case["verdicts"][:, :, order], "tokens": case["tokens"][:, :, order]}
    torch.testing.assert_close(span_credit(**case), span_credit(**other))


@given(case=cases())
@many
def test_good_tokens_never_get_less_than_bad_ones_nor_the_other_sign(case) -> None:
    terms = torch.zeros_like(case["terms"])
    terms[..., 0] = case["terms"][..., 0]
    alone = case | {"terms": terms, "advantages": terms[..., 0]}
    spread, verdicts = span_credit(**alone, kappa=1.0), case["verdicts"][..., 0]
    place = case["tokens"] & case["completion_mask"][:, :, None]
    only = {verdict: (place & (verdicts == verdict)[..., None]).any(2) for verdict in (0.0, 1.0)}
    good, bad = only[1.0] & ~only[0.0], only[0.0] & ~only[1.0]
    lowest = torch.where(good, spread, torch.inf).amin(-1)
    highest = torch.where(bad, spread, -torch.inf).amax(-1)
    assert (lowest >= highest - 1e-6).all()
    assert (spread * terms[..., :1] >= 0).all()
    mass = terms[..., 0].abs() * case["completion_mask"].sum(-1)
    torch.testing.assert_close(spread.abs().sum(-1), mass, atol=1e-4, rtol=1e-4)


def test_terms_add_up_to_advantages() -> None:
    rewards = torch.rand(3, 5, 3, generator=torch.Generator().manual_seed(0))
    rewards[0, 1] = rewards[1, 2, 0] = NAN
    rewards[2, :, 1] = 0.5
    weights = torch.tensor([1.0, 0.5, 0.0])
    for whiten in (True, False):
        advantages, terms = cgdpo_terms(rewards, weights, whiten=whiten)
        assert torch.equal(advantages, cgdpo(rewards, weights, whiten=whiten))
        torch.testing.assert_close(terms.sum(-1), advantages)
        assert (terms[..., 2] == 0).all()
        assert (terms[0, 1] == 0).all()
        assert (terms[2, :, 1] == 0).all()
    assert cgdpo_terms(torch.full((2, 3, 1), 0.5), torch.ones(1))[1].tolist() == [[[0.0]] * 3] * 2


def test_classes_pass_their_settings_on() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, weights = torch.rand(B, G, K, generator=generator), torch.tensor([1.0, 0.5, 0.0])
    verdicts = torch.rand(B, G, N, K, generator=generator).round()
    tokens = torch.rand(B, G, N, T, generator=generator) < 0.3
    spans = AssertionSpans(tokens, verdicts, torch.ones(B, G, T, dtype=torch.bool))
    gathered: list[torch.Tensor] = []
    spread = SpanCredit(0.25, eps=0.1).token_advantages(
        rewards, weights, spans, lambda t: gathered.append(t) or t
    )
    assert len(gathered) == 1
    expected = span_credit(*cgdpo_terms(rewards, weights, 0.1), verdicts, tokens, spans.completion_mask, 0.25)
    assert torch.equal(spread, expected)
    unjudged = replace(spans, verdicts=verdicts.index_fill(-1, torch.tensor([2]), NAN))  # it weighs nothing
    penalised = SpanPenalty(0.5).token_advantages(rewards, weights, spans)
    assert torch.equal(penalised, SpanPenalty(0.5).token_advantages(rewards, weights, unjudged))
    assert penalised.min() < cgdpo(rewards, weights).min()
    assert torch.equal(SpanCredit().advantages(rewards, weights), cgdpo(rewards, weights))
    with pytest.raises(NotImplementedError, match="CGDPO has no token_advantages"):
        CGDPO().token_advantages(rewards, weights, spans)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (SpanCredit(1.5), "kappa: 1.5 is outside"),
        (SpanCredit(NAN), "kappa: nan"),
        (SpanCredit(eps=0.0), "eps: 0.0"),
        (SpanPenalty(-1.0), "penalty: -1.0"),
    ],
)
def test_settings_that_cannot_work_are_named(wrong, words) -> None:
    (problem,) = wrong.problems()
    assert problem.startswith(f"model.advantage.init_args.{words}")
    assert SpanCredit().problems() == SpanPenalty(0.0).problems() == []

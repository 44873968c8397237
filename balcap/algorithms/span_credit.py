"""Credit per token: a caption's advantage goes to the words that earned it; not in the paper."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balcap.algorithms.base import AllGather
from balcap.algorithms.cgdpo import CGDPO, cgdpo_terms
from balcap.types import AssertionSpans

_KEY = "model.advantage.init_args"


class SpanCredit(CGDPO):
    """`span_credit` by ``class_path``, on the terms of `cgdpo`.

    Args:
        kappa: in [0, 1]: how much of the advantage of rewards that judge assertions goes by them.
        coverage: whether recall's goes by them, too: to those that cover units of the reference. The judge then names them
            (`balcap.judge.tasks.MatchSpans`).
        eps, whiten: of `cgdpo`.
    """

    needs_spans = True

    def __init__(
        self, kappa: float = 0.5, coverage: bool = False, eps: float = 1e-4, whiten: bool = True
    ) -> None:
        super().__init__(eps, whiten)
        self.kappa, self.needs_coverage = kappa, coverage

    def token_advantages(
        self, rewards: Tensor, weights: Tensor, spans: AssertionSpans, all_gather: AllGather | None = None
    ) -> Tensor:
        advantages, terms = cgdpo_terms(rewards, weights, self.eps, self.whiten, all_gather)
        return span_credit(advantages, terms, spans.verdicts, spans.tokens, spans.completion_mask, self.kappa)

    def problems(self) -> list[str]:
        right = 0 <= self.kappa <= 1
        return super().problems() + ([] if right else [f"{_KEY}.kappa: {self.kappa} is outside [0, 1]"])


def span_credit(
    advantages: Float[Tensor, "B G"],
    terms: Float[Tensor, "B G K"],
    verdicts: Float[Tensor, "B G N K"],
    tokens: Bool[Tensor, "B G N T"],
    completion_mask: Bool[Tensor, "B G T"],
    kappa: float = 0.5,
) -> Float[Tensor, "B G T"]:
    """Advantages per token that differ from the caption's own only in how they are spread over its tokens.

    For a caption with advantage A, of which reward k contributes A_k; over its tokens that assertions with a verdict for k
    come from, C_k of them::

        g_tk = mean of the verdicts of the assertions that come from token t      1 good, 0 bad
        q_tk = g_tk where A_k >= 0, else 1 - g_tk                                 who earned it
        f_tk = q_tk C_k / sum_t q_tk                                              mean 1
        A_t  = A + kappa sum_k A_k (f_tk - 1)

    A caption that is better than its group owes it to what it has right: there A_k goes to true assertions, and false ones
    gain less. One that is worse owes it to what it has wrong, which pays for all. All other tokens keep A: those of no
    assertion, such as "there is" or the end, and what rewards without verdicts contribute. The tokens of a caption always
    add up to T A, and what one reward gives to all of them, in absolute value, is what c-GDPO gives. A single token may get
    much: up to ``kappa C_k`` times A_k, where one of C_k tokens is bad.

    Args:
        advantages: of `cgdpo`.
        terms: what each reward contributes, of `cgdpo_terms`.
        verdicts: 1 where an assertion raises the reward, 0 where it lowers it, NaN where it says nothing of it.
        tokens: True on the tokens that each assertion comes from.
        completion_mask: True on caption tokens, T of them.
        kappa: in [0, 1]; 0 is c-GDPO.

    Returns:
        0 where masked.

    Degenerate cases: f is 1, so that all is as in c-GDPO, where a caption has no verdicts, none of its assertions has
    tokens, all verdicts are equal, or nobody earned A_k (it is positive and nothing is good, or the other way round).
    """
    known = ~verdicts.isnan()
    place = (tokens & completion_mask[:, :, None]).to(terms.dtype)  # [B, G, N, T]
    count = torch.einsum("bgnt,bgnk->bgtk", place, known.to(terms.dtype))
    good = torch.einsum("bgnt,bgnk->bgtk", place, torch.where(known, verdicts, 0.0).to(terms.dtype))
    covered = count > 0  # [B, G, T, K]
    share = good / count.clamp(min=1)
    earned = torch.where(covered, torch.where(terms[:, :, None] >= 0, share, 1 - share), 0.0)
    total = earned.sum(2, keepdim=True)  # [B, G, 1, K]
    factor = earned * covered.sum(2, keepdim=True) / torch.where(total > 0, total, 1.0)
    factor = torch.where(covered & (total > 0), factor, 1.0)
    spread = (terms[:, :, None] * (factor - 1)).sum(-1)  # [B, G, T], adds up to 0 over T
    return torch.where(completion_mask, advantages[..., None] + kappa * spread, 0.0)


class SpanPenalty(CGDPO):
    """`span_penalty` by ``class_path``, on `cgdpo`: what `SpanCredit` is compared with.

    Args:
        penalty: at least 0.
        eps, whiten: of `cgdpo`.
    """

    needs_spans = True

    def __init__(self, penalty: float = 1.0, eps: float = 1e-4, whiten: bool = True) -> None:
        super().__init__(eps, whiten)
        self.penalty = penalty

    def token_advantages(
        self, rewards: Tensor, weights: Tensor, spans: AssertionSpans, all_gather: AllGather | None = None
    ) -> Tensor:
        advantages = self.advantages(rewards, weights, all_gather)
        verdicts = spans.verdicts[..., weights > 0]
        return span_penalty(advantages, verdicts, spans.tokens, spans.completion_mask, self.penalty)

    def problems(self) -> list[str]:
        right = 0 <= self.penalty < math.inf
        return super().problems() + ([] if right else [f"{_KEY}.penalty: {self.penalty} must be at least 0"])


def span_penalty(
    advantages: Float[Tensor, "B G"],
    verdicts: Float[Tensor, "B G N K"],
    tokens: Bool[Tensor, "B G N T"],
    completion_mask: Bool[Tensor, "B G T"],
    penalty: float = 1.0,
) -> Float[Tensor, "B G T"]:
    """``A_t = A - penalty`` on tokens of assertions that a reward holds to be bad, A elsewhere, 0 where masked.

    It takes away whatever the group does, so that a caption's tokens add up to less than T A: the simple form of a penalty
    on hallucinated spans.

    Args:
        advantages, verdicts, tokens, completion_mask: see `span_credit`.
        penalty: at least 0.
    """
    bad = (tokens & (verdicts == 0).any(-1)[..., None]).any(2)  # [B, G, T]
    return torch.where(completion_mask, advantages[..., None] - penalty * bad, 0.0)

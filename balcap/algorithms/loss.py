"""The clipped policy loss with its KL term, on token log-probs.

An optimizer step is usually computed in pieces: micro-batches, and ranks. Sums of token losses add up over
the pieces, means do not. So the denominator of the *whole* step is computed once by `loss_normalizer`
and every piece is divided by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LossAggregation = Literal["token_mean", "sequence_mean"]

# exp(20) is 5e8: beyond it a ratio is a numerical accident, its exponential overflows soon after, and
# inf * 0 would put NaN into the loss of a rollout whose advantage is 0.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one micro-batch and what to report about it, as sums over tokens that can be added up.

    Attributes:
        loss: scalar with gradient, already divided by the normalizer: micro-batches add up.
        tokens: scalar, caption tokens.
        clipped: scalar, caption tokens where clipping cut the gradient; ``clip_fraction = clipped / tokens``.
        kl: scalar, k3 estimates summed over the caption tokens; ``kl = kl / tokens``. None without reference.
    """

    loss: Float[Tensor, ""]
    tokens: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    kl: Float[Tensor, ""] | None


def clipped_surrogate(
    logps: Float[Tensor, "B G T"],
    old_logps: Float[Tensor, "B G T"],
    advantages: Float[Tensor, "B G"] | Float[Tensor, "B G T"],
    completion_mask: Bool[Tensor, "B G T"],
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
) -> tuple[Float[Tensor, "B G T"], Bool[Tensor, "B G T"]]:
    """Negative clipped surrogate of every token, with a token-level importance ratio.

    Equation (clipped GRPO objective of arXiv 2605.07394; PPO, arXiv 1707.06347)::

        ratio_t = exp(logp_t - old_logp_t)
        loss_t  = -min(ratio_t A, clip(ratio_t, 1 - clip_eps_low, 1 + clip_eps_high) A)

    Args:
        logps: log-probs of the policy, with gradient; any floating type, float32 inside.
        old_logps: log-probs of the policy that sampled, at the start of the step.
        advantages: one per rollout, shared by its tokens, or one per token.
        completion_mask: True on caption tokens. What stands elsewhere, NaN and inf included, reaches
            neither loss nor gradient.
        clip_eps_low: how far below 1 the ratio may fall before it stops to pay, in [0, 1].
        clip_eps_high: how far above 1 it may rise, at least 0.

    Returns:
        The loss of every token, 0 where masked; and where the clip is what counts (the gradient is 0 there).

    Degenerate case: log-ratios are limited to ±20, beyond which a token has no gradient.
    """
    log_ratio = _masked_difference(logps, old_logps, completion_mask)
    ratio = log_ratio.exp()
    advantage = advantages.float()
    if advantage.ndim == 2:
        advantage = advantage[..., None]  # [B, G, 1]
    limited = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    loss = -torch.minimum(ratio * advantage, limited * advantage)
    above = (advantage > 0) & (ratio > 1 + clip_eps_high)
    below = (advantage < 0) & (ratio < 1 - clip_eps_low)
    return torch.where(completion_mask, loss, 0.0), (above | below) & completion_mask


def truncated_importance(
    logps: Float[Tensor, "B G T"],
    sampler_logps: Float[Tensor, "B G T"],
    completion_mask: Bool[Tensor, "B G T"],
    cap: float,
) -> Float[Tensor, "B G T"]:
    """How much likelier the trainer makes each token than the sampler did, at most `cap`; without gradient.

    Equation (truncated importance sampling: Ionides 2008; for engines whose arithmetic differs from the
    trainer's: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")::

        w_t = min(exp(logp_t - sampler_logp_t), cap)

    It corrects captions that another engine sampled, or older weights. Truncation trades variance for a small bias.

    Args:
        logps: of the trainer, under the weights at the start of the update.
        sampler_logps: of who sampled.
        completion_mask: True on caption tokens; elsewhere the result is 1.
        cap: at least 1.
    """
    ratio = _masked_difference(logps.detach(), sampler_logps, completion_mask).exp()
    return torch.where(completion_mask, ratio.clamp(max=cap), 1.0)


def kl_k3(
    logps: Float[Tensor, "B G T"],
    ref_logps: Float[Tensor, "B G T"],
    completion_mask: Bool[Tensor, "B G T"] | None = None,
) -> Float[Tensor, "B G T"]:
    """Estimate of the reverse KL(policy ‖ reference) at every sampled token: Schulman's k3.

    Equation (KL term of GRPO, arXiv 2402.03300)::

        kl_t = exp(ref_logp_t - logp_t) - (ref_logp_t - logp_t) - 1    >= 0

    unbiased for tokens that were sampled by the policy, and 0 where the two agree.

    Args:
        logps: log-probs of the policy; any floating type, float32 inside.
        ref_logps: log-probs of the reference.
        completion_mask: True on caption tokens; elsewhere the result is 0. None: all of them.

    Degenerate case: log-ratios are limited to ±20, beyond which a token has no gradient.
    """
    mask = torch.ones_like(logps, dtype=torch.bool) if completion_mask is None else completion_mask
    log_ratio = _masked_difference(ref_logps, logps, mask)
    # expm1 keeps the digits that exp(x) - 1 loses near 0; what is left of rounding is cut off.
    return (log_ratio.expm1() - log_ratio).clamp(min=0)


def loss_normalizer(completion_mask: Bool[Tensor, "B G T"], mode: LossAggregation) -> Float[Tensor, ""]:
    """The denominator of a whole optimizer step.

    Args:
        completion_mask: of *all* micro-batches of the step.
        mode: ``"token_mean"`` counts caption tokens, ``"sequence_mean"`` captions with at least one token.

    Returns:
        A scalar, 0 where there is nothing to count. With several ranks, sum it over them; then the losses of
        all ranks add up to the loss of the whole step. DDP and FSDP *average* gradients over ranks: divide
        the sum by the number of ranks.
    """
    _check_mode(mode)
    counted = completion_mask if mode == "token_mean" else completion_mask.any(dim=-1)
    return counted.sum().float()


def aggregate(
    per_token: Float[Tensor, "B G T"],
    completion_mask: Bool[Tensor, "B G T"],
    mode: LossAggregation,
    normalizer: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """One number from a loss per token.

    ``"token_mean"``: every token of the step weighs the same, so a long caption weighs more than a short one
    (DAPO, arXiv 2503.14476). ``"sequence_mean"``: every caption weighs the same, its tokens share its weight
    (GRPO, arXiv 2402.03300).

    Args:
        per_token: the loss of every token; what is masked, NaN and inf included, is not looked at.
        completion_mask: True on caption tokens.
        mode: see above.
        normalizer: the denominator of the whole optimizer step, from `loss_normalizer`. None: of these tokens
            alone, right only where they are the whole step.

    Degenerate cases: a caption without tokens adds nothing and is not counted; without any the result is 0.
    """
    _check_mode(mode)
    if normalizer is None:
        normalizer = loss_normalizer(completion_mask, mode)
    losses = torch.where(completion_mask, per_token, 0.0).float().sum(dim=-1)  # [B, G]
    if mode == "sequence_mean":
        losses = losses / completion_mask.sum(dim=-1).clamp(min=1)
    denominator = torch.as_tensor(normalizer, dtype=torch.float32, device=per_token.device)
    # Divided by 1 where nothing is counted. A count below 1 is real: a rank's share of a tiny step.
    return losses.sum() / torch.where(denominator > 0, denominator, 1.0)


def policy_loss(
    logps: Float[Tensor, "B G T"],
    old_logps: Float[Tensor, "B G T"],
    advantages: Float[Tensor, "B G"] | Float[Tensor, "B G T"],
    completion_mask: Bool[Tensor, "B G T"],
    ref_logps: Float[Tensor, "B G T"] | None = None,
    kl_coef: float = 0.0,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    mode: LossAggregation = "token_mean",
    normalizer: float | Tensor | None = None,
    importance: Float[Tensor, "B G T"] | None = None,
) -> PolicyLoss:
    """Clipped surrogate plus ``kl_coef`` times KL to the reference, aggregated.

    Args:
        logps, old_logps, advantages, completion_mask, clip_eps_low, clip_eps_high: see `clipped_surrogate`.
        ref_logps: log-probs of the reference. None: no KL; given with ``kl_coef`` 0 it is only measured.
        kl_coef: weight of the KL term, at least 0.
        mode, normalizer: as for `aggregate`.
        importance: `truncated_importance` of every token, which its surrogate is multiplied with; None: 1.

    Raises:
        ValueError: ``kl_coef`` is not 0 and there are no `ref_logps`.
    """
    if kl_coef != 0 and ref_logps is None:
        raise ValueError(
            f"kl_coef={kl_coef} needs ref_logps: give the policy a reference, or set kl_coef to 0"
        )
    per_token, clipped = clipped_surrogate(
        logps, old_logps, advantages, completion_mask, clip_eps_low, clip_eps_high
    )
    if importance is not None:
        per_token = torch.where(completion_mask, per_token * importance.detach().float(), 0.0)
    kl = None
    if ref_logps is not None:
        per_token_kl = kl_k3(logps, ref_logps, completion_mask)
        kl = per_token_kl.detach().sum()
        if kl_coef != 0:
            per_token = per_token + kl_coef * per_token_kl
    return PolicyLoss(
        loss=aggregate(per_token, completion_mask, mode, normalizer),
        tokens=completion_mask.sum().float(),
        clipped=clipped.sum().float(),
        kl=kl,
    )


def _masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``a - b`` in float32, limited, and 0 with a gradient of 0 where masked, whatever stands there."""
    difference = torch.where(mask, a.float() - b.float(), 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _check_mode(mode: str) -> None:
    if mode not in ("token_mean", "sequence_mean"):
        raise ValueError(f'loss aggregation must be "token_mean" or "sequence_mean", got {mode!r}')

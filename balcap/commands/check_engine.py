"""Checks of the rollout engine against the policy: prompts, bans, log-probs, greedy captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from balcap.commands.check_state import ROUNDED, Result, State, mismatch
from balcap.policy.families import base_of
from balcap.policy.logps import caption_logits
from balcap.rollout import RolloutEngine, Sampling, VLLMInProcess, VLLMServer
from balcap.rollout.vllm.requests import banned_words, token_settings

CAPTIONS = 2
"""Sampled of each image."""

SURE = 1e4
"""Added to a logit, outweighs every other one, also in float16."""


def engine_prompts(state: State) -> Result:
    """The engine gets the policy's weights and samples; vLLM engines compare their prompts' tokens with the trainer's."""
    engine, policy, prompts = state.engine, state.policy, state.prompts
    engine.attach(policy)
    engine.sync(policy, 0)
    state.sampled = rollouts = engine.generate(state.batch, prompts, CAPTIONS, state.sampling)
    lengths = rollouts.completion_mask.sum(-1)
    found = f"{lengths.numel()} captions of {int(lengths.min())} to {int(lengths.max())} tokens"
    if engine.on_policy:
        found += "; sampled on the policy itself, so prompts are the same object"
    elif isinstance(engine, VLLMInProcess | VLLMServer):
        tokens = sum(item["input_ids"].shape[1] for item in prompts.items)
        found += f"; {len(prompts.items)} prompts, {tokens:,} tokens, equal one by one"
    else:
        found += f"; {type(engine).__name__} does not report its prompts, see log-probs"
    return Result(True, found)


def bans(state: State) -> Result:
    """No token that stands for pixels can be sampled."""
    policy, engine, encoder = state.policy, state.engine, state.policy.encoder
    needed = set(encoder.family.placeholder_ids(encoder.config, encoder.tokenizer)) | {
        state.prompts.image_token_id
    }
    banned = _engine_bans(state)
    captions = {"in the captions": state.rollouts}
    if engine.on_policy:
        with _wanted(policy.model, needed):
            one = Sampling(max_tokens=1)
            batch, prompts = state.batch.select([0]), replace(state.prompts, items=state.prompts.items[:1])
            captions["where the policy wants nothing else"] = engine.generate(batch, prompts, CAPTIONS, one)
    names = encoder.tokenizer.convert_ids_to_tokens
    problems = []
    for whose, ids in (("policy", set(encoder.banned_token_ids)), ("engine", banned)):
        if ids != needed:
            problems.append(f"the {whose} bans {names(sorted(ids))} instead of {names(sorted(needed))}")
    for where, rollouts in captions.items():
        if drawn := needed & set(rollouts.token_ids[rollouts.completion_mask].tolist()):
            problems.append(f"the engine draws {names(sorted(drawn))} {where}")
    way_out = (
        "captions with such a token cannot be trained on: an engine must ban Policy.encoder.banned_token_ids; sample "
        "with balcap.rollout.HFGenerate, or list the tokens in the family's placeholder_ids"
    )
    shown = ", ".join(names(sorted(needed)))
    return Result(not problems, "; ".join(problems) or f"{len(needed)} tokens are banned: {shown}", way_out)


def _engine_bans(state: State) -> set[int]:
    """Tokens that the engine is told not to draw."""
    policy, engine = state.policy, state.engine
    if isinstance(engine, VLLMInProcess):
        return set(token_settings(policy, state.sampling, 1, 1)[0]["logit_bias"])
    if isinstance(engine, VLLMServer):
        return set(policy.encoder.tokenizer.convert_tokens_to_ids(banned_words(policy.encoder)))
    return set(policy.encoder.banned_token_ids)


@contextmanager
def _wanted(model: Any, tokens: set[int]) -> Iterator[None]:
    """These tokens are the likeliest, wherever the model stands."""
    ids = sorted(tokens)

    def add(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., ids] += SURE
        return logits

    hook = base_of(model).get_output_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def log_probs(state: State) -> Result:
    """The sampler's log-probs of its captions are the trainer's."""
    rollouts, policy = state.rollouts, state.policy
    rows = range(len(rollouts))
    ours = [policy.logps(rollouts, state.prompts, [row], state.sampling.temperature)[0] for row in rows]
    mean, found = mismatch(torch.cat(ours), rollouts.sampler_logps, rollouts.completion_mask, state.threshold)
    return Result(
        mean <= _engine_tolerance(state.engine, state).logps,
        f"trainer and engine: {found}",
        "the engine has other weights or another dtype (model.engine.init_args.dtype, options), or sees other images. "
        "Small differences, such as those of 8 bits, are corrected (model.importance_cap)",
    )


def _engine_tolerance(engine: RolloutEngine, state: State) -> Any:
    """Another engine has its own kernels, and often its own dtype."""
    return state.tolerance if engine.on_policy else ROUNDED


@torch.no_grad()
def greedy(state: State) -> Result:
    """At temperature 0 the engine draws what the policy's own forward finds the likeliest, token by token."""
    policy, images, gaps = state.policy, len(state.rollouts), []
    likeliest = replace(state.sampling, temperature=0.0, top_p=1.0)
    rollouts = state.engine.generate(state.batch, state.prompts, 1, likeliest)
    for row in range(images):
        ids = rollouts.token_ids[row][rollouts.completion_mask[row]][None].to(policy.device)
        logits = caption_logits(policy.model, state.prompts, [row], ids, torch.ones_like(ids).bool())[0]
        logits[:, policy.encoder.banned_token_ids] = -torch.inf
        logps = logits.float().log_softmax(-1)
        gaps.append(logps.amax(-1) - logps.gather(-1, ids[0, :, None])[:, 0])
    gap, tie = torch.cat(gaps), _engine_tolerance(state.engine, state).tie
    other, most = gap[gap > 0], float(gap.max())
    found = f"{images} captions, {len(gap)} tokens: {len(gap) - len(other)} are the likeliest ones"
    if len(other):
        ties = int((other <= tie).sum())
        found += f", {ties} are ties (at most {tie:g} nats below), {len(other) - ties} are not; largest gap {most:.2g}"
    return Result(
        most <= tie,
        found,
        "the engine has other weights or sees other images; see log-probs. Else its generation settings change the "
        "distribution: it must sample without a penalty, min_p or top_k",
    )

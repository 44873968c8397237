"""Checks of the policy alone: what is trained, its prompts, its log-probs, its export."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from balcap.commands.check_state import Result, Skipped, State, mismatch
from balcap.policy.families import base_of, family_of
from balcap.policy.loading import check_language_is_trained
from balcap.policy.logps import caption_logps
from callbacks.export import export

FEW = 2
"""Images whose captions get a gradient or are forwarded again."""


def trainable(state: State) -> Result:
    """How many parameters of each part are trained; linear layers of the language model are among them."""
    base = base_of(state.policy.model)
    family = family_of(base)
    language = family.language_prefixes(base)
    trained: Counter[str] = Counter()
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            part = "language model" if name.startswith(language) else "vision"
            trained[f"adapter of the {part}" if ".lora_" in name else part] += parameter.numel()
    found = ", ".join(f"{part}: {count / 1e6:,.2f} M parameters" for part, count in trained.items())
    targets = [name for name, module in base.named_modules() if hasattr(module, "lora_A")]
    if targets:
        endings = Counter(name.rpartition(".")[2] for name in targets)
        found += f"; {len(targets)} layers with LoRA: " + ", ".join(
            f"{n} {name}" for name, n in endings.items()
        )
    check_language_is_trained(family.language_model(base))
    return Result(True, found)


@torch.no_grad()
def placeholders(state: State) -> Result:
    """Each prompt holds as many image placeholders as the vision tower makes features."""
    policy = state.policy
    state.encoded = prompts = policy.encode(state.batch)
    base, counts = base_of(policy.model), []
    family = family_of(base)
    by_itself = bool(family.obstacle(base))  # features come out of the whole model alone, which compares them
    for row, count in enumerate(prompts.num_features(range(len(prompts.items)))):
        if by_itself:
            policy.model(**prompts.inputs([row], 1, policy.device), use_cache=False, logits_to_keep=1)
        else:
            parts = family.image_features(base, prompts.images([row], policy.device))
            features = sum(len(part.embeds) for part in parts)
            if features != count:
                return Result(
                    False,
                    f"sample {state.batch.sample_ids[row]!r}: {count} placeholders, {features} features",
                    "the processor is not the model's own: compare model.policy.model and revision with the files of "
                    "the model",
                )
        counts.append(count)
    return Result(
        True, f"{len(counts)} prompts of {min(counts):,} to {max(counts):,} placeholders, as many features"
    )


@torch.no_grad()
def padding(state: State) -> Result:
    """Prompts of different lengths in one batch give the log-probs of each alone."""
    policy, rows = state.policy, list(range(min(4, len(state.rollouts))))
    if len(rows) < 2:
        raise Skipped("one prompt alone is not padded; use --images 2 or more")
    batch = state.batch.select(rows)
    longer = [f"{prompt}{' Please.' * row}" for row, prompt in enumerate(batch.prompts)]
    prompts = policy.encode(replace(batch, prompts=longer))
    tokens, mask = (
        part[rows, :1].to(policy.device)
        for part in (state.rollouts.token_ids, state.rollouts.completion_mask)
    )
    together, _ = caption_logps(policy.model, prompts, rows, tokens, mask)
    alone = [caption_logps(policy.model, prompts, [r], tokens[r : r + 1], mask[r : r + 1])[0] for r in rows]
    mean, found = mismatch(together, torch.cat(alone), mask, state.threshold)
    return Result(
        mean <= state.tolerance.logps,
        f"{len(rows)} prompts padded in one batch and alone: {found}",
        "padding is not masked, or stands on the wrong side: set model.policy.attn_implementation: sdpa; if that is "
        "no help, the model needs a file in balcap/policy/families",
    )


def shared_prefix(state: State) -> Result:
    """Log-probs and gradients of all captions in one packed sequence are those of one sequence per caption."""
    policy, rollouts, prompts = state.policy, state.rollouts, state.prompts
    if not policy.shared_prefix:
        why = family_of(policy.model).obstacle(base_of(policy.model)) or "model.policy.shared_prefix is false"
        raise Skipped(f"one sequence per caption: {why}")
    by_length = sorted(range(len(rollouts)), key=lambda row: prompts.items[row]["input_ids"].shape[1])
    rows = by_length[:FEW]  # of the whole batch; a gradient of long prompts takes memory
    mask = rollouts.completion_mask[rows].to(policy.device)
    ours, _ = policy.logps(rollouts, prompts, rows)
    gradient = _gradient(state, ours)
    theirs, _ = caption_logps(policy.model, prompts, rows, rollouts.token_ids[rows].to(policy.device), mask)
    other = _gradient(state, theirs)
    error = torch.stack([(a - b).float().norm() for a, b in zip(gradient, other, strict=True)]).norm()
    size = torch.stack([part.float().norm() for part in other]).norm()
    relative = float(error / size)  # NaN where there is none
    mean, found = mismatch(ours, theirs, mask, state.threshold)
    return Result(
        mean <= state.tolerance.logps and relative <= state.tolerance.gradient,
        f"one packed sequence and one per caption: {found}; gradients by {relative:.2g} of their norm",
        "model.policy.shared_prefix: false computes every caption by itself, slower; please report the model",
    )


def _gradient(state: State, logps: Tensor) -> list[Tensor]:
    """Of the sum of these log-probs, by each trained parameter."""
    weights = [weight for weight in state.policy.model.parameters() if weight.requires_grad]
    return list(torch.autograd.grad(logps.sum(), weights, materialize_grads=True))


@torch.no_grad()
def exported(state: State) -> Result:
    """What a fit would export can be loaded, and gives the same prompts and log-probs. Closes the engine, whose memory the
    second copy of the policy takes."""
    policy, rows = state.policy, list(range(min(FEW, len(state.rollouts))))
    few, prompts = state.rollouts.select(rows), policy.encode(state.batch.select(rows))
    state.engine.close()
    with tempfile.TemporaryDirectory() as folder:
        export(policy, f"{folder}/export")
        # as for whoever gets the folder: it says itself what it is
        config = replace(state.config, model=f"{folder}/export", revision=None, lora=None)
        again = state.load(replace(config, min_pixels=None, max_pixels=None))
        their_prompts = again.encode(few.batch)
        theirs, _ = again.logps(few, their_prompts, rows)
    for sample_id, ours, other in zip(few.batch.sample_ids, prompts.items, their_prompts.items, strict=True):
        if not all(torch.equal(value, other[key]) for key, value in ours.items()):
            return Result(
                False,
                f"sample {sample_id!r}: the exported processor makes another prompt",
                "please report the model: its processor does not save its own settings",
            )
    kind = "adapter" if policy.has_adapter else "model"
    mean, found = mismatch(policy.logps(few, prompts, rows)[0], theirs, few.completion_mask, state.threshold)
    return Result(
        mean <= state.tolerance.logps,
        f"the {kind}, written and loaded again: {found}",
        "the exported folder is another policy: compare the versions of transformers and peft with requirements.lock",
    )

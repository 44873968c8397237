"""Whether a vLLM server can sample for a policy; where not, which of its flags to change.

What a server is comes from its workers (`balcap.rollout.transfer.RemoteWeightSync.balcap_about`), as ``about``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from balcap.rollout.base import EngineFailed, Sampling
from balcap.rollout.vllm_common import logprobs_mode, mm_processor_kwargs
from balcap.rollout.vllm_http import START
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts


def check_fits(server: str, about: dict[str, Any], known: Sequence[str], policy: Policy) -> None:
    """EngineFailed where a server cannot sample for the policy.

    Args:
        server: its url.
        about: what its workers report (`balcap.rollout.transfer.RemoteWeightSync.balcap_about`).
        known: names under which it serves its model.
        policy: that is trained.
    """
    named = f"the vLLM server {server}"
    own = policy.source.rstrip("/")
    served = {name.rstrip("/") for name in (about["model"], *known)}
    # Hosts keep the same folder in different places.
    if own not in served and own.rpartition("/")[2] not in {name.rpartition("/")[2] for name in served}:
        raise EngineFailed(
            f"{named} serves {', '.join(sorted(served))}, but model.policy.model is {own}; start it with: {START}. "
            f"If they are the same model, start it with --served-model-name {own}"
        )
    if policy.revision and about["revision"] and policy.revision != about["revision"]:
        raise EngineFailed(
            f"{named} serves revision {about['revision']}, but model.policy.revision is {policy.revision}; start it "
            f"with --revision {policy.revision}"
        )
    if about["data_parallel"] != 1:
        raise EngineFailed(
            f"{named} was started with --data-parallel-size {about['data_parallel']}; start that many servers instead, "
            f"and name them all in model.engine.init_args.urls"
        )
    scaled = mm_processor_kwargs(policy.encoder.processor)
    if scaled and scaled["size"] != (about["mm_processor_kwargs"] or {}).get("size"):
        raise EngineFailed(
            f"{named} scales images otherwise than the trainer (model.policy.min_pixels, model.policy.max_pixels); start "
            f"it with --mm-processor-kwargs '{json.dumps(scaled)}'"
        )
    if not policy.has_adapter:
        return
    rank = policy.model.peft_config[policy.model.active_adapter].r
    if about["max_lora_rank"] is None or about["max_lora_rank"] < rank:
        raise EngineFailed(
            f"{named} has no room for an adapter of rank {rank} (model.policy.lora.r); start it with --enable-lora "
            "--max-lora-rank of at least that"
        )


def check_limits(
    server: str, about: dict[str, Any], batch: CaptionBatch, prompts: Prompts, sampling: Sampling
) -> None:
    """EngineFailed where a server would return other log-probs than are asked for, or cut captions unnoticed."""
    mode = logprobs_mode(sampling.temperature)
    if about["logprobs_mode"] != mode:
        raise EngineFailed(
            f"the vLLM server {server} was started with --logprobs-mode {about['logprobs_mode']}; with "
            f"model.sampling.temperature: {sampling.temperature} it must be {mode}"
        )
    for sample_id, item in zip(batch.sample_ids, prompts.items, strict=True):
        needed = item["input_ids"].shape[1] + sampling.max_tokens
        if needed > about["max_model_len"]:
            raise EngineFailed(
                f"sample {sample_id!r}: its prompt and a caption of model.sampling.max_tokens: {sampling.max_tokens} "
                f"make {needed} tokens, the vLLM server {server} was started with --max-model-len "
                f"{about['max_model_len']}; raise that, or lower model.policy.max_pixels or model.sampling.max_tokens"
            )

"""Each model family in vLLM for the CPU: its prompts are the trainer's, and so are its log-probs, with weights that were
synced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.rollout.vllm import inprocess
from balcap.types import Rollouts
from callbacks.export import export
from tests.rollout.with_vllm.support import Shared, draw, own_logps, update, wide
from tests.tested_families import IN_VLLM
from tests.tiny_families import FAMILIES

Captions = Callable[..., tuple[Policy, Rollouts]]


@pytest.fixture
def captions(tmp_path: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Captions:
    """`captions(name, **init_args)`: a policy, and what vLLM samples for it after an update, from the same prompts."""

    def captions(name: str, **init_args: Any) -> tuple[Policy, Rollouts]:
        if name == "smolvlm":
            pytest.importorskip("num2words")
        policy = Policy.load(
            PolicyConfig(str(wide(FAMILIES[name](tmp_path))), dtype="float32", freeze_vision=False), False
        )
        engine = shared.get(policy, max_model_len=1024, **init_args)
        update(policy, seed=1)
        engine.sync(policy, 1)
        seen: list[tuple[list[int], list[int]]] = []

        def compare(sample_id: str, engine_ids: Any, trainer_ids: torch.Tensor) -> None:
            seen.append((list(engine_ids), trainer_ids[0].tolist()))

        monkeypatch.setattr(inprocess, "check_prompt", compare)
        rollouts = draw(engine, policy, 4)
        assert len(seen) == len(rollouts)
        for theirs, own in seen:
            assert theirs == own
        return policy, rollouts

    return captions


@pytest.mark.parametrize("name", IN_VLLM)
def test_prompts_and_log_probs_are_the_trainers(name: str, captions: Captions) -> None:
    policy, rollouts = captions(name)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_qwen3_moe"])
def test_experts_are_synced_as_they_would_be_loaded(
    name: str, captions: Captions, shared: Shared, tmp_path: Path
) -> None:
    """vLLM's experts on a CPU round more than the trainer's."""
    policy, synced = captions(name)
    export(policy, tmp_path / "export")
    loaded = Policy.load(PolicyConfig(str(tmp_path / "export"), dtype="float32"), False)
    again = draw(shared.get(loaded, max_model_len=1024), loaded, 4)
    assert torch.equal(again.token_ids, synced.token_ids)
    torch.testing.assert_close(again.sampler_logps, synced.sampler_logps, atol=1e-5, rtol=0)
    assert (synced.sampler_logps - own_logps(policy, synced)).abs().mean() < 0.1


def test_gemma_3_on_a_cpu_differs_by_what_image_tokens_see(
    captions: Captions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's attention for CPUs lets a token of an image see those before it alone, the model all of its image."""
    policy, rollouts = captions("gemma3")
    assert (rollouts.sampler_logps - own_logps(policy, rollouts)).abs().max() > 0.01
    causal = Policy(policy.model, policy.encoder, shared_prefix=False)
    encode = policy.encode

    def without_images(batch: Any) -> Any:
        prompts = encode(batch)
        for item in prompts.items:
            item["token_type_ids"].zero_()
        return prompts

    monkeypatch.setattr(causal, "encode", without_images)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(causal, rollouts), atol=2e-3, rtol=0)


def test_qwen_3_5_is_sampled_in_bfloat16(captions: Captions) -> None:
    """All that vLLM's gated delta nets can on a CPU."""
    policy, rollouts = captions("qwen3_5", dtype="bfloat16")
    others = replace(rollouts, batch=rollouts.batch.select([1, 2, 0]))
    differences = [
        (rollouts.sampler_logps - own_logps(policy, each)).abs()[rollouts.completion_mask].mean()
        for each in (rollouts, others)
    ]
    assert differences[0] < 0.05
    assert differences[1] > 3 * differences[0], "given the images of others"

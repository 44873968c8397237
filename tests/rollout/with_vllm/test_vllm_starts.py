"""Starting and ending vLLM: what it is started with, what it leaves behind, and why it would not start."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.policy import LoraSettings
from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.inprocess import VLLMInProcess
from tests.rollout.with_vllm.server_fixtures import free_port
from tests.rollout.with_vllm.support import Load, Shared, draw, likeliest, own_logps, update
from tests.tiny_models import mixed_batch, own_logits


@pytest.fixture(scope="module")
def family() -> str:
    return "qwen"


def test_log_probs_are_those_at_the_sampling_temperature(load: Load, shared: Shared):
    policy = load()
    engine = shared.get(policy)
    banned = policy.encoder.banned_token_ids
    for temperature in (0.7, 1.3):
        rollouts = draw(engine, policy, 4, temperature=temperature, max_tokens=6)
        own = own_logps(policy, rollouts, temperature)
        higher = (rollouts.sampler_logps - own)[rollouts.completion_mask]
        assert higher.min() > -2e-3, "by what banned tokens take, and no more"
        batch = rollouts.batch
        for b in range(3):
            ids = rollouts.token_ids[b, 0][rollouts.completion_mask[b, 0]]
            with torch.no_grad():
                logits = own_logits(
                    "qwen", policy.model, policy.encoder.processor, batch.images[b][0], batch.prompts[b], ids
                )
            logits[:, banned] = -torch.inf
            expected = (logits / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            sampled = rollouts.sampler_logps[b, 0][: len(ids)]
            torch.testing.assert_close(sampled, expected, atol=2e-3, rtol=0)
    # back at 1 they are before the ban again
    rollouts = draw(engine, policy, 4)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_more_prompt_tokens_than_a_step_takes(load: Load, shared: Shared):
    policy = load()
    engine = shared.get(policy, max_model_len=256, options={"max_num_batched_tokens": 256})
    batch = mixed_batch()
    batch = batch.select([i % len(batch) for i in range(12)])
    rollouts = draw(engine, policy, 4, batch)
    prompts = policy.encode(batch)
    assert sum(item["input_ids"].shape[1] for item in prompts.items) > 256
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_an_adapter_of_the_vision_tower_is_sampled_from(load: Load, shared: Shared):
    adapter = LoraSettings(target_modules=["qkv", "q_proj"], r=4)
    policy = load(lora=adapter, freeze_vision=False)
    engine = shared.get(policy)
    said = {str(draw(engine, policy, 1, top_p=1e-6).captions)}
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_" in name and "visual" in name:
                    parameter += torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(version)
                    )
        engine.sync(policy, version)
        rollouts = draw(engine, policy, 1, top_p=1e-6)
        assert torch.equal(rollouts.token_ids, likeliest(policy).token_ids)
        torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)
        said.add(str(rollouts.captions))
    assert len(said) == 3


def test_a_4_bit_policys_adapter_is_sampled_over_the_base_as_it_is_on_disk(load: Load, shared: Shared):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    adapter = LoraSettings(target_modules=["q_proj", "down_proj"], r=4)
    policy, dense = load(lora=adapter, load_in_4bit=True), load(lora=adapter)
    policy.train()  # for inference bitsandbytes packs weights in a way that needs wider layers than these
    update(dense, seed=1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(dense.model.get_parameter(name))
    rollouts = draw(shared.get(policy), policy, 4)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(dense, rollouts), atol=2e-3, rtol=0)
    assert (rollouts.sampler_logps - own_logps(policy, rollouts)).abs().max() > 0.01, "4 bits cost something"


def test_an_engine_in_eight_bits_takes_adapters_and_the_difference_shows(load: Load, shared: Shared):
    policy = load(lora=LoraSettings(target_modules=["q_proj", "down_proj"], r=4))
    eight = {"quantization": "fp8_per_channel", "kv_cache_dtype": "fp8"}  # ``fp8`` itself needs a GPU
    differences = []
    for options in (None, eight):
        engine = shared.get(policy, dtype="bfloat16", options=options)
        assert not engine.on_policy, "so that the importance ratio corrects it"
        before = draw(engine, policy, 1, top_p=1e-6)
        update(policy, seed=1)
        engine.sync(policy, 1)
        rollouts = draw(engine, policy, 4)
        differences.append((rollouts.sampler_logps - own_logps(policy, rollouts)).abs().mean())
        assert not torch.equal(draw(engine, policy, 1, top_p=1e-6).token_ids, before.token_ids)
    assert differences[1] > 2 * differences[0]


def test_4_bits_without_bitsandbytes_in_vllm_say_what_to_install(
    load: Load, shared: Shared, monkeypatch: pytest.MonkeyPatch
):
    shared.close()
    monkeypatch.setattr("balcap.rollout.vllm.start.has_bitsandbytes", lambda: False)
    engine, policy = VLLMInProcess(options={"quantization": "bitsandbytes"}), load()
    engine.attach(policy)
    engine.sync(policy, 0)
    with pytest.raises(EngineFailed, match=r"pip install vllm-bnb-plugin.*options: {quantization: fp8}"):
        draw(engine, policy)


def process_state() -> dict[str, Any]:
    return {
        "python": random.getstate()[1],
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "cores": os.sched_getaffinity(0),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
        "root log level": __import__("logging").getLogger().level,
    }


def test_the_process_is_as_it_was_and_the_model_is_freed(load: Load, shared: Shared):
    shared.close()
    assert not dist.is_initialized()
    policy = load()
    for _ in range(2):  # a second start works
        engine = VLLMInProcess(enforce_eager=True)
        engine.attach(policy)
        engine.sync(policy, 3)
        before = process_state()
        engine._start(policy, 1.0)
        after = process_state()
        assert {k for k in before if before[k] != after[k]} == set()
        rollouts = draw(engine, policy, 1, top_p=1e-6)
        assert torch.equal(rollouts.token_ids, likeliest(policy).token_ids)
        assert rollouts.weights_version == 3
        model = weakref.ref(engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model)
        assert model() is not None
        engine.close()
        engine.close()
        gc.collect()
        assert model() is None
        assert not dist.is_initialized()


def test_the_trainers_own_process_group_is_used_and_kept(load: Load, shared: Shared):
    shared.close()
    policy = load()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        engine = VLLMInProcess(enforce_eager=True)
        engine.attach(policy)
        engine.sync(policy, 1)
        draw(engine, policy, 1)
        engine.close()
        assert dist.is_initialized()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_image_area_limits_of_the_config_reach_the_engine(load: Load, shared: Shared):
    policy = load(max_pixels=56**2)
    rollouts = draw(shared.get(policy), policy, 2)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)
    lengths = [
        [p["input_ids"].shape[1] for p in each.encode(rollouts.batch).items] for each in (policy, load())
    ]
    assert lengths[0] != lengths[1], "the limits change the prompts"


# ── why it would not start ───────────────────────────────────────────────────────────────────────────


def test_a_start_that_fails_says_what_to_change(load: Load, shared: Shared):
    shared.close()
    policy = load()
    policy.source = "/nowhere/at/all"
    engine = VLLMInProcess()
    engine.attach(policy)
    engine.sync(policy, 0)
    said = r"vLLM did not start for /nowhere/at/all on cpu: .*gpu_memory_utilization"
    with pytest.raises(EngineFailed, match=said):
        draw(engine, policy)
    engine.close()


def test_a_start_that_fails_half_way_leaves_no_process_group(load: Load, shared: Shared, tmp_path: Path):
    shared.close()
    policy = load()
    shutil.copytree(policy.source, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    own, policy.source = policy.source, str(tmp_path / "empty")
    engine = VLLMInProcess(enforce_eager=True)
    engine.attach(policy)
    engine.sync(policy, 0)
    with pytest.raises(EngineFailed, match=r"vLLM did not start for .*empty"):
        draw(engine, policy, 1)
    assert not dist.is_initialized()
    policy.source = own
    assert draw(engine, policy, 1).weights_version == 0
    engine.close()


def test_ranks_that_do_not_come_out_even_are_refused(load: Load, shared: Shared):
    shared.close()
    policy = load()
    engine = VLLMInProcess(tensor_parallel_size=2)
    engine.attach(policy)
    engine.sync(policy, 0)
    with pytest.raises(
        EngineFailed, match=r"tensor_parallel_size: 2 does not divide the run's ranks, 1;.*VLLMServer"
    ):
        draw(engine, policy)


def test_an_unknown_option_is_named(load: Load, shared: Shared):
    shared.close()
    engine = VLLMInProcess(options={"no_such_option": 1})
    policy = load()
    engine.attach(policy)
    engine.sync(policy, 0)
    with pytest.raises(EngineFailed, match=r"no_such_option.*model\.engine\.init_args\.options"):
        draw(engine, policy)


def test_a_missing_vllm_names_the_extra(load: Load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    policy = load()
    engine = VLLMInProcess()
    engine.attach(policy)
    engine.sync(policy, 0)
    with pytest.raises(EngineFailed, match=r"pip install 'balcap\[vllm\]'"):
        draw(engine, policy)

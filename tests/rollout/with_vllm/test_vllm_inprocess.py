"""vLLM in the trainer's process: what it samples, and whose weights it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout import RolloutEngine
from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.inprocess import VLLMInProcess
from balcap.rollout.vllm.weights import weight_files
from tests.rollout.test_hf_generate import check_ends
from tests.rollout.with_vllm.support import Load, Shared, draw, likeliest, louder, own_logps, update
from tests.tiny_models import batch_of, batch_of_rows, mixed_batch, picture, several_images

ADAPTER = LoraSettings(target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], r=4)


@pytest.fixture
def policy(load: Load) -> Policy:
    """Fully tuned; its captions end early and late."""
    policy = load(freeze_vision=False)
    louder(policy, [policy.encoder.tokenizer.eos_token_id], 2.0)
    return policy


# ── captions ─────────────────────────────────────────────────────────────────────────────────────────


def test_captions_end_where_they_must_and_log_probs_are_the_policys(policy: Policy, shared: Shared):
    engine = shared.get(policy)
    assert isinstance(engine, RolloutEngine)
    assert not engine.on_policy
    rollouts = draw(engine, policy, 8, max_tokens=10)
    assert rollouts.token_ids.shape[:2] == (3, 8)
    assert rollouts.truncated.any()
    check_ends(policy, rollouts, 10)
    assert len(set(rollouts.captions[0])) > 4, "the captions of an image are drawn apart"
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_images_of_many_sizes_keep_their_own_captions(policy: Policy, shared: Shared):
    sizes = [(56, 56), (112, 112), (40, 170), (200, 90), (64, 64)]
    batch = batch_of(
        [picture(w, h, seed=i) for i, (w, h) in enumerate(sizes)], ["Go", "What is this?"] * 2 + ["?"]
    )
    rollouts = draw(shared.get(policy), policy, 2, batch)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_rows_of_several_images_are_sampled_as_the_policy_sees_them(policy: Policy, shared: Shared):
    engine, batch = shared.get(policy), several_images()
    rollouts = draw(engine, policy, 2, batch)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)
    four = batch_of_rows([batch.images[1] * 2], ["Go"])
    with pytest.raises(EngineFailed, match=r"'img0\.png' has 4 images, vLLM takes 3 .*limit_mm_per_prompt"):
        draw(engine, policy, 1, four)


def test_banned_tokens_are_never_sampled(policy: Policy, shared: Shared):
    banned = policy.encoder.banned_token_ids
    louder(policy, banned, 30.0)
    engine = shared.get(policy)
    for top_p in (1.0, 0.5):
        rollouts = draw(engine, policy, 8, top_p=top_p)
        assert not torch.isin(rollouts.token_ids[rollouts.completion_mask], torch.tensor(banned)).any()
        assert rollouts.sampler_logps.isfinite().all()
        # log-probs are those before the ban, as in training
        torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=1e-4)
    policy.encoder.banned_token_ids = []
    unbanned = draw(engine, policy, 8, max_tokens=1).token_ids
    assert torch.isin(unbanned, torch.tensor(banned)).float().mean() > 0.3, "the ban did it"


@pytest.mark.parametrize("per_request", [False, True], ids=["of the process", "per request"])
def test_the_seed_decides(policy: Policy, shared: Shared, monkeypatch: pytest.MonkeyPatch, per_request: bool):
    engine = shared.get(policy)
    monkeypatch.setattr(engine, "per_request_seeds", per_request)
    first, again, other = (draw(engine, policy, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.token_ids, again.token_ids)
    torch.testing.assert_close(first.sampler_logps, again.sampler_logps, atol=1e-5, rtol=0)
    assert not torch.equal(first.token_ids, other.token_ids)
    twins = batch_of([picture(60, 60)] * 2, ["Go"] * 2)
    drawn = draw(engine, policy, 4, twins)
    assert not torch.equal(drawn.token_ids[0], drawn.token_ids[1]), "each image is drawn by itself"


def test_an_engine_that_is_started_anew_draws_the_same_and_the_trainers_numbers_go_on(
    policy: Policy, shared: Shared
):
    engine = shared.get(policy)
    draw(engine, policy, seed=5)
    drawn, own = [], []
    for start in ("warm", "cold"):
        if start == "cold":
            shared.close()
            engine = shared.get(policy)
        np.random.seed(3)
        drawn.append(draw(engine, policy, 4, seed=1))
        own.append([*torch.rand(2).tolist(), *np.random.rand(2)])
    assert torch.equal(drawn[0].token_ids, drawn[1].token_ids), "as a resumed run does"
    torch.manual_seed(1)
    torch.randint(2**62, ())  # what the engine's seed was made of
    np.random.seed(3)
    assert own == [[*torch.rand(2).tolist(), *np.random.rand(2)]] * 2


def test_mixed_precision_of_the_trainer_does_not_reach_the_engine(policy: Policy, shared: Shared):
    engine = shared.get(policy)
    expected = draw(engine, policy)
    with torch.autocast("cpu", torch.bfloat16):
        engine.sync(policy, 1)
        rollouts = draw(engine, policy)
    assert torch.equal(rollouts.token_ids, expected.token_ids)
    assert torch.equal(rollouts.sampler_logps, expected.sampler_logps)


def test_each_group_is_reported_once_when_its_captions_are_complete(policy: Policy, shared: Shared):
    reported: dict[int, list[str]] = {}

    def on_group_done(row: int, captions: list[str]) -> None:
        assert row not in reported
        reported[row] = list(captions)

    rollouts = draw(shared.get(policy), policy, on_group_done=on_group_done)
    assert reported == dict(enumerate(rollouts.captions))


def test_sampling_defaults_of_the_hub_do_not_leak(policy: Policy, shared: Shared):
    engine = shared.get(policy)
    expected = draw(engine, policy, 4)
    theirs = {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "repetition_penalty": 1.5, "max_new_tokens": 2}
    from vllm import SamplingParams

    read = engine._llm.llm_engine.model_config.get_diff_sampling_param()
    assert read == {}, "vLLM has read none"
    assert SamplingParams().temperature == 1.0
    for name, value in theirs.items():
        setattr(policy.model.generation_config, name, value)
    assert torch.equal(draw(engine, policy, 4).token_ids, expected.token_ids)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_greedy_captions_are_hfs_after_every_full_sync(load: Load, shared: Shared, freeze_vision: bool):
    policy = load(freeze_vision=freeze_vision)
    engine = shared.get(policy)
    said = set()
    for version in range(1, 4):
        update(policy, seed=version)
        engine.sync(policy, version)
        rollouts = draw(engine, policy, 1, top_p=1e-6)
        expected = likeliest(policy)
        assert torch.equal(rollouts.token_ids, expected.token_ids)
        assert rollouts.weights_version == version
        torch.testing.assert_close(rollouts.sampler_logps, expected.sampler_logps, atol=2e-3, rtol=0)
        said.add(str(expected.captions))
    assert len(said) == 3, "each update changed what is said"


def test_an_engine_that_missed_a_sync_is_stale(
    policy: Policy, shared: Shared, monkeypatch: pytest.MonkeyPatch
):
    engine = shared.get(policy)
    assert draw(engine, policy).weights_version == 0
    with monkeypatch.context() as lost:
        lost.setattr(engine, "_send", lambda policy: None)
        engine.sync(policy, 7)
    with pytest.raises(EngineFailed, match="holds weights of version 0, the policy is at 7"):
        draw(engine, policy)
    engine.sync(policy, 8)
    assert draw(engine, policy).weights_version == 8


# ── what ends a run ──────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_that_differs_names_the_sample(policy: Policy, shared: Shared):
    engine = shared.get(policy)
    batch = mixed_batch()
    prompts = policy.encode(batch)
    ids = prompts.items[1]["input_ids"]
    image = int((ids == prompts.image_token_id).nonzero()[0, 1])
    prompts.items[1]["input_ids"] = torch.cat(
        [ids[:, :image], ids[:, image + 1 :]], 1
    )  # one image token less
    from balcap.rollout import Sampling

    reported: list[int] = []
    with pytest.raises(EngineFailed, match=r"sample 'img1\.png': vLLM's prompt differs.*min_pixels"):
        engine.generate(batch, prompts, 2, Sampling(max_tokens=4), lambda row, captions: reported.append(row))
    assert 1 not in reported, "its captions are not judged"
    assert draw(engine, policy).token_ids.shape[0] == 3, "what was under way is aborted"


def test_a_deadline_gives_up_what_is_left(policy: Policy, shared: Shared, monkeypatch: pytest.MonkeyPatch):
    engine = shared.get(policy)
    expected = draw(engine, policy)
    with monkeypatch.context() as hurried:
        hurried.setattr(engine, "deadline_s", 1e-9)
        with pytest.raises(EngineFailed, match=r"captioned 0 of 3 images after 1e-09 s; raise .*deadline_s"):
            draw(engine, policy)
    assert engine._llm.llm_engine.get_num_unfinished_requests() == 0
    assert torch.equal(draw(engine, policy).token_ids, expected.token_ids)


def test_a_step_that_fails_ends_the_run(policy: Policy, shared: Shared, monkeypatch: pytest.MonkeyPatch):
    engine = shared.get(policy)
    draw(engine, policy, 1)

    def fails() -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine._llm.llm_engine, "step", fails)
        with pytest.raises(EngineFailed, match=r"OutOfMemoryError: no memory.*gpu_memory_utilization"):
            draw(engine, policy)
    assert engine._llm.llm_engine.get_num_unfinished_requests() == 0


def test_captions_that_vllm_would_cut_are_refused(policy: Policy, shared: Shared):
    with pytest.raises(EngineFailed, match=r"sample 'img0\.png'.*make \d+ tokens, the limit of vLLM is 2048"):
        draw(shared.get(policy), policy, max_tokens=2048)


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_beyond_vllms_are_refused(policy: Policy, shared: Shared, temperature: float):
    with pytest.raises(EngineFailed, match=r"model\.sampling\.temperature: vLLM samples between"):
        draw(shared.get(policy), policy, temperature=temperature)


def test_an_engine_without_a_policy_says_so():
    engine = VLLMInProcess()
    with pytest.raises(RuntimeError, match="call attach and sync first"):
        engine.generate(mixed_batch(), None, 1, None)  # type: ignore[arg-type]
    engine.close()


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────


def test_greedy_captions_are_hfs_after_every_adapter_sync(load: Load, shared: Shared):
    policy = load(lora=ADAPTER)
    engine = shared.get(policy)
    base = draw(engine, policy, 1, top_p=1e-6)
    assert torch.equal(base.token_ids, likeliest(policy).token_ids)
    said = {str(base.captions)}
    for version in range(1, 4):
        before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        update(policy, seed=version)
        engine.sync(policy, version)
        rollouts = draw(engine, policy, 1, top_p=1e-6)
        expected = likeliest(policy)
        assert torch.equal(rollouts.token_ids, expected.token_ids)
        assert rollouts.weights_version == version
        torch.testing.assert_close(rollouts.sampler_logps, expected.sampler_logps, atol=2e-3, rtol=0)
        said.add(str(expected.captions))
        changed = [n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])]
        assert all("lora_" in name for name in changed), "the engine scales its own copy"
    assert len(said) == 4


def test_an_adapter_samples_with_the_policys_log_probs(load: Load, shared: Shared):
    policy = load(lora=ADAPTER)
    update(policy, seed=0)
    rollouts = draw(shared.get(policy), policy, 4)
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)
    with policy.model.disable_adapter():
        base = own_logps(policy, rollouts)
    assert (rollouts.sampler_logps - base).abs().max() > 0.1


def test_a_module_that_vllm_cannot_adapt_is_named(
    load: Load, shared: Shared, monkeypatch: pytest.MonkeyPatch
):
    policy = load(lora=ADAPTER)
    engine = shared.get(policy)
    draw(engine, policy, 1)

    @contextmanager
    def of_another_layer(policy: Policy, root: str | None) -> Iterator[str]:
        with weight_files(policy, root) as folder:
            tensors = load_file(f"{folder}/adapter_model.safetensors")
            tensors = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in tensors.items()}
            save_file(tensors, f"{folder}/adapter_model.safetensors")
            yield folder

    monkeypatch.setattr("balcap.rollout.vllm.inprocess.weight_files", of_another_layer)
    with pytest.raises(EngineFailed, match=r"vLLM cannot adapt .*layers\.9.*target_modules"):
        engine.sync(policy, 1)
    with pytest.raises(EngineFailed, match="holds weights of version None, the policy is at 1"):
        draw(engine, policy, 1)

"""vLLM servers on loopback: what they sample, and whose weights they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.client import CHAT, Server
from balcap.rollout.vllm.requests import chat_settings
from balcap.rollout.vllm.server import VLLMServer
from tests.rollout.test_hf_generate import check_ends
from tests.rollout.with_vllm.server_fixtures import LORA, LORA_PIXELS, Pool, pool  # noqa: F401
from tests.rollout.with_vllm.support import (
    Load,
    draw,
    everything_trained,
    likeliest,
    louder,
    own_logps,
    update,
)
from tests.tiny_models import batch_of, picture, several_images

Connect = Callable[..., VLLMServer]


@pytest.fixture(scope="module")
def family() -> str:
    return "qwen"


@pytest.fixture
def connect(pool: Pool) -> Iterator[Connect]:  # noqa: F811
    """`connect(policy, servers=2)`: an engine on servers that hold this policy's weights as version 0."""
    engines = []

    def connect(policy: Policy, servers: int = 2) -> VLLMServer:
        chosen = pool.get("lora") if policy.has_adapter else pool.get("full", servers)
        engines.append(VLLMServer([server.url for server in chosen], start_timeout_s=10, deadline_s=60))
        engines[-1].attach(policy)
        with everything_trained(policy):
            engines[-1].sync(policy, 0)
        return engines[-1]

    yield connect
    for engine in engines:
        engine.close()


@pytest.fixture
def policy(load: Load) -> Policy:
    """Fully tuned; its captions end early and late."""
    policy = load(freeze_vision=False)
    louder(policy, [policy.encoder.tokenizer.eos_token_id], 2.0)
    return policy


def with_adapter(load: Load) -> Policy:
    return load(lora=LoraSettings(**LORA), max_pixels=LORA_PIXELS)


# ── captions ─────────────────────────────────────────────────────────────────────────────────────────


def test_captions_end_where_they_must_and_log_probs_are_the_policys(policy: Policy, connect: Connect):
    reported: list[tuple[int, list[str]]] = []
    rollouts = draw(
        connect(policy),
        policy,
        8,
        max_tokens=10,
        on_group_done=lambda row, texts: reported.append((row, list(texts))),
    )
    assert rollouts.token_ids.shape[:2] == (3, 8)
    assert rollouts.truncated.any()
    assert not rollouts.truncated.all()
    check_ends(policy, rollouts, 10)
    assert len(set(rollouts.captions[0])) > 4, "the captions of an image are drawn apart"
    assert dict(reported) == dict(enumerate(rollouts.captions))
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_two_servers_share_images_of_many_sizes(
    policy: Policy, connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    sizes = [(56, 56), (112, 112), (40, 170), (200, 90), (64, 64), (100, 70), (33, 60), (90, 90)]
    batch = batch_of([picture(w, h, seed=i) for i, (w, h) in enumerate(sizes)], ["Go", "What is this?"] * 4)
    engine = connect(policy)
    asked: list[str] = []
    ask = Server.ask

    async def counted(server: Server, path: str, body: Any = None) -> Any:
        asked.extend([server.url] if path == CHAT else [])
        return await ask(server, path, body)

    monkeypatch.setattr(Server, "ask", counted)
    rollouts = draw(engine, policy, 2, batch)
    assert sorted(set(asked)) == sorted(engine.urls)
    assert len(asked) == 8
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_rows_of_several_images_are_sampled_as_the_policy_sees_them(policy: Policy, connect: Connect):
    rollouts = draw(connect(policy), policy, 2, several_images())
    torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=0)


def test_the_seed_decides(policy: Policy, connect: Connect):
    engine = connect(policy)
    engine.per_request_seeds = True
    first, again, other = (draw(engine, policy, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.token_ids, again.token_ids)
    assert not torch.equal(first.token_ids, other.token_ids)
    twins = batch_of([picture(60, 60)] * 2, ["Go"] * 2)
    drawn = draw(engine, policy, 4, twins)
    assert not torch.equal(drawn.token_ids[0], drawn.token_ids[1]), "each image has a seed of its own"


def test_banned_tokens_are_never_sampled(policy: Policy, connect: Connect, monkeypatch: pytest.MonkeyPatch):
    banned = policy.encoder.banned_token_ids
    louder(policy, banned, 300.0)  # by far more than a logit_bias of -100 takes away
    engine = connect(policy, servers=1)
    for top_p in (1.0, 0.5):
        rollouts = draw(engine, policy, 8, top_p=top_p)
        assert not torch.isin(rollouts.token_ids[rollouts.completion_mask], torch.tensor(banned)).any()
        # log-probs are those before the ban, as in training
        torch.testing.assert_close(rollouts.sampler_logps, own_logps(policy, rollouts), atol=2e-3, rtol=1e-4)
    assert rollouts.sampler_logps.min() < -100
    monkeypatch.setattr("balcap.rollout.vllm.requests.banned_words", lambda encoder: [])
    unbanned = draw(engine, policy, 8, max_tokens=1).token_ids
    assert torch.isin(unbanned, torch.tensor(banned)).float().mean() > 0.3, "the ban did it"


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_after_each_full_sync_servers_are_as_greedy_as_the_policy(
    load: Load, connect: Connect, freeze_vision: bool
):
    policy = load(freeze_vision=freeze_vision)
    engine = connect(policy)
    seen = [likeliest(policy).token_ids]
    for version in (1, 2):
        update(policy, seed=version)
        engine.sync(policy, version)
        rollouts = draw(engine, policy, 1, top_p=1e-6)
        seen.append(likeliest(policy).token_ids)
        assert torch.equal(rollouts.token_ids, seen[-1])
        assert rollouts.weights_version == version
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_after_each_sync_of_an_adapter_the_server_is_as_greedy_as_the_policy(load: Load, connect: Connect):
    policy = with_adapter(load)
    engine = connect(policy)
    seen = [likeliest(policy).token_ids]
    for version in (1, 2):
        update(policy, seed=version)
        engine.sync(policy, version)
        rollouts = draw(engine, policy, 1, top_p=1e-6)
        seen.append(likeliest(policy).token_ids)
        assert torch.equal(rollouts.token_ids, seen[-1])
        assert rollouts.weights_version == version
        sampled = draw(engine, policy, 4)
        check_ends(policy, sampled, 8)
        torch.testing.assert_close(sampled.sampler_logps, own_logps(policy, sampled), atol=2e-3, rtol=0)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_another_run_took_is_caught_and_can_be_taken_back(policy: Policy, connect: Connect):
    first, second = connect(policy), connect(policy, servers=1)
    with pytest.raises(EngineFailed, match=f"{second.urls[0]} does not hold .*another run"):
        draw(first, policy)
    assert draw(second, policy).weights_version == 0
    first.sync(policy, 3)
    assert draw(first, policy).weights_version == 3


def test_another_chat_template_is_caught(policy: Policy, connect: Connect):
    engine = connect(policy, servers=1)
    policy.encoder.processor.chat_template = policy.encoder.processor.chat_template.replace(
        "helpful", "quick"
    )
    with pytest.raises(EngineFailed, match=r"sample 'img\d\.png': vLLM's prompt differs"):
        draw(engine, policy)


def test_images_that_would_be_scaled_otherwise_are_caught_at_once(load: Load, connect: Connect):
    with pytest.raises(EngineFailed, match=r"scales images otherwise .*--mm-processor-kwargs .*3136"):
        connect(load(max_pixels=56**2))


def test_a_server_without_room_for_an_adapter_is_caught(load: Load, pool: Pool):  # noqa: F811
    engine = VLLMServer([pool.get("full")[0].url], start_timeout_s=10)
    with pytest.raises(EngineFailed, match="no room for an adapter of rank 4"):
        engine.attach(load(lora=LoraSettings(**LORA)))
    engine.close()


def test_the_servers_own_words_are_passed_on(
    policy: Policy, connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    engine = connect(policy, servers=1)
    monkeypatch.setattr(
        "balcap.rollout.vllm.server.chat_settings",
        lambda *args: [one | {"max_tokens": -1} for one in chat_settings(*args)],
    )
    with pytest.raises(
        EngineFailed, match=r"/v1/chat/completions with HTTP 400: max_tokens must be at least 1"
    ):
        draw(engine, policy)

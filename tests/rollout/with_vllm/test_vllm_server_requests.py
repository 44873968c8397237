"""What is asked of servers, what becomes of their answers, and what a failing one says. The servers have no model."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout import RolloutEngine
from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.client import Server
from balcap.rollout.vllm.server import VLLMServer
from balcap.types import CaptionBatch
from tests.rollout.with_vllm.server_fixtures import LORA, FakeServer, FakeWorker, free_port
from tests.rollout.with_vllm.support import Load, draw
from tests.tiny_models import batch_of, mixed_batch, picture, several_images

CHAT = "/v1/chat/completions"
Connect = Callable[..., VLLMServer]


@pytest.fixture(scope="module")
def family() -> str:
    return "qwen"


@pytest.fixture
def policy(load: Load) -> Policy:
    return load()


def speaks_for(policy: Policy, batch: CaptionBatch) -> FakeServer:
    """A server whose prompts are the policy's own."""
    fake = FakeServer(policy.source, tokens=(20, 21, policy.encoder.tokenizer.eos_token_id))
    for question, item in zip(batch.prompts, policy.encode(batch).items, strict=True):
        fake.prompt_ids[question] = item["input_ids"][0].tolist()
    return fake


@pytest.fixture
def fakes(policy: Policy) -> Iterator[list[FakeServer]]:
    servers = [speaks_for(policy, mixed_batch()) for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def connect(policy: Policy, fakes: list[FakeServer]) -> Iterator[Connect]:
    """`connect(**init_args)`: an engine on both servers, synced."""
    engines = []

    def connect(synced: Policy = policy, **init_args: Any) -> VLLMServer:
        init_args = {"start_timeout_s": 5, "deadline_s": 20, "urls": [f.url for f in fakes]} | init_args
        engines.append(VLLMServer(**init_args))
        engines[-1].attach(synced)
        engines[-1].sync(synced, 4)
        return engines[-1]

    yield connect
    for engine in engines:
        engine.close()


def asked(fakes: list[FakeServer]) -> list[dict[str, Any]]:
    """All requests for captions, in the order of mixed_batch."""
    found = [body for fake in fakes for body in fake.seen.get(CHAT, [])]
    order = mixed_batch().prompts
    return sorted(found, key=lambda body: order.index(body["messages"][0]["content"][1]["text"]))


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_draws_from_the_policys_distribution_and_nothing_else(
    connect: Connect, policy: Policy, fakes: list[FakeServer]
):
    policy.encoder.switches = {"enable_thinking": False}  # of a template that knows it
    engine = connect()
    assert isinstance(engine, RolloutEngine)
    assert not engine.on_policy
    draw(engine, policy, 3, top_p=0.9, max_tokens=12)
    bodies, batch = asked(fakes), mixed_batch()
    assert len(bodies) == 3
    tokenizer = policy.encoder.tokenizer
    for body, (image,) in zip(bodies, batch.images, strict=True):
        plain = {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        plain |= {
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": 12,
            "n": 3,
            "min_tokens": 0,
        }
        assert {name: body[name] for name in plain} == plain
        assert sorted(body["stop_token_ids"]) == sorted(policy.model.generation_config.eos_token_id)
        assert body["ignore_eos"]
        assert "logit_bias" not in body, "the endpoint would weaken it"
        assert tokenizer.convert_tokens_to_ids(body["bad_words"]) == policy.encoder.banned_token_ids
        assert (body["logprobs"], body["top_logprobs"], body["return_token_ids"]) == (True, 0, True)
        assert "mm_processor_kwargs" not in body, "servers refuse them"
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert (sent.mode, sent.size, sent.tobytes()) == ("RGB", image.size, image.tobytes())
    assert not any("seed" in body for body in bodies), "they would slow vLLM's sampler down"


def test_seeds_that_are_asked_for_follow_torchs(connect: Connect, policy: Policy, fakes: list[FakeServer]):
    engine = connect(per_request_seeds=True)
    seeds = []
    for seed in (1, 1, 2):
        for fake in fakes:
            fake.seen.clear()
        draw(engine, policy, seed=seed)
        seeds.append([body["seed"] for body in asked(fakes)])
    assert len(set(seeds[0])) == 3, "each image has a seed of its own"
    assert seeds[0] == seeds[1]
    assert not set(seeds[0]) & set(seeds[2])


def test_an_adapter_is_asked_for_by_name(load: Load, connect: Connect, fakes: list[FakeServer]):
    policy = load(lora=LoraSettings(**LORA))
    make_room(fakes, rank=4)
    draw(connect(policy), policy)
    assert {body["model"] for body in asked(fakes)} == {"balcap"}


def make_room(fakes: list[FakeServer], rank: int | None) -> None:
    """For adapters up to this rank."""
    for worker in (worker for fake in fakes for worker in fake.workers):
        worker.vllm_config.lora_config = None if rank is None else SimpleNamespace(max_lora_rank=rank)


def test_what_else_an_image_file_says_does_not_travel():
    from balcap.rollout.vllm.requests import data_url

    image = picture(30, 20).convert("P")
    image.info["transparency"] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.info["exif"] = exif.tobytes()
    url = data_url(image)
    got = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert got.info == {}
    assert (got.mode, got.tobytes()) == ("RGB", image.convert("RGB").tobytes())


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────


def test_answers_become_rollouts_and_are_reported_as_they_come(
    connect: Connect, policy: Policy, fakes: list[FakeServer]
):
    reported: list[tuple[int, list[str]]] = []
    threads = set()

    def on_group_done(row: int, captions: Any) -> None:
        threads.add(threading.current_thread())
        reported.append((row, list(captions)))

    rollouts = draw(connect(), policy, 2, on_group_done=on_group_done)
    text = policy.encoder.tokenizer.decode([20, 21]).strip()
    assert sorted(reported) == [(row, [text, text]) for row in range(3)]
    assert threads == {threading.current_thread()}
    assert rollouts.captions == [[text, text]] * 3
    assert rollouts.lengths.tolist() == [[2, 2]] * 3
    assert rollouts.sampler_logps.tolist() == [[[-0.5] * 3] * 2] * 3
    assert rollouts.weights_version == 4


def test_servers_share_the_images(connect: Connect, policy: Policy, fakes: list[FakeServer]):
    batch = batch_of([picture(56, 56)] * 12, ["Go"] * 12)
    for fake in fakes:
        fake.prompt_ids["Go"] = policy.encode(batch).items[0]["input_ids"][0].tolist()
    fakes[1].delay_s = 0.5  # the busier one gets less
    draw(connect(concurrency=4), policy, batch=batch)
    counts = [len(fake.seen[CHAT]) for fake in fakes]
    assert sum(counts) == 12
    assert counts[1] >= 2
    assert counts[0] > counts[1]


def test_a_server_for_fewer_images_than_a_row_has_names_the_flag(connect: Connect, policy: Policy):
    with pytest.raises(
        EngineFailed, match=r"has 2 images, the vLLM server .* takes 1 .*--limit-mm-per-prompt '\{"
    ):
        draw(connect(), policy, batch=several_images())


def test_no_more_are_under_way_than_allowed_and_an_error_of_the_listener_ends_the_call(
    connect: Connect, policy: Policy, fakes: list[FakeServer]
):
    def on_group_done(row: int, captions: Any) -> None:
        raise ZeroDivisionError(row)

    for fake in fakes:
        fake.delay_s = 0.1
    engine = connect(concurrency=1)
    draw(engine, policy)
    assert max(fake.most_at_once for fake in fakes) == 1
    with pytest.raises(ZeroDivisionError):
        draw(engine, policy, on_group_done=on_group_done)
    assert len(draw(engine, policy).captions) == 3


def test_captions_that_are_missing_are_noticed(connect: Connect, policy: Policy, fakes: list[FakeServer]):
    engine = connect()
    answer = {"prompt_token_ids": [], "choices": []}
    for fake in fakes:
        fake.replies[CHAT] = (200, answer)
    with pytest.raises(EngineFailed, match=r"returned 0 captions .* asked for were 3"):
        draw(engine, policy)


# ── the check of prompts ─────────────────────────────────────────────────────────────────────────────


def test_another_prompt_is_caught_on_every_call(connect: Connect, policy: Policy, fakes: list[FakeServer]):
    engine = connect()
    draw(engine, policy)
    for fake in fakes:
        fake.prompt_ids = {question: [*ids[:5], 0, *ids[6:]] for question, ids in fake.prompt_ids.items()}
    with pytest.raises(EngineFailed, match=r"sample 'img\d\.png': vLLM's prompt differs .* from token 5 on"):
        draw(engine, policy)


# ── whose weights ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("held", "why"),
    [(None, "it was started anew since"), ("else-4", "another run"), ("own-3", "at version 3")],
)
def test_a_server_with_other_weights_is_caught(
    connect: Connect, policy: Policy, fakes: list[FakeServer], held: str | None, why: str
):
    engine = connect()
    fakes[1].workers[0]._balcap_version = held and held.replace("own", engine._run_id)
    with pytest.raises(EngineFailed, match=f"{fakes[1].url} does not hold the weights of version 4.*{why}"):
        draw(engine, policy)


def test_a_server_that_is_started_anew_meanwhile_is_caught(
    connect: Connect, policy: Policy, fakes: list[FakeServer]
):
    def on_group_done(row: int, captions: Any) -> None:
        fakes[0].workers = [FakeWorker(policy.source)]

    for fake in fakes:
        fake.delay_s = 0.3
    with pytest.raises(EngineFailed, match="it was started anew since"):
        draw(connect(concurrency=1), policy, on_group_done=on_group_done)


def test_without_a_sync_there_is_nothing_to_sample_from(policy: Policy, fakes: list[FakeServer]):
    engine = VLLMServer([fakes[0].url], start_timeout_s=5)
    with pytest.raises(RuntimeError, match="call attach and sync first"):
        draw(engine, policy)
    engine.attach(policy)
    with pytest.raises(RuntimeError, match="call attach and sync first"):
        draw(engine, policy)
    engine.close()
    engine.close()


# ── servers that are gone, slow, or refuse ───────────────────────────────────────────────────────────


def test_a_server_that_is_gone_at_start_is_waited_for_and_named(policy: Policy, fakes: list[FakeServer]):
    url = f"http://127.0.0.1:{free_port()}"
    engine = VLLMServer([url, fakes[0].url], start_timeout_s=1.5)
    fakes[0].replies["/health"] = (503, None)
    threading.Timer(1.2, fakes[0].replies.clear).start()  # this one is up in time
    start = time.monotonic()
    with pytest.raises(EngineFailed, match=rf"no vLLM server is up at {url} after 1\.5 s .*main\.py serve"):
        engine.attach(policy)
    assert 1.4 < time.monotonic() - start < 10
    VLLMServer([fakes[0].url], start_timeout_s=5).attach(policy)
    assert len(fakes[0].seen["/health"]) >= 2
    engine.close()


def test_a_server_that_goes_in_the_middle_ends_the_call(
    connect: Connect, policy: Policy, fakes: list[FakeServer]
):
    engine = connect(concurrency=2)
    fakes[0].hangs.add(CHAT)  # waits; its request must be given up
    fakes[1].drops.add(CHAT)
    start = time.monotonic()
    with pytest.raises(EngineFailed, match=f"the vLLM server {fakes[1].url} is gone .*Start it again"):
        draw(engine, policy)
    assert time.monotonic() - start < 5


def test_a_server_that_hangs_is_given_up_at_the_deadline(
    connect: Connect, policy: Policy, fakes: list[FakeServer]
):
    engine = connect(deadline_s=1.0)
    fakes[0].hangs.add(CHAT)
    start = time.monotonic()
    said = rf"no answer within model\.engine\.init_args\.deadline_s: 1 s .* {fakes[0].url} \(\d\)"
    with pytest.raises(EngineFailed, match=said) as caught:
        draw(engine, policy)
    assert time.monotonic() - start < 3
    assert fakes[1].url not in str(caught.value)


RPC, NOT_FOUND = "/collective_rpc", {"detail": "Not Found"}


@pytest.mark.parametrize(
    ("path", "status", "body", "said"),
    [
        (CHAT, 400, {"error": {"message": "too many tokens", "code": 400}}, "too many tokens"),
        (CHAT, 500, "no json", "no json"),
        (CHAT, 401, {"error": "Unauthorized"}, r"Unauthorized.*api_key_env"),
        ("/reset_mm_cache", 404, NOT_FOUND, r"Set VLLM_SERVER_DEV_MODE=1 .*main\.py serve"),
        (RPC, 404, NOT_FOUND, r"Set VLLM_SERVER_DEV_MODE=1 .*main\.py serve"),
        (
            RPC,
            500,
            {"error": {"message": "failed: no attribute"}},
            r"--worker-extension-cls balcap\..*WeightSync",
        ),
        ("/v1/load_lora_adapter", 404, NOT_FOUND, "Set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ("/v1/load_lora_adapter", 500, NOT_FOUND, "no --lora-modules of your own"),
    ],
)
def test_a_refusal_is_passed_on_and_says_how_to_start_the_server(
    load: Load, connect: Connect, fakes: list[FakeServer], path: str, status: int, body: Any, said: str
):
    policy = load(lora=LoraSettings(**LORA))
    make_room(fakes, rank=8)
    for fake in fakes:
        fake.replies[path] = status, body
    with pytest.raises(
        EngineFailed, match=rf"the vLLM server http://127.*{path}.* with HTTP {status}.*{said}"
    ):
        draw(connect(policy), policy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "other/model"}, r"serves .*other/model.*, but model\.policy\.model is"),
        ({"logprobs_mode": "processed_logprobs"}, "--logprobs-mode processed_logprobs; .*1.0 it must be raw"),
        ({"max_model_len": 20}, r"sample 'img0\.png': .* is 20; raise its --max-model-len"),
        (
            {"mm_processor_kwargs": None},
            r"scales images otherwise .*--mm-processor-kwargs '.\"size\": .\"shortest_edge\": 3136, ",
        ),
        ({"data_parallel_size": 2}, "--data-parallel-size 2; start that many servers"),
        ({"max_lora_rank": 2}, "no room for an adapter of rank 4 .*--max-lora-rank"),
        ({"lora_config": None}, "no room for an adapter of rank 4 .*--max-lora-rank"),
    ],
)
def test_a_server_that_does_not_fit_says_what_to_change(
    load: Load, connect: Connect, fakes: list[FakeServer], change: dict[str, Any], said: str
):
    policy = load(lora=LoraSettings(**LORA))
    make_room(fakes, rank=8)
    config = fakes[0].workers[0].vllm_config
    fakes[0].model = change.get("model", policy.source)
    for name, value in change.items():
        model = config.model_config
        parts = (config, model, model.multimodal_config, config.lora_config, config.parallel_config)
        setattr(next(part for part in parts if hasattr(part, name)), name, value)
    with pytest.raises(EngineFailed, match=said):
        draw(connect(policy), policy)


def test_a_quantised_server_is_for_adapters_alone(load: Load, connect: Connect, fakes: list[FakeServer]):
    make_room(fakes, rank=4)
    for fake in fakes:
        fake.workers[0].vllm_config.model_config.quantization = "fp8"
    draw(connect(load(lora=LoraSettings(**LORA))), load(lora=LoraSettings(**LORA)))
    with pytest.raises(EngineFailed, match=r"--quantization fp8; full tuning .*model\.policy\.lora"):
        connect(load())


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "hub/Qwen2.5-VL"])
def test_the_same_model_in_another_folder_is_taken(policy: Policy, fakes: list[FakeServer], name: str):
    policy.source = "/here/models/Qwen2.5-VL/"
    fakes[0].model = f"/there/{name}"
    engine = VLLMServer([fakes[0].url], start_timeout_s=5)
    engine.attach(policy)
    assert [server.about["max_model_len"] for server in engine._servers]  # it was asked, and fits
    engine.close()


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_key_is_sent_and_never_shown(
    connect: Connect,
    policy: Policy,
    fakes: list[FakeServer],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MY_SERVERS", "hunter22")
    engine = connect(api_key_env="MY_SERVERS")
    assert all(h.get("Authorization") == "Bearer hunter22" for fake in fakes for h in fake.headers)
    for fake in fakes:
        fake.replies[CHAT] = (403, {"error": {"message": "Bearer hunter22 may not do this"}})
    with pytest.raises(EngineFailed, match="may not do this") as caught:
        draw(engine, policy)
    assert "hunter22" not in str(caught.value)


def test_a_missing_key_names_its_variable(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_SERVERS", raising=False)
    engine = VLLMServer(["http://127.0.0.1:1"], api_key_env="MY_SERVERS")
    with pytest.raises(EngineFailed, match="environment variable MY_SERVERS is not set"):
        engine.attach(policy)
    engine.close()


def test_credentials_in_a_url_are_not_shown():
    server = Server("https://me:secret@host:8000/v1/")
    assert (server.url, server.name) == ("https://me:secret@host:8000", "https://host:8000")


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("init_args", "said"),
    [
        ({"urls": []}, r"urls: \[\] must name at least one server"),
        ({"urls": ["http://a", "http://a"]}, "each once"),
        ({"urls": ["a:8000"]}, r"urls: \['a:8000'\] must begin with http://"),
        ({"urls": ["http://a"], "deadline_s": 0}, "deadline_s: 0 must be above 0"),
        ({"urls": ["http://a"], "start_timeout_s": -1}, "start_timeout_s: -1 must be above 0"),
        ({"urls": ["http://a"], "concurrency": 0}, "concurrency: 0 must be above 0"),
    ],
)
def test_settings_out_of_range_are_named(init_args: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        VLLMServer(**init_args)

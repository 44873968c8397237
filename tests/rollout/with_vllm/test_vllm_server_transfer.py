"""Weights on their way to servers: packing, the process group, versions. The servers have no model, the transfer is real."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout import transfer
from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.server import VLLMServer
from balcap.rollout.vllm.weights import trained_weights
from tests.rollout.with_vllm.server_fixtures import LORA, FakeServer, FakeWorker
from tests.rollout.with_vllm.support import Load, update

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64]


@pytest.fixture(scope="module")
def family() -> str:
    return "qwen"


@pytest.fixture
def policy(load: Load) -> Policy:
    return load()


@pytest.fixture
def fakes(policy: Policy) -> Iterator[list[FakeServer]]:
    """Two servers, of two workers and of one."""
    servers = [FakeServer(policy.source, workers=2), FakeServer(policy.source, workers=1)]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def engine(policy: Policy, fakes: list[FakeServer]) -> Iterator[VLLMServer]:
    engine = VLLMServer([fake.url for fake in fakes], deadline_s=30, start_timeout_s=5)
    engine.attach(policy)
    yield engine
    engine.close()


def workers(fakes: list[FakeServer]) -> list[FakeWorker]:
    return [worker for fake in fakes for worker in fake.workers]


# ── packing ──────────────────────────────────────────────────────────────────────────────────────────


def some(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    drawn = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype) if dtype == torch.bool else drawn.to(dtype) * 3


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=12
    ),
    st.integers(1, 400),
)
def test_what_is_unpacked_is_what_was_packed(made: list[tuple[torch.dtype, list[int]]], limit: int):
    weights = [(f"w{i}", some(dtype, shape, i)) for i, (dtype, shape) in enumerate(made)]
    parts = transfer.buckets(weights, limit=limit)
    arrived = []
    for part, slots in zip(parts, transfer.announce(parts), strict=True):
        data = transfer.packed(part, torch.device("cpu"))
        assert data.nbytes == transfer.size_of(slots)
        assert data.nbytes <= limit or len([p for p in part if p.nbytes]) == 1
        arrived += transfer.unpacked(data, slots)
    assert [name for name, _ in arrived] == [name for name, _ in weights]
    for (_, sent), (_, got) in zip(weights, arrived, strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)


def test_wider_floats_are_rounded_before_they_travel_and_nothing_else():
    kinds = [torch.float32, torch.float16, torch.int64]
    weights = [
        (str(kind), torch.arange(3).to(kind) / 3 if kind.is_floating_point else torch.arange(3))
        for kind in kinds
    ]
    (part,) = transfer.buckets(weights, torch.bfloat16)
    assert [parcel.dtype for parcel in part] == [torch.bfloat16, torch.float16, torch.int64]
    data = transfer.packed(part, torch.device("cpu"))
    got = dict(transfer.unpacked(data, transfer.announce([part])[0]))
    assert torch.equal(got["torch.float32"], weights[0][1].bfloat16())
    (part,) = transfer.buckets([("half", torch.ones(2, dtype=torch.float16))], torch.float32)
    assert part[0].dtype == torch.float16, "widening is the receiver's business"


def test_strided_weights_arrive_whole():
    weight = torch.arange(12.0).view(3, 4).T
    (part,) = transfer.buckets([("w", weight)])
    data = transfer.packed(part, torch.device("cpu"))
    assert torch.equal(transfer.unpacked(data, transfer.announce([part])[0])[0][1], weight)


# ── full tuning ──────────────────────────────────────────────────────────────────────────────────────


def assert_holds(worker: FakeWorker, policy: Policy) -> None:
    own = dict(trained_weights(policy))
    assert worker.weights.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(worker.weights[name], tensor), name


def test_every_worker_gets_the_trained_weights_and_no_others(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer], monkeypatch: pytest.MonkeyPatch
):
    small = 20_000  # bytes: several buckets
    monkeypatch.setattr(
        "balcap.rollout.sender.buckets", lambda weights, dtype: transfer.buckets(weights, dtype, small)
    )
    for version in (0, 1, 5):
        update(policy, seed=version)
        engine.sync(policy, version)
        for worker in workers(fakes):
            assert_holds(worker, policy)
            assert not any("visual" in name for name in worker.weights), "the tower is frozen"
            assert worker.balcap_version() == version
            assert len(worker.weights) > 10
    asked = [body["method"] for body in fakes[0].seen["/collective_rpc"]]
    assert asked.count("balcap_join") == 1, "one group for all transfers"
    for fake in fakes:
        for cache in ("prefix", "mm", "encoder"):
            assert len(fake.seen[f"/reset_{cache}_cache"]) == 3


def test_weights_travel_in_the_servers_dtype(policy: Policy, fakes: list[FakeServer]):
    for worker in workers(fakes):
        worker.vllm_config.model_config.dtype = torch.bfloat16
    engine = VLLMServer([fake.url for fake in fakes], deadline_s=30, start_timeout_s=5)
    engine.attach(policy)
    engine.sync(policy, 0)
    for name, tensor in trained_weights(policy):
        assert torch.equal(workers(fakes)[2].weights[name], tensor.bfloat16())
    engine.close()


def test_a_cache_that_is_in_use_is_reset_again(policy: Policy, engine: VLLMServer, fakes: list[FakeServer]):
    states = iter([False, False, True])
    fakes[0]._reply, usual = (
        lambda path, body: {"success": next(states)} if path == "/reset_prefix_cache" else usual(path, body),
        fakes[0]._reply,
    )
    engine.sync(policy, 0)
    assert len(fakes[0].seen["/reset_prefix_cache"]) == 3


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────


def test_of_an_adapter_policy_only_the_adapter_travels(load: Load, fakes: list[FakeServer]):
    policy = load(lora=LoraSettings(**LORA))
    for worker in workers(fakes):
        worker.vllm_config.lora_config = type("Lora", (), {"max_lora_rank": 8, "lora_dtype": torch.float32})
    engine = VLLMServer([fake.url for fake in fakes], deadline_s=30, start_timeout_s=5)
    engine.attach(policy)
    for version in (0, 1):
        update(policy, seed=version)
        engine.sync(policy, version)
        for worker in workers(fakes):
            assert worker.adapter is not None
            assert not worker.weights
            config, tensors = worker.adapter
            assert (config["r"], config["lora_alpha"]) == (4, 128)
            mine = [p for p in policy.model.parameters() if p.requires_grad]
            assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in mine)
            assert sorted(float(t.sum()) for t in tensors.values()) == sorted(
                float(p.detach().sum()) for p in mine
            )
    assert [fake.adapters for fake in fakes] == [["balcap"]] * 2, "made known once"
    engine.close()


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_cannot_use_the_weights_is_told_of_and_the_next_sync_works(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    broken = fakes[0].workers[1]
    broken.fails_after = 3
    with pytest.raises(
        EngineFailed, match=rf"{fakes[0].url} could not run balcap_receive: KeyError.*no parameter"
    ):
        engine.sync(policy, 1)
    assert broken.balcap_version() == -1
    broken.fails_after = None
    engine.sync(policy, 2)
    assert {worker.balcap_version() for worker in workers(fakes)} == {2}


def test_a_version_that_differs_is_told_of(policy: Policy, engine: VLLMServer, fakes: list[FakeServer]):
    engine.sync(policy, 0)
    lying = fakes[1].workers[0]
    lying.balcap_version = lambda: 7  # type: ignore[method-assign]
    with pytest.raises(
        EngineFailed, match=rf"{fakes[1].url} reports weights of version \[7\] .* version 1 was sent"
    ):
        engine.sync(policy, 1)


def test_a_server_that_dies_during_a_transfer_is_named(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    dead = fakes[1]
    usual = dead._answer

    def die(request: Any) -> None:
        request.connection.close()
        if dead.workers[0]._balcap_group is not None:
            dead.workers[0]._balcap_group.leave()

    dead._answer = die  # type: ignore[method-assign]
    with pytest.raises(EngineFailed, match=f"{dead.url} is gone"):
        engine.sync(policy, 1)
    dead._answer = usual  # type: ignore[method-assign]
    dead.workers = [FakeWorker(0, 1, policy.source)]  # started again
    engine.sync(policy, 2)
    assert_holds(dead.workers[0], policy)


def test_a_trainer_that_leaves_in_the_middle_is_noticed_at_once(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    taken, waiting = fakes[1].workers[0], fakes[0].workers[0]
    taken._balcap_run = "another"  # it refuses; the others wait for the rest
    start = time.monotonic()
    with pytest.raises(
        EngineFailed, match=rf"{fakes[1].url} could not run balcap_receive.*joined another run"
    ) as kept:
        engine.sync(policy, 1)
    engine.sync(policy, 2)
    assert time.monotonic() - start < 10, "of a deadline of 30"
    assert waiting.balcap_version() == taken.balcap_version() == 2
    assert kept.value is not None


def test_a_transfer_that_hangs_ends_at_the_deadline(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    engine.deadline_s = 1.0
    fakes[1].hangs.add("/collective_rpc")
    with pytest.raises(
        EngineFailed,
        match=rf"did not reach .*{fakes[1].url} within model\.engine\.init_args\.deadline_s: 1 s",
    ):
        engine.sync(policy, 1)


def test_servers_that_cannot_reach_the_trainer_are_told_of(
    policy: Policy, engine: VLLMServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer, "JOIN_TIMEOUT_S", 1.0)
    engine.group_host = "127.0.0.2"  # where no port of this machine answers, once the store listens elsewhere
    monkeypatch.setattr(transfer, "open_store", refuse_elsewhere(transfer.open_store))
    with pytest.raises(
        EngineFailed, match=r"cannot form a process group \(gloo\) at 127\.0\.0\.2.*group_host"
    ):
        engine.sync(policy, 0)


def refuse_elsewhere(real: Any) -> Any:
    def open_store(host: str, port: int, serve: bool) -> Any:
        return real(host, port if serve or host != "127.0.0.2" else 1, serve)  # nothing listens on port 1

    return open_store


def test_nccl_without_gpus_names_the_setting(policy: Policy, fakes: list[FakeServer]):
    engine = VLLMServer([fakes[0].url], transfer_backend="nccl", start_timeout_s=5)
    engine.attach(policy)
    with pytest.raises(EngineFailed, match=r"model\.engine\.init_args\.transfer_backend: NCCL needs CUDA"):
        engine.sync(policy, 0)
    engine.close()


def test_a_worker_that_has_not_joined_says_so():
    request = {"run": "r", "version": 0, "announced": [], "adapter": None}
    answer = FakeWorker(0, 1, "m").balcap_receive(json.dumps(request))
    assert answer["kind"] == "RuntimeError"
    assert "started anew" in answer["error"]

"""Weights on their way to servers, which have no model here: what arrives, whose version, and what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.server import VLLMServer
from balcap.rollout.vllm.weights import trained_weights
from tests.rollout.with_vllm.server_fixtures import LORA, FakeServer, FakeWorker
from tests.rollout.with_vllm.support import Load, update


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


def assert_holds(worker: FakeWorker, policy: Policy) -> None:
    own = dict(trained_weights(policy))
    assert worker.weights.keys() == own.keys()
    assert len(own) > 10
    for name, tensor in own.items():
        assert torch.equal(worker.weights[name], tensor), name


def test_every_worker_gets_the_trained_weights_and_no_others(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    for version in (0, 1, 5):
        update(policy, seed=version)
        engine.sync(policy, version)
        for worker in workers(fakes):
            assert_holds(worker, policy)
            assert not any("visual" in name for name in worker.weights), "the tower is frozen"
            assert worker._balcap_version == f"{engine._run_id}-{version}"
    for fake in fakes:
        for cache in ("prefix", "mm", "encoder"):
            assert len(fake.seen[f"/reset_{cache}_cache"]) == 3


def test_of_an_adapter_policy_only_the_adapter_travels(
    load: Load, engine: VLLMServer, fakes: list[FakeServer]
):
    policy = load(lora=LoraSettings(**LORA))
    for version in (0, 1):
        update(policy, seed=version)
        engine.sync(policy, version)
        mine = sorted(float(p.detach().sum()) for p in policy.model.parameters() if p.requires_grad)
        for worker in workers(fakes):
            assert worker.adapter is not None
            assert not worker.weights
            config, tensors = worker.adapter
            assert (config["r"], config["lora_alpha"]) == (4, 128)
            assert sorted(float(t.sum()) for t in tensors.values()) == mine
    assert [fake.adapters for fake in fakes] == [["balcap"]] * 2, "made known once"


def test_a_cache_that_is_in_use_is_reset_again(policy: Policy, engine: VLLMServer, fakes: list[FakeServer]):
    states, usual = iter([False, False, True]), fakes[0]._reply
    fakes[0]._reply = lambda path, body: (  # type: ignore[method-assign]
        {"success": next(states)} if path == "/reset_prefix_cache" else usual(path, body)
    )
    engine.sync(policy, 0)
    assert len(fakes[0].seen["/reset_prefix_cache"]) == 3


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_cannot_use_the_weights_is_named_and_the_next_sync_works(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    broken = fakes[0].workers[1]
    broken.fails = "no parameter is called so"
    with pytest.raises(EngineFailed, match=rf"{fakes[0].url} answers .*balcap_load_folder.*no parameter is"):
        engine.sync(policy, 1)
    assert broken._balcap_version is None
    broken.fails = None
    engine.sync(policy, 2)
    assert {worker._balcap_version for worker in workers(fakes)} == {f"{engine._run_id}-2"}


def test_a_worker_that_holds_another_version_after_a_sync_is_named(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    lying = fakes[1].workers[0]
    lying.balcap_load_folder = lambda folder, version: None  # type: ignore[method-assign]
    with pytest.raises(EngineFailed, match=rf"{fakes[1].url} does not hold the weights of version 1 "):
        engine.sync(policy, 1)


def test_servers_that_cannot_see_the_folder_are_named_with_the_setting(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    elsewhere = fakes[1].workers[0]
    load = elsewhere.balcap_load_folder
    elsewhere.balcap_load_folder = lambda folder, version: load(f"{folder}-elsewhere", version)  # type: ignore[method-assign]
    with pytest.raises(EngineFailed, match=rf"{fakes[1].url} .*No such file.*init_args\.weights_folder"):
        engine.sync(policy, 0)


def test_a_folder_that_cannot_be_written_is_named(policy: Policy, engine: VLLMServer):
    engine.weights_folder = "/nowhere/at/all"
    with pytest.raises(EngineFailed, match=r"init_args\.weights_folder: weights cannot be written.*nowhere"):
        engine.sync(policy, 0)


def test_a_server_that_dies_during_a_transfer_is_named(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.sync(policy, 0)
    fakes[1].drops.add("/collective_rpc")
    with pytest.raises(EngineFailed, match=f"{fakes[1].url} is gone"):
        engine.sync(policy, 1)
    fakes[1].drops.clear()
    fakes[1].workers = [FakeWorker(policy.source)]  # started again
    engine.sync(policy, 2)
    assert_holds(fakes[1].workers[0], policy)


def test_a_transfer_that_hangs_ends_at_the_deadline(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer]
):
    engine.deadline_s = 1.0
    fakes[1].hangs.add("/collective_rpc")
    said = rf"did not reach .*{fakes[1].url} within model\.engine\.init_args\.deadline_s: 1 s"
    with pytest.raises(EngineFailed, match=said):
        engine.sync(policy, 1)


# ── NCCL, without GPUs: vLLM's own transfer engine, with a queue for each worker in place of the broadcast ───────────


def test_nccl_without_gpus_names_the_setting(policy: Policy, engine: VLLMServer):
    engine.transfer_backend = "nccl"
    with pytest.raises(EngineFailed, match=r"model\.engine\.init_args\.transfer_backend: NCCL needs CUDA"):
        engine.sync(policy, 0)


@pytest.mark.parametrize(
    ("device", "backend", "started_for", "lora", "taken"),
    [
        ("cuda", "auto", "nccl", False, True),
        ("cuda", "auto", None, False, False),
        ("cuda", "folder", "nccl", False, False),
        ("cuda", "auto", "nccl", True, False),
        ("cpu", "auto", "nccl", False, False),
    ],
)
def test_nccl_is_taken_for_full_weights_between_gpus(
    device: str, backend: Any, started_for: str | None, lora: bool, taken: bool
):
    engine = VLLMServer(["http://a"], transfer_backend=backend)
    engine._servers = [SimpleNamespace(about={"device": "cuda", "weight_transfer": started_for})]  # type: ignore[list-item]
    about = {"device": torch.device(device), "has_adapter": lora, "is_sharded": False}
    policy: Any = type("P", (), about)
    assert engine._uses_nccl(policy) is taken


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch, fakes: list[FakeServer]) -> Any:
    module = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine", reason="make test-vllm")
    monkeypatch.setattr(VLLMServer, "_uses_nccl", lambda engine, policy: True)
    monkeypatch.setattr(module, "open_trainer_endpoint", lambda info: object())

    def broadcast(engine: Any, source: Any, meta: Any) -> None:
        for item in engine._checked_iter(source, meta):
            for worker in workers(fakes):
                worker.incoming.put(item)

    monkeypatch.setattr(module.NCCLTrainerWeightTransferEngine, "_broadcast", broadcast)
    return module


def test_vllms_nccl_transfer_carries_the_trained_weights(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer], nccl: Any
):
    for version in (0, 1):
        update(policy, seed=version)
        engine.sync(policy, version)
        for worker in workers(fakes):
            assert_holds(worker, policy)
            assert worker._balcap_version == f"{engine._run_id}-{version}"
    joined = [worker.group for worker in workers(fakes)]
    # ranks: the trainer's is 0; a server adds its workers' own to the first of its ranks
    assert [group["rank_offset"] for group in joined] == [1, 1, 3]
    assert {group["world_size"] for group in joined} == {4}
    assert len({group["master_port"] for group in joined}) == 1, "one group for all transfers"


def test_a_server_that_fails_ends_an_nccl_transfer_that_waits_for_it(
    policy: Policy, engine: VLLMServer, fakes: list[FakeServer], nccl: Any, monkeypatch: pytest.MonkeyPatch
):
    over = threading.Event()
    monkeypatch.setattr(nccl.NCCLTrainerWeightTransferEngine, "_broadcast", lambda *args: over.wait(20))
    fakes[0].workers[0].fails = "no such weight"
    start = time.monotonic()
    with pytest.raises(EngineFailed, match=rf"{fakes[0].url} answers .*balcap_receive.*no such weight"):
        engine.sync(policy, 0)
    assert time.monotonic() - start < 10
    over.set()


def test_an_nccl_group_that_cannot_be_made_names_the_settings(
    policy: Policy, engine: VLLMServer, nccl: Any, monkeypatch: pytest.MonkeyPatch
):
    def refuse(info: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    monkeypatch.setattr(nccl, "open_trainer_endpoint", refuse)
    with pytest.raises(EngineFailed, match=r"by NCCL: NCCL error.*group_host.*transfer_backend: folder"):
        engine.sync(policy, 0)

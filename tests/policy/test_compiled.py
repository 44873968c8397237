"""Compiled decoder layers and head: the same numbers, and a way on where nothing compiles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from balcap.policy import PolicyConfig
from balcap.policy.compiled import Compiled, is_compiled
from balcap.policy.policy import Policy
from tests.tiny_models import mixed_batch, rollouts_of, tiny_qwen

Loaded = Callable[..., Policy]


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "failed", False)
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    tiny_qwen(tmp_path)

    def load(**options) -> Policy:
        return Policy.load(PolicyConfig(str(tmp_path), dtype="float32", **options), with_reference=False)

    return load


def outcome(policy: Policy, lengths: list[list[int]]) -> list[torch.Tensor]:
    """Log-probs, entropies and gradients."""
    rollouts = rollouts_of(mixed_batch(), lengths, range(20, 300))
    policy.model.zero_grad()
    logps, entropies = policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2], 0.9, entropy=True)
    logps.sum().backward()
    return [logps, entropies, *(p.grad for p in policy.model.parameters() if p.grad is not None)]


def test_compiled_updates_are_the_same(loaded: Loaded) -> None:
    plain, compiled = loaded(compile=False), loaded(compile=True)
    compiled.load_state_dict(plain.state_dict())
    lengths = [[3, 5, 9], [2, 4, 7], [6, 1, 8]]
    for mine, other in zip(outcome(compiled, lengths), outcome(plain, lengths), strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-6
    assert not Compiled.failed
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_what_cannot_be_compiled_goes_on_without_it(
    loaded: Loaded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    policy = loaded(compile=True)
    with caplog.at_level(logging.WARNING):
        found = outcome(policy, [[3, 5], [2, 4], [6, 1]])
    assert Compiled.failed
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["model.policy.compile"]
    monkeypatch.undo()
    plain = loaded(compile=False)
    for mine, other in zip(found, outcome(plain, [[3, 5], [2, 4], [6, 1]]), strict=True):
        torch.testing.assert_close(mine, other)


def test_errors_of_the_function_itself_are_not_swallowed() -> None:
    def wrong(tensor: torch.Tensor) -> torch.Tensor:
        raise ValueError("wrong")

    function = Compiled(wrong, wanted=True)
    function.compiled = wrong
    with pytest.raises(ValueError, match="wrong"):
        function(torch.zeros(1))
    assert not Compiled.failed


@pytest.mark.parametrize(
    ("wanted", "device", "so"), [(True, "cpu", True), (False, "cuda", False), ("auto", "cpu", False)]
)
def test_where_updates_are_compiled(wanted: bool | str, device: str, so: bool) -> None:
    assert is_compiled(wanted, device) is so


def test_other_forwards_are_not_compiled(loaded: Loaded) -> None:
    policy = loaded(compile=True)
    ids = torch.randint(20, 300, (1, 5))
    policy.model(input_ids=ids)
    assert not counters["stats"]

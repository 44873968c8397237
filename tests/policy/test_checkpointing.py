"""What is recomputed, and packed into a forward, on a device of which the test says how much is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from balcap.policy import LoraSettings, checkpointing
from balcap.policy.checkpointing import (
    MARGIN,
    DeviceFit,
    OutOfMemory,
    explained_out_of_memory,
    layers_to_checkpoint,
    room_for_forward,
)
from balcap.policy.families import base_of, family_of
from balcap.policy.memory import Forward, UpdateCosts, update_costs
from balcap.policy.policy import Policy
from balcap.trainer.update import OptimizerLoop, UpdateSettings, micro_batches, update
from tests.tiny_models import mixed_batch, rollouts_of

Load = Callable[..., Policy]
LENGTHS = [[3, 1, 5], [7, 2, 2], [4, 6, 1]]
ROWS = [0, 1, 2]
# 16 layers keep 100 bytes per token, 1 when checkpointed; nothing else costs anything.
COSTS = UpdateCosts(
    weights=0, reference=0, gradients=0, optimizer=0, optimizer_step=0, casts=0, layers=16, per_token=100, per_seen_key=0,
    apart=0, checkpointed=1, gradient=0, inference=0, outside=0, vocabulary=1, head_gradient=0, vision_pass=0, vision_kept=0,
    vision_checkpointed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "layers"),
    [
        (16_000, 0),  # 10 tokens * 16 layers * 100
        (15_999, 2),  # 10 * (14 * 100 + 2)
        (14_020, 2),
        (14_019, 4),  # in eighths
        (1_160, 16),  # 10 * 16, and one layer again: 10 * 100
        (0, 16),  # nothing fits, and less is not possible
    ],
)
def test_as_few_layers_as_fit(room: float, layers: int) -> None:
    forwards = [Forward(10, 0), Forward(3, 0)]
    assert layers_to_checkpoint(COSTS, forwards, room) == layers


def test_a_model_with_few_layers_has_fewer_steps() -> None:
    costs = replace(COSTS, layers=2)
    assert [layers_to_checkpoint(costs, [Forward(10, 0)], room) for room in (2000, 1999, 1009)] == [0, 1, 2]


def test_room_is_what_is_free_without_what_is_still_to_come() -> None:
    costs = replace(COSTS, gradients=10, optimizer=20)
    margin = MARGIN * 1000
    assert room_for_forward(costs, 500, 1000, 0, False) == 500 - 30 - margin
    assert room_for_forward(costs, 500, 1000, 10, True) == 500 - margin


def test_a_cpu_has_no_limit() -> None:
    assert checkpointing.device_memory(torch.device("cpu")) is None


# ── a policy ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`device(room)`: so many bytes are left for a forward, from now on."""

    def set_room(room: float) -> None:
        monkeypatch.setattr(checkpointing, "device_memory", lambda device: (0, 0))
        monkeypatch.setattr(checkpointing, "room_for_forward", lambda *_: room)

    return set_room


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(checkpointing, "rank_zero_info", lines.append)
    return lines


def flags(policy: Policy) -> list[bool]:
    return [
        layer.gradient_checkpointing
        for layer in family_of(policy.model).language_model(base_of(policy.model)).layers
    ]


def needs(policy: Policy, rollouts: Any, rows: Sequence[int] = ROWS) -> list[int]:
    """Bytes of a forward of these rows with 0, 1 and 2 layers checkpointed."""
    prompts, costs = policy.encode(rollouts.batch), update_costs(policy.model, "cpu")
    size, lengths = policy.size(rollouts, prompts, rows), [LENGTHS[row] for row in rows]
    ids = [prompts.items[row]["input_ids"] for row in rows]
    seen = sum(3 * (len(one[0]) + max(of_image)) for one, of_image in zip(ids, lengths, strict=True))
    forward = Forward(size.forwarded, sum(map(sum, lengths)), seen)
    return [costs.estimate(forward, m).forward for m in range(3)]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_memory_decides_and_changes_no_number(
    load: Load, device: Any, said: list[str], adapter: bool
) -> None:
    torch.manual_seed(0)
    policy = load(lora=LoraSettings(r=4) if adapter else None)
    policy.model.train()
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    prompts = policy.encode(rollouts.batch)
    none, some, every = needs(policy, rollouts)
    assert none > max(some, every)
    found = []
    for room, wanted in (
        (none, [False, False]),
        (none - 1, [True, False]),
        (some - 1, [True, True]),
        (0, [True, True]),
    ):
        device(room)
        DeviceFit(policy, rollouts, prompts).checkpoint([ROWS])
        assert flags(policy) == wanted
        calls = [0]
        hook = (
            family_of(policy.model)
            .language_model(base_of(policy.model))
            .layers[0]
            .mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        )
        policy.model.zero_grad()
        logps, _ = policy.logps(rollouts, prompts, ROWS)
        logps.sum().backward()
        hook.remove()
        assert calls == [1 + wanted[0]], "in backward a checkpointed layer runs once more"
        found.append((logps.detach(), [p.grad for p in policy.model.parameters() if p.grad is not None]))
    for logps, gradients in found[1:]:
        torch.testing.assert_close(logps, found[0][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-6, rtol=1e-6)
    # when it is first decided and when it changes, not at the last update, which changes nothing
    assert [line.split(";")[0] for line in said] == [
        f"gradient checkpointing: {n} of 2 layers" for n in range(3)
    ]


@pytest.mark.parametrize("choice", [True, False])
def test_what_the_config_says_stays(load: Load, device: Any, said: list[str], choice: bool) -> None:
    policy = load(gradient_checkpointing=choice)
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    for room in (0, 1e12):
        device(room)
        DeviceFit(policy, rollouts, policy.encode(rollouts.batch)).checkpoint([ROWS])
        assert flags(policy) == [choice] * 2
    assert not said


def packs(policy: Policy, rollouts: Any, tokens: Any = "auto") -> list[list[int]]:
    prompts = policy.encode(rollouts.batch)
    settings = UpdateSettings(max_tokens_per_forward=tokens)
    return list(
        micro_batches(policy, settings, rollouts, prompts, ROWS, DeviceFit(policy, rollouts, prompts))
    )


@pytest.mark.parametrize("choice", [True, False, "auto"])
def test_as_many_images_as_fit_are_forwarded_together(load: Load, device: Any, choice: Any) -> None:
    policy = load(gradient_checkpointing=choice)
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    assert packs(policy, rollouts) == [ROWS], "a CPU has no limit"
    checkpointed = 2 if choice is True else 0  # what is not always recomputed should not have to be
    whole, two = (needs(policy, rollouts, rows)[checkpointed] for rows in (ROWS, [0, 1]))
    assert whole > two
    for room, wanted in (
        (whole, [ROWS]),
        (whole - 1, [[0, 1], [2]]),
        (two - 1, [[0], [1, 2]]),
        (0, [[0], [1], [2]]),
    ):
        device(room)
        if wanted == [[0], [1, 2]] and needs(policy, rollouts, [1, 2])[checkpointed] > room:
            wanted = [[0], [1], [2]]
        assert packs(policy, rollouts) == wanted
        assert packs(policy, rollouts, None) == [ROWS]


def test_an_unknown_architecture_is_checkpointed_image_by_image(
    load: Load, device: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device(1e12)
    monkeypatch.setattr(checkpointing, "update_costs", lambda *_, **__: None)
    policy = load()
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    assert packs(policy, rollouts) == [[0], [1], [2]]
    DeviceFit(policy, rollouts, policy.encode(rollouts.batch)).checkpoint([[0], [1], [2]])
    assert flags(policy) == [True, True]
    assert said == ["gradient checkpointing: 2 of 2 layers; of an unknown architecture"]


# ── whole updates ────────────────────────────────────────────────────────────────────────────────────


def updated(policy: Policy) -> tuple[list[torch.Tensor], float]:
    """Gradients and loss of one update by `balcap.trainer.update.update`, with the settings' defaults."""
    rollouts = rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    loop = OptimizerLoop(
        optimizer, None, torch.Tensor.backward, lambda _: None, nullcontext, lambda x: x[None]
    )
    advantages = torch.tensor([[1.0, -1.0, 0.5]] * 3)
    tally = update(policy, UpdateSettings(), rollouts, policy.encode(rollouts.batch), advantages, loop)
    return [p.grad for p in policy.model.parameters() if p.grad is not None], tally.means()["loss"]


def test_an_update_decides_and_learns_the_same(load: Load, device: Any) -> None:
    policy = load()
    gradients, loss = updated(policy)
    assert flags(policy) == [False, False]
    gradients = [gradient.clone() for gradient in gradients]
    device(0)
    found, found_loss = updated(policy)
    assert flags(policy) == [True, True]
    assert found_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(found, gradients, atol=1e-6, rtol=1e-5)


def test_an_update_that_does_not_fit_says_what_to_change(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Policy, "logps", fail)
    keys = "gradient_checkpointing: true, max_tokens_per_forward, max_pixels, num_captions, 2.00 GiB"
    with pytest.raises(OutOfMemory, match=keys.replace(", ", ".*")):
        updated(load())


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained_out_of_memory():
        raise RuntimeError("shape")
    assert issubclass(OutOfMemory, RuntimeError)


@pytest.mark.parametrize("value", ["auto", None, 100])
def test_tokens_may_be_a_number_auto_or_null(value: Any) -> None:
    assert UpdateSettings(max_tokens_per_forward=value).problems() == []


def test_no_tokens_are_no_limit() -> None:
    assert UpdateSettings(max_tokens_per_forward=0).problems() == [
        "model.max_tokens_per_forward: 0 must be at least 1"
    ]

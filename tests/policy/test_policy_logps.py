"""Log-probs of groups, padded or in one packed sequence, against HF's own forward of one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from balcap.policy import prompts as prompts_module
from balcap.policy.policy import Policy
from balcap.types import Rollouts
from tests.tiny_models import Alone, mixed_batch, rollouts_of

Load = Callable[..., Policy]
LENGTHS = [[3, 1, 5], [7, 2, 2], [4, 6, 1]]
ROWS = [0, 1, 2]
WORDS = range(20, 300)


@pytest.fixture(params=["shared prefix", "separate"])
def load_path(load: Load, request: pytest.FixtureRequest) -> Load:
    """The policy on both paths: one packed sequence, and every caption with its own prompt."""

    def loaded(**config: Any) -> Policy:
        return load(shared_prefix=request.param == "shared prefix", **config)

    return loaded


@pytest.fixture
def rollouts() -> Rollouts:
    return rollouts_of(mixed_batch(), LENGTHS, WORDS)


@pytest.fixture
def alone(family: str, folders: dict[str, Path]) -> Alone:
    return Alone(family, folders[family])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_padded_group_is_scored_as_each_example_alone(
    load_path: Load, alone: Alone, rollouts: Rollouts, temperature: float
):
    policy = load_path()
    prompts = policy.encode(rollouts.batch)
    assert len({item["input_ids"].shape[1] for item in prompts.items}) == 3, (
        "padding is exercised only where prompts differ in length"
    )
    logps, entropies = policy.logps(rollouts, prompts, ROWS, temperature, entropy=True)
    expected, expected_entropies = alone.logps(rollouts, temperature)
    assert logps.dtype == torch.float32
    assert not entropies.requires_grad
    for own, other in ((logps, expected), (entropies, expected_entropies)):  # of logits that were divided
        torch.testing.assert_close(own, other, atol=1e-5 / temperature, rtol=1e-6)


def test_any_subset_of_rows_in_any_order(load_path: Load, alone: Alone, rollouts: Rollouts):
    policy = load_path()
    prompts, (expected, _) = policy.encode(rollouts.batch), alone.logps(rollouts)
    for rows in ([2], [2, 0], [1, 1]):
        logps, entropies = policy.logps(rollouts, prompts, rows)
        assert entropies is None
        torch.testing.assert_close(logps, expected[rows], atol=1e-5, rtol=0)


def test_gradients_are_the_sum_of_single_examples(load_path: Load, alone: Alone, rollouts: Rollouts):
    policy = load_path(freeze_vision=False)
    policy.logps(rollouts, policy.encode(rollouts.batch), ROWS, 0.7)[0].sum().backward()
    alone.logps(rollouts, 0.7)[0].sum().backward()
    theirs = {name: p.grad for name, p in alone.model.named_parameters()}
    checked = 0
    for name, parameter in policy.model.named_parameters():
        if theirs[name] is None:  # CLIP's last layer, which LLaVA does not read
            assert parameter.grad is None
            continue
        error, size = (parameter.grad - theirs[name]).norm(), theirs[name].norm()
        # a key's bias moves all scores alike, so its true gradient is 0 and there is rounding only
        assert error <= 1e-4 * size + 1e-5, f"{name}: {error / size:.1e}"
        checked += size > 0
    assert checked > 30


def test_a_wrong_padding_side_would_be_noticed(
    load: Load, alone: Alone, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
):
    def pad_right(row: Tensor, width: int, fill: int) -> Tensor:
        return torch.nn.functional.pad(row, (0, width - row.shape[1]), value=fill)

    policy = load(shared_prefix=False)  # the path that pads prompts
    expected, _ = alone.logps(rollouts)
    monkeypatch.setattr(prompts_module, "_pad_left", pad_right)
    wrong, _ = policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)
    assert (wrong - expected)[[0, 2], :, 0].abs().min() > 1e-2
    torch.testing.assert_close(wrong[1], expected[1], atol=1e-5, rtol=0)  # the longest prompt has no padding


def test_a_missing_mask_or_image_would_be_noticed(
    load: Load, alone: Alone, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
):
    policy = load(shared_prefix=False)
    prompts, (expected, _) = policy.encode(rollouts.batch), alone.logps(rollouts)
    original = prompts_module.Prompts.inputs

    def tampered(change: Callable[[dict[str, Tensor]], None]) -> Tensor:
        def inputs(self: prompts_module.Prompts, *args: object) -> dict[str, Tensor]:
            out = original(self, *args)
            change(out)
            return out

        monkeypatch.setattr(prompts_module.Prompts, "inputs", inputs)
        return policy.logps(rollouts, prompts, ROWS)[0]

    assert (tampered(lambda x: x["attention_mask"].fill_(1)) - expected)[0].abs().max() > 1e-2
    assert (tampered(lambda x: x["pixel_values"].zero_()) - expected).abs().amax((1, 2)).min() > 1e-2


def test_positions_in_one_dimension_would_be_noticed(
    load: Load, family: str, alone: Alone, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
):
    if family == "llava":
        pytest.skip("LLaVA's positions have one dimension")
    policy = load(shared_prefix=False)
    prompts, (expected, _) = policy.encode(rollouts.batch), alone.logps(rollouts)
    for item in prompts.items:
        item.pop("mm_token_type_ids")  # without it Qwen2.5-VL counts image tokens like words
    flat, _ = policy.logps(rollouts, prompts, ROWS)
    assert (flat - expected).abs().amax((1, 2)).min() > 1e-2


def test_an_empty_caption_scores_nothing(load_path: Load, rollouts: Rollouts):
    policy = load_path()
    prompts = policy.encode(rollouts.batch)
    full, _ = policy.logps(rollouts, prompts, [0])
    rollouts.completion_mask[0, 1] = False
    logps, entropies = policy.logps(rollouts, prompts, [0], entropy=True)
    assert torch.equal(logps[0, 1], torch.zeros(7))
    assert torch.equal(entropies[0, 1], torch.zeros(7))
    torch.testing.assert_close(logps[0, [0, 2]], full[0, [0, 2]], atol=1e-5, rtol=0)
    rollouts.completion_mask[0] = False
    nothing, _ = policy.logps(rollouts, prompts, [0])
    assert torch.equal(nothing, torch.zeros(1, 3, 7))
    nothing.sum().backward()  # every rank must be able to take part in a backward pass


def test_what_stands_in_the_padding_does_not_matter(load_path: Load, rollouts: Rollouts):
    policy = load_path()
    prompts = policy.encode(rollouts.batch)
    expected, _ = policy.logps(rollouts, prompts, ROWS)
    rollouts.token_ids[~rollouts.completion_mask] = policy.encoder.image_token_id
    assert torch.equal(policy.logps(rollouts, prompts, ROWS)[0], expected)


def test_bfloat16_is_close(load_path: Load, rollouts: Rollouts):
    expected, _ = load_path().logps(rollouts, load_path().encode(rollouts.batch), ROWS)
    policy = load_path(dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    logps, entropies = policy.logps(rollouts, policy.encode(rollouts.batch), ROWS, entropy=True)
    assert logps.dtype == torch.float32
    assert logps.isfinite().all()
    assert entropies.isfinite().all()
    assert (logps - expected).abs().mean() < 0.1
    logps.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.model.parameters() if p.grad is not None)

"""Model FLOPs: against what PyTorch counts, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.families import base_of
from balcap.policy.flops import peak_flops, peak_memory, rollout_flops, update_flops
from balcap.policy.layout import Layout
from balcap.policy.policy import Policy
from tests.tiny_models import mixed_batch, rollouts_of

Load = Callable[..., Policy]
LENGTHS = [[9, 4, 9], [7, 7, 2], [4, 6, 8]]
ROWS = [0, 1, 2]


def layout_of(policy: Policy, prompts, lengths=LENGTHS) -> Layout:
    return Layout([item["input_ids"].shape[1] for item in prompts.items], lengths)


@pytest.mark.parametrize("lora", [None, LoraSettings(["q_proj", "down_proj"], r=4)], ids=["full", "lora"])
def test_matrix_products_of_the_language_model_are_those_that_pytorch_counts(load: Load, lora) -> None:
    policy = load(lora=lora)
    base, rollouts = base_of(policy.model), rollouts_of(mixed_batch(), LENGTHS, range(20, 300))
    prompts = policy.encode(rollouts.batch)
    policy.logps(rollouts, prompts, ROWS)  # image features are there now: the tower is frozen
    with FlopCounterMode(display=False) as counter:
        logps, _ = policy.logps(rollouts, prompts, ROWS)
        logps.sum().backward()
    ops = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in ops.items() if str(op) in ("aten.mm", "aten.addmm"))

    layout = layout_of(policy, prompts)
    text = base.config.get_text_config()
    pairs = sum(
        span.prompt * (span.prompt + 1) / 2 + sum(n * span.prompt + n * (n + 1) / 2 for n in span.captions)
        for span in layout.spans
    )
    attention = 3 * 4 * text.hidden_size * text.num_hidden_layers * pairs
    vision = update_flops(base, layout, prompts.items) - update_flops(base, layout, [])
    ours = update_flops(base, layout, prompts.items) - vision - attention
    # Below the first adapter nothing needs a gradient, which the formula does not know.
    assert products == pytest.approx(ours, rel=1e-12 if lora is None else 0.2)
    assert vision > 0


def test_a_rollout_by_hand(folders) -> None:
    base = Policy.load(PolicyConfig(str(folders["qwen"]), dtype="float32"), with_reference=False).model
    # A prompt of 5 tokens, captions of 3 and 1: forwarded 5 + 2 + 0 = 7, sampled 4.
    # Pairs: the prompt's 5 * 6 / 2 = 15, and of the longer caption's two tokens 2 * 5 + (1 + 2) = 13.
    layout = Layout([5], [[3, 1]])
    # Width 32, 4 heads of 8, keys and values of 2 heads (16), feed-forward 64, 2 layers.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    head = 32 * base.config.get_text_config().vocab_size
    language = 2 * 7 * weights + 2 * 4 * head + 4 * (4 * 8) * 2 * (15 + 13)
    assert rollout_flops(base, layout, []) == language
    # A picture of 4 x 4 patches of 2 * 3 * 14 * 14 values, a tower of the same width with 2 layers, one of them with
    # windows of 4 x 4 patches, and 4 patches together through a merger of 128 x 128 and 128 x 32.
    item = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    tower = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 3 * 14 * 14 * 32
    vision = 2 * (16 * tower + 4 * (128 * 128 + 128 * 32)) + 4 * 32 * 2 * 16**2
    assert rollout_flops(base, layout, [item]) == language + vision


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v"])
def test_matrix_products_of_a_tower_are_those_that_pytorch_counts(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), with_reference=False)
    base, prompts = base_of(policy.model), policy.encode(mixed_batch())
    family = policy.encoder.family
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.image_features(base, prompts.images(ROWS, policy.device))
    ops = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in ops.items() if str(op) in ("aten.mm", "aten.addmm", "aten.convolution"))
    patches = [int(item["image_grid_thw"].prod()) for item in prompts.items]
    attention = sum(4 * 32 * 2 * n**2 for n in patches)  # width 32, 2 layers
    assert sum(family.vision_flops(base, item) for item in prompts.items) == products + attention


def test_of_experts_those_that_are_chosen_are_counted(folder_of: Callable[[str], Path]) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of("glm4v_moe")), dtype="float32"), with_reference=False)
    base, layout = base_of(policy.model), Layout([5], [[3, 1]])  # 7 tokens, 4 of them sampled, 28 pairs
    # Width 32, 2 heads of 16, keys and values of 1 head. The first layer is dense, of width 64; in the second a token goes
    # through the router of 4 experts, 2 of them, and the one that all go through, of width 32 each.
    attention = 2 * 32 * 32 + 2 * 32 * 16
    weights = 2 * attention + 3 * 32 * 64 + 4 * 32 + 3 * (3 * 32 * 32)
    head = 32 * base.config.get_text_config().vocab_size
    language = 2 * 7 * weights + 2 * 4 * head + 4 * (2 * 16) * 2 * 28
    assert rollout_flops(base, layout, []) == language
    assert update_flops(base, layout, []) == 3 * language


def test_a_rollout_is_the_forward_of_an_update(load: Load) -> None:
    policy = load(freeze_vision=False)
    base, prompts = base_of(policy.model), policy.encode(mixed_batch())
    layout = layout_of(policy, prompts)
    # All is trained: forward, gradient of the input, gradient of the weight.
    forward = rollout_flops(base, layout, prompts.items)
    assert update_flops(base, layout, prompts.items) == pytest.approx(3 * forward)


def test_a_prompt_counts_once_and_a_trained_tower_three_times(load: Load) -> None:
    policy = load()
    base, prompts = base_of(policy.model), policy.encode(mixed_batch())
    whole = update_flops(base, layout_of(policy, prompts), prompts.items)
    apart = sum(
        update_flops(base, Layout([item["input_ids"].shape[1]], [[n]]), [item])
        for item, group in zip(prompts.items, LENGTHS, strict=True)
        for n in group
    )
    assert whole < 0.5 * apart
    frozen = whole - update_flops(base, layout_of(policy, prompts), [])
    trained = load(freeze_vision=False)
    prompts = trained.encode(mixed_batch())
    layout = layout_of(trained, prompts)
    tower = update_flops(base_of(trained.model), layout, prompts.items)
    tower -= update_flops(base_of(trained.model), layout, [])
    assert tower == pytest.approx(3 * frozen)


def test_peaks_are_known_or_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA T4": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(50_000_000)  # 200 MB
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > held.nbytes


def test_an_unknown_architecture_has_no_count(load: Load) -> None:
    policy = load()
    base = base_of(policy.model)
    base.config.model_type = "git"
    layout = Layout([4], [[3, 2]])
    assert update_flops(base, layout, [{}]) is rollout_flops(base, layout, [{}]) is None

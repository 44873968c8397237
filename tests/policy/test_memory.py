"""Memory of an update: against what autograd keeps, and against what an H100 measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from balcap.policy import LoraSettings, PolicyConfig, attention, layout, varlen
from balcap.policy.compiled import Compiled
from balcap.policy.families import base_of, family_of
from balcap.policy.loading import prepare
from balcap.policy.memory import Forward, OptimizerCosts, update_costs
from balcap.policy.policy import Policy
from tests import varlen_reference
from tests.support import ROOT
from tests.tiny_models import mixed_batch, rollouts_of

Load = Callable[..., Policy]
ROWS = [0, 1, 2]
SIZES = yaml.safe_load((ROOT / "perf/models.yaml").read_text())


def kept_by_the_language_model(policy: Policy, rollouts: Any, autocast: bool) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    language, inside, kept = family_of(policy.model).language_model(base_of(policy.model)), [False], {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    prompts = policy.encode(rollouts.batch)
    with torch.no_grad():
        policy.logps(rollouts, prompts, ROWS)  # image features are there now: the tower is frozen
    language.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    language.register_forward_hook(lambda *_: inside.__setitem__(0, False))

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that its address stays its own
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy.logps(rollouts, prompts, ROWS)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bf16-mixed"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("shared", "device"), [(True, "cpu"), (True, "cuda"), (False, "cpu")], ids=["shared", "cuda", "separate"]
)
def test_activations_are_those_that_autograd_keeps(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
    device: str,
    adapter: bool,
    dtype: str,
    checkpointing: bool,
) -> None:
    """Those of a CUDA device by its attention, on a CPU."""
    autocast = dtype == "bf16-mixed"
    if device == "cuda":
        monkeypatch.setattr(layout, "has_varlen", lambda _: True)
        monkeypatch.setattr(varlen, "varlen_attn", varlen_reference.varlen_attn)
        monkeypatch.setattr(attention, "_merged", attention._varlen)
    policy = load(
        dtype="float32" if autocast else dtype,
        lora=LoraSettings(r=4) if adapter else None,
        gradient_checkpointing=checkpointing,
        shared_prefix=shared,
    )
    measured, estimate = measured_and_estimated(policy, device, autocast, checkpointing)
    error = 0.15 if device == "cpu" else 0.2  # a CPU's kernel repeats the keys of prompts
    assert measured == pytest.approx(estimate, rel=error)


def test_compiled_layers_keep_what_the_partitioner_leaves(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own choice of what is made again, the same on any device; no code is generated. Adapters are float32."""
    compile_with, backend = torch.compile, "aot_eager_decomp_partition"
    monkeypatch.setattr(
        torch, "compile", lambda function, **how: compile_with(function, backend=backend, **how)
    )
    monkeypatch.setattr(Compiled, "failed", False)
    torch._dynamo.reset()
    config = PolicyConfig(str(folders["qwen"]), lora=LoraSettings(r=4), compile=True)
    policy = Policy.load(config, with_reference=False)
    measured, estimate = measured_and_estimated(policy, "cpu", False, False)
    assert measured == pytest.approx(estimate, rel=0.08)
    assert not Compiled.failed
    plain = update_costs(policy.model, "cpu")
    assert update_costs(policy.model, "cpu", compiled=True).per_token < 0.8 * plain.per_token


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v", "qwen3_vl_moe", "internvl_qwen3_moe"])
def test_norms_of_queries_layers_that_are_one_and_experts_are_known(
    name: str, adapter: bool, folder_of: Callable[[str], Path]
) -> None:
    lora = LoraSettings(r=4) if adapter else None
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32", lora=lora), with_reference=False)
    measured, estimate = measured_and_estimated(policy, "cpu", False, False)
    assert measured == pytest.approx(estimate, rel=0.08)


def test_a_mixture_with_shared_experts_has_no_estimate(folder_of: Callable[[str], Path]) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of("glm4v_moe")), dtype="float32"), with_reference=False)
    assert update_costs(policy.model) is None


def measured_and_estimated(
    policy: Policy, device: str, autocast: bool, checkpointing: bool
) -> tuple[int, float]:
    """Bytes that autograd keeps, and activations by arithmetic."""
    policy.model.train()
    rollouts = rollouts_of(mixed_batch(), [[30, 20, 31], [28, 30, 30], [31, 31, 29]], range(60, 300))
    measured = kept_by_the_language_model(policy, rollouts, autocast)
    shared = policy.shared_prefix
    prompts = policy.encode(rollouts.batch)
    size, longest = policy.size(rollouts, prompts, ROWS), max(p["input_ids"].shape[1] for p in prompts.items)
    forward = Forward(size.forwarded, 260, 9 * (longest + 31) if shared else 0, shared_prefix=shared)
    costs = update_costs(policy.model, device, autocast, compiled=policy.is_compiled)
    estimate = costs.estimate(forward, costs.layers if checkpointing else 0)
    # Autocast's copies of the weights are kept as well, those in layers that are not checkpointed.
    layers = family_of(policy.model).language_model(base_of(policy.model)).layers.parameters()
    casts = sum(2 * p.numel() for p in layers if p.dim() > 1 and p.requires_grad)
    casts *= autocast and not checkpointing
    return measured, estimate.activations + casts


def of_size(size: str, lora: LoraSettings | None = None) -> Any:
    """A Qwen2.5-VL without its weights."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    text, vision = SIZES[size]["text"], SIZES[size]["vision"]
    tied = text.get("tie_word_embeddings", False)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        return prepare(model, PolicyConfig("meta", lora=lora))


# P 1312, of them 1280 of the image; 8 captions of 200 to 300 tokens, 250 on average
H100 = Forward.of_images(1, 1312, 1280, 8, 250)
FULL, LORA = ("3b", None), ("7b", LoraSettings())  # Qwen2.5-VL


def test_the_forward_of_images_that_are_alike() -> None:
    assert Forward(1312 + 8 * 249, 8 * 250, 8 * (1312 + 250), 1280) == H100, "the last token is not forwarded"
    assert Forward.of_images(2, 10, 6, 3, 5) == Forward(2 * (10 + 3 * 4), 30, 6 * 15, 12)
    assert Forward.of_images(2, 10, 6, 3, 5, False) == Forward(6 * 15, 30, 0, 36, shared_prefix=False)


@pytest.mark.parametrize(
    ("model", "compiled", "checkpointed", "measured"),
    [
        (FULL, False, True, 14.8),
        (FULL, False, False, 26.0),
        (FULL, True, True, 14.8),
        (FULL, True, False, 20.7),
        (LORA, False, True, 19.7),
        (LORA, False, False, 49.5),
        (LORA, True, True, 19.9),
        (LORA, True, False, 40.3),
    ],
)
def test_an_update_takes_what_an_h100_measured(
    model: Any, compiled: bool, checkpointed: bool, measured: float
) -> None:
    """Weights in bfloat16, adapters in float32; no optimizer. GB of one H100 80GB, docs/performance.md, 2026-11-27; the day
    before, checkpointed and not compiled, 14.7 and 19.6."""
    costs = update_costs(of_size(*model), compiled=compiled, optimizer=OptimizerCosts(0, 0))
    estimate = costs.estimate(H100, costs.layers if checkpointed else 0)
    peak = sum(estimate.peak(first=True).values()) / 1e9
    assert peak == pytest.approx(measured, rel=0.05)
    # All of an update but its first forward finds the gradients there; `auto` reckons with that.
    assert peak < estimate.resident / 1e9 + estimate.forward / 1e9


def test_what_does_not_depend_on_tokens_by_hand() -> None:
    # per layer: r (in + out) of q, o 2 * 64 * 7168, of k, v 2 * 64 * 4096, of gate, up, down 3 * 64 * 22528
    adapters = 28 * 64 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    costs = update_costs(of_size("7b", LoraSettings()))
    assert costs.gradients == 4 * adapters
    assert costs.optimizer == 8 * adapters
    assert costs.weights == pytest.approx(2 * 8.292e9 + 4 * adapters, rel=1e-3)
    assert costs.reference == costs.casts == costs.head_gradient == 0
    full = update_costs(of_size("3b"), autocast=True, with_reference=True)
    assert full.reference == full.weights == pytest.approx(2 * 3.755e9, rel=1e-3)
    assert full.casts == 0, "its weights are in 16 bits already"


def test_four_bits_are_counted_as_they_lie() -> None:
    model = of_size("7b", LoraSettings(r=32))
    lying, plain = update_costs(model, load_in_4bit=True), update_costs(model)
    embeddings = 2 * 152064 * 3584  # and the head, in 16 bits
    adapters = plain.gradients // 4
    linear = plain.weights / 2 - 2 * adapters - embeddings
    assert lying.weights == pytest.approx(0.516 * linear + 2 * embeddings + 4 * adapters, rel=2e-3)
    # The H100's 10.4 GB are of a whole step, sampling (of which the images are repeated) included.
    update = lying.estimate(Forward(670 + 6 * 319, 6 * 320, 6 * (670 + 320), image_tokens=640), lying.layers)
    assert 8.5e9 < update.total < 10.4e9


@pytest.mark.skipif(not Path("/proc").exists(), reason="bitsandbytes works on Linux")
def test_four_bit_weights_of_a_loaded_model(load: Load) -> None:
    pytest.importorskip("bitsandbytes")
    lora = LoraSettings(r=4)
    wanted = update_costs(load(lora=lora, dtype="bfloat16").model, "cpu", load_in_4bit=True)
    found = update_costs(load(lora=lora, dtype="bfloat16", load_in_4bit=True).model, "cpu")
    assert found.weights == pytest.approx(wanted.weights, rel=0.05)
    assert found.per_token == wanted.per_token


def test_parts_add_up_by_hand(load: Load) -> None:
    costs = update_costs(load().model, "cuda")
    forward = Forward(100, 60, 150)
    layer = 100 * costs.per_token + 150 * costs.per_seen_key
    none, half, whole = (costs.estimate(forward, count) for count in (0, 1, 2))
    assert none.activations == 2 * layer + 100 * costs.outside
    assert half.activations == layer + 100 * (costs.checkpointed + costs.outside)
    assert whole.activations == 100 * (2 * costs.checkpointed + costs.outside)
    assert none.head == 12 * 60 * costs.vocabulary + costs.head_gradient
    assert none.forward == none.activations + max(none.head, none.backward)
    # While the first layer runs again, what the other kept is free.
    again = 100 * costs.checkpointed + layer + half.backward
    assert half.forward == max(half.activations + max(half.head, half.backward), again)
    assert half.total == half.resident + max(half.forward, half.optimizer_step)
    # In the first forward there are no gradients at first; half of them are there when the first layer runs again.
    assert sum(half.peak(first=True).values()) == max(
        half.resident - half.gradients + half.activations + max(half.head, half.backward),
        half.resident - half.gradients // 2 + again,
        half.resident + layer + half.backward,
        half.resident + half.optimizer_step,
    )


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_a_trained_tower_keeps_its_activations(load: Load, checkpointed: int) -> None:
    def vision(freeze: bool) -> Sequence[float]:
        costs = update_costs(load(freeze_vision=freeze).model, "cpu")
        return [
            costs.estimate(Forward(100, 60, 150, image_tokens=images), checkpointed).forward
            for images in (0, 16)
        ]

    (none, frozen), (_, trained) = vision(True), vision(False)
    assert frozen == none, "its pass is over before the language model begins"
    assert trained > none


def test_an_unknown_decoder_has_no_estimate(load: Load) -> None:
    model = load().model
    for layer in family_of(model).language_model(model).layers:
        layer.mlp.experts = layer.mlp.gate_proj
        del layer.mlp.gate_proj
    assert update_costs(model) is None

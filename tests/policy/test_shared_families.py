"""Every family that shares a prefix: log-probs and gradients are those of one sequence per caption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.families import base_of
from balcap.policy.policy import Policy
from balcap.policy.prompts import PlaceholderMismatch
from tests.tiny_models import batch_of, picture, rollouts_of, several_images

SHARED = (
    "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v",
    "llava", "pixtral", "mistral3", "llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl", "internvl_qwen3",
    "internvl_qwen3_moe", "gemma3", "gemma3_crops",
)  # fmt: skip
"""Names of `tests.tiny_families`."""

SEVERAL = tuple(name for name in SHARED if name not in ("llava_next", "llava_onevision"))
"""Those that take several images in a prompt."""

PROMPTS = ("What is this?", "Describe the image in detail, please.", "Go")
lengths = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=3).filter(
    lambda groups: any(map(any, groups))
)
sizes = st.permutations([(64, 64), (150, 60), (70, 200)])
KINDS: dict[str, dict[str, Any]] = {
    "full": {"freeze_vision": False},
    "lora": {"lora": LoraSettings(r=4, alpha=8), "gradient_checkpointing": True},
}


def loaded(folder: Path, kind: str, shared_prefix: bool) -> Policy:
    """Ready to train; adapters are made to matter, peft starts with their second half at zero."""
    config = PolicyConfig(str(folder), dtype="float32", shared_prefix=shared_prefix, **KINDS[kind])
    policy = Policy.load(config, False).train()
    assert policy.shared_prefix == shared_prefix
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15, generator=generator)
    return policy


def logps_and_gradients(
    policy: Policy, rollouts: Any, seed: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = list(range(len(rollouts)))
    weights = torch.randn(rollouts.token_ids.shape, generator=torch.Generator().manual_seed(seed))
    policy.model.zero_grad()
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), rows, 0.9)
    (logps * weights).sum().backward()
    named = policy.model.named_parameters()
    return logps.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHARED)
def test_log_probs_and_gradients_are_those_of_separate_sequences(
    name: str, kind: str, folder_of: Callable[[str], Path]
) -> None:
    shared, separate = (loaded(folder_of(name), kind, share) for share in (True, False))
    trained = {n for n, p in shared.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in separate.model.named_parameters() if p.requires_grad}

    @settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(lengths=lengths, sizes=sizes, seed=st.integers(0, 3))
    def compare(lengths: list[list[int]], sizes: list[tuple[int, int]], seed: int) -> None:
        images = [picture(*size, seed=i) for i, size in enumerate(sizes[: len(lengths)])]
        rollouts = rollouts_of(batch_of(images, PROMPTS[: len(lengths)]), lengths, range(60, 300), seed=seed)
        ours, mine = logps_and_gradients(shared, rollouts, seed)
        naive, theirs = logps_and_gradients(separate, rollouts, seed)
        torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-6)
        assert set(mine) <= set(theirs)
        for parameter, gradient in theirs.items():
            error = (mine.get(parameter, torch.zeros(())) - gradient).norm()
            assert error <= 1e-3 * gradient.norm() + 1e-5, parameter

    compare()


@pytest.mark.parametrize("name", SEVERAL)
def test_rows_of_one_two_and_three_images_are_those_of_separate_sequences(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    rollouts = rollouts_of(several_images(), [[3, 0], [7, 2], [1, 6]], range(60, 300))
    ours, mine = logps_and_gradients(loaded(folder_of(name), "full", True), rollouts, 0)
    naive, theirs = logps_and_gradients(loaded(folder_of(name), "full", False), rollouts, 0)
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-6)
    assert set(mine) == set(theirs)
    for parameter, gradient in theirs.items():
        assert (mine[parameter] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, parameter


@pytest.mark.parametrize("name", SEVERAL)
def test_flops_of_several_images_are_those_of_each(name: str, folder_of: Callable[[str], Path]) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False)
    base, batch = base_of(policy.model), several_images()
    flops = [policy.encoder.family.vision_flops(base, item) for item in policy.encode(batch).items]
    apart = batch_of([image for row in batch.images for image in row], ["Go"] * 6)
    each = [policy.encoder.family.vision_flops(base, item) for item in policy.encode(apart).items]
    if None not in each:
        assert flops == pytest.approx([each[0], sum(each[1:3]), sum(each[3:])])


@pytest.mark.parametrize("name", sorted({*SHARED} - {*SEVERAL}))
def test_a_family_of_one_image_refuses_several(name: str, folder_of: Callable[[str], Path]) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False)
    with pytest.raises(PlaceholderMismatch, match=r"has 2 images, a prompt of llava_\w+ takes one"):
        policy.encode(several_images())

"""Windows of a vision tower in batches: the features and gradients of transformers' own loop, in few calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from balcap.policy import PolicyConfig, varlen, windows
from balcap.policy.policy import Policy
from balcap.policy.windows import Windows, install
from perf.operators import CountOperators
from tests import varlen_reference
from tests.tiny_models import batch_of, picture

# (width, height) in pixels; a window is 112 a side: whole ones, cut to the right, below, in the corner, a single one
SIZES = [(224, 224), (196, 308), (56, 84), (420, 112)]


@pytest.fixture
def policy(folders: dict[str, Path]) -> Policy:
    return Policy.load(PolicyConfig(str(folders["qwen"]), dtype="float32"), with_reference=False)


def test_windows_by_hand() -> None:
    # sizes 2, 1, 2, 0, 1: the two of size 1 (places 2 and 5), then the two of size 2 (0, 1 and 3, 4)
    windows = Windows.of(torch.tensor([0, 2, 3, 5, 5, 6]))
    assert windows.groups == ((2, 1), (2, 2))
    assert windows.order.tolist() == [2, 5, 0, 1, 3, 4]
    assert windows.order[windows.back].tolist() == list(range(6))
    assert Windows.of(torch.tensor([0, 3, 6])) == Windows(((2, 3),))
    bounds = torch.tensor([0, 1])
    assert Windows.of(bounds) is Windows.of(bounds)


@pytest.mark.parametrize("images", [SIZES[:1], SIZES], ids=["one", "four at once"])
@pytest.mark.parametrize("gpu", [False, True], ids=["batched", "as on a GPU"])
def test_features_and_gradients_are_those_of_the_loop(
    policy: Policy, folders: dict[str, Path], images, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU one call takes all windows; here the reference is its kernel."""
    if gpu:
        monkeypatch.setattr(windows, "has_varlen", lambda _: True)
        monkeypatch.setattr(windows, "HALF", (torch.float32,))
        monkeypatch.setattr(varlen, "varlen_attn", varlen_reference.varlen_attn)
    plain = AutoModelForImageTextToText.from_pretrained(folders["qwen"], dtype=torch.float32)
    batch = batch_of([picture(*size) for size in images], ["Describe this image."] * len(images))
    pixels = policy.encode(batch).images(range(len(images)), policy.device)
    results = []
    for tower in (plain.model.visual, policy.model.model.visual):
        tower.requires_grad_(True)
        features = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        features.square().sum().backward()
        results.append((features.detach(), {name: p.grad for name, p in tower.named_parameters()}))
    (expected, gradients), (got, own) = results
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-4, rtol=1e-4)


def test_as_many_calls_as_sizes_of_windows(policy: Policy, folders: dict[str, Path]) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folders["qwen"], dtype=torch.float32)
    batch = batch_of([picture(*SIZES[1])], ["Describe this image."])
    pixels = policy.encode(batch).images([0], policy.device)
    calls = []
    for tower in (plain.model.visual, policy.model.model.visual):
        with torch.no_grad(), CountOperators() as counted:
            tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
        calls.append(sum(n for name, n in counted.counts.items() if "scaled_dot_product" in name))
    config = policy.model.config.vision_config
    full = len(config.fullatt_block_indexes)
    assert calls[0] == full + 6 * (config.depth - full)  # 2 x 3 windows
    assert calls[1] <= full + 4 * (config.depth - full)


@pytest.mark.parametrize("size", [(2, 3, 3), (4, 6, 3)], ids=["one patch", "several"])
def test_patches_are_embedded_as_by_the_convolution(size: tuple[int, int, int]) -> None:
    tower = torch.nn.Sequential(torch.nn.Conv3d(3, 5, (2, 3, 3), (2, 3, 3)))
    pixels = torch.randn(7, 3, *size)
    expected = tower(pixels)
    install(tower)
    with CountOperators() as counted:
        torch.testing.assert_close(tower(pixels), expected)
    assert bool(counted.counts["convolution"]) == (size != (2, 3, 3))


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v", "glm4v_moe"])
def test_images_of_one_size_are_one_call(name: str, folder_of: Callable[[str], Path]) -> None:
    """In towers without windows, where an image is one."""
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), with_reference=False)
    plain = AutoModelForImageTextToText.from_pretrained(folder_of(name), dtype=torch.float32)
    images = [picture(*size, seed=i) for i, size in enumerate([(64, 64), (150, 60), (64, 64)])]
    pixels = policy.encode(batch_of(images, ["Go"] * 3)).images([0, 1, 2], policy.device)
    features, calls = [], []
    for tower in (plain.model.visual, policy.model.model.visual):
        with torch.no_grad(), CountOperators() as counted:
            features.append(tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output)
        calls.append(sum(n for name, n in counted.counts.items() if "scaled_dot_product" in name))
    torch.testing.assert_close(features[1], features[0], atol=1e-5, rtol=1e-5)
    depth = policy.model.config.vision_config.depth
    assert calls == [3 * depth, 2 * depth]


def test_it_is_installed_once_and_copied_with_its_model(policy: Policy) -> None:
    tower = policy.model.model.visual
    forward = tower.blocks[0].attn.forward
    install(tower)
    assert tower.blocks[0].attn.forward is forward or tower.blocks[0].attn.forward == forward
    twin = copy.deepcopy(tower)
    assert twin.blocks[0].attn.forward.__self__ is twin.blocks[0].attn


@pytest.mark.parametrize("bias", [False, True])
def test_a_wider_mlp_computes_the_same(bias: bool) -> None:
    mlp = SimpleNamespace(
        gate_proj=torch.nn.Linear(4, 13, bias),
        up_proj=torch.nn.Linear(4, 13, bias),
        down_proj=torch.nn.Linear(13, 4, bias),
        act_fn=torch.nn.SiLU(),
    )
    states = torch.randn(5, 4)
    plain = mlp.down_proj(mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states))
    torch.testing.assert_close(windows._widened_mlp(mlp, states), plain)

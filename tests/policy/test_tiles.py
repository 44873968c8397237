"""Images of any size: in tiles, or in rows of patches (Pixtral); how many features they make, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from balcap.policy import PolicyConfig
from balcap.policy.families import family_of, regrouped
from balcap.policy.policy import Policy
from tests.tiny_models import batch_of, mixed_batch, picture, rollouts_of

FAMILIES = ("pixtral", "mistral3", "llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl")
ROWS = [0, 1, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_many_images_are_those_of_each_alone(name: str, folder_of: Callable[[str], Path]) -> None:
    """As many as the prompt has placeholders, which `encode` compares with `num_features`."""
    sizes = [(64, 64), (150, 60), (70, 200), (30, 300), (300, 31), (113, 112), (57, 55)]
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False)
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    prompts = policy.encode(batch_of(images, ["Go"] * len(images)))
    family, model, rows = family_of(policy.model), policy.model, range(len(images))

    @torch.no_grad()
    def features(rows: Sequence[int]) -> list[Tensor]:
        parts = family.image_features(model, prompts.images(rows, "cpu"))
        return [one.embeds for one in regrouped(parts, prompts.num_features(rows))]

    together = features(rows)
    assert len({len(one) for one in together}) > 1
    for row, of_image in zip(rows, together, strict=True):
        (alone,) = features([row])
        torch.testing.assert_close(of_image, alone, atol=1e-5, rtol=1e-5)
    assert all(family.num_features(model.config, item) is not None for item in prompts.items)


@pytest.mark.parametrize("name", [*FAMILIES, "llava"])
def test_operations_of_the_tower_are_those_that_pytorch_counts(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    policy = Policy.load(
        PolicyConfig(str(folder_of(name)), dtype="float32", attn_implementation="eager"), False
    )
    prompts, family = policy.encode(mixed_batch()), family_of(policy.model)
    for row in ROWS:
        images = prompts.images([row], "cpu")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            family.image_features(policy.model, images)
        assert family.vision_flops(policy.model, prompts.items[row]) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "llava_next"])
def test_the_tiles_of_an_image_are_kept_together(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    rollouts, found = rollouts_of(mixed_batch(), [[3, 1], [7, 2], [4, 6]], range(60, 300)), []
    for cache in (None, str(tmp_path), str(tmp_path)):
        policy = Policy.load(
            PolicyConfig(str(folder_of(name)), dtype="float32", feature_cache=cache), with_reference=False
        )
        prompts = policy.encode(rollouts.batch)
        found.append((policy.logps(rollouts, prompts, ROWS)[0], len(prompts.cached)))
    assert [read for _, read in found] == [0, 0, 3]
    assert len(list(tmp_path.glob("??/*.safetensors"))) == 3
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("name", ["mistral3", "internvl_qwen3", "internvl_qwen3_moe"])
def test_a_text_model_with_windows_shares_no_prefix(name: str, folder_of: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(folder_of(name))
    model = SimpleNamespace(config=config)
    config.text_config._attn_implementation = "sdpa"
    assert not family_of(config).obstacle(model)
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    config.text_config = type(config.text_config)(**config.text_config.to_dict() | windows)
    config.text_config._attn_implementation = "sdpa"
    assert "layers of sliding_attention" in family_of(config).obstacle(model)

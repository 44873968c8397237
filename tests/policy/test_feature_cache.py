"""Image features on disk: read instead of made, and never those of something else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from balcap.policy import PolicyConfig
from balcap.policy.families import ImageFeatures, base_of
from balcap.policy.feature_cache import FeatureCache
from balcap.policy.policy import Policy
from balcap.trainer.update import UpdateSettings, update
from balcap.types import CaptionBatch
from tests.support import optimizer_loop
from tests.tiny_models import batch_of_rows, mixed_batch, picture, rollouts_of

Load = Callable[..., Policy]
CPU = torch.device("cpu")


def epoch(policy: Policy, batch: CaptionBatch | None = None) -> tuple[torch.Tensor, int, set[int]]:
    """Log-probs of three rows' captions, images that the tower saw, rows that were read."""
    rollouts = rollouts_of(batch or mixed_batch(), [[3, 5], [2, 4], [6, 1]], range(20, 300))
    prompts, seen, inner = policy.encode(rollouts.batch), [], base_of(policy.model).model
    tower = type(inner).get_image_features.__get__(inner)

    def counted(pixel_values, *args, **kwargs):
        seen.append(kwargs.get("image_grid_thw", pixel_values))
        return tower(pixel_values, *args, **kwargs)

    inner.get_image_features = counted
    logps = [policy.logps(rollouts, prompts, rows)[0].detach() for rows in ([0, 1], [2], [0, 1, 2])]
    return torch.cat(logps), sum(map(len, seen)), prompts.cached


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_epoch_makes_no_vision_pass(load: Load, tmp_path: Path, dtype: str) -> None:
    plain, made, _ = epoch(load(dtype=dtype))
    assert made == 3
    folder = tmp_path / "features"
    first, made, cached = epoch(load(dtype=dtype, feature_cache=str(folder)))
    assert (made, cached) == (3, set())
    assert len(list(folder.glob("??/*.safetensors"))) == 3
    assert not list(folder.glob("*/.*"))
    second, made, cached = epoch(load(dtype=dtype, feature_cache=str(folder)))
    assert (made, cached) == (0, {0, 1, 2})
    assert torch.equal(plain, first)
    assert torch.equal(plain, second)


def test_features_of_several_layers_are_read_again(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    def load(**config) -> Policy:
        config = PolicyConfig(str(folder_of("qwen3_vl")), dtype="float32", **config)
        return Policy.load(config, with_reference=False)

    plain, _, _ = epoch(load())
    first, made, _ = epoch(load(feature_cache=str(tmp_path)))
    policy = load(feature_cache=str(tmp_path))
    second, made_again, cached = epoch(policy)
    assert (made, made_again, cached) == (3, 0, {0, 1, 2})
    assert torch.equal(plain, first)
    assert torch.equal(plain, second)
    key = policy.feature_cache.key(mixed_batch().images[1], CPU)
    features = policy.feature_cache.get(key, CPU)
    assert [one.shape for one in features.extra] == [features.embeds.shape] * 2


def test_images_of_a_row_are_kept_together(load: Load, tmp_path: Path) -> None:
    pictures = [picture(64, 64, seed=0), picture(150, 60, seed=1), picture(70, 200, seed=2)]
    rows = [(pictures[0],), (pictures[1], pictures[0]), (pictures[0], pictures[1], pictures[2])]
    batch = batch_of_rows(rows, ["What?", "Is <image> like <image>?", "Compare them."])
    plain, made, _ = epoch(load(), batch)
    assert made == 6
    first, made, cached = epoch(load(feature_cache=str(tmp_path)), batch)
    assert (made, cached, len(list(tmp_path.glob("??/*.safetensors")))) == (6, set(), 3)
    second, made, cached = epoch(load(feature_cache=str(tmp_path)), batch)
    assert (made, cached) == (0, {0, 1, 2})
    assert torch.equal(plain, first)
    assert torch.equal(plain, second)
    turned = batch_of_rows([row[::-1] for row in rows], batch.prompts)
    assert epoch(load(feature_cache=str(tmp_path)), turned)[1:] == (5, {0})


def test_operations_that_were_not_made_are_not_counted(load: Load, tmp_path: Path) -> None:
    rollouts = rollouts_of(mixed_batch(), [[3, 5], [2, 4], [6, 1]], range(20, 300))
    means = []
    for cache in (None, str(tmp_path), str(tmp_path)):
        policy = load(feature_cache=cache)
        prompts, loop, advantages = policy.encode(rollouts.batch), optimizer_loop(policy), torch.ones(3, 2)
        means.append(update(policy, UpdateSettings(), rollouts, prompts, advantages, loop).means())
    assert [mean.get("features_cached") for mean in means] == [None, 0.0, 1.0]
    tower = sum(policy.encoder.family.vision_flops(base_of(policy.model), item) for item in prompts.items)
    assert means[0]["tflops"] == means[1]["tflops"]
    assert 1e12 * (means[1]["tflops"] - means[2]["tflops"]) == pytest.approx(tower)
    assert means[0]["grad_norm"] == means[1]["grad_norm"] == means[2]["grad_norm"]


def test_another_tower_another_size_or_other_pixels_have_other_keys(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def key(images=None, change=lambda policy: None, device=CPU, **config) -> str:
        settings = {"dtype": "float32", "feature_cache": str(tmp_path)} | config
        policy = Policy.load(PolicyConfig(str(folders["qwen"]), **settings), with_reference=False)
        change(policy)
        assert policy.feature_cache is not None
        return policy.feature_cache.key(images or (picture(64, 64),), device)

    def tuned(part: str) -> Callable[[Policy], None]:
        return lambda policy: next(base_of(policy.model).get_submodule(part).parameters()).data.add_(1e-3)

    own = key()
    assert own == key() == key(change=tuned("model.language_model")) == key(gradient_checkpointing=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = key()
    others = [
        mixed,
        key((picture(64, 64, seed=1),)),
        key((picture(64, 128).rotate(90),)),
        key((picture(64, 64), picture(64, 64))),
        key(max_pixels=70**2),
        key(dtype="bfloat16"),
        key(change=tuned("model.visual")),
    ]
    assert len({own, *others}) == 8


def test_a_damaged_file_is_made_anew(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, _, _ = epoch(load(feature_cache=str(tmp_path)))
    damaged, cut, whole = sorted(tmp_path.glob("??/*.safetensors"))
    damaged.write_bytes(b"no tensors")
    cut.write_bytes(whole.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        again, made, cached = epoch(load(feature_cache=str(tmp_path)))
    assert (made, len(cached)) == (2, 1)
    torch.testing.assert_close(
        plain, again, atol=1e-5, rtol=1e-5
    )  # passes over other images round differently
    said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert [str(path) in " ".join(said) for path in (damaged, cut, whole)] == [True, True, False]
    assert len(said) == 2
    assert epoch(load(feature_cache=str(tmp_path)))[1] == 0


def test_all_tensors_of_an_image_are_kept(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, None, None)
    features = ImageFeatures(torch.randn(4, 3), (torch.randn(2, 3).bfloat16(), torch.arange(3)))
    cache.put("abcd", features)
    assert (tmp_path / "ab" / "abcd.safetensors").is_file()
    back = cache.get("abcd", CPU)
    assert back is not None
    assert torch.equal(back.embeds, features.embeds)
    assert [one.dtype for one in back.extra] == [torch.bfloat16, torch.long]
    assert all(map(torch.equal, back.extra, features.extra))
    assert cache.get("abce", CPU) is None


def test_what_cannot_be_cached_is_said(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def problems(**config) -> list[str]:
        return list(PolicyConfig("Qwen/Qwen2.5-VL-3B-Instruct", **config).problems())

    assert problems(feature_cache=str(tmp_path / "new")) == []
    (trained,) = problems(feature_cache=str(tmp_path), freeze_vision=False)
    assert trained.startswith("model.policy.feature_cache: ")
    assert "model.policy.freeze_vision" in trained
    (separate,) = problems(feature_cache=str(tmp_path), shared_prefix=False)
    assert "model.policy.shared_prefix" in separate
    (tmp_path / "file").write_text("")
    (no_folder,) = problems(feature_cache=str(tmp_path / "file"))
    assert "is no folder" in no_folder
    with caplog.at_level(logging.WARNING):
        assert load(feature_cache=str(tmp_path), attn_implementation="eager").feature_cache is None
    assert "model.policy.feature_cache: not used" in caplog.text

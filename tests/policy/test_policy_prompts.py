"""Prompts: image tokens are counted, placeholders stay out of questions and captions."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn
import torch
from PIL import Image

from balcap.data.images import decode_image
from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.policy.prompts import PlaceholderMismatch, PromptEncoder
from balcap.rollout import Sampling
from balcap.rollout.hf import HFGenerate
from tests.tiny_models import batch_of, mixed_batch, picture, prompt_by_hand, rollouts_of

Load = Callable[..., Policy]

PLACEHOLDERS = {
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"],
    "llava": ["<image>"],
}


def test_prompts_are_what_the_hub_would_write(load: Load, family: str):
    encoder = load().encoder
    batch = mixed_batch()
    for item, question in zip(encoder.encode(batch).items, batch.prompts, strict=True):
        text = encoder.tokenizer.decode(item["input_ids"][0])
        token = {"qwen": "<|image_pad|>", "llava": "<image>"}[family]
        count = text.count(token)
        written = text.replace(token * count, token)
        assert written == ("<s>" if family == "llava" else "") + prompt_by_hand(family, question)


def test_a_model_that_could_think_captions_at_once(load: Load, family: str):
    policy = load()
    assert policy.encoder.switches == {}
    # the end of Qwen3.5's template
    thinks_not = "enable_thinking is defined and enable_thinking is false"
    end = "{% if " + thinks_not + " %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    processor = policy.encoder.processor
    processor.chat_template += "{% if add_generation_prompt %}" + end + "{% endif %}"
    encoder = PromptEncoder(processor, policy.model.config)
    for item in encoder.encode(mixed_batch()).items:
        assert encoder.tokenizer.decode(item["input_ids"][0]).endswith("<think>\n\n</think>\n\n")


def test_image_tokens_are_as_many_as_the_models_features(load: Load, family: str):
    policy = load()
    counts = []
    for item in policy.encode(mixed_batch()).items:
        there = int((item["input_ids"] == policy.encoder.image_token_id).sum())
        grid = {k: v for k, v in item.items() if k == "image_grid_thw"}
        features = policy.model.get_image_features(item["pixel_values"], **grid).pooler_output
        assert (
            there == features[0].shape[0] == policy.encoder.family.num_features(policy.encoder.config, item)
        )
        counts.append(there)
    # Qwen merges 2x2 patches of 14 pixels: 64x64 is scaled to 56x56 = 2*2 tokens, 150x60 to 140x56 = 5*2,
    # 70x200 to 56x196 = 2*7. LLaVA crops all to 56x56 = 4*4 patches.
    assert counts == {"qwen": [4, 10, 14], "llava": [16, 16, 16]}[family]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # 2x2 patches of 16 pixels are a token: 64x64 stays, 150x60 is scaled to 160x64, 70x200 to 64x192.
        ("qwen3_vl", [4, 10, 12]),
        ("qwen3_vl_moe", [4, 10, 12]),
        # 2x2 of 14, as of Qwen2.5-VL
        ("glm4v", [4, 10, 14]),
        ("glm4v_moe", [4, 10, 14]),
        ("glm46v", [4, 10, 14]),
    ],
)
def test_image_tokens_of_families_with_a_grid(name: str, counts: list[int], folder_of) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), with_reference=False)
    family, prompts = policy.encoder.family, policy.encode(mixed_batch())
    features = family.image_features(policy.model, prompts.images([0, 1, 2], "cpu"))
    assert [len(image.embeds) for image in features] == counts
    for item, count in zip(prompts.items, counts, strict=True):
        assert int((item["input_ids"] == policy.encoder.image_token_id).sum()) == count
        assert family.num_features(policy.encoder.config, item) == count
    names = policy.encoder.tokenizer.convert_ids_to_tokens(policy.encoder.banned_token_ids)
    assert all("image" in token or "video" in token or "vision" in token for token in names)
    assert len(names) == (6 if name.startswith("glm") else 5)


def test_pixel_limits_of_the_config_reach_the_processor(load: Load, family: str):
    if family == "llava":
        pytest.skip("LLaVA crops every image to one size")
    limits = [(None, None), (None, 56 * 56), (168 * 168, 224 * 224)]
    tokens = []
    for low, high in limits:
        policy = load(min_pixels=low, max_pixels=high)
        items = policy.encode(batch_of([picture(280, 280), picture(70, 70)], ["Go", "Go"])).items
        tokens += [int((item["input_ids"] == policy.encoder.image_token_id).sum()) for item in items]
    # tokens of 28x28: 112x112 and 56x56, both 56x56, then 224x224 and 168x168
    assert tokens == [16, 4, 4, 4, 64, 36]
    with pytest.raises(
        ValueError, match=r"model.policy.min_pixels: 3136 is above model.policy.max_pixels: 784"
    ):
        load(max_pixels=28 * 28)


def test_pixel_limits_that_a_processor_would_ignore_are_refused(load: Load, family: str):
    if family == "llava":
        with pytest.raises(ValueError, match=r"model.policy.max_pixels: .* leave both null"):
            load(max_pixels=50_000)
    else:
        assert dict(load(max_pixels=50_000).encoder.processor.image_processor.size) == {
            "shortest_edge": 56 * 56,
            "longest_edge": 50_000,
        }


def test_a_wrong_count_names_the_sample(load: Load, family: str):
    policy = load()
    encode = policy.encoder.processor.__class__.__call__

    class Miscounts(policy.encoder.processor.__class__):
        def __call__(self, *args, **kwargs):
            out = encode(self, *args, **kwargs)
            extra = torch.full((1, 1), policy.encoder.image_token_id)
            out["input_ids"] = torch.cat([out["input_ids"], extra], 1)
            return out

    policy.encoder.processor.__class__ = Miscounts
    there, made = {"qwen": (5, 4), "llava": (17, 16)}[family]
    with pytest.raises(
        PlaceholderMismatch, match=rf"'img0.png'.* {there} image placeholders.* {made} features"
    ):
        policy.encode(batch_of([picture(56, 56)], ["Go"]))


def test_special_tokens_in_a_question_are_data(load: Load, family: str):
    """Of this family they are spelled apart; of others they are words like any other."""
    policy = load()
    tokenizer, encoder = policy.encoder.tokenizer, policy.encoder
    special = set(tokenizer.all_special_ids) | set(encoder.banned_token_ids)

    def specials(question: str) -> list[int]:
        (item,) = policy.encode(batch_of([picture(60, 60)], [question])).items
        return [i for i in item["input_ids"][0].tolist() if i in special]

    plain = specials("What is this?")
    for token in (*tokenizer.all_special_tokens, *PLACEHOLDERS[family], "<image>", "<|im_end|>", "[INST]"):
        assert specials(f"What is {token} this?") == plain, token
    assert encoder.plain("<" * 3 + "|a cat|> <image") == "<<<|a cat|> <image"


def test_a_caption_with_a_placeholder_names_its_sample(load: Load, family: str):
    policy = load(with_reference=True)
    batch = mixed_batch()
    prompts = policy.encode(batch)
    for token in PLACEHOLDERS[family]:
        rollouts = rollouts_of(batch, [[2, 2]] * 3, range(20, 300))
        rollouts.token_ids[1, 1, 1] = policy.encoder.tokenizer.convert_tokens_to_ids(token)
        assert policy.logps(rollouts, prompts, [0, 2])[0].isfinite().all()
        for score in (policy.logps, policy.reference_logps):
            with pytest.raises(PlaceholderMismatch, match=r"'img1.png'.*caption"):
                score(rollouts, prompts, [1, 2])
        rollouts.completion_mask[1, 1, 1] = False  # in the padding it means nothing
        assert policy.logps(rollouts, prompts, [1])[0].isfinite().all()


def test_banned_tokens_are_the_placeholders_and_no_word(load: Load, family: str):
    encoder = load().encoder
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.banned_token_ids)
    assert sorted(tokens) == sorted(PLACEHOLDERS[family])
    assert encoder.image_token_id in encoder.banned_token_ids
    assert encoder.tokenizer.eos_token_id not in encoder.banned_token_ids
    for word in ("image", " image", "vision", "video", "img", " photograph", "<", ">"):
        ids = encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
        assert not set(ids) & set(encoder.banned_token_ids)
    encoder.tokenizer.add_tokens(["image", "[IMG_BREAK]", "television"])
    tokens = encoder.tokenizer.convert_ids_to_tokens(
        encoder.family.placeholder_ids(encoder.config, encoder.tokenizer)
    )
    assert sorted(tokens) == sorted([*PLACEHOLDERS[family], "[IMG_BREAK]"])


def test_a_template_that_writes_bos_does_not_double_it(load: Load, family: str):
    encoder = load().encoder
    batch = batch_of([picture(60, 60)], ["What is this?"])
    if family == "qwen":
        assert encoder.tokenizer.bos_token is None
    else:
        expected = encoder.encode(batch).items[0]["input_ids"]
        encoder.processor.chat_template = "{{ bos_token }}" + encoder.processor.chat_template
        assert torch.equal(encoder.encode(batch).items[0]["input_ids"], expected)
        assert int((expected == encoder.tokenizer.bos_token_id).sum()) == 1


def test_a_tokenizer_without_pad_token_gets_one(load: Load):
    policy = load()
    policy.encoder.tokenizer.pad_token = None
    encoder = type(policy.encoder)(policy.encoder.processor, policy.model.config)
    assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id


def test_count_and_decode(load: Load):
    encoder = load().encoder
    text = "A red circle lies to the left of a small blue square."
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.count([text, "", "A"]) == [len(ids), 0, 1]  # no special tokens: LLaVA's would add one
    assert encoder.count([]) == []
    end = encoder.tokenizer.eos_token_id
    assert encoder.texts([torch.tensor([*ids, end]), torch.tensor([end] * 5), torch.tensor([])]) == [
        text,
        "",
        "",
    ]


# ── real photographs ─────────────────────────────────────────────────────────────────────────────────

PHOTOGRAPHS = {
    "RGB": Path(skimage.__file__).parent / "data" / "astronaut.png",
    "P": Path(skimage.__file__).parent / "data" / "chelsea.png",
    "L": Path(skimage.__file__).parent / "data" / "camera.png",
    "I;16": Path(skimage.__file__).parent / "data" / "rocket.jpg",
    "RGBA": Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg",
    "CMYK": Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg",
}


def as_file(image: Image.Image, mode: str) -> bytes:
    """The photograph as a file of this mode; CMYK as printers send it, the rest as PNG."""
    image = image.convert("RGB").resize((image.width // 4, image.height // 4))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "RGBA":
        image.putalpha(image.convert("L"))
    else:
        image = image.convert(mode)
    assert image.mode == mode
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    return buffer.getvalue()


def test_real_photographs_in_every_mode_are_captioned(load: Load):
    photographs = {mode: path for mode, path in PHOTOGRAPHS.items() if path.is_file()}
    assert len(photographs) >= 4
    batch = batch_of(
        [decode_image(as_file(Image.open(path), mode)) for mode, path in photographs.items()],
        ["Describe."] * len(photographs),
    )
    policy, engine = load(), HFGenerate()
    engine.attach(policy)
    prompts = policy.encode(batch)
    rollouts = engine.generate(batch, prompts, 2, Sampling(max_tokens=3))
    logps, _ = policy.logps(rollouts, prompts, range(len(batch)))
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=1e-4, rtol=0)
    pixels = [item["pixel_values"] for item in prompts.items]
    assert all(p.isfinite().all() and p.std() > 0.1 for p in pixels)

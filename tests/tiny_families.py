"""Tiny, randomly initialised models of many architectures, by name; more of them are built in `tests.tiny_mrope` and
`tests.tiny_models`.

Only what makes an architecture special is spelled out: how it cuts images into tokens, and its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny_mrope
from tests.tiny_models import tiny_idefics3, tiny_llava, tiny_qwen
from tests.tiny_parts import EXPERTS, ROPE, SHAPE, SIGLIP, chat_template, plain_tokenizer, save, text_config


def _gemma3(path: Path, window: int, **crops: Any) -> Path:
    """Layers in turn with a sliding window; the tokens of an image see each other in both directions."""
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    tokenizer = plain_tokenizer(
        "<start_of_image>", "<end_of_image>", "<image_soft_token>",
        extra_special_tokens={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
        **crops,
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=size), tokenizer, chat_template("<start_of_image>"), image_seq_length=4
    )
    rope = {"sliding_attention": ROPE, "full_attention": ROPE | {"rope_theta": 1000.0}}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    text = text_config(tokenizer, rope_parameters=rope, query_pre_attn_scalar=8, **layers)
    ids = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=text,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    return save(path, processor, config)


def gemma3(path: Path) -> Path:
    return _gemma3(path, 16)


def gemma3_crops(path: Path) -> Path:
    """Images that are not square are seen whole and in crops, each of more tokens than the window. Of what is on disk only
    the tokenizer's settings reach the processor's crops."""
    crops = {"pan_and_scan_min_crop_size": 32, "pan_and_scan_max_num_crops": 4}
    return _gemma3(path, 3, do_pan_and_scan=True, pan_and_scan_min_ratio_to_activate=1.2, **crops)


def smolvlm(path: Path) -> Path:
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = plain_tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
        extra_special_tokens={
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
    )  # fmt: skip
    edges = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**edges),
        tokenizer,
        SmolVLMVideoProcessor(**edges),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    config = SmolVLMConfig(
        vision_config=SHAPE | {"image_size": 28, "patch_size": 7},
        text_config=text_config(tokenizer) | {"model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return save(path, processor, config)


def _llava_like(path: Path, kind: str) -> Path:
    """Tiles of 56x56 pixels beside a small picture of the whole image."""
    import transformers as hf
    from transformers import AutoConfig

    tokenizer = plain_tokenizer("<image>", "<video>", padding_side="left")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    square = {"height": 56, "width": 56}
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_grid_pinpoints": pinpoints}
    processor: Any
    if kind == "llava_next":
        image_processor = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        processor = hf.LlavaNextProcessor(
            image_processor, tokenizer, 14, "default", chat_template("<image>"), num_additional_image_tokens=1
        )
        vision = {"model_type": "clip_vision_model", "projection_dim": 32} | SIGLIP | {"num_hidden_layers": 3}
        text = {"model_type": "llama"}
    else:
        pinpoints.append([224, 224])  # 16 tiles, whose features are scaled down to those of nine
        image_processor = hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints)
        processor = hf.LlavaOnevisionProcessor(
            image_processor,
            tokenizer,
            hf.LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=chat_template("<image>"),
        )
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | SIGLIP
        text = {"model_type": "qwen2"}
        ids["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    config = AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config=text_config(tokenizer) | text,
        tie_word_embeddings=False,
        **ids,
    )
    return save(path, processor, config)


def llava_next(path: Path) -> Path:
    return _llava_like(path, "llava_next")


def llava_onevision(path: Path) -> Path:
    return _llava_like(path, "llava_onevision")


def _pixtral_like(path: Path, kind: str) -> Path:
    """Images of any size, a token for the end of each row of patches."""
    import transformers as hf
    from transformers import AutoConfig

    tokenizer = plain_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    merge = 2 if kind == "mistral3" else 1
    image_processor = hf.PixtralImageProcessor(
        size={"longest_edge": 112}, patch_size={"height": 14 * merge, "width": 14 * merge}
    )
    processor = hf.PixtralProcessor(
        image_processor, tokenizer, 14, merge, chat_template("[IMG]"), "[IMG]", "[IMG_BREAK]", "[IMG_END]"
    )
    vision = {
        "model_type": "pixtral",
        "head_dim": 8,
        "image_size": 112,
        "patch_size": 14,
        "rope_theta": 100.0,
    }
    special = {"spatial_merge_size": 2} if kind == "mistral3" else {"vision_feature_select_strategy": "full"}
    config = AutoConfig.for_model(
        kind,
        vision_config=SHAPE | vision,
        text_config=text_config(tokenizer) | {"model_type": "mistral", "sliding_window": None},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **special,
    )
    return save(path, processor, config)


def pixtral(path: Path) -> Path:
    """LLaVA's code with Pixtral's tower."""
    return _pixtral_like(path, "llava")


def mistral3(path: Path) -> Path:
    return _pixtral_like(path, "mistral3")


def _internvl(path: Path, text: dict[str, Any]) -> Path:
    """One to four tiles of 28x28 pixels, and one of the whole image."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    special = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = plain_tokenizer(*special.values(), extra_special_tokens=special)
    size = {"height": 28, "width": 28}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    config = InternVLConfig(
        vision_config=SHAPE | {"image_size": [28, 28], "patch_size": [7, 7]},
        text_config=text_config(tokenizer) | text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return save(path, processor, config)


def internvl(path: Path) -> Path:
    return _internvl(path, {"model_type": "qwen2"})


def internvl_qwen3(path: Path) -> Path:
    """InternVL3.5."""
    return _internvl(path, {"model_type": "qwen3"})


def internvl_qwen3_moe(path: Path) -> Path:
    return _internvl(path, {"model_type": "qwen3_moe"} | EXPERTS)


def lfm2_vl(path: Path) -> Path:
    """Layers with short convolutions beside attention; patches of NaFlex images, padded."""
    from transformers import Lfm2VlConfig, Lfm2VlImageProcessor, Lfm2VlProcessor

    special = {
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }  # fmt: skip
    tokenizer = plain_tokenizer(*special.values(), extra_special_tokens=special)
    image_processor = Lfm2VlImageProcessor(
        do_image_splitting=False,
        min_image_tokens=4,
        max_image_tokens=16,
        encoder_patch_size=14,
        max_num_patches=64,
    )
    processor = Lfm2VlProcessor(image_processor, tokenizer, chat_template("<image>"))
    text = text_config(
        tokenizer, layer_types=["conv", "full_attention"], block_ff_dim=64, block_auto_adjust_ff_dim=False
    )
    config = Lfm2VlConfig(
        vision_config=SHAPE | {"patch_size": 14, "num_patches": 64, "vision_use_head": False},
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return save(path, processor, config)


def paligemma(path: Path) -> Path:
    """Has no chat template, and its prompt sees itself in both directions."""
    from transformers import PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = plain_tokenizer("<image>")
    image_processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": 32, "vision_use_head": False},
        text_config=text_config(tokenizer) | {"model_type": "gemma"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return save(path, processor, config)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": tiny_qwen,
    "qwen2_vl": tiny_mrope.qwen2_vl,
    "qwen3_vl": tiny_mrope.qwen3_vl,
    "qwen3_vl_moe": tiny_mrope.qwen3_vl_moe,
    "qwen3_5": tiny_mrope.qwen3_5,
    "qwen3_5_moe": tiny_mrope.qwen3_5_moe,
    "glm4v": tiny_mrope.glm4v,
    "glm4v_moe": tiny_mrope.glm4v_moe,
    "glm46v": tiny_mrope.glm46v,
    "gemma3": gemma3,
    "gemma3_crops": gemma3_crops,
    "smolvlm": smolvlm,
    "idefics3": tiny_idefics3,
    "llava": tiny_llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "internvl": internvl,
    "internvl_qwen3": internvl_qwen3,
    "internvl_qwen3_moe": internvl_qwen3_moe,
    "lfm2_vl": lfm2_vl,
    "paligemma": paligemma,
}
"""Name -> writes a model of that architecture into a folder and returns the folder."""

WORKING = tuple(name for name in FAMILIES if name != "paligemma")
"""Those that a policy can be: the other has no chat template."""

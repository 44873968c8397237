"""What `perf/update.py` measures on: random models of two families, an image and its captions."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.loading import prepare
from balcap.policy.prompts import PromptEncoder, Prompts
from balcap.types import Rollouts
from tests import tiny_models as tiny

QUESTION = "Describe the image in detail."
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TEXT = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size"
QWEN_VISION = "depth hidden_size intermediate_size num_heads fullatt_block_indexes"
CLIP_VISION = "num_hidden_layers hidden_size intermediate_size num_attention_heads projection_dim"


def _named(names: str, *values: Any, **more: Any) -> dict[str, Any]:
    return dict(zip(names.split(), values, strict=True)) | more


def _qwen_text(*values: int, sections: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return _named(TEXT, *values, rms_norm_eps=1e-6, rope_parameters=rope, **more)


LARGE_VISION = _named(QWEN_VISION, 32, 1280, 3420, 16, [7, 15, 23, 31])

# name, text, vision. The large ones as in the config.json of Qwen/Qwen2.5-VL-*B-Instruct and
# llava-hf/llava-1.5-7b-hf; the small ones have the proportions of Qwen2.5-VL-3B.
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "30m": (
        "Qwen2.5-VL",
        _qwen_text(8, 512, 1280, 8, 2, 4096, sections=[8, 12, 12]),
        _named(QWEN_VISION, 5, 256, 688, 4, [1, 4]),
    ),
    "llava30m": (
        "LLaVA-1.5",
        _named(TEXT, 7, 512, 1280, 8, 8, 4096),
        _named(CLIP_VISION, 6, 256, 1024, 4, 256),
    ),
    "3b": (
        "Qwen2.5-VL-3B",
        _qwen_text(36, 2048, 11008, 16, 2, 151936, sections=[16, 24, 24], tie_word_embeddings=True),
        LARGE_VISION,
    ),
    "7b": (
        "Qwen2.5-VL-7B",
        _qwen_text(28, 3584, 18944, 28, 4, 152064, sections=[16, 24, 24]),
        LARGE_VISION,
    ),
    "llava7b": (
        "LLaVA-1.5-7B",
        _named(TEXT, 32, 4096, 11008, 32, 32, 32064, rms_norm_eps=1e-5),
        _named(CLIP_VISION, 24, 1024, 4096, 16, 768),
    ),
}


@dataclass(frozen=True)
class Case:
    """What is updated.

    Attributes:
        size: key of `SIZES`.
        prompt: P that is aimed at; the image decides it.
        captions: G.
        shortest, longest: caption tokens, uniform between.
        device, dtype, attention, lora, checkpointing: alike for all variants.
    """

    size: str
    prompt: int
    captions: int
    shortest: int = 100
    longest: int = 200
    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "sdpa"
    lora: bool = False
    checkpointing: bool = False

    @property
    def family(self) -> str:
        """``llava`` or ``qwen``."""
        return "llava" if self.size.startswith("llava") else "qwen"


@dataclass(frozen=True, eq=False)
class Work:
    """One update's input, for all variants.

    Attributes:
        rollouts: B = 1 image, G captions.
        prompts: the image's prompt.
        advantages: ``[1, G]``.
    """

    rollouts: Rollouts
    prompts: Prompts
    advantages: Tensor


def build(case: Case) -> tuple[Any, Any]:
    """A random model, ready to train, and its processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        (tiny.tiny_llava if case.family == "llava" else tiny.tiny_qwen)(Path(folder))
        config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    config, images = _config(case, config, _image_tokens(case, processor)), processor.image_processor
    if case.family == "llava":
        side = config.vision_config.image_size
        images.size, images.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    else:
        images.size = {"shortest_edge": 56**2, "longest_edge": 4096 * 28**2}
    with torch.device(case.device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, case.dtype), attn_implementation=case.attention
        )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    lora = LoraSettings(LORA) if case.lora else None
    model = prepare(model, PolicyConfig("random", lora=lora, gradient_checkpointing=case.checkpointing))
    generator = torch.Generator(case.device).manual_seed(0)
    for parameter in model.parameters():  # of adapters too: they start at 0
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model, processor


def _image_tokens(case: Case, processor: Any) -> int:
    """What is left of P for the image, the text holding one placeholder; a square for LLaVA."""
    text = tiny.prompt_by_hand(case.family, QUESTION)
    left = case.prompt - len(processor.tokenizer(text)["input_ids"]) + 1
    if case.size == "llava7b":
        return 24**2
    return round(left**0.5) ** 2 if case.family == "llava" else left


def _config(case: Case, small: Any, tokens: int) -> Any:
    """The config of a tiny model, in this case's size."""
    _, text, vision = SIZES[case.size]
    tied = text.get("tie_word_embeddings", False)
    text = text | {"max_position_embeddings": 4096}
    vision = vision | {"patch_size": 14}
    if case.family == "llava":
        vision["image_size"] = 14 * math.isqrt(tokens)
        text, vision = type(small.text_config)(**text), type(small.vision_config)(**vision)
        kept, more = ("image_token_index", "pad_token_id"), {"image_seq_length": tokens}
    else:
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
        vision["out_hidden_size"] = text["hidden_size"]
        kept = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        more = {}
    more |= {key: getattr(small, key) for key in kept}
    return type(small)(text_config=text, vision_config=vision, tie_word_embeddings=tied, **more)


def work_of(case: Case, model: Any, processor: Any) -> Work:
    """An image, its captions and their advantages; those of a smaller G are the first of a larger."""
    tokens = _image_tokens(case, processor)
    rows = round(tokens**0.5)
    image = tiny.picture(28 * round(tokens / rows), 28 * rows)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(case.shortest, case.longest + 1, (64,), generator=generator)[: case.captions]
    batch = tiny.batch_of([image], [QUESTION])
    rollouts = tiny.rollouts_of(batch, [lengths.tolist()], range(20, SIZES[case.size][1]["vocab_size"]))
    advantages = torch.randn(1, 64, generator=generator)[:, : case.captions]
    return Work(rollouts, PromptEncoder(processor, model.config).encode(batch), advantages)

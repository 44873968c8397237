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
from balcap.policy.layout import Layout
from balcap.policy.loading import prepare
from balcap.policy.prompts import PromptEncoder, Prompts
from balcap.types import Rollouts
from tests import tiny_models as tiny

QUESTION = "Describe the image in detail."
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _text(layers: int, hidden: int, mlp: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        **more,
    }


def _qwen(*shape: int, sections: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return _text(*shape, rms_norm_eps=1e-6, rope_parameters=rope, **more)


def _qwen_vision(depth: int, hidden: int, mlp: int, heads: int, whole: list[int]) -> dict[str, Any]:
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "fullatt_block_indexes")
    return dict(zip(names, (depth, hidden, mlp, heads, whole), strict=True))


def _clip(layers: int, hidden: int, mlp: int, heads: int, projection: int) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")
    return dict(zip(names, (layers, hidden, mlp, heads, projection), strict=True))


LARGE_VISION = _qwen_vision(32, 1280, 3420, 16, [7, 15, 23, 31])

# name, text, vision. The large ones as in the config.json of Qwen/Qwen2.5-VL-*B-Instruct and
# llava-hf/llava-1.5-7b-hf; the small ones have the proportions of Qwen2.5-VL-3B.
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "30m": (
        "Qwen2.5-VL",
        _qwen(8, 512, 1280, 8, 2, 4096, sections=[8, 12, 12]),
        _qwen_vision(5, 256, 688, 4, [1, 4]),
    ),
    "llava30m": ("LLaVA-1.5", _text(7, 512, 1280, 8, 8, 4096), _clip(6, 256, 1024, 4, 256)),
    "3b": (
        "Qwen2.5-VL-3B",
        _qwen(36, 2048, 11008, 16, 2, 151936, sections=[16, 24, 24], tie_word_embeddings=True),
        LARGE_VISION,
    ),
    "7b": ("Qwen2.5-VL-7B", _qwen(28, 3584, 18944, 28, 4, 152064, sections=[16, 24, 24]), LARGE_VISION),
    "llava7b": (
        "LLaVA-1.5-7B",
        _text(32, 4096, 11008, 32, 32, 32064, rms_norm_eps=1e-5),
        _clip(24, 1024, 4096, 16, 768),
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


@dataclass(frozen=True)
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

    @property
    def layout(self) -> Layout:
        mask = self.rollouts.completion_mask
        return Layout([self.prompt], mask.sum(-1).tolist())

    @property
    def prompt(self) -> int:
        """P, image tokens included."""
        return self.prompts.items[0]["input_ids"].shape[1]

    @property
    def separate(self) -> int:
        """Tokens of a sequence per caption, padded to the longest."""
        G, T = self.rollouts.token_ids.shape[1:]
        return G * (self.prompt + T)


def build(case: Case) -> tuple[Any, Any]:
    """A random model, ready to train, and its processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        (tiny.tiny_llava if _is_llava(case) else tiny.tiny_qwen)(Path(folder))
        config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    tokens = _image_tokens(case, processor)
    config = (_llava_config if _is_llava(case) else _qwen_config)(case, config, tokens)
    images = processor.image_processor
    if _is_llava(case):
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


def _is_llava(case: Case) -> bool:
    return case.size.startswith("llava")


def _image_tokens(case: Case, processor: Any) -> int:
    """What is left of P for the image, the text holding one placeholder; a square for LLaVA."""
    text = tiny.prompt_by_hand("llava" if _is_llava(case) else "qwen", QUESTION)
    left = case.prompt - len(processor.tokenizer(text)["input_ids"]) + 1
    if case.size == "llava7b":
        return 24**2
    return round(left**0.5) ** 2 if _is_llava(case) else left


def _qwen_config(case: Case, small: Any, tokens: int) -> Any:
    _, text, vision = SIZES[case.size]
    sizes = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return type(small)(
        text_config=text,
        vision_config=vision | sizes | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **{key: getattr(small, key) for key in ids},
    )


def _llava_config(case: Case, small: Any, tokens: int) -> Any:
    _, text, vision = SIZES[case.size]
    return type(small)(
        text_config=type(small.text_config)(**text),
        vision_config=type(small.vision_config)(**vision, patch_size=14, image_size=14 * math.isqrt(tokens)),
        image_token_index=small.image_token_index,
        image_seq_length=tokens,
        pad_token_id=small.pad_token_id,
        tie_word_embeddings=False,
    )


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

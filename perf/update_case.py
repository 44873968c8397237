"""What `perf/update.py` measures on: random models of two families, an image and its captions."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.loading import prepare
from balcap.policy.prompts import PromptEncoder, Prompts
from balcap.types import Rollouts
from tests import tiny_models as tiny

QUESTION = "Describe the image in detail."
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SIZES: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text())


@dataclass(frozen=True)
class Case:
    """What is updated.

    Attributes:
        size: key of `SIZES`.
        prompt: P that is aimed at; the image decides it.
        captions: G.
        shortest, longest: caption tokens, uniform between.
        device, dtype, lora, checkpointing: alike for all variants.
    """

    size: str
    prompt: int
    captions: int
    shortest: int = 100
    longest: int = 200
    device: str = "cpu"
    dtype: str = "float32"
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
            config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
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
    text, vision = SIZES[case.size]["text"], SIZES[case.size]["vision"] | {"patch_size": 14}
    tied = text.get("tie_word_embeddings", False)
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
    rollouts = tiny.rollouts_of(batch, [lengths.tolist()], range(20, SIZES[case.size]["text"]["vocab_size"]))
    advantages = torch.randn(1, 64, generator=generator)[:, : case.captions]
    return Work(rollouts, PromptEncoder(processor, model.config).encode(batch), advantages)

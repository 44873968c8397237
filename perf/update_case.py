"""What `perf/update.py` measures on: random models of several families, an image and its captions."""

from __future__ import annotations

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
from tests.tiny_families import FAMILIES

QUESTION = "Describe the image in detail."
SIZES: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text())


@dataclass(frozen=True)
class Case:
    """What is updated.

    Attributes:
        size: key of `SIZES`.
        prompt: P that is aimed at; the image decides it, LLaVA's by its size in ``models.yaml``.
        captions: G.
        shortest, longest: caption tokens, uniform between.
        device, dtype, lora, checkpointing: alike for all variants, but for `perf.update_variants.KEPT`.
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
    def autocast(self) -> bool:
        """Adapters are in float32 over weights in bfloat16 and compute in bfloat16, as the configs train them."""
        return self.lora and self.dtype == "bfloat16"

    @property
    def family(self) -> str:
        """``qwen2_5_vl``, or a name of `FAMILIES`."""
        return SIZES[self.size]["family"]


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
        FAMILIES.get(case.family, tiny.tiny_qwen)(Path(folder))
        config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text, vision = SIZES[case.size]["text"], SIZES[case.size]["vision"]
    config.text_config = type(config.text_config)(**text)
    config.vision_config = type(config.vision_config)(**vision)
    config.tie_word_embeddings = text.get("tie_word_embeddings", False)
    images = processor.image_processor
    if case.family == "llava":
        side = vision["image_size"]
        config.image_seq_length = (side // vision["patch_size"]) ** 2
        images.size, images.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    else:
        of_token = (images.patch_size * images.merge_size) ** 2
        images.size = {"shortest_edge": 4 * of_token, "longest_edge": 4096 * of_token}
    with torch.device(case.device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    lora = LoraSettings() if case.lora else None
    model = prepare(model, PolicyConfig("random", lora=lora, gradient_checkpointing=case.checkpointing))
    generator = torch.Generator(case.device).manual_seed(0)
    for parameter in model.parameters():  # of adapters too: they start at 0
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model, processor


def work_of(case: Case, model: Any, processor: Any) -> Work:
    """An image, its captions and their advantages; those of a smaller G are the first of a larger."""
    text = tiny.prompt_by_hand(case.family, QUESTION)
    tokens = (
        case.prompt - len(processor.tokenizer(text)["input_ids"]) + 1
    )  # the text holds one of the image's
    rows = round(tokens**0.5)
    images = processor.image_processor
    side = 28 if case.family == "llava" else images.patch_size * images.merge_size
    image = tiny.picture(side * round(tokens / rows), side * rows)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(case.shortest, case.longest + 1, (64,), generator=generator)[: case.captions]
    batch = tiny.batch_of([image], [QUESTION])
    rollouts = tiny.rollouts_of(batch, [lengths.tolist()], range(20, SIZES[case.size]["text"]["vocab_size"]))
    advantages = torch.randn(1, 64, generator=generator)[:, : case.captions]
    return Work(rollouts, PromptEncoder(processor, model.config).encode(batch), advantages)

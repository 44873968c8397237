"""Engines and captions for the tests of vLLM in process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from balcap.policy.policy import Policy
from balcap.rollout import RolloutEngine, Sampling
from balcap.rollout.hf import HFGenerate
from balcap.rollout.vllm.inprocess import VLLMInProcess
from balcap.types import CaptionBatch, Rollouts
from tests.tiny_models import loud, mixed_batch
from tests.tiny_parts import turn_experts

Load = Callable[..., Policy]

LIMIT = {"image": 3, "video": 0}
"""Images in a prompt that the engines of the tests take."""


class Shared:
    """The engine that runs now. There is one at a time: a policy that it does not fit ends it."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.engine: VLLMInProcess | None = None

    def get(self, policy: Policy, **init_args: Any) -> VLLMInProcess:
        """An engine that holds this policy's weights as version 0."""
        size = dict(policy.encoder.processor.image_processor.size)
        init_args = {"options": {"limit_mm_per_prompt": LIMIT}} | init_args
        key = (policy.source, policy.has_adapter, size, init_args)
        if self.engine is None or key != self.key:
            self.close()
            self.engine, self.key = VLLMInProcess(enforce_eager=True, **init_args), key
        self.engine.attach(policy)
        with everything_trained(policy):
            self.engine.sync(policy, 0)
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None


def wide(folder: Path) -> Path:
    """The tiny model in this folder with attention heads of 32 dimensions, the fewest that vLLM has on a CPU, and as the hub
    would deliver it."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size = 32 * text.num_attention_heads
    if hasattr(text, "head_dim"):
        text.head_dim = 32
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = text.hidden_size
    if config.model_type == "qwen2_vl":
        vision.hidden_size = text.hidden_size
    if "mrope_section" in text.rope_parameters:
        partial = "partial_rotary_factor" in text.rope_parameters
        text.rope_parameters["mrope_section"] = [2, 1, 1] if partial else [8, 4, 4]
    for size in ("linear_key_head_dim", "linear_value_head_dim"):
        if hasattr(text, size):
            setattr(text, size, 64)
    if hasattr(text, "moe_intermediate_size"):
        text.moe_intermediate_size = 32
    if config.model_type == "qwen3_vl_moe":
        text.norm_topk_prob = True  # of the files on the hub; transformers has no other way
    model = loud(AutoModelForImageTextToText.from_config(config))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    if vision.model_type in ("clip_vision_model", "siglip_vision_model"):
        # the name on the hub, which HF drops from a model that it made itself
        weights = load_file(folder / "model.safetensors")
        named = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", k): v for k, v in weights.items()}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    turn_experts(folder)
    if config.model_type == "gemma3":  # vLLM looks them up
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["\n" * lines for lines in range(1, 5)])
        tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def everything_trained(policy: Policy) -> Iterator[None]:
    """A sync then sends frozen weights, too: another test's policy may have left its own in the engine."""
    frozen = [] if policy.has_adapter else [p for p in policy.model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    yield
    for parameter in frozen:
        parameter.requires_grad_(False)


def draw(
    engine: RolloutEngine,
    policy: Policy,
    num_captions: int = 3,
    batch: CaptionBatch | None = None,
    seed: int = 0,
    on_group_done: Any = None,
    **how: Any,
) -> Rollouts:
    """Captions of three images of different sizes, or of `batch`."""
    batch = batch or mixed_batch()
    torch.manual_seed(seed)
    sampling = Sampling(**({"max_tokens": 8} | how))
    return engine.generate(batch, policy.encode(batch), num_captions, sampling, on_group_done)


def likeliest(policy: Policy, **how: Any) -> Rollouts:
    """HF's greedy captions."""
    engine = HFGenerate()
    engine.attach(policy)
    return draw(engine, policy, 1, top_p=1e-6, **how)


@torch.no_grad()
def update(policy: Policy, seed: int) -> None:
    """As an optimizer would, all trained weights and nothing else, and far enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            scale = 0.3 * parameter.std().nan_to_num().clamp(min=0.1)
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def louder(policy: Policy, tokens: list[int], by: float) -> None:
    """Make the logits of these tokens `by` times larger, whichever sign they have."""
    model = policy.model.get_base_model() if policy.has_adapter else policy.model
    rows = torch.tensor(tokens)
    model.lm_head.weight[rows] *= by


def own_logps(policy: Policy, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """The trainer's log-probs of these captions, 0 where masked."""
    rows = list(range(len(rollouts)))
    with torch.no_grad():
        logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), rows, temperature)
    return logps

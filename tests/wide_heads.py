"""The embedded base policy with larger attention heads: the same function of its inputs, in wider matrices.

vLLM's attention for CPUs knows no heads of 40 dimensions, GPUs take them as they are:

    python -m tests.wide_heads data/shapes-base-64
    python main.py fit --config configs/shapes.yaml --config configs/engine/vllm.yaml \\
        --model.policy.model data/shapes-base-64

What is added is 0 and its gradients are 0, so training leaves it so.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BASE = Path(__file__).parents[1] / "assets/shapes-base"
HEAD_SIZE = 64


def write_wide_base(folder: Path) -> None:
    """The base policy with heads of `HEAD_SIZE` dimensions, and its processor."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("report.json"), dirs_exist_ok=True)
    widened(AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)).save_pretrained(folder)


def widened(model: Any) -> Any:
    """A Qwen2.5-VL that computes what `model` computes, with heads of `HEAD_SIZE` dimensions.

    The hidden size grows with the heads. Queries are scaled up, since scores are divided by the root of the larger
    size; RoPE's base grows so that its frequencies stay; norms weigh less, since their mean is over more
    dimensions.
    """
    config = copy.deepcopy(model.config)
    text = config.text_config
    heads, hidden = text.num_attention_heads, text.hidden_size
    size = hidden // heads
    wide = heads * HEAD_SIZE
    text.hidden_size = config.vision_config.out_hidden_size = wide
    text.rms_norm_eps *= hidden / wide
    rope = dict(text.rope_parameters)
    rope["rope_theta"] = rope["rope_theta"] ** (HEAD_SIZE / size)
    *first, last = rope["mrope_section"]
    rope["mrope_section"] = [*first, last + (HEAD_SIZE - size) // 2]
    text.rope_parameters = rope
    out = type(model)(config).to(model.dtype)
    weights = model.state_dict()
    for name, tensor in out.state_dict().items():
        tensor.copy_(_widened(name, weights[name].float(), tensor.shape, size))
    out.generation_config = copy.deepcopy(model.generation_config)
    return out


def _widened(name: str, old: Tensor, shape: torch.Size, size: int) -> Tensor:
    """A weight of the wide model, 0 where the narrow one has nothing."""
    if "visual" in name and old.shape == shape:
        return old
    places = [torch.arange(n) for n in old.shape]  # of the old weight's rows and columns in the new one
    if projection := re.search(r"self_attn\.([qkvo])_proj\.", name):
        dim = 1 if projection[1] == "o" else 0
        places[dim] = _head_places(old.shape[dim] // size, size)
        if projection[1] == "q":
            old = old * math.sqrt(HEAD_SIZE / size)
    elif "norm" in name and "visual" not in name:
        old = old * math.sqrt(len(old) / shape[0])
    new = torch.zeros(shape)
    new[torch.meshgrid(*places, indexing="ij")] = old
    return new


def _head_places(heads: int, size: int) -> Tensor:
    """Where the dimensions of narrow heads stand in wide ones. RoPE turns pairs that are half a head apart."""
    half = torch.arange(size // 2)
    one = torch.cat([half, HEAD_SIZE // 2 + half])
    return (torch.arange(heads)[:, None] * HEAD_SIZE + one).flatten()


if __name__ == "__main__":
    write_wide_base(Path(sys.argv[1]))

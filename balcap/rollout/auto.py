"""The fastest engine that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from balcap.rollout.base import RolloutEngine
from balcap.rollout.hf import HFGenerate
from balcap.rollout.vllm.inprocess import VLLMInProcess


def vllm_or_hf(max_sequences: int = 256, **vllm: Any) -> RolloutEngine:
    """`VLLMInProcess` where vLLM is installed, else `HFGenerate`, which the log then says.

    Args:
        max_sequences: without vLLM: captions that are sampled at once.
        vllm: settings of `VLLMInProcess`, checked in any case.
    """
    engine = VLLMInProcess(**vllm)
    if find_spec("vllm") is not None:
        return engine
    rank_zero_info(
        "model.engine: vLLM is not installed, so captions are sampled on the policy itself, which is slower; "
        'pip install -e ".[vllm]" to sample with vLLM'
    )
    return HFGenerate(max_sequences)

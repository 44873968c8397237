"""Engines that sample captions.

``base.py``     the contract of an engine, and `Sampling`
``hf.py``       HF ``generate`` on the policy itself: needs nothing else
``packing.py``  from sampled tokens to `Rollouts`
``vllm/``       vLLM in the trainer's process, or as servers on other GPUs and hosts

The engines are imported when they are first asked for: a config names one of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from balcap.rollout.base import EngineFailed, OnGroupDone, RolloutEngine, Sampling

if TYPE_CHECKING:
    from balcap.rollout.hf import HFGenerate
    from balcap.rollout.vllm.inprocess import VLLMInProcess
    from balcap.rollout.vllm.server import VLLMServer

__all__ = [
    "EngineFailed",
    "HFGenerate",
    "OnGroupDone",
    "RolloutEngine",
    "Sampling",
    "VLLMInProcess",
    "VLLMServer",
]

_ENGINES = {
    "HFGenerate": "balcap.rollout.hf",
    "VLLMInProcess": "balcap.rollout.vllm.inprocess",
    "VLLMServer": "balcap.rollout.vllm.server",
}


def __getattr__(name: str) -> Any:
    if name in _ENGINES:
        return getattr(import_module(_ENGINES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

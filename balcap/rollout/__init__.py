"""Engines that sample captions.

``base.py``  the contract of an engine, `Sampling`, and from sampled tokens to `Rollouts`
``hf.py``    on the policy itself: needs nothing else; ``decode.py`` reads each prompt once for its captions
``vllm/``    vLLM in the trainer's process, or as servers on other GPUs and hosts
``auto.py``  vLLM in process where it is installed, else the policy itself
``memory.py``  what sampling holds on the device, by arithmetic
``references.py``  the references in place of sampled captions, for supervised fine-tuning
"""

from balcap.rollout.auto import vllm_or_hf
from balcap.rollout.base import EngineFailed, RolloutEngine, Sampling
from balcap.rollout.hf import HFGenerate
from balcap.rollout.vllm.inprocess import VLLMInProcess
from balcap.rollout.vllm.server import VLLMServer

__all__ = [
    "EngineFailed",
    "HFGenerate",
    "RolloutEngine",
    "Sampling",
    "VLLMInProcess",
    "VLLMServer",
    "vllm_or_hf",
]

"""Engines that sample captions.

``base.py`` the contract; ``packing.py`` what sampled tokens become; ``pipeline.py`` between sampling and update.

HF: ``hf.py``, which needs nothing else. vLLM: ``vllm_inprocess.py`` on the trainer's device (``vllm_start.py``,
``vllm_requests.py``), ``vllm_server.py`` elsewhere (``vllm_http.py``, ``vllm_chat.py``, ``server_checks.py``;
``serve.py`` starts one). Both: ``vllm_common.py``; weights: ``weights.py``, ``vllm_worker.py``, ``sender.py``,
``transfer.py``.
"""

from balcap.rollout.base import EngineFailed, Finished, RolloutEngine, Sampling

__all__ = ["EngineFailed", "Finished", "RolloutEngine", "Sampling"]

"""What runs inside a vLLM worker: it takes new weights from the trainer, and tells whose weights it holds.

vLLM mixes `WeightSync` into its worker class (``worker_extension_cls="balcap.rollout.vllm_worker.WeightSync"``) and
reaches its methods by ``collective_rpc``. Attributes that begin with ``self.model_runner`` are vLLM's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ADAPTER_ID = 1
"""The one adapter of the engine: requests carry ``LoRARequest(lora_int_id=ADAPTER_ID, ...)``."""

NEVER_SYNCED = -1


class WeightSync:
    """Extension of a vLLM worker. While a transfer is under way, or after it failed, the worker has no version."""

    _balcap_version: int = NEVER_SYNCED

    def balcap_version(self) -> int:
        """Optimizer updates behind the weights that this worker holds; -1 before the first sync."""
        return self._balcap_version

    def balcap_load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace these weights of the base model in place; the others stay. Returns `version`.

        Args:
            weights: names as in the model's checkpoint on disk, and whole tensors. Weights that vLLM keeps in one
                tensor (such as q, k and v of a layer) must come together: what is left out of it is lost.
            version: that the worker reports from now on.
        """
        self._balcap_version = NEVER_SYNCED
        worker: Any = self
        with torch.no_grad(), _silent_about_weights_left_out():
            worker.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)
            _pack_tied_heads_again(worker.model_runner.model)
        self._balcap_version = version
        return version

    def balcap_adapter(self, config: dict[str, Any], weights: dict[str, Tensor], version: int) -> int:
        """Replace the LoRA adapter, from memory. Returns `version`.

        Args:
            config: peft's ``adapter_config.json``.
            weights: peft's state dict of the adapter.
            version: that the worker reports from now on.

        Raises:
            ValueError: the adapter changes a module that vLLM cannot adapt, or is of a kind that it cannot take.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        self._balcap_version = NEVER_SYNCED
        worker: Any = self
        manager = worker.model_runner.lora_manager
        adapters = manager._adapter_manager
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(manager.lora_config)
        lora = LoRAModel.from_lora_tensors(
            lora_model_id=ADAPTER_ID,
            # vLLM scales B in place: never on the policy's own storage
            tensors={name: tensor.detach().clone() for name, tensor in weights.items()},
            peft_helper=helper,
            device=str(worker.device),
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=_renames(adapters.model),
        )
        _check_modules(lora.loras, adapters)
        manager.remove_adapter(ADAPTER_ID)
        adapters.add_adapter(lora)
        adapters.activate_adapter(ADAPTER_ID)
        self._balcap_version = version
        return version


def _pack_tied_heads_again(model: Any) -> None:
    """On a CPU vLLM computes logits from a packed copy of the head's weight. Where the head shares the embedding's, a
    reload names the embedding alone and leaves the head's copy as it was (vLLM 0.32)."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and hasattr(method, "tie_weights"):  # embeddings and heads
            method.process_weights_after_loading(module)


def _renames(model: Any) -> Any:
    """vLLM's map from names of the hub to its own, or None."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    # Newer mappers also stack q, k and v into one weight, which LoRA's own packing does (vLLM 0.32).
    renames = getattr(mapper, "get_rename_mapper", None)
    return mapper if renames is None else renames()


def _check_modules(adapted: Iterable[str], adapters: Any) -> None:
    """ValueError where vLLM would leave out a module of the adapter without a word."""
    packed = {name for parts in adapters.packed_modules.values() for name in parts}
    there = set(adapters.modules) | packed
    missing = sorted(set(adapted) - there)
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"vLLM cannot adapt {', '.join(missing[:3])}{rest} of {type(adapters.model).__name__}; leave it out of "
            "model.policy.lora.target_modules, or sample with balcap.rollout.hf.HFGenerate"
        )


@contextmanager
def _silent_about_weights_left_out() -> Iterator[None]:
    """vLLM warns of every layer that a reload does not touch; here these are the frozen ones."""
    expected = ("Failed to load weights", "Following weights were not loaded")

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in expected)

    names = ("model_executor.model_loader.reload.layerwise", "model_executor.model_loader.reload.inplace")
    # Before 0.30 or so the runner itself reloaded.
    loggers = [logging.getLogger(f"vllm.{name}") for name in (*names, "v1.worker.gpu_model_runner")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)

"""What runs inside a vLLM worker: it takes new weights from the trainer, and reports which ones it holds.

vLLM mixes `WeightSync` into its worker class (``worker_extension_cls``) and reaches its methods by ``collective_rpc``:
with any arguments in the trainer's process, over HTTP with texts alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

ADAPTER_ID = 1
"""The one adapter of the engine: requests carry ``LoRARequest(lora_int_id=ADAPTER_ID, ...)``."""

# It warns of every layer that a reload does not touch; here these are the frozen ones.
logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)


class WeightSync:
    """Extension of a vLLM worker. While weights are loaded, or after that failed, it holds no version."""

    if TYPE_CHECKING:  # what the worker has

        def __getattr__(self, name: str) -> Any: ...

    _balcap_version: int | str | None = None

    @contextmanager
    def _balcap_loads(self, version: int | str) -> Iterator[None]:
        self._balcap_version = None
        yield
        self._balcap_version = version

    def balcap_about(self) -> dict[str, Any]:
        """What this worker runs, and the version of the weights last loaded; None before the first."""
        config = self.vllm_config
        lora, transfer = config.lora_config, getattr(config, "weight_transfer_config", None)
        return {
            "model": config.model_config.model,
            "revision": config.model_config.revision,
            "device": torch.device(self.device).type,
            "quantization": config.model_config.quantization,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "mm_processor_kwargs": config.model_config.multimodal_config.mm_processor_kwargs,
            "images": config.model_config.multimodal_config.get_limit_per_prompt("image"),
            "max_model_len": config.model_config.max_model_len,
            "max_lora_rank": None if lora is None else lora.max_lora_rank,
            "workers": config.parallel_config.world_size,
            "data_parallel": config.parallel_config.data_parallel_size,
            "weight_transfer": None if transfer is None else transfer.backend,
            "version": self._balcap_version,
        }

    def balcap_load(self, weights: Iterable[tuple[str, Tensor]], version: int | str) -> None:
        """Replace these weights of the base model in place; the others stay.

        Args:
            weights: names as in the model's checkpoint on disk, and whole tensors. Weights that vLLM keeps in one
                tensor (such as q, k and v of a layer) must come together: what is left out of it is lost.
            version: that the worker reports from now on.
        """
        with self._balcap_loads(version), torch.no_grad():
            self.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)
            _pack_tied_heads_again(self.model_runner.model)

    def balcap_load_folder(self, folder: str, version: str) -> None:
        """The same, with weights from the files ``model-*.safetensors`` of a folder."""
        with self._balcap_loads(version):
            self.balcap_load(stored(folder), version)

    def balcap_load_adapter(self, folder: str, version: int | str) -> None:
        """Replace the LoRA adapter by the one in a folder, as peft saves it.

        Raises:
            ValueError: the adapter changes a module that vLLM cannot adapt, or is of a kind that it cannot take.
        """
        from vllm.lora.request import LoRARequest

        with self._balcap_loads(version):
            self.add_lora(LoRARequest("balcap", ADAPTER_ID, folder, load_inplace=True))
            _check_all_adapted(self.model_runner.lora_manager._adapter_manager)

    def balcap_join(self, init_info: str) -> None:
        """Join the trainer's NCCL group (``--weight-transfer-config``), leaving any other."""
        self._balcap_version = None
        self.shutdown_weight_transfer_engine()
        self.init_weight_transfer_engine(json.loads(init_info))

    def balcap_receive(self, update_info: str, version: str) -> None:
        """Take the weights of the base model that the trainer sends through that group."""
        with self._balcap_loads(version):
            self.start_weight_update()
            self.update_weights(json.loads(update_info))
            self.finish_weight_update()


def stored(folder: str) -> Iterator[tuple[str, Tensor]]:
    """What the files of a folder hold. FileNotFoundError where there are none."""
    from safetensors import safe_open

    paths = sorted(Path(folder).glob("model-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"No such file or directory: {folder}/model-*.safetensors")
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _pack_tied_heads_again(model: Any) -> None:
    """On a CPU vLLM computes logits from a packed copy of the head's weight. Where the head shares the embedding's, a
    reload names the embedding alone and leaves the head's copy as it was (vLLM 0.32)."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and hasattr(method, "tie_weights"):  # embeddings and heads
            method.process_weights_after_loading(module)


def _check_all_adapted(adapters: Any) -> None:
    """ValueError where vLLM has left out a module of the adapter without a word."""
    adapted = adapters.get_adapter(ADAPTER_ID).loras
    packed = {name for parts in adapters.packed_modules.values() for name in parts}
    missing = sorted(set(adapted) - set(adapters.modules) - packed)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"vLLM cannot adapt {', '.join(missing[:3])}{more} of {type(adapters.model).__name__}; leave it out of "
            "model.policy.lora.target_modules, or sample with balcap.rollout.HFGenerate"
        )

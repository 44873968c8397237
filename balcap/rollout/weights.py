"""What an engine outside the policy's own modules needs of its weights: names and tensors, nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from balcap.policy.policy import Policy


def trained_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a fully tuned policy, one by one, under the names of its checkpoint on disk.

    transformers 5 renames weights as it loads them; loaders of other projects expect the names on disk. Of weights
    that are tied only one is named. Tensors are the parameters' own storage: read them, and change nothing.

    With sharded parameters (FSDP2) each is gathered as it is asked for, so that only one is whole at a time: every
    rank must then exhaust the iterator.
    """
    from transformers.core_model_loading import revert_weight_conversion

    trained = {
        name: parameter.detach()
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad
    }
    for name, tensor in revert_weight_conversion(policy.model, trained).items():
        yield name, _whole(tensor)


def adapter_weights(policy: Policy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The LoRA adapter as peft would save it: ``adapter_config.json`` as a dict, and its tensors by name.

    Tensors are the parameters' own storage, as in `trained_weights`; sharded ones are gathered, on all ranks.
    """
    from peft import get_peft_model_state_dict

    name = policy.model.active_adapter
    # Embeddings are never adapted here; to find that out by itself, peft would ask the hub.
    state = get_peft_model_state_dict(policy.model, adapter_name=name, save_embedding_layers=False)
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in policy.model.peft_config[name].to_dict().items()
        if isinstance(value, str | int | float | bool | list | tuple | dict | set | None)
    }
    return config, {key: _whole(tensor.detach()) for key, tensor in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where this rank holds a shard."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

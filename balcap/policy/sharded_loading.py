"""Weights of a policy that is cut over ranks: read once, by rank 0; the others begin with the model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from balcap.policy.config import PolicyConfig, PolicyError
from balcap.policy.loading import empty_model, load_model


@dataclass(frozen=True)
class _Loaded:
    """What ranks without weights must know of a model that was loaded."""

    dtypes: dict[str, torch.dtype]
    generation_config: Any
    weight_conversions: Any

    @classmethod
    def of(cls, model: Any) -> _Loaded:
        dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
        return cls(dtypes, model.generation_config, getattr(model, "_weight_conversions", None))

    def give(self, model: Any) -> Any:
        """To a model on the meta device, which it returns. A head that has weights of its own beside an embedding that the
        config ties it to keeps them, as transformers does."""
        for name in self.dtypes.keys() - dict(model.named_parameters()).keys():
            path, _, attribute = name.rpartition(".")
            own = nn.Parameter(torch.empty_like(model.get_parameter(name)))
            setattr(model.get_submodule(path), attribute, own)
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(self.dtypes[name])
        model.generation_config, model._weight_conversions = self.generation_config, self.weight_conversions
        return model


def load_once(config: PolicyConfig) -> Any:
    """The weights on rank 0; on the others the same model on the meta device. A collective.

    Raises:
        PolicyError: on all ranks, where rank 0 cannot load it.
    """
    told: list[Any] = [""]
    model = None
    if dist.get_rank() == 0:
        try:
            model = load_model(config)
            told = [_Loaded.of(model)]
        except PolicyError as error:
            told = [str(error)]
    dist.broadcast_object_list(told)
    if isinstance(told[0], str):
        raise PolicyError(told[0])
    return model if model is not None else told[0].give(empty_model(config))


def empty_like(model: Any, config: PolicyConfig) -> Any:
    """A model of the same weights, as it was loaded, on the meta device."""
    return _Loaded.of(model).give(empty_model(config))

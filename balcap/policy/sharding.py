"""A policy whose weights, gradients and optimizer state lie in parts on all ranks: torch's FSDP2 (``fully_shard``).

Units, each gathered as a whole where it is used: every decoder layer; every block of a vision tower that is trained; and
what is left, embedding, head and norms (with the policy's own logps as forward, so that head and embedding may be read in
any way, and share their matrix). The reference of full tuning is cut in the same way, and its rest gathered for its own
log-probs alone.

A frozen tower stays whole on each rank: which images it sees differs from rank to rank, since features are kept, and a
gathering that not all ranks take part in never ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from balcap.policy.families import base_of, family_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from balcap.policy.policy import Policy


@dataclass(frozen=True)
class Sharding:
    """Over which ranks, and how they compute.

    Attributes:
        mesh: of one dimension.
        compute_dtype: of weights where they are gathered; None for their own. Gradients are summed in float32.
    """

    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        kind = self.mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def shard(policy: Policy, sharding: Sharding) -> None:
    """Cut a policy, in place, and give each rank its parts of the weights that rank 0 has. A collective.

    Args:
        policy: its model of `balcap.policy.sharded_loading.load_once`, prepared; its reference, if any, of `empty_like`.
        sharding: how.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    # Nothing is changed in place here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    model, reference, device = policy.model, policy.reference, sharding.device
    whole = model.state_dict() if dist.get_rank() == 0 else {}
    kept = frozen_tower(model)
    _cut_blocks(base_of(model), sharding, kept)
    if reference is not None:
        _cut_blocks(reference, sharding, set())
        _cut(reference, sharding, set())
    _cut(policy, sharding, kept)
    for name in ("logps", "reference_logps"):
        register_fsdp_forward_method(policy, name)
    for part in filter(None, (model, reference)):
        is_empty = any(tensor.is_meta for tensor in part.parameters())
        part.to_empty(device=device) if is_empty else part.to(device)
        _load(part, dict(whole))  # it is changed
    own = dict(base_of(model).named_buffers())
    for buffer in own.values():
        dist.broadcast(buffer, 0)
    for name, buffer in () if reference is None else reference.named_buffers():
        buffer.copy_(own[name])


def frozen_tower(model: Any) -> set[nn.Parameter]:
    """Weights of vision, where nothing of it is trained."""
    base = base_of(model)
    family = family_of(base)
    if not family.vision_is_frozen(base):
        return set()
    language = family.language_prefixes(base)
    return {weight for name, weight in base.named_parameters() if not name.startswith(language)}


def blocks_of(base: Any, kept: set[nn.Parameter]) -> list[nn.Module]:
    """Each layer of language model and tower, those of `kept` weights left out."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = (module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))
    return [block for block in blocks if not kept.issuperset(block.parameters())]


def _cut_blocks(base: Any, sharding: Sharding, kept: set[nn.Parameter]) -> None:
    for block in blocks_of(base, kept):
        _cut(block, sharding, kept)


def _cut(module: nn.Module, sharding: Sharding, kept: set[nn.Parameter]) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(
        sharding.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(module, mesh=sharding.mesh, mp_policy=precision, ignored_params=kept)


def _load(model: Any, whole: dict[str, Any]) -> None:
    """Its part on each rank of the whole weights, which rank 0 has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)


def is_sharded(module: nn.Module) -> bool:
    """Whether it was cut by `shard`."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """What of a module's weights no unit below it has, whole on each rank for as long as the context lasts. A collective;
    nothing where the module is not cut."""
    if not is_sharded(module):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, as a whole. A collective where it does."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this rank."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


def whole_state(model: Any, trained: bool) -> dict[str, Tensor]:
    """The state dict of a model that is cut: whole, in the memory of rank 0; empty on the others. A collective.

    Args:
        model: as `shard` leaves it.
        trained: only what is trained of it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in state.items() if name in names}  # of tied weights one

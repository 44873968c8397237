"""A device that is not there: tensors on the CPU that count as on it, and whoever waits for them is caught."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)

READS = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "equal"}
"""Operators whose result, or its shape, the host must wait for; so it must for an index of booleans."""

_GETS_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]


class PretendDevice(TorchFunctionMode):
    """Within it `DEVICE` can be used as if it were there.

    What is moved or made there is known by its storage, and so is everything that is computed from it.

    Args:
        there: tensors that are on the device from the beginning.

    Attributes:
        waits: names of the operations that would have made the host wait for the device, in order.
    """

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._operators = _Operators(self)
        self._storages: dict[int, Any] = {}  # kept alive, so that no number is given twice
        self.put(there)

    def put(self, tensors: Any) -> Any:
        """Count all tensors of a structure as on the device."""
        for one in tree_leaves(tensors):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self._storages[storage._cdata] = storage
        return tensors

    def holds(self, *values: Any) -> bool:
        """Whether any tensor among these is on the device."""
        tensors = (one for one in tree_leaves(values) if isinstance(one, Tensor))
        return any(one.untyped_storage()._cdata in self._storages for one in tensors)

    def __enter__(self) -> PretendDevice:
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        held = bool(args) and isinstance(args[0], Tensor) and self.holds(args[0])
        if func == _GETS_DEVICE:
            return DEVICE if held else func(*args)
        if held and func in (Tensor.cpu, Tensor.tolist, Tensor.numpy):
            self.waits.append(func.__name__)
            copy = args[0].detach().clone()
            del self._storages[copy.untyped_storage()._cdata]
            return func(copy)
        if DEVICE not in (*args[1:], *kwargs.values()):
            return func(*args, **kwargs)
        if func is not Tensor.to:
            return self.put(func(*args, **kwargs | {"device": "cpu"}))
        rest = [arg for arg in args[1:] if arg != DEVICE]
        moved = args[0] if held else args[0].clone()
        return self.put(moved.to(*rest) if rest else moved)


class _Operators(TorchDispatchMode):
    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.device.holds(args, kwargs):
            return out
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        booleans = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
        if name in READS or booleans:
            self.device.waits.append(name)
        return self.device.put(out)

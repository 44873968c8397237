"""The layers of language model and vision tower and the head of an update in few large kernels, made by ``torch.compile``.

A GPU that waits for Python is bound by the number of operators, not by arithmetic. One graph serves all layers of a model
and all lengths, because what is packed reaches a layer as tensors alone (`balcap.policy.layout.AttentionLayout`). Only
packed sequences go through it: ``generate`` and sequences of one caption work as ever.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from balcap.policy.windows import WithLongest

logger = logging.getLogger(__name__)


class Compiled:
    """A function of tensors that is compiled at its first call, and called as it is where it cannot be.

    Args:
        function: to be compiled; tensors may be of other sizes from call to call.
        wanted: see `PolicyConfig.compile`.
        needs: name of a keyword argument; calls without it go to the function itself.
    """

    failed = False
    """Of any of them: what cannot be compiled once cannot be elsewhere."""

    def __init__(self, function: Callable[..., Any], wanted: bool | str, needs: str = "") -> None:
        self.function, self.wanted, self.needs = function, wanted, needs

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """Made at the first call that needs it: torch's compiler takes a second to import."""
        return torch.compile(self.function, dynamic=True)

    def works_on(self, device: str) -> bool:
        """Whether it is compiled on this type of device, as far as is known before its first call."""
        return not Compiled.failed and is_compiled(self.wanted, device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(one for one in args if isinstance(one, Tensor)).device.type
        if (self.needs and self.needs not in kwargs) or not self.works_on(device):
            return self.function(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            Compiled.failed = True
            logger.warning(
                "model.policy.compile: torch.compile fails here (%s); updates go on without it, slower",
                " ".join(str(error).split())[:300],
            )
            return self.function(*args, **kwargs)


def compile_layers(base: Any, language_model: Any, wanted: bool | str) -> None:
    """Compile the forward of all decoder layers of a model, in place, for packed sequences, and of the blocks of its tower
    where one kernel takes their windows of any sizes."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = Compiled(layer.forward, wanted, needs="packed_attention")
    for block in base.modules():
        if isinstance(block.forward, WithLongest):
            block.forward.forward = Compiled(block.forward.forward, wanted, needs="longest")


@functools.cache
def is_compiled(wanted: bool | str, device: str) -> bool:
    """Whether updates on this type of device are compiled. On a CPU the first update would take a minute longer, to save
    some percent of the next ones."""
    if wanted != "auto":
        return bool(wanted)
    from torch.utils._triton import has_triton

    return device == "cuda" and has_triton()

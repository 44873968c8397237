"""Lets the registry's torchvision be imported beside a torch that was built for the CPU alone.

torchvision's wheel on PyPI brings kernels that load only beside PyPI's own torch (with CUDA); without them its import
fails where it gives ``nms`` a shape function, because nobody has defined the operator. vLLM for the CPU needs a CPU
build of torch, and torchvision only to resize images, which takes no operator of its own. So this defines the two
operators, without an implementation, just before torchvision is imported. torchvision's own CPU wheels (``+cpu``)
define them, and are left alone.

``make test-vllm`` copies this file into its environment, with a ``.pth`` file that imports it when Python starts.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; is called when torchvision is about to be imported."""

    library: Any = None  # the operators live as long as it does

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            if "+" not in metadata.version("torchvision"):
                self.define()
        return None

    def define(self) -> None:
        import torch

        _Finder.library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _Finder.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Finder())

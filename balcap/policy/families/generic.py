"""Any image-text-to-text model of transformers: one sequence per caption, and nothing assumed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from balcap.policy.families.base import Family


class Generic(Family):
    """Exact for every model, and slow: no shared prefix (no text type is claimed), no FLOPs, no count of features."""

    def num_features(self, config: Any, item: dict[str, Tensor]) -> None:
        """Not known."""

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> None:
        """Not known."""

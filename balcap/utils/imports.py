"""One workaround: torchmetrics, which Lightning imports, would import transformers for metrics unused here."""

from __future__ import annotations

import importlib
import sys


def import_torchmetrics_lightly() -> None:
    """Import torchmetrics as if transformers were not installed.

    transformers and what it pulls in take seconds; ``--help`` and a refused config need none of it. Only
    torchmetrics' BERTScore, InfoLM and CLIPScore are affected, and only until they are imported anew.
    """
    if "torchmetrics" in sys.modules or "transformers" in sys.modules:
        return
    from lightning_utilities.core.imports import RequirementCache

    original = RequirementCache.__bool__

    def without_transformers(self: RequirementCache) -> bool:
        return False if str(self.requirement or "").startswith("transformers") else original(self)

    RequirementCache.__bool__ = without_transformers  # type: ignore[method-assign]
    try:
        importlib.import_module("torchmetrics")
    finally:
        RequirementCache.__bool__ = original  # type: ignore[method-assign]

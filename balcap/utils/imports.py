"""One workaround: torchmetrics, which Lightning imports, would import large packages for metrics unused here."""

from __future__ import annotations

import importlib
import re
import sys
from unittest import mock

HEAVY = ("scipy", "transformers")


def import_torchmetrics_lightly() -> None:
    """Import torchmetrics as if `HEAVY` packages were not installed.

    With what they pull in they take seconds; ``--help`` and a refused config need none of them. Only
    torchmetrics' BERTScore, InfoLM and CLIPScore are affected, and only until they are imported anew.
    """
    if "torchmetrics" in sys.modules or "transformers" in sys.modules:
        return
    from lightning_utilities.core import imports

    is_met, is_there = imports.RequirementCache.__bool__, imports.package_available

    def is_light(requirement: str | None) -> bool:
        return re.split(r"\W", requirement or "")[0] not in HEAVY

    with (
        mock.patch.object(
            imports.RequirementCache, "__bool__", lambda self: is_light(self.requirement) and is_met(self)
        ),
        mock.patch.object(imports, "package_available", lambda name: is_light(name) and is_there(name)),
    ):
        importlib.import_module("torchmetrics")

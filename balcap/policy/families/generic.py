"""Any image-text-to-text model of transformers: one sequence per caption, and nothing assumed."""

from __future__ import annotations

from balcap.policy.families.base import Family


class Generic(Family):
    """Exact for every model, and slow: no shared prefix (no text type is claimed), no FLOPs, no count of features."""

"""What each model family does in its own way; all that is common to them stands one folder up.

``base.py`` the questions that a family answers, and the usual answers; ``qwen2_5_vl.py`` Qwen2-VL and Qwen2.5-VL;
``llava.py`` LLaVA-1.5; ``qwen3_5.py`` Qwen3.5 and 3.6; ``gemma3.py`` Gemma 3; ``generic.py`` every other model of
transformers, one sequence per caption.

A new family is one file here, and its class in `FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from balcap.policy.families.base import Family, ImageFeatures, base_of
from balcap.policy.families.gemma3 import Gemma3
from balcap.policy.families.generic import Generic
from balcap.policy.families.llava import Llava
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL
from balcap.policy.families.qwen3_5 import Qwen3_5

__all__ = ["FAMILIES", "Family", "ImageFeatures", "base_of", "family_of"]

FAMILIES: tuple[Family, ...] = (Qwen2_5VL(), Llava(), Qwen3_5(), Gemma3())


def family_of(model_or_config: Any) -> Family:
    """The family of an HF model (with or without an adapter) or of its config; `Generic` for unknown ones."""
    config = getattr(base_of(model_or_config), "config", model_or_config)
    known = (family for family in FAMILIES if config.model_type in family.model_types)
    return next(known, Generic())

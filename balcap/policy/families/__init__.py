"""What each model family does in its own way; all that is common to them stands one folder up.

``base.py`` the questions that a family answers, and the usual answers; ``qwen2_5_vl.py`` Qwen2-VL and Qwen2.5-VL;
``qwen3_vl.py`` Qwen3-VL; ``qwen3_5.py`` Qwen3.5 and 3.6; ``glm4v.py`` GLM-4.1V to GLM-4.6V; ``llava.py`` LLaVA-1.5,
Pixtral, Mistral Small 3; ``llava_next.py`` LLaVA-NeXT and LLaVA-OneVision; ``idefics3.py`` Idefics3 and SmolVLM;
``internvl.py`` InternVL3 and 3.5; ``gemma3.py`` Gemma 3; ``generic.py`` every other model of transformers, one sequence
per caption.

A new family is one file here, and its class in `FAMILIES`; or a class anywhere that ``model.policy.family`` names.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from balcap.policy.families.base import Family, ImageFeatures, base_of, regrouped
from balcap.policy.families.gemma3 import Gemma3
from balcap.policy.families.generic import Generic
from balcap.policy.families.glm4v import Glm4V
from balcap.policy.families.idefics3 import Idefics3
from balcap.policy.families.internvl import InternVL
from balcap.policy.families.llava import Llava, Mistral3
from balcap.policy.families.llava_next import LlavaNext, LlavaOnevision
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL
from balcap.policy.families.qwen3_5 import Qwen3_5
from balcap.policy.families.qwen3_vl import Qwen3VL

__all__ = ["FAMILIES", "Family", "ImageFeatures", "base_of", "family_of", "load_family", "regrouped"]

FAMILIES: tuple[Family, ...] = (
    Qwen2_5VL(),
    Qwen3VL(),
    Qwen3_5(),
    Glm4V(),
    Llava(),
    Mistral3(),
    LlavaNext(),
    LlavaOnevision(),
    Idefics3(),
    InternVL(),
    Gemma3(),
)


_others: list[Family] = []


def load_family(path: str) -> Family:
    """The family at this import path, which is from now on that of the model types that it names.

    Raises:
        ImportError, AttributeError, ValueError: nothing is there.
    """
    kind = pkgutil.resolve_name(path)
    known = next((family for family in _others if type(family) is kind), None)
    if known is None:
        _others.insert(0, known := kind())
    return known


def family_of(model_or_config: Any) -> Family:
    """The family of an HF model (with or without an adapter) or of its config; `Generic` for unknown ones."""
    config = getattr(base_of(model_or_config), "config", model_or_config)
    known = (family for family in (*_others, *FAMILIES) if config.model_type in family.model_types)
    return next(known, Generic())

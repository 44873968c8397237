"""Tokens without asking anybody: of images, by the rule of the model that sees them; of texts; of reasoning.

Pure functions of width and height in pixels, as the image is sent. The rules are those that providers publish,
corrected where bills are known to differ (2026-11). A rule is picked by the model's name; a model that no rule
knows is counted as `AREA`, and the estimate says so.

=========================  =====================================================================
`tiles`                    GPT-4o, 4.1, 4o-mini, o1, o3, GPT-5, 5.1: a base, and each 512-pixel tile
`patches`                  GPT-4.1-mini and -nano, o4-mini, GPT-5-mini and -nano, GPT-5.2 and later
`merged`                   Qwen-VL: patches of 28 (from Qwen3-VL on 32) pixels after its own resizing
`gemini`                   Gemini 1.5 to 2.5: tiles of 768 pixels; from Gemini 3 on the same for every size
`area`                     Claude: pixels / 750
=========================  =====================================================================
"""

from __future__ import annotations

import math
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from typing import Any

from balcap.judge import ImagePolicy, JudgeSettings
from balcap.judge.client import import_litellm
from balcap.judge.images import image_url

TokensOf = Callable[[int, int, str | None], int]


def tiles(width: int, height: int, detail: str | None, base: int, tile: int) -> int:
    """`base`, and `tile` for each 512-pixel square of the image shrunk to fit 2048 x 2048, then to a shorter
    side of 768. ``low`` detail is `base` alone; ``auto`` counts as ``high``."""
    if detail == "low":
        return base
    shrink = min(1.0, 2048 / max(width, height))
    shrink *= min(1.0, 768 / (min(width, height) * shrink))
    return base + tile * _cells(width * shrink, height * shrink, 512)


def patches(width: int, height: int, detail: str | None, multiplier: float, most: int) -> int:
    """`multiplier` for each 32-pixel square; an image of more than `most` is shrunk until it has no more.

    `detail` changes nothing: bills show the same for ``low``.
    """
    count = _cells(width, height, 32)
    if count > most:
        shrink = math.sqrt(most * 32**2 / (width * height))
        across, down = width * shrink / 32, height * shrink / 32
        # So that a whole number of squares fits along at least one side.
        shrink *= min(math.floor(across) / across, math.floor(down) / down) if min(across, down) >= 1 else 1
        count = min(most, _cells(width * shrink, height * shrink, 32))
    return math.ceil(count * multiplier)


def merged(width: int, height: int, detail: str | None, side: int, most: int = 16384) -> int:
    """Squares of `side` pixels after rounding both sides to a multiple of it, 4 to `most`, and two marks."""
    across, down = max(1, round(width / side)), max(1, round(height / side))
    if across * down > most:
        shrink = math.sqrt(most * side**2 / (width * height))
        across, down = math.floor(width * shrink / side), math.floor(height * shrink / side)
    elif across * down < 4:
        grow = math.sqrt(4 * side**2 / (width * height))
        across, down = math.ceil(width * grow / side), math.ceil(height * grow / side)
    return max(1, across) * max(1, down) + 2


def gemini(width: int, height: int, detail: str | None) -> int:
    """258 for each tile of 768 pixels, and for an image of at most 384 pixels either way."""
    return 258 * (1 if max(width, height) <= 384 else _cells(width, height, 768))


def gemini_3(width: int, height: int, detail: str | None) -> int:
    """1120, or 280 at ``low`` detail, whatever the size."""
    return 280 if detail == "low" else 1120


def area(width: int, height: int, detail: str | None) -> int:
    """Pixels / 750 of the image shrunk to a longer side of 1568, at most 1600."""
    shrink = min(1.0, 1568 / max(width, height))
    return min(1600, math.ceil(width * shrink * height * shrink / 750))


@dataclass(frozen=True)
class Rule:
    """How a family of models counts an image.

    Attributes:
        family: for a person.
        tokens: (width, height, detail) -> prompt tokens.
        known: False where it is an assumption.
    """

    family: str
    tokens: TokensOf
    known: bool = True


AREA = Rule("no published rule: pixels / 750", area, known=False)
# The first that is found in the model's name, behind the provider, in lower case.
_RULES: tuple[tuple[str, Rule], ...] = (
    ("gpt-4o-mini", Rule("GPT-4o-mini tiles", partial(tiles, base=2833, tile=5667))),
    ("gpt-4.1-mini", Rule("GPT-4.1-mini patches", partial(patches, multiplier=1.62, most=1536))),
    ("gpt-4.1-nano", Rule("GPT-4.1-nano patches", partial(patches, multiplier=2.46, most=1536))),
    ("o4-mini", Rule("o4-mini patches", partial(patches, multiplier=1.72, most=1536))),
    ("gpt-5-nano", Rule("GPT-5-nano patches", partial(patches, multiplier=1.5, most=1536))),
    (r"gpt-5[\d.]*-(mini|nano)", Rule("GPT-5-mini patches", partial(patches, multiplier=1.2, most=1536))),
    (r"gpt-5\.[23]", Rule("GPT-5.2 patches", partial(patches, multiplier=1.2, most=1536))),
    (r"gpt-5\.4", Rule("GPT-5.4 patches", partial(patches, multiplier=1.2, most=2500))),
    (r"gpt-(5\.[5-9]|[6-9])", Rule("GPT-5.5 patches", partial(patches, multiplier=1.2, most=10_000))),
    (r"gpt-5", Rule("GPT-5 tiles", partial(tiles, base=70, tile=140))),
    (r"gpt-4o|gpt-4\.[15]|gpt-4-turbo|chatgpt-4o", Rule("GPT-4o tiles", partial(tiles, base=85, tile=170))),
    (r"\bo[13]\b", Rule("o1 and o3 tiles", partial(tiles, base=75, tile=150))),
    (r"qwen2(\.5)?-?vl|qwen-?vl-(max|plus)", Rule("Qwen2-VL patches", partial(merged, side=28))),
    (r"qwen3(\.\d)?-?(vl|omni)", Rule("Qwen3-VL patches", partial(merged, side=32))),
    (r"gemini-(1|2)", Rule("Gemini tiles", gemini)),
    (r"gemini-\d", Rule("Gemini 3", gemini_3)),
    (r"claude", Rule("Claude: pixels / 750", area)),
)


def rule_for(model: str) -> Rule:
    """The rule for a litellm model string, `AREA` where none is known."""
    name = model.lower()
    return next((rule for pattern, rule in _RULES if re.search(pattern, name)), AREA)


def _cells(width: float, height: float, side: int) -> int:
    """Squares of `side` that cover the image; a hair beyond a border, from scaling, opens no new one."""
    return math.ceil(round(width / side, 6)) * math.ceil(round(height / side, 6))


_REASONS = r"gpt-5(-mini|-nano|-20\d\d|$)|\bo[134](-|$)|gemini-(2\.5|[3-9])|deepseek-r|qwq"
"""Models that reason unless they are told not to; GPT-5.1 and later, Claude and most open ones do not."""

# Output tokens per call that are billed and never seen. Short questions with a list to fill in.
_EFFORTS = {"none": 0, "disable": 0, "minimal": 0, "low": 200, "medium": 800, "high": 2500, "xhigh": 5000}


def text_counter(chars_per_token: float | None) -> tuple[Callable[[str], int], str]:
    """Counts the tokens of a text; and what it is, for a person.

    Args:
        chars_per_token: characters that make a token; None takes litellm's tokenizer, which needs no network.
    """
    if chars_per_token is not None:
        return lambda text: int(len(text) / chars_per_token), f"{chars_per_token:g} characters a token"
    count = import_litellm().token_counter
    # The model only chooses a tokenizer: this one lies in litellm, others would be fetched.
    return (
        lru_cache(maxsize=4096)(lambda text: count(model="gpt-4o", text=text)),
        "OpenAI's cl100k_base tokenizer, within some percent of others",
    )


def reasoning_tokens(model: str, params: Mapping[str, Any]) -> int:
    """Assumed output tokens per call that a model spends on reasoning, beside its answer.

    From ``reasoning_effort`` (or the budget of Anthropic's ``thinking``), else from what the model does by
    itself.
    """
    effort = params.get("reasoning_effort")
    effort = effort.get("effort") if isinstance(effort, Mapping) else effort
    if effort is not None:
        return _EFFORTS.get(str(effort), _EFFORTS["medium"])
    thinking = params.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") != "disabled":
        return min(_EFFORTS["medium"], int(thinking.get("budget_tokens") or _EFFORTS["medium"]))
    return _EFFORTS["medium"] if re.search(_REASONS, model) else 0


def place_of(settings: JudgeSettings, model: str) -> str:
    """Where a model is served, as litellm writes it: the first of its deployments."""
    return settings.deployments[0].model if settings.deployments and model == settings.model else model


def image_tokens(settings: JudgeSettings, model: str, image: bytes) -> int:
    """Tokens of an image file as the judge sends it to `model`, by the model's rule."""
    place = place_of(settings, model)
    return rule_for(place).tokens(*_size(image, settings.images), settings.images.detail)


@lru_cache(maxsize=1024)
def _size(image: bytes, policy: ImagePolicy) -> tuple[int, int]:
    """Pixels of an image file as it is sent."""
    from PIL import Image

    with Image.open(BytesIO(b64decode(image_url(image, policy).partition(",")[2]))) as sent:
        return sent.size

"""Tokens without asking anybody: of images, by the rule of the model that sees them; of texts; of reasoning.

Pure functions of width and height in pixels, as the image is sent. The rules are those that providers publish,
corrected where bills are known to differ (2026-11). A rule is picked by the model's name; a model that no rule
knows is counted by `area`, and the estimate says so.

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
from functools import lru_cache, partial
from io import BytesIO
from typing import Any

from balcap.judge import ImagePolicy, JudgeSettings
from balcap.judge.images import image_url
from balcap.judge.models import import_litellm

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
    """`multiplier` for each 32-pixel square; an image of more than `most` is shrunk until it has no more, and has
    up to 6 % fewer. `detail` changes nothing: bills show the same for ``low``."""
    return math.ceil(multiplier * min(most, _cells(width, height, 32)))


def merged(width: int, height: int, detail: str | None, side: int) -> int:
    """Squares of `side` pixels after rounding both sides to a multiple of it, 4 to 16384, and two marks."""
    return max(4, min(16384, round(width / side) * round(height / side))) + 2


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


# The first that is found in the model's name, behind the provider, in lower case.
_RULES: tuple[tuple[str, TokensOf], ...] = (
    (r"gpt-4o-mini", partial(tiles, base=2833, tile=5667)),
    (r"gpt-4\.1-mini", partial(patches, multiplier=1.62, most=1536)),
    (r"gpt-4\.1-nano", partial(patches, multiplier=2.46, most=1536)),
    (r"o4-mini", partial(patches, multiplier=1.72, most=1536)),
    (r"gpt-5-nano", partial(patches, multiplier=1.5, most=1536)),
    (r"gpt-5[\d.]*-(mini|nano)|gpt-5\.[23]", partial(patches, multiplier=1.2, most=1536)),
    (r"gpt-5\.4", partial(patches, multiplier=1.2, most=2500)),
    (r"gpt-(5\.[5-9]|[6-9])", partial(patches, multiplier=1.2, most=10_000)),
    (r"gpt-5", partial(tiles, base=70, tile=140)),
    (r"gpt-4o|gpt-4\.[15]|gpt-4-turbo|chatgpt-4o", partial(tiles, base=85, tile=170)),
    (r"\bo[13]\b", partial(tiles, base=75, tile=150)),
    (r"qwen2(\.5)?-?vl|qwen-?vl-(max|plus)", partial(merged, side=28)),
    (r"qwen3(\.\d)?-?(vl|omni)", partial(merged, side=32)),
    (r"gemini-(1|2)", gemini),
    (r"gemini-\d", gemini_3),
    (r"claude", area),
)


def rule_for(model: str) -> TokensOf | None:
    """(width, height, detail) -> prompt tokens, for a litellm model string; None where no rule is known."""
    name = model.lower()
    return next((rule for pattern, rule in _RULES if re.search(pattern, name)), None)


def _cells(width: float, height: float, side: int) -> int:
    """Squares of `side` that cover the image; a hair beyond a border, from scaling, opens no new one."""
    return math.ceil(round(width / side, 6)) * math.ceil(round(height / side, 6))


_REASONS = r"gpt-5(-mini|-nano|-20\d\d|$)|\bo[134](-|$)|gemini-(2\.5|[3-9])|deepseek-r|qwq"
"""Models that reason unless they are told not to; GPT-5.1 and later, Claude and most open ones do not."""

# Output tokens per call that are billed and never seen. Short questions with a list to fill in.
_EFFORTS = {"none": 0, "disable": 0, "minimal": 0, "low": 200, "medium": 800, "high": 2500, "xhigh": 5000}


def text_counter(chars_per_token: float | None) -> Callable[[str], int]:
    """Counts the tokens of a text.

    Args:
        chars_per_token: characters that make a token; None takes litellm's tokenizer, which needs no network.
    """
    if chars_per_token is not None:
        return lambda text: int(len(text) / chars_per_token)
    count = import_litellm().token_counter
    # The model only chooses a tokenizer: this one lies in litellm, others would be fetched.
    return lru_cache(maxsize=4096)(lambda text: count(model="gpt-4o", text=text))


def reasoning_tokens(model: str, params: Mapping[str, Any]) -> int:
    """Assumed output tokens per call that a model spends on reasoning, beside its answer.

    From ``reasoning_effort`` (Anthropic's ``thinking`` counts as medium), else from what the model does by itself.
    """
    effort = params.get("reasoning_effort") or params.get("thinking")
    if isinstance(effort, Mapping):
        effort = effort.get("effort") or ("none" if effort.get("type") == "disabled" else "medium")
    if effort is not None:
        return _EFFORTS.get(str(effort), _EFFORTS["medium"])
    return _EFFORTS["medium"] if re.search(_REASONS, model) else 0


def place_of(settings: JudgeSettings, model: str) -> str:
    """Where a model is served, as litellm writes it: the first of its deployments."""
    return settings.deployments[0].model if settings.deployments and model == settings.model else model


def image_tokens(settings: JudgeSettings, model: str, image: bytes) -> int:
    """Tokens of an image file as the judge sends it to `model`, by the model's rule."""
    place = place_of(settings, model)
    return (rule_for(place) or area)(*_size(image, settings.images), settings.images.detail)


@lru_cache(maxsize=1024)
def _size(image: bytes, policy: ImagePolicy) -> tuple[int, int]:
    """Pixels of an image file as it is sent."""
    from PIL import Image

    with Image.open(BytesIO(b64decode(image_url(image, policy).partition(",")[2]))) as sent:
        return sent.size

"""Text of models and data sets as a page may show it: what cannot be seen is written out, secrets are left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from balcap.utils.redact import secret_filter

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for tab and newline
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of the text around it
    "\u2028\u2029\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"  # halves of characters, which no file can hold
)


def text_filter() -> Callable[[str], str]:
    """A function that leaves secrets out of a text (those that the environment holds now), and writes control characters,
    marks of direction and lone surrogates as ``⟨U+202E⟩``."""
    without_secrets = secret_filter()

    @lru_cache(maxsize=100_000)
    def visible(text: str) -> str:
        return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", without_secrets(text))

    return visible

"""What an estimate assumes: one table of flags, with what they say, their defaults and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


def _assumed(default: Any, what: str, least: float = 0.0, most: float = math.inf) -> Any:
    """A flag: its default, what it says, and its range."""
    return field(default=default, metadata={"what": what, "least": least, "most": most})


@dataclass(frozen=True)
class Assumptions:
    """What nobody can know before the run: a flag each.

    Args:
        rows: images that are sampled, of training and of validation.
        ranks: processes of the run over all machines; null takes them from the trainer's settings.
        caption_words: words of a caption; null for as many as the image's reference has.
        overlap: share of what they say that all captions of an image have in common, in [0, 1].
        words_per_assertion: words of a caption for each assertion that it makes.
        chars_per_token: characters of the messages for each token, and nothing beside them; null for a tokenizer.
        image_tokens: tokens of each image; null for the rule of the model.
        reasoning_tokens: per call; null assumes them by the model and its ``reasoning_effort``.

    Raises:
        ValueError: a value is out of range; the message names the flag.
    """

    rows: int = _assumed(32, "images of training and of validation, drawn at random, that stand for all", 1)
    ranks: int | None = _assumed(None, "ranks of the run", 1)
    caption_words: int | None = _assumed(None, "words of a caption", 1)
    overlap: float = _assumed(
        0.45, "share of what they say that all captions of an image have in common", most=1
    )
    words_per_assertion: float = _assumed(4.1, "words of a caption for each assertion", 0.1)
    chars_per_token: float | None = _assumed(None, "characters of a token", 0.1)
    image_tokens: int | None = _assumed(None, "tokens of an image")
    reasoning_tokens: int | None = _assumed(None, "tokens of reasoning in a call")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least, most = getattr(self, one.name), one.metadata["least"], one.metadata["most"]
            if value is not None and not least <= value <= most:
                raise ValueError(f"--{one.name} {value} is out of range: {least:g} to {most:g}")

    def report(self, where_null: Mapping[str, str]) -> list[tuple[str, str]]:
        """Each assumption in words, and the flag that changes it.

        Args:
            where_null: flag -> what is assumed where it is null.
        """
        values = {one: getattr(self, one.name) for one in fields(self)}
        return [
            (f"{one.metadata['what']}: {where_null[one.name] if value is None else value}", f"--{one.name}")
            for one, value in values.items()
        ]

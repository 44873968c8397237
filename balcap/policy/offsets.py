"""Where each sampled token stands in the text of its caption, and which tokens a part of that text comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]
"""``(start, end)`` in characters of a caption, the end excluded."""

HALF = "\ufffd"
"""What a byte-level tokenizer decodes the first bytes of a character to, as long as its last one is missing."""


def token_offsets(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[Span | None]:
    """The characters of `text` that each token stands for: the offset mapping of tokens that were sampled.

    A caption's tokens need not be those that its text would be encoded to, so that they are decoded, one after the other,
    each behind the tokens before it. Tokens that share a character have the same span, and so have those around bytes that
    are no character.

    Args:
        tokenizer: of transformers.
        token_ids: ``[t]`` of one caption.
        text: what they decode to without special tokens, white space at both ends taken off or not.

    Returns:
        ``[t]`` spans, in order; together they cover `text`. None for special tokens and for white space that was taken
        off. All None where `text` is not what the tokens decode to one after the other: with tokenizers that put bytes
        together as SentencePiece does, and tokens whose bytes are no characters.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    places = [place for place, number in enumerate(token_ids) if number not in special]
    ids = [token_ids[place] for place in places]
    pieces = _pieces(tokenizer, ids)
    whole = "".join(piece for piece, _ in pieces)
    offsets: list[Span | None] = [None] * len(token_ids)
    if text not in whole or whole.strip() != text.strip():
        return offsets
    start = whole.find(text)
    position, done = -start, 0
    for piece, count in pieces:
        span = max(0, position), min(len(text), position + len(piece))
        if span[0] < span[1]:
            for place in places[done : done + count]:
                offsets[place] = span
        position, done = position + len(piece), done + count
    return offsets


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """The text in pieces of whole characters, each with how many tokens it comes from."""
    pieces: list[tuple[str, int]] = []
    start = done = (
        0  # of the piece before, whose text is `before`: tokens may decode differently at the beginning of a text
    )
    before = ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[start:end])
        if now.endswith(HALF) and end < len(ids):
            continue
        pieces.append((now[len(before) :], end - done))
        if pieces[-1][0]:
            start, before = done, tokenizer.decode(ids[done:end])
        else:
            before = now
        done = end
    return pieces


def tokens_of(span: Span, offsets: Sequence[Span | None]) -> list[int]:
    """The tokens that a part of the text comes from, those that reach into it included."""
    start, end = span
    return [place for place, one in enumerate(offsets) if one is not None and one[0] < end and one[1] > start]

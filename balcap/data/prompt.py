"""What is asked about an image: the row's own question, or one of the prompts of the config."""

from __future__ import annotations

from collections.abc import Sequence

from balcap.data.split import image_hash

DEFAULT_PROMPT = "Describe this image in detail."
"""For images that come without a question."""


def prompt_for(sample_id: str, question: str, prompts: Sequence[str] = (), seed: int = 0) -> str:
    """The instruction for one image, the same in every epoch, process and run.

    Args:
        sample_id: the image.
        question: the row's own, "" if it has none.
        prompts: one of these instead, picked by `seed` and `sample_id`; empty for the row's own question.
        seed: of the choice among `prompts`.
    """
    if prompts:
        return prompts[image_hash(seed, sample_id) % len(prompts)]
    return question or DEFAULT_PROMPT

"""The captions that an estimate is made for: the policy's own, or stand-ins as long as the references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from balcap.estimate.forecast import CaptionOf, Sample
from balcap.estimate.language import TOKENS_PER_WORD, stand_in

if TYPE_CHECKING:
    from balcap.data.reader import Sample as Row
    from balcap.module import BalCapModule

_IMAGES_AT_ONCE = 16


def tokens_per_word(module: BalCapModule, texts: Sequence[str]) -> float:
    """Of the policy's tokenizer where it lies on this disk, else of English."""
    words = sum(len(text.split()) for text in texts)
    if not words or not Path(module.policy_config.model).is_dir():
        return TOKENS_PER_WORD
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(module.policy_config.model)
    return sum(len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]) / words


def caption_of(tokens_in_word: float, max_tokens: int, caption_tokens: int | None) -> CaptionOf:
    """Stand-ins where a row has no captions (any more).

    Args:
        tokens_in_word: tokens of a word.
        max_tokens: longest caption.
        caption_tokens: tokens of every caption; None for as many as the row's reference (or its own captions)
            has.
    """
    most = max(1, int(max_tokens / tokens_in_word))

    def caption(sample: Sample, number: int) -> str:
        if number < len(sample.captions):
            return sample.captions[number]
        model = sample.captions[number % len(sample.captions)] if sample.captions else sample.reference
        words = len(model.split()) if caption_tokens is None else round(caption_tokens / tokens_in_word)
        return stand_in(model, min(words, most), number)

    return caption


def sample_policy(module: BalCapModule, rows: Sequence[Row], captions: int) -> list[list[str]]:
    """Loads the policy, unless it is there, and samples `captions` captions of each row with HF; costs no money."""
    import torch

    from balcap.data.reader import to_batch
    from balcap.policy.policy import Policy
    from balcap.rollout.hf import HFGenerate

    if not hasattr(module, "policy"):
        module.policy = Policy.load(module.policy_config, with_reference=False)
        module.policy.to("cuda" if torch.cuda.is_available() else "cpu")
    # an estimate starts no vLLM, and sends a server no weights
    engine = module.engine if isinstance(module.engine, HFGenerate) else HFGenerate(max_sequences=64)
    engine.attach(module.policy)
    found: list[list[str]] = []
    with torch.random.fork_rng():
        torch.manual_seed(module.seed)
        for start in range(0, len(rows), _IMAGES_AT_ONCE):
            batch = to_batch(rows[start : start + _IMAGES_AT_ONCE])
            rollouts = engine.generate(batch, module.policy.encode(batch), captions, module.sampling)
            found += [list(group) for group in rollouts.captions]
    return found

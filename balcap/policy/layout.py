"""Images and their captions in one sequence, without padding: each prompt once, before its captions.

``[prompt of image 0, its caption 1, …, its caption G, prompt of image 1, …]``. A caption sees its image's
prompt and itself, and its positions continue after the prompt as if the other captions were not there. The
first token of a caption is predicted from the prompt's last state, so a caption's last token need not be
forwarded: nothing follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class PromptSpan:
    """One image's part of the sequence: its prompt, then its captions.

    Attributes:
        start: index of the prompt's first token.
        prompt: P, its length.
        captions: ``[G]`` forwarded tokens of each caption: one fewer than it has, at least 0.
    """

    start: int
    prompt: int
    captions: tuple[int, ...]

    @property
    def end(self) -> int:
        """Index behind the last token."""
        return self.start + self.prompt + sum(self.captions)


class PaddedCaptions(NamedTuple):
    """An image's captions side by side.

    Attributes:
        shape: G, and L, the longest.
        tokens: ``[G * L]`` indices of those of the sequence that stand there.
        kept: ``[sum of lengths]`` places among these that are no padding, in the order of the sequence.
    """

    shape: tuple[int, int]
    tokens: Int[Tensor, GL]  # noqa: F821
    kept: Int[Tensor, M]  # noqa: F821


class Layout:
    """Where everything stands in the packed sequence of N tokens.

    Built from lengths alone; the index tensors live on `device`.

    Args:
        prompts: ``[b]`` prompt tokens of each image.
        captions: ``[b][G]`` caption tokens of each image, end-of-sequence included.
        device: of the index tensors.
    """

    def __init__(
        self, prompts: Sequence[int], captions: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ):
        self.device = torch.device(device)
        self.spans: list[PromptSpan] = []
        start = 0
        for length, group in zip(prompts, captions, strict=True):
            self.spans.append(PromptSpan(start, length, tuple(max(0, n - 1) for n in group)))
            start = self.spans[-1].end
        self.tokens = start
        self._captions = [list(group) for group in captions]

    @cached_property
    def predictors(self) -> Int[Tensor, M]:  # noqa: F821
        """Of each caption token, captions in order, the index of the token whose state predicts it."""
        indices: list[int] = []
        for span, group in zip(self.spans, self._captions, strict=True):
            start = span.start + span.prompt
            for forwarded, tokens in zip(span.captions, group, strict=True):
                if tokens:
                    indices.append(span.start + span.prompt - 1)
                    indices.extend(range(start, start + forwarded))
                start += forwarded
        return torch.tensor(indices, dtype=torch.long, device=self.device)

    @cached_property
    def padded(self) -> list[PaddedCaptions]:
        """Per image: its captions as a batch, padded on the right with the prompt's last token."""
        padded = []
        for span in self.spans:
            lengths = torch.tensor(span.captions, dtype=torch.long)
            steps = torch.arange(max(span.captions, default=0))
            real = steps < lengths[:, None]
            starts = span.start + span.prompt + lengths.cumsum(0) - lengths
            index = torch.where(real, starts[:, None] + steps, span.start + span.prompt - 1)
            kept = real.flatten().nonzero()[:, 0]  # here, on the CPU: a device would have to be waited for
            shape = (len(lengths), len(steps))
            padded.append(PaddedCaptions(shape, index.flatten().to(self.device), kept.to(self.device)))
        return padded

    @cached_property
    def masks(self) -> list[Bool[Tensor, "L K"]]:
        """Per image: what a padded caption token may see of [prompt, own caption], K = P + L."""
        sizes = [(max(span.captions, default=0), span.prompt) for span in self.spans]
        return [torch.ones(L, P + L, dtype=torch.bool, device=self.device).tril(P) for L, P in sizes]

    @property
    def attention_pairs(self) -> float:
        """Pairs of a forwarded token with one that it sees, itself included."""
        return sum(
            span.prompt * (span.prompt + 1) / 2
            + sum(n * span.prompt + n * (n + 1) / 2 for n in span.captions)
            for span in self.spans
        )

    @property
    def separate(self) -> int:
        """Tokens that separate sequences would forward: the prompt and a whole caption, for each caption."""
        groups = zip(self.spans, self._captions, strict=True)
        return sum(span.prompt + tokens for span, group in groups for tokens in group)

    @property
    def separate_padded(self) -> int:
        """The same where prompts and captions are padded to the longest."""
        captions = [tokens for group in self._captions for tokens in group]
        return len(captions) * (max(span.prompt for span in self.spans) + max(1, *captions))

    @property
    def padding(self) -> float:
        """Share of padding among the caption tokens that attention works on, in [0, 1)."""
        cells = sum(len(span.captions) * max(span.captions, default=0) for span in self.spans)
        return 1 - sum(sum(span.captions) for span in self.spans) / cells if cells else 0.0

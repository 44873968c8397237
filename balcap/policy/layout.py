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

from balcap.policy.varlen import has_varlen


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


class VarlenLayout(NamedTuple):
    """The packed sequence as b prompts and their captions, one sequence after the other, for kernels that take sequences
    of any lengths. Captions of which nothing is forwarded are left out.

    Attributes:
        bounds: ``[s + 1]`` where the tokens of each sequence begin, and N.
        key_bounds: ``[s + 1]`` where its keys begin, and S: a prompt's are its own, a caption's its prompt's and its own.
        keys: ``[S]`` the token that each key comes from.
        copies: ``[N, 1 + G]`` where the keys of each token stand, and S where there are fewer.
        longest: most keys of a sequence.
    """

    bounds: Int[Tensor, " s+1"]
    key_bounds: Int[Tensor, " s+1"]
    keys: Int[Tensor, S]  # noqa: F821
    copies: Int[Tensor, "N 1+G"]
    longest: int


class AttentionLayout(NamedTuple):
    """The packed sequence as rectangles, for attention: indices of its N tokens, and N itself where there is padding.

    Attributes:
        prompts: ``[b, P]`` tokens of each prompt, P the longest.
        captions: ``[b, M]`` tokens of all captions of an image, one caption after the other; M the most of any image.
        own: ``[b, G, L]`` tokens of each caption, L the longest.
        places: ``[b, M]`` where the tokens of `captions` stand in `own`; 0 for padding.
        order: ``[N]`` where each token of the sequence stands in `prompts` followed by `captions`.
        prompt_mask: ``[b, P]`` True on tokens of prompts; None where all prompts are of one length.
        varlen: the same without padding; None where the device has no kernel for it.
    """

    prompts: Int[Tensor, "b P"]
    captions: Int[Tensor, "b M"]
    own: Int[Tensor, "b G L"]
    places: Int[Tensor, "b M"]
    order: Int[Tensor, N]  # noqa: F821
    prompt_mask: Bool[Tensor, "b P"] | None
    varlen: VarlenLayout | None = None


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
        return torch.tensor(indices, dtype=torch.long).to(self.device, non_blocking=True)

    @cached_property
    def attention(self) -> AttentionLayout:
        """How attention takes the sequence apart. Made on the CPU: a device would have to be waited for."""
        spans = self.spans
        starts = torch.tensor([span.start for span in spans])
        prompt_lengths = torch.tensor([span.prompt for span in spans])
        prompts = self._ranges(starts, prompt_lengths)
        captions = self._ranges(starts + prompt_lengths, torch.tensor([sum(span.captions) for span in spans]))
        most = max((len(span.captions) for span in spans), default=0)
        lengths = torch.tensor([[*span.captions] + [0] * (most - len(span.captions)) for span in spans])
        begins = (starts + prompt_lengths)[:, None] + lengths.cumsum(1) - lengths
        own = self._ranges(begins.flatten(), lengths.flatten()).unflatten(0, lengths.shape)
        places = torch.zeros(self.tokens + 1, dtype=torch.long)
        places[own.flatten()] = torch.arange(own.numel())
        places[self.tokens] = 0
        order = torch.empty(self.tokens + 1, dtype=torch.long)
        both = torch.cat((prompts.flatten(), captions.flatten()))
        order[both] = torch.arange(len(both))
        ragged = bool((prompt_lengths != prompt_lengths.max()).any())
        mask = prompts != self.tokens if ragged else None
        there = self._there
        return AttentionLayout(
            there(prompts),
            there(captions),
            there(own),
            there(places[captions]),
            there(order[:-1]),
            None if mask is None else there(mask),
            self.varlen if has_varlen(self.device) else None,
        )

    @cached_property
    def varlen(self) -> VarlenLayout:
        """How kernels for sequences of any lengths take the sequence. Made on the CPU, likewise."""
        lengths, keys, key_lengths = [], [], []
        for span in self.spans:
            prompt = torch.arange(span.start, span.start + span.prompt)
            at = span.start + span.prompt
            lengths.append(span.prompt)
            keys.append(prompt)
            key_lengths.append(span.prompt)
            for length in filter(None, span.captions):
                lengths.append(length)
                keys += [prompt, torch.arange(at, at + length)]
                key_lengths.append(span.prompt + length)
                at += length
        seen = torch.cat(keys)
        by_token, counts = seen.argsort(stable=True), seen.bincount(minlength=self.tokens)
        firsts = counts.cumsum(0) - counts
        steps = torch.arange(int(counts.max()))
        copies = torch.nn.functional.pad(by_token, (0, len(steps)))[firsts[:, None] + steps]
        copies = torch.where(steps < counts[:, None], copies, len(seen))
        bounds = [torch.tensor([0, *each]).cumsum(0).int() for each in (lengths, key_lengths)]
        starts, key_starts = map(self._there, bounds)
        return VarlenLayout(starts, key_starts, self._there(seen), self._there(copies), max(key_lengths))

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _ranges(self, starts: Tensor, lengths: Tensor) -> Tensor:
        """``[r, longest]`` of r ranges of tokens, then N."""
        steps = torch.arange(int(lengths.max()) if len(lengths) else 0)
        return torch.where(steps < lengths[:, None], starts[:, None] + steps, self.tokens)

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

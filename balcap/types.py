"""What travels between the packages, and the one legend of shapes.

=====  =============================================================
B      prompts (rows, each of one image or several) in the batch of one rank
G      captions (rollouts) sampled per prompt: the group
K      rewards, in the order of the reward suite
P      prompt tokens, image tokens included
T      caption tokens, end-of-sequence token included, right-padded
N      assertions of a caption, padded
=====  =============================================================

Rewards stay ``[B, G, K]`` until the advantage; a missing reward is NaN. The identity of a group is
its sample, never its prompt text: different images share one instruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from balcap.judge import Judgments


@dataclass(frozen=True)
class Cursor:
    """Where a data stream stands: what to save to continue it exactly.

    Attributes:
        shard: logical shard, ``0 .. num_workers - 1`` within the rank.
        position: rows that the shard has read, bad ones included, all epochs counted.
        batches: batches that the rank's stream has yielded so far, over all shards.
        skipped: rows of mastered images that were passed over on the way to this batch.
    """

    shard: int
    position: int
    batches: int
    skipped: int = 0


@dataclass(frozen=True)
class CaptionBatch:
    """B rows to caption, of one image each, or of several that one caption is about.

    Attributes:
        sample_ids: ``[B]`` unique per row: the path of the image as the data set writes it; of several images their
            paths with `balcap.data.layouts.BETWEEN` between them.
        images: ``[B]`` those of each row, in order; decoded, upright, RGB: what the policy sees.
        image_bytes: ``[B]`` their files as they are on disk: what the judge sees and what a cache keys on.
        prompts: ``[B]`` the instruction. In a row of several images, ``<image>`` stands where each of them goes, or
            nowhere: then all stand before the text, as a single image does.
        references: ``[B]`` the reference captions; an empty string where there is none (predict).
        extras: column name -> ``[B]`` values of further columns of the data set (``data.columns``), as parsed from
            JSON and of one kind per column; None where a row has none. ``reference_units``, the assertions of the
            references, is one of them.
        cursor: where the stream stands after this batch; None when not streamed.
    """

    sample_ids: Sequence[str]
    images: Sequence[tuple[Image.Image, ...]]
    image_bytes: Sequence[tuple[bytes, ...]]
    prompts: Sequence[str]
    references: Sequence[str]
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cursor: Cursor | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def select(self, rows: Sequence[int]) -> CaptionBatch:
        """The same batch with only these rows, in this order."""
        return replace(
            self,
            sample_ids=[self.sample_ids[i] for i in rows],
            images=[self.images[i] for i in rows],
            image_bytes=[self.image_bytes[i] for i in rows],
            prompts=[self.prompts[i] for i in rows],
            references=[self.references[i] for i in rows],
            extras={name: [values[i] for i in rows] for name, values in self.extras.items()},
        )

    def extra(self, name: str) -> Sequence[Any]:
        """``[B]`` values of a further column; None for every row where the data set has no such column."""
        return self.extras.get(name) or [None] * len(self)


@dataclass(frozen=True)
class Rollouts:
    """G sampled captions for each of B images.

    Attributes:
        batch: the images that were captioned.
        captions: ``[B][G]`` text, special tokens removed.
        token_ids: ``[B, G, T]`` sampled tokens, end-of-sequence included, right-padded.
        completion_mask: ``[B, G, T]`` True on sampled tokens.
        sampler_logps: ``[B, G, T]`` log-probabilities as the sampler computed them, at the sampling temperature
            and before top-p and bans; 0 where masked. The trainer's own log-probs are the ones that train.
        truncated: ``[B, G]`` True where the caption was cut at the token limit.
        lengths: ``[B, G]`` caption tokens without the end-of-sequence token.
        reference_lengths: ``[B]`` reference tokens, same tokenizer, no special tokens.
        weights_version: number of optimizer updates behind the weights that sampled.
    """

    batch: CaptionBatch
    captions: Sequence[Sequence[str]]
    token_ids: Int[Tensor, "B G T"]
    completion_mask: Bool[Tensor, "B G T"]
    sampler_logps: Float[Tensor, "B G T"]
    truncated: Bool[Tensor, "B G"]
    lengths: Int[Tensor, "B G"]
    reference_lengths: Int[Tensor, B]  # noqa: F821
    weights_version: int = field(default=0)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def num_captions(self) -> int:
        """G, captions per image."""
        return self.token_ids.shape[1]

    def select(self, rows: Sequence[int]) -> Rollouts:
        """The same rollouts for only these images, in this order."""
        index = list(rows)
        return Rollouts(
            batch=self.batch.select(index),
            captions=[self.captions[i] for i in index],
            token_ids=self.token_ids[index],
            completion_mask=self.completion_mask[index],
            sampler_logps=self.sampler_logps[index],
            truncated=self.truncated[index],
            lengths=self.lengths[index],
            reference_lengths=self.reference_lengths[index],
            weights_version=self.weights_version,
        )


@dataclass(frozen=True)
class AssertionSpans:
    """Which tokens the assertions of each caption come from, and what they are worth to each reward.

    Attributes:
        tokens: ``[B, G, N, T]`` True on the tokens of each assertion's words.
        verdicts: ``[B, G, N, K]`` 1 where an assertion raises a reward, 0 where it lowers it; NaN where the reward does not
            say, the judgment is missing, or there is no assertion.
        completion_mask: ``[B, G, T]`` of the rollouts.
    """

    tokens: Bool[Tensor, "B G N T"]
    verdicts: Float[Tensor, "B G N K"]
    completion_mask: Bool[Tensor, "B G T"]

    def located(self) -> Float[Tensor, "B G N"]:
        """1 where an assertion has tokens, 0 where it has none; NaN where no reward has a verdict on it."""
        judged = ~self.verdicts.isnan().all(-1)
        return self.tokens.any(-1).float().masked_fill(~judged, math.nan)


@dataclass(frozen=True)
class StepRecord:
    """All that one step knew about its rollouts, for callbacks that log it.

    ``training_step`` and ``validation_step`` return those that they are done with under the key ``"records"``.

    Attributes:
        rollouts: what was sampled.
        judgments: what the judge said.
        reward_names: ``[K]``.
        rewards: ``[B, G, K]`` in [0, 1] before the reward transforms, NaN where missing.
        shaped: ``[B, G, K]`` after them, such as the length mask; equal to `rewards` in validation.
        advantages: ``[B, G]``, or ``[B, G, T]`` for one per token; None in validation.
        number: batches that were learned from before this one, or in validation its place in the pass.
    """

    rollouts: Rollouts
    judgments: Judgments
    reward_names: Sequence[str]
    rewards: Float[Tensor, "B G K"]
    shaped: Float[Tensor, "B G K"]
    advantages: Float[Tensor, "B G"] | Float[Tensor, "B G T"] | None = None
    number: int = 0

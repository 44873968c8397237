"""The policy MLLM and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from balcap.policy.config import PolicyConfig
from balcap.policy.flops import update_flops
from balcap.policy.layout import Layout
from balcap.policy.loading import load_model, load_processor, prepare, vision_prefixes
from balcap.policy.logps import caption_logps
from balcap.policy.prompts import PromptEncoder, Prompts
from balcap.policy.shared_prefix import (
    base_of,
    image_features,
    prepare_shared_prefix,
    shared_prefix_logps,
)
from balcap.types import CaptionBatch, Rollouts


@dataclass(frozen=True)
class Size:
    """Of a forward pass over some images with their captions, in tokens.

    Attributes:
        forwarded: that the language model works on, padding included.
        separate: of a prompt and a whole caption for each caption, without padding.
        padding: share of padding, in [0, 1): of the whole forward, or with a shared prefix of the caption
            tokens in attention alone.
    """

    forwarded: int
    separate: int
    padding: float


class Policy(nn.Module):
    """Holds the model, its processor, and what the KL term compares it with.

    The reference is the policy with its adapter off (LoRA), a frozen copy (full tuning), or absent.

    Args:
        model: the model to train, frozen parts marked.
        encoder: builds its prompts.
        reference: a frozen copy, or None.
        shared_prefix: forward each image and prompt once for all its captions, where the model can take it.
        source: hub id or folder that the weights came from, for engines that load their own copy.
        revision: on the hub.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        reference: Any | None = None,
        shared_prefix: bool = True,
        source: str = "",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.source, self.revision = source, revision
        self.model = model
        self.encoder = encoder
        self.reference = reference
        if reference is not None:
            reference.requires_grad_(False).eval()
        self.shared_prefix = shared_prefix and prepare_shared_prefix(model)
        if self.shared_prefix and reference is not None:
            prepare_shared_prefix(reference)
        vision = tuple(vision_prefixes(base_of(model)))
        named = base_of(model).named_parameters()
        self.vision_is_frozen = not any(p.requires_grad for name, p in named if name.startswith(vision))

    @classmethod
    def load(cls, config: PolicyConfig, with_reference: bool) -> Policy:
        """Load weights and processor; `with_reference` keeps a frozen copy where no adapter can be turned off."""
        processor = load_processor(config)
        model = load_model(config)
        encoder = PromptEncoder(processor, model.config)
        copy = load_model(config) if with_reference and config.lora is None else None
        trained = prepare(model, config)
        return cls(trained, encoder, copy, config.shared_prefix, config.model, config.revision)

    def train(self, mode: bool = True) -> Policy:
        """As of any module, but the reference stays in evaluation mode: dropout would make it noisy."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def encode(self, batch: CaptionBatch) -> Prompts:
        """Prompts of a batch; see `PromptEncoder.encode`."""
        return self.encoder.encode(batch)

    def size(self, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int]) -> Size:
        """What `logps` of these rows forwards."""
        lengths = rollouts.completion_mask[list(rows)].sum(-1).tolist()
        layout = Layout([prompts.items[row]["input_ids"].shape[1] for row in rows], lengths)
        if self.shared_prefix:
            return Size(layout.tokens, layout.separate, layout.padding)
        width = max(1, max(max(group, default=0) for group in lengths))
        longest = max(span.prompt for span in layout.spans)
        forwarded = sum(len(group) for group in lengths) * (longest + width)
        return Size(forwarded, layout.separate, 1 - layout.separate / forwarded)

    def flops(self, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int]) -> float | None:
        """Model FLOPs of one forward and backward over these rows; see `update_flops`."""
        items = [prompts.items[row] for row in rows]
        lengths = rollouts.completion_mask[list(rows)].sum(-1).tolist()
        layout = Layout([item["input_ids"].shape[1] for item in items], lengths)
        return update_flops(base_of(self.model), layout, items)

    def logps(
        self,
        rollouts: Rollouts,
        prompts: Prompts,
        rows: Sequence[int],
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> tuple[Float[Tensor, "b G T"], Float[Tensor, "b G T"] | None]:
        """Log-probs (and entropies) of the captions of these rows of the batch, with gradient.

        Raises:
            PlaceholderMismatch: a caption contains a token that stands for pixels.
        """
        return self._logps(self.model, rollouts, prompts, rows, temperature, entropy)

    @torch.no_grad()
    def reference_logps(
        self, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int], temperature: float = 1.0
    ) -> Float[Tensor, "b G T"]:
        """The same under the reference, without gradient."""
        if self.reference is None and not self.has_adapter:
            raise RuntimeError("this policy was loaded without a reference; model.kl_coef must then be 0")
        model = self.reference if self.reference is not None else self.model
        with nullcontext() if self.reference is not None else self.model.disable_adapter():
            return self._logps(model, rollouts, prompts, rows, temperature, False)[0]

    def _logps(
        self,
        model: Any,
        rollouts: Rollouts,
        prompts: Prompts,
        rows: Sequence[int],
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        chosen = list(rows)
        token_ids, mask = rollouts.token_ids[chosen], rollouts.completion_mask[chosen]
        ids = [rollouts.batch.sample_ids[i] for i in chosen]
        self.encoder.check_captions(ids, token_ids, mask)
        (b, G, T), device = token_ids.shape, self.device
        if self.shared_prefix:
            features = self._features(model, prompts, chosen)
            ids_here, mask_here = token_ids.to(device), mask.to(device)
            return shared_prefix_logps(
                model, prompts, chosen, ids_here, mask_here, features, temperature, entropy
            )
        width = max(1, int(mask.flatten(0, 1).any(0).sum()))  # this micro-batch's own longest caption
        inputs = prompts.inputs(chosen, G, device)
        logps, spread = caption_logps(
            model,
            inputs,
            token_ids.reshape(b * G, T)[:, :width].to(device),
            mask.reshape(b * G, T)[:, :width].to(device),
            temperature,
            entropy,
        )
        shape = (b, G, T)

        def back(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, T - width)).view(shape)

        return back(logps), None if spread is None else back(spread)

    def _features(self, model: Any, prompts: Prompts, rows: Sequence[int]) -> list[Tensor]:
        """Image features of these rows; a frozen tower sees each image once, for policy and reference alike."""
        device = self.device
        if not self.vision_is_frozen:
            distinct = list(dict.fromkeys(rows))
            found = dict(zip(distinct, image_features(model, prompts, distinct, device), strict=True))
            return [found[row] for row in rows]
        new = [row for row in dict.fromkeys(rows) if row not in prompts.features]
        if new:
            with torch.no_grad():
                made = image_features(self.model, prompts, new, device)
            prompts.features.update(zip(new, made, strict=True))
        return [prompts.features[row] for row in rows]

"""The policy MLLM and its reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from balcap.policy.compiled import Compiled, compile_layers
from balcap.policy.config import PolicyConfig
from balcap.policy.families import ImageFeatures, base_of, family_of, regrouped
from balcap.policy.feature_cache import FeatureCache
from balcap.policy.flops import rollout_flops, update_flops
from balcap.policy.head import logps_of_chunk
from balcap.policy.layout import Layout
from balcap.policy.loading import as_reference, load_model, load_processor, prepare
from balcap.policy.logps import caption_logps
from balcap.policy.prompts import PromptEncoder, Prompts
from balcap.policy.sharded_loading import empty_like, load_once
from balcap.policy.sharding import Sharding, gathered, is_sharded, shard, whole_state
from balcap.policy.shared_prefix import prepare_shared_prefix, shared_prefix_logps
from balcap.types import CaptionBatch, Rollouts

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForwardSize:
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
        compile: see `PolicyConfig`.
        source: hub id or folder that the weights came from, for engines that load their own copy.
        revision: on the hub.
        feature_cache: folder that keeps image features of a frozen vision tower; None for none.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        reference: Any | None = None,
        shared_prefix: bool = True,
        compile: bool | Literal["auto"] = False,
        source: str = "",
        revision: str | None = None,
        feature_cache: str | None = None,
    ) -> None:
        super().__init__()
        self.source, self.revision = source, revision
        self.model = model
        self.encoder = encoder
        self.reference = reference
        if reference is not None:
            reference.requires_grad_(False).eval()
        for one in filter(None, (model, reference)):
            family_of(one).speed_up(base_of(one))
        self.shared_prefix = shared_prefix and prepare_shared_prefix(model)
        if self.shared_prefix and reference is not None:
            prepare_shared_prefix(reference)
        self._chunk = None
        if self.shared_prefix and compile:
            for one in filter(None, (model, reference)):
                base = base_of(one)
                compile_layers(base, family_of(one).language_model(base), compile)
            self._chunk = Compiled(logps_of_chunk, compile)
        self.vision_is_frozen = family_of(model).vision_is_frozen(base_of(model))
        self.feature_cache: FeatureCache | None = None
        if feature_cache is not None and self.shared_prefix and self.vision_is_frozen:
            self.feature_cache = FeatureCache(feature_cache, model, encoder.processor)
        elif feature_cache is not None:
            log.warning("model.policy.feature_cache: not used; it needs a shared prefix and a frozen tower")

    @classmethod
    def load(cls, config: PolicyConfig, with_reference: bool, sharding: Sharding | None = None) -> Policy:
        """Load weights and processor; `with_reference` keeps a frozen copy of what is trained, where it is no new adapter.

        Args:
            config: of the policy.
            with_reference: whether it is compared with what it was.
            sharding: over which ranks its weights are spread, a collective then; None for all of them here.

        Raises:
            PolicyError: see `prepare`.
        """
        base, has_adapter = config.base, config.lora is not None or config.adapter is not None
        processor = load_processor(config)
        model = load_model(base) if sharding is None else load_once(base)
        encoder, copy = PromptEncoder(processor, model.config), None
        if with_reference and not has_adapter:
            copy = load_model(config) if sharding is None else empty_like(model, config)
        model = prepare(model, config, with_reference)
        policy = cls(
            model,
            encoder,
            copy,
            config.shared_prefix,
            config.compile if sharding is None else False,  # not tried with weights that come and go
            base.model,
            base.revision,
            config.feature_cache,
        )
        if sharding is not None:
            shard(policy, sharding)
        return policy

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
    def is_compiled(self) -> bool:
        """Whether its updates run compiled layers."""
        return self._chunk is not None and self._chunk.works_on(self.device.type)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of its weights (`balcap.policy.sharding`); `logps` and `reference_logps` are
        collectives then."""
        return is_sharded(self)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def whole_state(self) -> dict[str, Tensor] | None:
        """What `save_pretrained` writes of a sharded policy: on rank 0 in the host's memory, ``{}`` on the others. A
        collective. None where each rank holds all weights."""
        return whole_state(self.model, trained=self.has_adapter) if self.is_sharded else None

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Weights in transformers' format; of a PeftModel the adapter that is trained, in peft's. A sharded policy needs the
        option ``state_dict``, `whole_state`."""
        adapter = {"selected_adapters": [self.model.active_adapter]} if self.has_adapter else {}
        self.model.save_pretrained(folder, **adapter, **options)

    def encode(self, batch: CaptionBatch) -> Prompts:
        """Prompts of a batch; see `PromptEncoder.encode`."""
        return self.encoder.encode(batch)

    def size(self, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int]) -> ForwardSize:
        """What `logps` of these rows forwards."""
        layout = _layout(rollouts, prompts, rows)
        if self.shared_prefix:
            return ForwardSize(layout.tokens, layout.separate, layout.padding)
        forwarded = layout.separate_padded
        return ForwardSize(forwarded, layout.separate, 1 - layout.separate / forwarded)

    def flops(self, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int]) -> float | None:
        """Model FLOPs of one forward and backward over these rows, None where unknown; see `update_flops`. Of images whose
        features were read from the cache, those of the tower are left out."""
        layout, seen = _layout(rollouts, prompts, rows), [row for row in rows if row not in prompts.cached]
        return update_flops(base_of(self.model), layout, [prompts.items[row] for row in seen])

    def rollout_flops(self, rollouts: Rollouts, prompts: Prompts) -> float | None:
        """Model FLOPs of sampling these captions, None where unknown; see `balcap.policy.flops.rollout_flops`."""
        layout = _layout(rollouts, prompts, range(len(rollouts)))
        return rollout_flops(base_of(self.model), layout, prompts.items)

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
        return self._logps(self.model, rollouts, prompts, rows, temperature=temperature, entropy=entropy)

    @torch.no_grad()
    def reference_logps(
        self, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int], temperature: float = 1.0
    ) -> Float[Tensor, "b G T"]:
        """The same under the reference, without gradient."""
        if self.reference is None and not self.has_adapter:
            raise RuntimeError("this policy was loaded without a reference; model.kl_coef must then be 0")
        model = self.reference if self.reference is not None else self.model
        with gathered(model) if self.reference is not None else as_reference(self.model):
            return self._logps(model, rollouts, prompts, rows, temperature=temperature)[0]

    def _logps(
        self, model: Any, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int], **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Under `model`; `options` are temperature and entropy."""
        rows, device = list(rows), self.device
        token_ids, mask = rollouts.token_ids[rows], rollouts.completion_mask[rows]
        self.encoder.check_captions([rollouts.batch.sample_ids[row] for row in rows], token_ids, mask)
        if not self.shared_prefix:
            return caption_logps(model, prompts, rows, token_ids.to(device), mask.to(device), **options)
        features = self._features(model, prompts, rows, rollouts.batch.images)
        return shared_prefix_logps(
            model, prompts, rows, token_ids, mask, features, chunk=self._chunk, **options
        )

    def _features(
        self, model: Any, prompts: Prompts, rows: Sequence[int], images: Sequence[tuple[Image.Image, ...]]
    ) -> list[ImageFeatures]:
        """Image features of these rows; a frozen tower sees each image once, for policy and reference alike."""
        known = prompts.features if self.vision_is_frozen else {}
        new, kept, keys = [row for row in dict.fromkeys(rows) if row not in known], self.feature_cache, {}
        if kept is not None:
            keys = {row: kept.key(images[row], self.device) for row in new}
            read = {row: kept.get(key, self.device) for row, key in keys.items()}
            known.update({row: features for row, features in read.items() if features is not None})
            prompts.cached.update(row for row in new if row in known)
            new = [row for row in new if row not in known]
        if new:
            model = base_of(self.model if self.vision_is_frozen else model)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
                parts = family_of(model).image_features(model, prompts.images(new, self.device))
            known.update(zip(new, regrouped(parts, prompts.num_features(new)), strict=True))
            if kept is not None:
                for row in new:
                    kept.put(keys[row], known[row])
        return [known[row] for row in rows]


def _layout(rollouts: Rollouts, prompts: Prompts, rows: Sequence[int]) -> Layout:
    lengths = rollouts.completion_mask[list(rows)].sum(-1).tolist()
    return Layout([prompts.items[row]["input_ids"].shape[1] for row in rows], lengths)

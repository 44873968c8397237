"""CLIPScore: how close a caption is to its image for a CLIP model; a reward without a judge."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.rewards.base import Reward
from balcap.types import Rollouts


class CLIPScore(Reward):
    """max(cos(image, caption), 0) per rollout, in [0, 1] (Hessel et al., arXiv 2104.08718, without its factor 2.5).

    Of a row of several images it is the mean over them. The captions of a row are scored in one forward pass. CLIP reads
    only the first tokens of a caption, usually 77. (torchmetrics' own CLIPScore, version 1.9, does not run with
    transformers 5.)

    Args:
        model: hub id or folder of a CLIP model, loaded at the first use.
        device: where it runs, such as ``cuda``.
    """

    name = "clip_score"

    def __init__(self, model: str = "openai/clip-vit-base-patch16", device: str = "cpu") -> None:
        super().__init__()
        self.model, self.clip_device = model, device
        self._loaded: Any = None

    @torch.no_grad()
    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        model, processor = self._load()
        rows = []
        for images, captions in zip(rollouts.batch.images, rollouts.captions, strict=True):
            inputs = processor(
                text=list(captions), images=list(images), return_tensors="pt", padding=True, truncation=True
            )
            # [images, G], cosine times a scale
            logits = model(**inputs.to(self.clip_device)).logits_per_image
            rows.append((logits / model.logit_scale.exp()).clamp(0, 1).mean(0).cpu())
        return torch.stack(rows).float()

    def _load(self) -> Any:
        if self._loaded is None:
            from transformers import CLIPModel, CLIPProcessor

            model: Any = CLIPModel.from_pretrained(self.model)
            self._loaded = model.to(self.clip_device).eval(), CLIPProcessor.from_pretrained(self.model)
        return self._loaded

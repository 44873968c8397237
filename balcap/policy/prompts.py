"""The one place that builds prompts: the model's own HF processor and chat template, nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from balcap.types import CaptionBatch

PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # [1, P] each


class PlaceholderMismatch(ValueError):
    """A prompt's image placeholders and its image features do not agree, or a caption contains one."""


@dataclass(frozen=True)
class Prompts:
    """B prompts encoded one by one, so that any subset forms a batch.

    Attributes:
        items: ``[B]`` model inputs of one example each, no padding.
        pad_token_id: fills the left side.
        image_token_id: stands where image features go.
        features: row -> features of its image by a frozen vision tower, kept for the whole step.
    """

    items: Sequence[dict[str, Tensor]]
    pad_token_id: int
    image_token_id: int = -1
    features: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def inputs(self, rows: Sequence[int], repeat: int, device: torch.device | str) -> dict[str, Tensor]:
        """Model inputs ``[len(rows) * repeat, P]``, left-padded; each row stands `repeat` times in a row."""
        chosen = [self.items[i] for i in rows for _ in range(repeat)]
        width = max(item["input_ids"].shape[1] for item in chosen)
        out = {}
        for key in chosen[0]:
            if key in PER_TOKEN:
                fill = self.pad_token_id if key == "input_ids" else 0
                parts = [_pad_left(item[key], width, fill) for item in chosen]
            else:
                parts = [item[key] for item in chosen]
            out[key] = torch.cat(parts).to(device)
        return out


def _pad_left(row: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(row, (width - row.shape[1], 0), value=fill)


class PromptEncoder:
    """From images and instructions to model inputs.

    Args:
        processor: the model's own.
        config: the model's own; tells the image token and how features are counted.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.config = config
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        image_token_id = getattr(config, "image_token_id", None)
        self.image_token_id: int = config.image_token_index if image_token_id is None else image_token_id
        self.banned_token_ids = self._banned()

    def _banned(self) -> list[int]:
        """Tokens that stand for pixels: a policy that emits one breaks the count of image features."""
        ids = {
            getattr(self.config, f"{name}_token_id", None)
            for name in ("image", "video", "vision_start", "vision_end")
        }
        ids |= {self.image_token_id}
        ids |= {
            id_
            for id_, token in self.tokenizer.added_tokens_decoder.items()
            if re.match(r"[<\[].*(vision|image|video|img)", str(token), re.IGNORECASE)
        }
        return sorted(id_ for id_ in ids if id_ is not None)

    def encode(self, batch: CaptionBatch) -> Prompts:
        """Prompts of B images. PlaceholderMismatch names the sample whose placeholders do not fit its image."""
        items = []
        bos = self.tokenizer.bos_token
        for sample_id, image, prompt in zip(batch.sample_ids, batch.images, batch.prompts, strict=True):
            self._check_question(sample_id, prompt)
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            once = (
                {"add_special_tokens": False} if bos and text.startswith(bos) else {}
            )  # some templates write it
            out = dict(self.processor(text=[text], images=[image], return_tensors="pt", **once))
            self._check(sample_id, out)
            items.append(out)
        return Prompts(items, self.tokenizer.pad_token_id, self.image_token_id)

    def _check_question(self, sample_id: str, prompt: str) -> None:
        there = [t for t in self.tokenizer.convert_ids_to_tokens(self.banned_token_ids) if t in prompt]
        if there:
            raise PlaceholderMismatch(
                f"sample {sample_id!r}: its question contains {', '.join(there)}, which stands for pixels; the chat "
                "template places the image. Remove it from the question"
            )

    def _check(self, sample_id: str, item: dict[str, Tensor]) -> None:
        there = int((item["input_ids"] == self.image_token_id).sum())
        wanted = self._expected(item)
        if there == 0 or (wanted is not None and there != wanted):
            raise PlaceholderMismatch(
                f"sample {sample_id!r}: the prompt holds {there} image placeholders, the image makes "
                f"{wanted if wanted is not None else 'more than 0'} features. Is the processor the "
                "model's own?"
            )

    def _expected(self, item: dict[str, Tensor]) -> int | None:
        """Image features of one example, where the model family says how to count them."""
        if "image_grid_thw" in item:
            merge = self.config.vision_config.spatial_merge_size
            return int(item["image_grid_thw"].prod(-1).sum()) // merge**2
        vision = getattr(self.config, "vision_config", None)
        if getattr(self.config, "model_type", "") == "llava" and vision is not None:
            patches = (vision.image_size // vision.patch_size) ** 2
            return patches + (self.config.vision_feature_select_strategy == "full")
        return None

    def check_captions(self, sample_ids: Sequence[str], token_ids: Tensor, mask: Tensor) -> None:
        """PlaceholderMismatch where a caption [B, G, T] contains a token that stands for pixels."""
        banned = torch.tensor(self.banned_token_ids, device=token_ids.device)
        bad = (torch.isin(token_ids, banned) & mask).flatten(1).any(1)
        if bad.any():
            first = sample_ids[int(bad.nonzero()[0])]
            raise PlaceholderMismatch(
                f"sample {first!r}: a caption contains an image, video or vision token; rollout engines must ban "
                f"{self.banned_token_ids} while sampling"
            )

    def texts(self, captions: Sequence[Tensor]) -> list[str]:
        """Texts of captions, each ``[t]`` token ids, special tokens removed."""
        rows = [ids.tolist() for ids in captions]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, no special tokens: the unit of the length ratio."""
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [len(row) for row in ids]

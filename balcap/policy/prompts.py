"""The one place that builds prompts: the model's own HF processor and chat template, nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from balcap.data.layouts import PLACEHOLDER
from balcap.policy.families import ImageFeatures, family_of
from balcap.types import CaptionBatch
from balcap.utils.errors import UserError

PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # [1, P] each


SWITCHES = {"enable_thinking": False}
"""Given to chat templates that know them. Models that would think before they answer, such as Qwen3.5, caption at once:
judges would be shown their thoughts."""


class PlaceholderMismatch(UserError, ValueError):
    """A prompt's image placeholders and its image features do not agree, or a caption contains one."""


@dataclass(frozen=True)
class Prompts:
    """B prompts encoded one by one, so that any subset forms a batch.

    Attributes:
        items: ``[B]`` model inputs of one example each, no padding.
        pad_token_id: fills the left side.
        image_token_id: stands where image features go.
        unexpanded: ``[B]`` their token ids as the chat template writes them: before the processor puts what stands for the
            features of images in.
        features: row -> features of its images by a frozen vision tower, kept for the whole step.
        cached: rows of which these were read from ``model.policy.feature_cache``.
    """

    items: Sequence[dict[str, Tensor]]
    pad_token_id: int
    image_token_id: int = -1
    unexpanded: Sequence[list[int]] = ()
    features: dict[int, ImageFeatures] = field(default_factory=dict, compare=False, repr=False)
    cached: set[int] = field(default_factory=set, compare=False, repr=False)

    def inputs(self, rows: Sequence[int], repeat: int, device: torch.device | str) -> dict[str, Tensor]:
        """Model inputs ``[len(rows) * repeat, P]``, left-padded; each row stands `repeat` times in a row."""
        repeated = [row for row in rows for _ in range(repeat)]
        items = [self.items[row] for row in repeated]
        width = max(item["input_ids"].shape[1] for item in items)
        inputs = self.images(repeated, device)
        for key in PER_TOKEN:
            if key in items[0]:
                fill = self.pad_token_id if key == "input_ids" else 0
                inputs[key] = torch.cat([_pad_left(item[key], width, fill) for item in items]).to(device)
        return inputs

    def num_features(self, rows: Sequence[int]) -> list[int]:
        """Placeholders of image features in these prompts."""
        return [int((self.items[row]["input_ids"] == self.image_token_id).sum()) for row in rows]

    def images(self, rows: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        """The inputs of the vision tower for the images of these rows, in one batch; pixels are padded."""
        items, inputs = [self.items[row] for row in rows], {}
        for key in items[0]:
            if key not in PER_TOKEN:
                join = cat_padded if key.startswith("pixel_") else torch.cat
                inputs[key] = join([item[key] for item in items]).to(device)
        return inputs


def _pad_left(row: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(row, (width - row.shape[1], 0), value=fill)


def cat_padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated along the first dimension; where others differ (tiles, height, width), zeros fill their ends.

    So do processors in a batch of their own: models leave out tiles of zeros, or pixels whose
    ``pixel_attention_mask``, padded likewise, is 0.
    """
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    out = parts[0].new_zeros(sum(map(len, parts)), *shape)
    for part, place in zip(parts, out.split([len(part) for part in parts]), strict=True):
        place[(slice(None), *map(slice, part.shape[1:]))] = part
    return out


class PromptEncoder:
    """From images and instructions to model inputs.

    Args:
        processor: the model's own.
        config: the model's own; tells its family.

    Attributes:
        switches: of `SWITCHES`, those that the model's chat template knows.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.config = config
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.switches = {name: on for name, on in SWITCHES.items() if name in str(processor.chat_template)}
        self.family = family_of(config)
        self.image_token_id = self.family.image_token_id(config)
        self.banned_token_ids = self.family.placeholder_ids(config, self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special}
        names |= set(self.tokenizer.convert_ids_to_tokens(self.banned_token_ids))
        longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def plain(self, text: str) -> str:
        """A text of the data without special tokens: one that is spelled in it gets a space after its first character, so
        that it ends no turn and stands for no pixels."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def content(self, prompt: str, images: int) -> list[dict[str, str]]:
        """What the chat template is given for a prompt of so many images, see `CaptionBatch.prompts`."""
        texts = prompt.split(PLACEHOLDER)
        if images == 1 or len(texts) - 1 != images:
            texts = [*[""] * images, prompt]
        first, *others = ({"type": "text", "text": self.plain(text)} for text in texts)
        content = [first, *(part for text in others for part in ({"type": "image"}, text))]
        return [part for part in content if part.get("text") != ""]

    def encode(self, batch: CaptionBatch) -> Prompts:
        """Prompts of B rows.

        Raises:
            PlaceholderMismatch: a row has placeholders that do not fit its images, or several images, of which the
                model's family takes one; names the sample.
        """
        items, unexpanded = [], []
        for sample_id, images, prompt in zip(batch.sample_ids, batch.images, batch.prompts, strict=True):
            if len(images) > 1 and not self.family.several_images:
                raise PlaceholderMismatch(
                    f"sample {sample_id!r} has {len(images)} images, a prompt of {self.config.model_type} takes one: "
                    "leave such rows out of data.data, or set model.policy.model to a model that takes several"
                )
            text = self._chat(prompt, len(images))
            has_bos = self._has_bos(text)
            item = dict(self.processor(text=[text], images=list(images), return_tensors="pt", **has_bos))
            self._check(sample_id, item)
            items.append(item)
            unexpanded.append(self.tokenizer(text, **has_bos)["input_ids"])
        return Prompts(items, self.tokenizer.pad_token_id, self.image_token_id, unexpanded)

    def answers(self, batch: CaptionBatch) -> list[Tensor]:
        """``[B]`` token ids of the references as the chat template writes them behind the prompts, each ``[t]``, with what
        ends an answer there, if anything does. Of a template that writes answers otherwise than it asks for them, those
        of the references alone."""
        rows = zip(batch.images, batch.prompts, batch.references, strict=True)
        return [
            torch.tensor(self._answer(prompt, len(images), text.strip())) for images, prompt, text in rows
        ]

    def _answer(self, prompt: str, images: int, answer: str) -> list[int]:
        answer, asked = self.plain(answer), self._chat(prompt, images)
        try:
            answered = self._chat(prompt, images, answer).rstrip()
        except (TemplateError, TypeError):  # a template for prompts alone
            answered = ""
        if answered.startswith(asked) and answered[len(asked) :].lstrip().startswith(answer):
            # Tokenized together: a space before the answer belongs to its first word.
            before, both = (
                self.tokenizer(text, **self._has_bos(text))["input_ids"] for text in (asked, answered)
            )
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"]

    def _chat(self, prompt: str, images: int, answer: str | None = None) -> str:
        """A prompt of so many images as the chat template writes it, with an answer or as it asks for one."""
        messages = [{"role": "user", "content": self.content(prompt, images)}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=answer is None, tokenize=False, **self.switches
        )

    def _has_bos(self, text: str) -> dict[str, bool]:
        """Options of the tokenizer for a text of the chat template, which may begin with what the tokenizer would add."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _check(self, sample_id: str, item: dict[str, Tensor]) -> None:
        count = int((item["input_ids"] == self.image_token_id).sum())
        expected = self.family.num_features(self.config, item)
        if count == 0 or (expected is not None and count != expected):
            raise PlaceholderMismatch(
                f"sample {sample_id!r}: the prompt holds {count} image placeholders, its images make "
                f"{expected or 'more than 0'} features. Is the processor the model's own?"
            )

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
        texts = self.tokenizer.batch_decode([ids.tolist() for ids in captions], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, no special tokens: the unit of the length ratio."""
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [len(row) for row in ids]

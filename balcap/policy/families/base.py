"""The questions that a model family answers, with the answers that hold for most."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from balcap.policy.attention import IMPLEMENTATIONS, PREFIX, install, shared_prefix_attention
from balcap.policy.config import PolicyError
from balcap.policy.layout import AttentionLayout


def base_of(model: Any) -> Any:
    """The HF model itself, out of its adapter (which works inside it)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_weights(*parameters: Tensor) -> int:
    """Weights in these matrices, vectors left out; 4-bit ones lie packed, and remember their shape."""
    states = ((p, getattr(p, "quant_state", None)) for p in parameters if p.dim() > 1)
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in states)


def products(module: Any) -> int:
    """Weights of its linear layers and convolutions: those that each token is multiplied with."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return sum(num_weights(*part.parameters()) for part in module.modules() if isinstance(part, kinds))


def transformer_flops(
    config: Any, patches: int, embedding: Any, layers: Any, class_token: bool = False
) -> float:
    """Model FLOPs of a plain vision transformer over one picture, whose tokens all see each other.

    Args:
        config: of the tower.
        patches: of the picture.
        embedding: the module that embeds them.
        layers: the module of the layers.
        class_token: whether one token more passes through the layers.
    """
    tokens = patches + class_token
    pairs = config.num_hidden_layers * tokens**2
    return 2 * (patches * products(embedding) + tokens * products(layers)) + 4 * config.hidden_size * pairs


class ImageFeatures(NamedTuple):
    """Of one prompt's images, in their order in the prompt.

    Attributes:
        embeds: ``[tokens, H]``, in place of the placeholders.
        extra: more tensors ``[tokens, …]``, which the family's own `Family.language_model_inputs` reads.
    """

    embeds: Tensor
    extra: tuple[Tensor, ...] = ()


def regrouped(parts: Sequence[ImageFeatures], counts: Sequence[int]) -> list[ImageFeatures]:
    """Features of images or tiles, prompt after prompt, as those of each prompt.

    Args:
        parts: of `Family.image_features`.
        counts: placeholders of each prompt.
    """
    columns = zip(*((part.embeds, *part.extra) for part in parts), strict=True)
    grouped = zip(*(torch.cat(column).split(list(counts)) for column in columns), strict=True)
    return [ImageFeatures(embeds, tuple(extra)) for embeds, *extra in grouped]


class Family:
    """One architecture; here the answers that suit any. Stateless.

    In all methods ``model`` is the HF model out of its peft wrapper, and ``item`` one encoded prompt.

    Attributes:
        model_types: ``config.model_type`` of its models.
        text_types: ``model_type`` of the text models for which `attention` gives what a sequence of one caption
            alone would get: every layer attends to all tokens before.
        layer_types: kinds of their layers for which this holds, where their config names them.
        several_images: a prompt may show more than one image.
    """

    model_types: tuple[str, ...] = ()
    text_types: tuple[str, ...] = ()
    layer_types: tuple[str, ...] = ("full_attention",)
    several_images: bool = True

    # ── what is vision and what is language ──────────────────────────────────────────────────────────

    def language_model(self, model: Any) -> Any:
        """The text model: the outermost module that was built from the text part of the config.

        Raises:
            PolicyError: there is none.
        """
        kind = model.config.get_text_config().model_type
        if kind != model.config.model_type:
            for module in model.modules():
                if getattr(getattr(module, "config", None), "model_type", None) == kind:
                    return module
        raise PolicyError(
            f"model.policy.model: in the architecture {model.config.model_type} no text model stands apart from "
            "vision; a file in balcap/policy/families must say which part it is"
        )

    def language_prefixes(self, model: Any) -> tuple[str, ...]:
        """Prefixes of the names of all language parameters, the output head included; the others are vision."""
        parts = (self.language_model(model), model.get_output_embeddings())
        return tuple(f"{name}." for name, module in model.named_modules() if module in parts)

    def vision_is_frozen(self, model: Any) -> bool:
        """Whether nothing that makes image features is trained, adapters included."""
        language = self.language_prefixes(model)
        vision = (p for name, p in model.named_parameters() if not name.startswith(language))
        return not any(parameter.requires_grad for parameter in vision)

    def lora_targets(self, model: Any, layers: Sequence[str]) -> list[str]:
        """Of the linear layers that may be adapted, those that are where the user names none: all but the head, as in
        QLoRA (arXiv 2305.14314)."""
        head = model.get_output_embeddings()
        return [name for name in layers if model.get_submodule(name) is not head]

    def speed_up(self, model: Any) -> None:
        """Let parts of the model compute the same in fewer operators; the model is changed in place."""

    # ── prompts ──────────────────────────────────────────────────────────────────────────────────────

    def image_token_id(self, config: Any) -> int:
        """The token that stands where image features go."""
        return config.image_token_id

    def placeholder_ids(self, config: Any, tokenizer: Any) -> list[int]:
        """All tokens that stand for pixels: a policy that emits one breaks the count of image features."""
        names = ("video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {self.image_token_id(config), *(getattr(config, name, None) for name in names)}
        named = re.compile(r"[<\[].*(vision|image|video|img)", re.IGNORECASE)
        ids |= {i for i, token in tokenizer.added_tokens_decoder.items() if named.match(str(token))}
        return sorted(token_id for token_id in ids if token_id is not None)

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int | None:
        """Placeholders that this prompt must hold; None where only 0 is known to be wrong."""
        return None

    def sequence_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a forward of padded sequences ``[N, P + T]`` is given beside its ``inputs``: positions, except where
        the model finds them itself, as those with M-RoPE do from the image grid."""
        if "image_grid_thw" in inputs:
            return {}
        return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    # ── the shared prefix ────────────────────────────────────────────────────────────────────────────

    def obstacle(self, model: Any) -> str:
        """Why this model cannot share a prefix; empty where it can."""
        kind, text = model.config.model_type, model.config.get_text_config()
        if kind not in self.model_types or text.model_type not in self.text_types:
            return f"not written for the architecture {kind}/{text.model_type}"
        layers = getattr(text, "layer_types", None)  # Mistral's has none: a window is that of all layers
        if layers is None and getattr(text, "sliding_window", None):
            layers = ("sliding_attention",)
        if others := set(layers or ()) - set(self.layer_types):
            return f"the language model has layers of {', '.join(sorted(others))}"
        implementation = text._attn_implementation.removeprefix(PREFIX)
        if implementation not in IMPLEMENTATIONS:
            return f"attn_implementation is {implementation}, it works with {', '.join(IMPLEMENTATIONS)}"
        return ""

    def prepare_shared_prefix(self, model: Any) -> None:
        """Make the language model take a packed sequence; `generate` must work as before."""
        install(self.language_model(model))

    def image_features(self, model: Any, images: dict[str, Tensor]) -> list[ImageFeatures]:
        """Features of the images of some prompts in one pass of the vision tower, in their order: one for each image, or
        for each tile.

        Args:
            model: of this family.
            images: their inputs, as `Prompts.images` makes them.
        """
        parts = model.model.get_image_features(**images, return_dict=True).pooler_output
        return [ImageFeatures(part.reshape(-1, part.shape[-1])) for part in parts]

    def prompt_positions(self, model: Any, item: dict[str, Tensor]) -> Int[Tensor, "R P"]:
        """Positions of a prompt's tokens, R = 3 with M-RoPE, else 1; captions go on after the largest."""
        return torch.arange(item["input_ids"].shape[1])[None]

    def language_model_inputs(
        self, model: Any, features: Sequence[ImageFeatures], placeholders: Tensor, layout: AttentionLayout
    ) -> dict[str, Any]:
        """What the language model's forward is given beside embeddings and positions, and hands on to its layers: made once
        for all of them.

        Args:
            model: of this family.
            features: of the images, in their order in the sequence.
            placeholders: ``[1, N]``, True where `ImageFeatures.embeds` stand in the packed sequence.
            layout: of the packed sequence.
        """
        return {}

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, **options: Any
    ) -> Float[Tensor, "1 N Hq D"]:
        """Attention of one layer over the packed sequence; ``options`` are those that transformers gives."""
        return shared_prefix_attention(query, key, value, layout, options.get("scaling"))

    # ── FLOPs and memory ─────────────────────────────────────────────────────────────────────────────

    def patches_per_token(self, config: Any) -> float:
        """Patches in the vision tower for each placeholder of a prompt."""
        return getattr(config.vision_config, "spatial_merge_size", 1) ** 2

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float | None:
        """Model FLOPs of a prompt's images, forward, through the tower and what joins it to the language model. None
        where they, or those of the text model, are not known: then none are reported."""
        return None

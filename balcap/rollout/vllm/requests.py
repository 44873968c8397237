"""What is asked of vLLM for an image, in process and over HTTP, and checks of what comes back. Imports no vLLM.

Servers are asked at ``/v1/chat/completions``: of vLLM's endpoints it is the one that takes an image and returns token
ids in all of 0.22 to 0.33. The server renders the chat template itself; the prompt ids that it returns are compared
with the trainer's.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from balcap.rollout.base import EngineFailed, Sampling, stop_token_ids
from balcap.rollout.vllm.client import ADAPTER
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import PromptEncoder, Prompts

BAN = -1e30
"""Added to a logit, leaves no probability in float32, whatever the logit is; unlike -inf, JSON can carry it."""

COLDEST, HOTTEST = 0.01, 2.0
"""Temperatures that vLLM samples at; it would raise a lower one in silence."""


def sampling_settings(
    policy: Policy, sampling: Sampling, num_captions: int, rows: int, seeds: bool
) -> list[dict[str, Any]]:
    """``[rows]`` for each image, what vLLM's ``SamplingParams`` and its HTTP endpoints have in common.

    They draw from the policy's distribution at the temperature, and from nothing that the hub's generation config
    adds. Token ids of the result end with the stop token.

    Args:
        seeds: give each image a seed, from torch's CPU generator; else vLLM draws from its own numbers.

    Raises:
        EngineFailed: vLLM cannot sample at this temperature.
    """
    if sampling.temperature != 0 and not COLDEST <= sampling.temperature <= HOTTEST:
        raise EngineFailed(
            f"model.sampling.temperature: vLLM samples between {COLDEST} and {HOTTEST}, not at "
            f"{sampling.temperature}; change it, or sample with balcap.rollout.HFGenerate"
        )
    off = {"top_k": 0, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0}
    off |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    settings = off | {
        "n": num_captions,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": stop_token_ids(policy),
        "ignore_eos": True,  # those ids are all that ends a caption
    }
    if not seeds:
        return [settings] * rows
    # of an image's first caption; those of the others follow from there
    return [settings | {"seed": seed} for seed in torch.randint(2**62, (rows,)).tolist()]


# ── in process ───────────────────────────────────────────────────────────────────────────────────────


def prompt_request(unexpanded: list[int], images: Sequence[Image.Image]) -> dict[str, Any]:
    """vLLM's input for one row. vLLM expands the prompt itself, as the model's processor does.

    Args:
        unexpanded: of `Prompts.unexpanded`.
        images: what the policy sees.
    """
    return {"prompt_token_ids": unexpanded, "multi_modal_data": {"image": list(images)}}


def token_settings(
    policy: Policy, sampling: Sampling, num_captions: int, rows: int, seeds: bool = False
) -> list[dict[str, Any]]:
    """``[rows]`` keyword arguments of ``SamplingParams`` for each image. Arguments and errors as `sampling_settings`."""
    own = {
        # The cheapest ban: one operator a step for all requests. ``bad_words`` take one for each request and token,
        # ``allowed_token_ids`` a mask over the vocabulary for each request.
        "logit_bias": dict.fromkeys(policy.encoder.banned_token_ids, BAN),
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    return [settings | own for settings in sampling_settings(policy, sampling, num_captions, rows, seeds)]


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────────


def chat_settings(
    policy: Policy, sampling: Sampling, num_captions: int, rows: int, seeds: bool = False
) -> list[dict[str, Any]]:
    """``[rows]`` what a request for each image says beside the image. Arguments as `sampling_settings`.

    Raises:
        EngineFailed: as `sampling_settings`, and where a token cannot be banned.
    """
    own = {
        "model": ADAPTER if policy.has_adapter else None,  # None for the base model
        # The endpoint cuts logit_bias off at -100, which a sure enough policy overcomes.
        "bad_words": banned_words(policy.encoder),
        "logprobs": True,
        "top_logprobs": 0,  # the sampled token's alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": template_lacks_bos(policy.encoder),
        "chat_template_kwargs": policy.encoder.switches,
    }
    return [settings | own for settings in sampling_settings(policy, sampling, num_captions, rows, seeds)]


def chat_request(
    settings: dict[str, Any], content: Sequence[dict[str, str]], images: Sequence[Image.Image]
) -> dict[str, Any]:
    """The body of a request for one row, from its `chat_settings` and its `PromptEncoder.content`."""
    urls = map(data_url, images)
    parts = [
        {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
        for part in content
    ]
    return settings | {"messages": [{"role": "user", "content": parts}]}


def chat_answer(
    answer: dict[str, Any], num_captions: int, server: str
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Prompt ids, and token ids and log-probs of G captions, ``[t]`` each, from the answer to a request.

    Raises:
        EngineFailed: they are not all there; names the server.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    tokens = [torch.tensor(choice.get("token_ids") or [], dtype=torch.long) for choice in choices]
    steps = [(choice.get("logprobs") or {}).get("content") or [] for choice in choices]
    logps = [torch.tensor([step["logprob"] for step in caption]) for caption in steps]
    ends = {choice["finish_reason"] for choice in choices}
    counts, num_logps = [len(row) for row in tokens], [len(row) for row in logps]
    complete = len(choices) == num_captions and counts == num_logps and 0 not in counts
    if not complete or not ends <= {"stop", "length"}:
        raise EngineFailed(
            f"the vLLM server {server} returned {len(choices)} captions of {counts} tokens with {num_logps} log-probs, "
            f"which ended by {sorted(map(str, ends))}; asked for were {num_captions} captions. Is its version one of "
            "0.22 to 0.33?"
        )
    return answer["prompt_token_ids"], tokens, logps


def data_url(image: Image.Image) -> str:
    """The pixels as a PNG, without loss and without what else a file may say, such as a rotation or a palette."""
    plain = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    out = io.BytesIO()
    plain.save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def banned_words(encoder: PromptEncoder) -> list[str]:
    """The tokens that must not be sampled, each as the text that is this one token: what ``bad_words`` takes.

    Raises:
        EngineFailed: a token has no such text.
    """
    words = []
    for token_id in encoder.banned_token_ids:
        word = encoder.tokenizer.convert_ids_to_tokens(token_id)
        if not word or encoder.tokenizer.encode(word, add_special_tokens=False) != [token_id]:
            raise EngineFailed(
                f"token {token_id} ({word!r}) of model.policy.model must not be sampled, and cannot be named to a vLLM "
                "server; sample with balcap.rollout.VLLMInProcess or balcap.rollout.HFGenerate"
            )
        words.append(word)
    return words


def template_lacks_bos(encoder: PromptEncoder) -> bool:
    """Whether the tokenizer adds what a prompt begins with; where the template writes it, it would be there twice."""
    bos = encoder.tokenizer.bos_token
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    text = encoder.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return not (bos and text.startswith(bos))


# ── checks ───────────────────────────────────────────────────────────────────────────────────────────


def check_images(batch: CaptionBatch, limit: int, engine: str, more: str) -> None:
    """EngineFailed where a row has more images than vLLM takes.

    Args:
        limit: images in a prompt.
        engine: whose limit it is, for the message.
        more: what raises it, to be followed by the images in JSON.
    """
    for sample_id, images in zip(batch.sample_ids, batch.images, strict=True):
        if len(images) > limit:
            raise EngineFailed(
                f"sample {sample_id!r} has {len(images)} images, {engine} takes {limit} in a prompt; {more} "
                f'\'{{"image": {len(images)}, "video": 0}}\''
            )


def check_lengths(
    batch: CaptionBatch, prompts: Prompts, max_tokens: int, limit: int, engine: str, key: str
) -> None:
    """EngineFailed where vLLM would cut captions at its own limit, unnoticed.

    Args:
        max_tokens: of the longest caption.
        limit: of prompt and caption together, in tokens.
        engine: whose limit it is, for the message.
        key: what raises the limit.
    """
    for sample_id, item in zip(batch.sample_ids, prompts.items, strict=True):
        needed = item["input_ids"].shape[1] + max_tokens
        if needed > limit:
            raise EngineFailed(
                f"sample {sample_id!r}: its prompt and a caption of model.sampling.max_tokens: {max_tokens} make "
                f"{needed} tokens, the limit of {engine} is {limit}; raise {key}, or lower model.policy.max_pixels or "
                "model.sampling.max_tokens"
            )


def check_prompt(sample_id: str, engine_ids: Sequence[int], trainer_ids: Tensor) -> None:
    """EngineFailed where the engine saw another prompt than the trainer computes its log-probs for.

    Args:
        sample_id: named in the message.
        engine_ids: ``[P]`` prompt tokens as the engine reports them, image tokens expanded.
        trainer_ids: ``[P]`` or ``[1, P]`` of the trainer.
    """
    own, theirs = trainer_ids.flatten().tolist(), list(engine_ids)
    if own == theirs:
        return
    pairs = enumerate(zip(theirs, own, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(theirs)))
    raise EngineFailed(
        f"sample {sample_id!r}: vLLM's prompt differs from the trainer's from token {at} on: vLLM has "
        f"{theirs[at : at + 5]} ({len(theirs)} tokens in all), the trainer {own[at : at + 5]} ({len(own)}). "
        "Where the lengths differ, the image was scaled to another size: give mm_processor_kwargs of the engine the "
        "limits of model.policy.min_pixels and model.policy.max_pixels. Else the model folders differ: compare "
        "model.policy.model and model.policy.revision with what the engine loaded"
    )

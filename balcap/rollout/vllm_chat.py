"""What is asked of a vLLM server for one image, and what its answer holds.

The endpoint is ``/v1/chat/completions``: of vLLM's endpoints it is the one that takes an image and returns token ids in
all of 0.22 to 0.33. ``/inference/v1/generate``, which takes token ids, got images of its own (``content_parts``) only
after 0.22. The server renders the chat template itself, therefore; the prompt ids that it returns are compared with the
trainer's (`balcap.rollout.vllm_common.check_prompt`).
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from balcap.rollout.base import EngineFailed, Sampling
from balcap.rollout.vllm_common import sampling_settings

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import PromptEncoder

_FOR_TOKENS_ONLY = ("logit_bias", "logprobs", "detokenize")  # means something else here, or nothing


def chat_settings(policy: Policy, sampling: Sampling, num_captions: int) -> dict[str, Any]:
    """The part of a request that is the same for all images of a batch.

    Raises:
        EngineFailed: a token cannot be banned, or the temperature not be sampled at.
    """
    settings = sampling_settings(policy, sampling, num_captions, seed=0)
    settings = {key: value for key, value in settings.items() if key not in _FOR_TOKENS_ONLY}
    return settings | {
        # The endpoint cuts logit_bias off at -100, which a sure enough policy overcomes.
        "bad_words": banned_words(policy.encoder),
        "logprobs": True,
        "top_logprobs": 0,  # the sampled token's alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": template_lacks_bos(policy.encoder),
    }


def chat_request(
    settings: dict[str, Any], model: str | None, image: Image.Image, prompt: str, seed: int
) -> dict[str, Any]:
    """The body of a request for one image; without `model` it is for the base model."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": prompt},
    ]
    return settings | {"model": model, "messages": [{"role": "user", "content": content}], "seed": seed}


def chat_answer(answer: dict[str, Any], num_captions: int, server: str) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids and log-probs of G captions, ``[t]`` each, from the answer to a request.

    Raises:
        EngineFailed: they are not all there; names the server.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    tokens = [torch.tensor(choice.get("token_ids") or [], dtype=torch.long) for choice in choices]
    logps = [
        torch.tensor([step["logprob"] for step in (choice.get("logprobs") or {}).get("content") or []])
        for choice in choices
    ]
    ends = {choice["finish_reason"] for choice in choices}
    counts = [len(row) for row in tokens]
    if (
        len(choices) != num_captions
        or counts != [len(row) for row in logps]
        or not ends <= {"stop", "length"}
    ):
        raise EngineFailed(
            f"the vLLM server {server} returned {len(choices)} captions of {counts} tokens with "
            f"{[len(row) for row in logps]} log-probs, which ended by {sorted(map(str, ends))}; asked for were "
            f"{num_captions} captions. Is its version one of 0.22 to 0.33?"
        )
    return tokens, logps


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
                "server; sample with balcap.rollout.vllm_inprocess.VLLMInProcess or balcap.rollout.hf.HFGenerate"
            )
        words.append(word)
    return words


def template_lacks_bos(encoder: PromptEncoder) -> bool:
    """Whether the tokenizer adds what a prompt begins with; where the template writes it, it would be there twice."""
    bos = encoder.tokenizer.bos_token
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    text = encoder.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return not (bos and text.startswith(bos))

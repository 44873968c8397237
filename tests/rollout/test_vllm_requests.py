"""What vLLM's engines share, without vLLM: prompts, sampling settings, seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout import Sampling
from balcap.rollout.base import EngineFailed, stop_token_ids
from balcap.rollout.vllm.requests import (
    chat_request,
    check_images,
    check_prompt,
    data_url,
    prompt_request,
    sampling_settings,
    token_settings,
)
from balcap.rollout.vllm.start import engine_arguments, logprobs_mode, mm_processor_kwargs
from tests.tiny_models import batch_of_rows, mixed_batch, picture, prompt_by_hand

Load = Callable[..., Policy]


def test_an_engine_gets_the_prompt_as_the_template_writes_it(load: Load, family: str):
    policy, batch = load(), mixed_batch()
    prompts = policy.encode(batch)
    for item, ids, images, question in zip(
        prompts.items, prompts.unexpanded, batch.images, batch.prompts, strict=True
    ):
        assert prompt_request(ids, images) == {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": list(images)},
        }
        assert policy.encoder.tokenizer.decode(ids).removeprefix("<s>") == prompt_by_hand(family, question)
        at, features = ids.index(prompts.image_token_id), item["input_ids"].shape[1] - len(ids) + 1
        image_tokens = [prompts.image_token_id] * features
        assert item["input_ids"][0].tolist() == ids[:at] + image_tokens + ids[at + 1 :]


def test_images_within_the_text_are_sent_where_they_stand(load: Load, family: str):
    encoder, images = load().encoder, (picture(64, 64), picture(150, 60, seed=1))
    batch = batch_of_rows([images], ["Is <image> older than <image>?"])
    prompts = encoder.encode(batch)
    request = prompt_request(prompts.unexpanded[0], images)
    assert request["prompt_token_ids"].count(prompts.image_token_id) == 2
    assert request["multi_modal_data"] == {"image": list(images)}
    (message,) = chat_request({}, encoder.content(batch.prompts[0], 2), images)["messages"]
    urls = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    texts = [{"type": "text", "text": text} for text in ("Is ", " older than ", "?")]
    assert message["content"] == [texts[0], urls[0], texts[1], urls[1], texts[2]]
    (message,) = chat_request({}, encoder.content("Compare them.", 2), images)["messages"]
    assert message["content"] == [*urls, {"type": "text", "text": "Compare them."}]


def test_more_images_than_the_engine_takes_name_the_sample_and_the_flag():
    batch = batch_of_rows([(picture(30, 20),), (picture(30, 20),) * 3], ["Go", "Go"])
    check_images(batch, 3, "vLLM", "")
    with pytest.raises(EngineFailed) as error:
        check_images(batch, 1, "vLLM", "set options.limit_mm_per_prompt to")
    assert str(error.value) == (
        "sample 'img1.png' has 3 images, vLLM takes 1 in a prompt; set options.limit_mm_per_prompt to "
        """'{"image": 3, "video": 0}'"""
    )


def test_equal_prompts_pass():
    check_prompt("a.png", [1, 7, 7, 2], torch.tensor([[1, 7, 7, 2]]))


@pytest.mark.parametrize(
    ("theirs", "own", "said"),
    [
        (
            [1, 7, 7, 2],
            [1, 7, 7, 7, 2],
            r"token 3 on: vLLM has \[2\] \(4 tokens in all\), the trainer \[7, 2\] \(5\)",
        ),
        ([1, 7, 3], [1, 7, 2], r"token 2 on: vLLM has \[3\]"),
        ([1, 7], [1, 7, 2], r"token 2 on: vLLM has \[\] \(2 tokens in all\), the trainer \[2\] \(3\)"),
        ([], [4], r"token 0 on"),
    ],
)
def test_prompts_that_differ_say_where(theirs: list[int], own: list[int], said: str):
    with pytest.raises(EngineFailed, match=r"sample 'a\.png'.*" + said):
        check_prompt("a.png", theirs, torch.tensor(own))


def test_sampling_settings_are_the_policys(load: Load):
    policy = load()
    policy.model.generation_config.top_k = 5
    (settings,) = token_settings(policy, Sampling(0.7, 0.9, 33), 4, 1)
    assert "seed" not in settings
    assert settings["stop_token_ids"] == stop_token_ids(policy)
    assert (settings["temperature"], settings["top_p"], settings["max_tokens"]) == (0.7, 0.9, 33)
    assert (settings["n"], settings["top_k"], settings["logprobs"]) == (4, 0, 0)


def test_a_ban_leaves_no_probability_whatever_the_logit(load: Load):
    policy = load()
    bias = token_settings(policy, Sampling(), 1, 1)[0]["logit_bias"]
    assert set(bias) == set(policy.encoder.banned_token_ids)
    logits = torch.zeros(400)
    logits[policy.encoder.banned_token_ids] = 1e6
    for token, value in bias.items():
        logits[token] += value
    assert logits.softmax(-1)[policy.encoder.banned_token_ids].sum() == 0


@pytest.mark.parametrize("temperature", [0.009, 2.01])
def test_temperatures_that_vllm_does_not_sample_at(load: Load, temperature: float):
    with pytest.raises(EngineFailed, match=r"model\.sampling\.temperature"):
        sampling_settings(load(), Sampling(temperature), 1, 1, seeds=False)


def test_log_probs_are_raw_only_at_temperature_1():
    assert [logprobs_mode(t) for t in (1.0, 0.7, 1.01)] == ["raw_logprobs"] + ["processed_logprobs"] * 2


def test_image_limits_are_the_processors(load: Load, family: str):
    if family == "llava":
        assert mm_processor_kwargs(load().encoder.processor) == {}, "LLaVA crops to one size"
        return
    usual = {"shortest_edge": 56**2, "longest_edge": 112**2}
    assert mm_processor_kwargs(load().encoder.processor) == {"size": usual}
    smaller = load(max_pixels=84**2).encoder.processor
    assert mm_processor_kwargs(smaller) == {"size": usual | {"longest_edge": 84**2}}


def test_seeds_follow_torchs(load: Load):
    policy = load()

    def seeds(rows: int) -> list[int]:
        return [settings["seed"] for settings in sampling_settings(policy, Sampling(), 1, rows, seeds=True)]

    torch.manual_seed(3)
    first, second = seeds(50), seeds(50)
    torch.manual_seed(3)
    assert seeds(7) == first[:7], "an image's seed does not depend on how many follow"
    assert len({*first, *second}) == 100
    assert all(0 <= seed < 2**62 for seed in first)


def test_a_4_bit_policy_is_sampled_with_4_bit_weights_unless_the_options_say_otherwise(
    load: Load, monkeypatch: pytest.MonkeyPatch
):
    adapter = LoraSettings(target_modules=["q_proj"], r=4)
    four, dense = load(lora=adapter, load_in_4bit=True), load(lora=adapter)
    on_a_cpu = engine_arguments(four, 1.0, "auto", {})
    assert "quantization" not in on_a_cpu, "vLLM has no 4-bit kernels there"
    monkeypatch.setattr(Policy, "device", torch.device("cuda", 0))
    arguments = engine_arguments(four, 1.0, "auto", {"max_model_len": 99})
    assert (arguments["quantization"], arguments["model"]) == ("bitsandbytes", four.source)
    assert arguments["dtype"] == torch.float32, "the policy's own, of what is in no four bits"
    assert (arguments["enable_lora"], arguments["max_lora_rank"]) == (True, 8)
    assert engine_arguments(four, 1.0, "auto", {"quantization": None})["quantization"] is None
    eight = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    assert eight.items() <= engine_arguments(four, 1.0, "auto", eight).items()
    assert "quantization" not in engine_arguments(dense, 1.0, "auto", {})

"""Architectures that people train: each is exact on images of mixed sizes and trains, or is refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from balcap.policy import PolicyConfig
from balcap.policy.config import PolicyError
from balcap.policy.policy import Policy
from balcap.rollout import HFGenerate, Sampling
from balcap.types import Rollouts
from tests.short_captions import TRAINED_ON_IT
from tests.support import metrics
from tests.tiny_families import WORKING
from tests.tiny_models import Alone, mixed_batch, rollouts_of, tiny_tokenizer

ROWS = [0, 1, 2]


@pytest.fixture
def rollouts() -> Rollouts:
    return rollouts_of(mixed_batch(), [[3, 1, 5], [7, 2, 2], [4, 6, 1]], range(60, 300))


@pytest.mark.parametrize("name", WORKING)
def test_log_probs_are_those_of_each_example_alone(
    name: str, folder_of: Callable[[str], Path], rollouts: Rollouts
) -> None:
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False).eval()
    prompts = policy.encode(rollouts.batch)
    expected, _ = Alone(name, folder_of(name)).logps(rollouts)
    logps, _ = policy.logps(rollouts, prompts, ROWS)
    torch.testing.assert_close(logps, expected, atol=3e-6, rtol=3e-6)
    policy.train()
    logps, _ = policy.logps(rollouts, prompts, ROWS)
    torch.testing.assert_close(logps, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("name", WORKING)
def test_sampling_draws_from_what_is_trained(name: str, folder_of: Callable[[str], Path]) -> None:
    """In one batch of mixed sizes, padded; greedy decoding alone would hide a wrong position."""
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False)
    engine, batch = HFGenerate(), mixed_batch()
    engine.attach(policy)
    prompts = policy.encode(batch)
    rollouts = engine.generate(batch, prompts, 2, Sampling(max_tokens=6))
    logps, _ = policy.logps(rollouts, prompts, ROWS)
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_captions_that_have_ended_leave_all_kinds_of_caches(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recurrent states and sliding windows, beside keys and values of all tokens."""
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False)
    ends = list(range(60, 300, 6))
    monkeypatch.setattr("balcap.rollout.base.stop_token_ids", lambda _: ends)
    monkeypatch.setattr("balcap.rollout.hf.stop_token_ids", lambda _: ends)
    engine, batch = HFGenerate(), mixed_batch()
    engine.attach(policy)
    prompts = policy.encode(batch)
    torch.manual_seed(0)
    rollouts = engine.generate(batch, prompts, 4, Sampling(max_tokens=8))
    lengths = rollouts.completion_mask.sum(-1)
    assert lengths.min() < 4 < lengths.max()
    logps, _ = policy.logps(rollouts, prompts, ROWS)
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WORKING)
def test_it_trains_and_captions(
    name: str,
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    folder_of: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
) -> None:
    options = TRAINED_ON_IT | {"model.policy.model": folder_of(name)}
    training = {"trainer.max_steps": 2, "trainer.limit_val_batches": 0, "model.policy.freeze_vision": "false"}
    cli(fit_arguments(**options, **training, run_dir=tmp_path / "run"))
    norms = [float(row["train/grad_norm"]) for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert len(norms) == 2
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    source = {"data.data": None, "data.predict_from": world, "trainer.limit_predict_batches": 1}
    cli(fit_arguments("predict", **options, **source, run_dir=tmp_path / "captions"))
    lines = (tmp_path / "captions/captions.jsonl").read_text().splitlines()
    assert len(lines) >= 1
    assert all(set(json.loads(line)) == {"image", "prompt", "caption", "truncated"} for line in lines)


def test_a_model_without_a_chat_template_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(PolicyError, match=r"^model\.policy\.model: .* has no chat template"):
        Policy.load(PolicyConfig(str(folder_of("paligemma"))), False)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(("<s>", "</s>"), "<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=len(tokenizer))
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"^model\.policy\.model: .* has no image processor"):
        Policy.load(PolicyConfig(str(tmp_path)), False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.policy.attn_implementation": "flash_attention_9"}, "cannot be loaded: .*flash_attention_9"),
        ({"model.policy.lora.target_modules": "[nothing]"}, "target_modules: 'nothing' matches no linear"),
        ({"model.policy.model": "nobody/nothing"}, "nobody/nothing cannot be loaded"),
        ({"model.policy.min_pixels": "-1"}, "min_pixels: -1 is no area"),
    ],
)
def test_what_cannot_be_loaded_is_one_message(
    change: dict[str, str],
    message: str,
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=message) as stop:
        cli(fit_arguments(**change))
    assert "Traceback" not in str(stop.value)

"""``check``: sound models pass every check, and each fault that training would suffer from is found by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from balcap.cli import ConfigError
from balcap.commands import check_policy
from balcap.commands.check import CHECKS, disturb, run_checks
from balcap.commands.check_state import ROUNDED, Result, State
from balcap.policy import LoraSettings, PolicyConfig, prompts
from balcap.policy.families import base_of
from balcap.policy.families.base import Family
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL
from balcap.policy.policy import Policy
from balcap.policy.prompts import Prompts
from balcap.rollout import HFGenerate, RolloutEngine, Sampling, hf
from balcap.rollout.base import Drawn
from balcap.rollout.vllm.requests import check_prompt
from balcap.types import CaptionBatch
from callbacks.export import export
from tests.tiny_families import lfm2_vl
from tests.tiny_models import mixed_batch

LORA = LoraSettings(r=4, alpha=8)


class OtherWeights(HFGenerate):
    """As an engine in a process of its own that has not got the policy's weights."""

    on_policy = False

    def attach(self, policy: Policy) -> None:
        super().attach(policy)
        self.copy = copy.deepcopy(policy)
        for weight in self.copy.model.parameters():
            weight.data += 0.2 * weight.std() * torch.randn(weight.shape)

    def _draw(self, policy: Policy, *how: Any) -> Generator[Drawn]:
        yield from super()._draw(self.copy, *how)


class WithoutAdapter(HFGenerate):
    """It samples from the base."""

    on_policy = False

    def _draw(self, policy: Policy, *how: Any) -> Generator[Drawn]:
        with policy.model.disable_adapter():
            yield from super()._draw(policy, *how)


class OtherLimits(HFGenerate):
    """Its processor makes half as many image tokens, which it does not notice."""

    on_policy = False
    compares = False

    def _draw(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        encoder = copy.deepcopy(policy.encoder)
        size = encoder.processor.image_processor.size
        encoder.processor.image_processor.size = type(size)(**dict(size) | {"longest_edge": 56**2})
        own = encoder.encode(batch)
        if self.compares:
            for sample_id, mine, theirs in zip(batch.sample_ids, own.items, prompts.items, strict=True):
                check_prompt(sample_id, mine["input_ids"].flatten().tolist(), theirs["input_ids"])
        yield from super()._draw(policy, batch, own, num_captions, sampling)


class OtherLimitsSaid(OtherLimits):
    """As vLLM engines do."""

    compares = True


def state_of(folder: Path, engine: RolloutEngine | None = None, **config: Any) -> State:
    """A run on three images of different sizes."""
    torch.manual_seed(0)
    settings = PolicyConfig(str(folder), **({"dtype": "float32", "compile": False} | config))

    def load(config: PolicyConfig) -> Policy:
        return Policy.load(config, False).eval()

    policy = load(settings)
    disturb(policy)
    return State(settings, policy, engine or HFGenerate(), mixed_batch(), Sampling(max_tokens=12), load)


def failures(results: dict[str, Result]) -> set[str]:
    return {name for name, result in results.items() if result.passed is False}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen", {"freeze_vision": False}),
        ("qwen", {"lora": LORA}),
        ("llava", {"lora": LORA}),
        ("lfm2_vl", {}),
    ],
)
def test_a_sound_model_passes_every_check(
    name: str, config: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = lfm2_vl(tmp_path / "lfm2_vl") if name == "lfm2_vl" else folders[name]
    results = run_checks(state_of(folder, **config))
    assert list(results) == list(CHECKS)
    skipped = {check for check, result in results.items() if result.passed is None}
    assert skipped == ({"shared prefix"} if name == "lfm2_vl" else set())
    assert not failures(results), results
    trained = results["what is trained"].found
    assert ("vision: " in trained) == ("freeze_vision" in config)
    assert ("14 layers with LoRA: 2 q_proj" in trained) == ("lora" in config)
    assert "as many features" in results["placeholders"].found


def test_low_precision_passes_and_ties_are_named(folders: dict[str, Path]) -> None:
    state = replace(state_of(folders["qwen"], dtype="bfloat16", lora=LORA), tolerance=ROUNDED)
    assert not failures(run_checks(state))


@pytest.mark.parametrize(
    ("engine", "config", "found"),
    [
        (OtherWeights(), {}, {"log-probs", "greedy captions"}),
        (WithoutAdapter(), {"lora": LORA}, {"log-probs", "greedy captions"}),
        (OtherLimits(), {}, {"log-probs", "greedy captions"}),
        (OtherLimitsSaid(), {}, {"engine's prompts"}),
    ],
)
def test_an_engine_that_is_not_the_policy_is_found(
    engine: RolloutEngine, config: dict[str, Any], found: set[str], folders: dict[str, Path]
) -> None:
    results = run_checks(state_of(folders["qwen"], engine, **config))
    assert failures(results) == found
    if found == {"engine's prompts"}:
        assert "model.policy.max_pixels" in results["engine's prompts"].found
        assert results["log-probs"] == Result(None, "there are no captions, see engine's prompts")
    else:
        assert "model.engine.init_args" in results["log-probs"].way_out


def test_padding_on_the_wrong_side_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pad_right(row: torch.Tensor, width: int, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(row, (0, width - row.shape[1]), value=fill)

    monkeypatch.setattr(prompts, "_pad_left", pad_right)
    for name in ("qwen", "llava"):  # LLaVA's prompts differ in the question alone
        assert "padding" in failures(run_checks(state_of(folders[name])))


def test_an_engine_that_draws_placeholders_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = hf.decode
    monkeypatch.setattr(
        hf, "decode", lambda *args: decode(*args[:6], [], *args[7:])
    )  # the seventh is what is banned
    results = run_checks(state_of(folders["qwen"]))
    assert "bans" in failures(results)
    assert "where the policy wants nothing else" in results["bans"].found


def test_a_policy_that_bans_too_little_is_found(folders: dict[str, Path]) -> None:
    state = state_of(folders["qwen"])
    state.policy.encoder.banned_token_ids = []
    results = run_checks(state)
    assert "bans" in failures(results)
    assert "<|image_pad|>" in results["bans"].found


def test_a_frozen_language_model_is_found(folders: dict[str, Path]) -> None:
    state = state_of(folders["qwen"], freeze_vision=False)
    for name, weight in state.policy.model.named_parameters():
        weight.requires_grad_("visual" in name or "lm_head" in name)
    results = run_checks(state)
    assert failures(results) == {"what is trained"}
    assert "no linear layer of the language model" in results["what is trained"].found


def test_a_prefix_that_is_not_shared_rightly_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(folders["qwen"])
    monkeypatch.setattr(Qwen2_5VL, "prompt_positions", Family.prompt_positions)
    assert "shared prefix" in failures(run_checks(state))


def test_a_gradient_that_differs_is_found(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(folders["qwen"])
    logps = state.policy.logps

    def half(*args: Any, **options: Any) -> Any:
        values, entropies = logps(*args, **options)
        return 0.5 * values + 0.5 * values.detach(), entropies

    monkeypatch.setattr(state.policy, "logps", half)
    assert failures(run_checks(state)) == {"shared prefix"}


@pytest.mark.parametrize("config", [{}, {"lora": LORA}])
def test_an_export_with_other_weights_is_found(
    config: dict[str, Any], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(policy: Policy, folder: str) -> None:
        export(policy, folder)
        (file,) = Path(folder).glob("*.safetensors")
        weights = {name: 0.9 * weight for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(check_policy, "export", spoiled)
    assert failures(run_checks(state_of(folders["qwen"], **config))) == {"export"}


def test_an_export_that_makes_other_prompts_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_limits(policy: Policy, folder: str) -> None:
        export(policy, folder)
        type(policy.encoder.processor).from_pretrained(folders["qwen"]).save_pretrained(folder)

    state = state_of(folders["qwen"], max_pixels=64**2)
    assert not failures(run_checks(state))
    monkeypatch.setattr(check_policy, "export", without_limits)
    results = run_checks(state)
    assert failures(results) == {"export"}
    assert "another prompt" in results["export"].found


def test_wrong_placeholders_fail_and_the_rest_is_skipped(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(folders["qwen"])
    monkeypatch.setattr(state.policy.encoder.family.__class__, "num_features", lambda *_: 1)
    results = run_checks(state)
    assert failures(results) == {"placeholders"}
    assert "img0.png" in results["placeholders"].found
    assert {name for name, result in results.items() if result.passed} == {"what is trained"}
    # Without the encoder's own count the features themselves are counted.
    monkeypatch.setattr(state.policy.encoder.family.__class__, "num_features", lambda *_: None)
    one = base_of(state.policy.model).get_input_embeddings().weight[:1]
    monkeypatch.setattr(
        state.policy.encoder.family.__class__, "image_features", lambda *_: [prompts.ImageFeatures(one)]
    )
    results = run_checks(state)
    assert "1 features" in results["placeholders"].found
    assert results["placeholders"].passed is False


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


def check_arguments(fit_arguments: Callable[..., list[str]], **options: object) -> list[str]:
    return ["check", *fit_arguments("predict", **options)[1:], "--images", "3"]


def test_the_command_prints_a_table_and_leaves_nothing_behind(
    cli: Callable[[list[str]], None],
    fit_arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    cli(check_arguments(fit_arguments, **{"model.judge.model": "openai/gpt-6-luna"}))
    text = capsys.readouterr().out
    for name in ("loading", *CHECKS):
        assert re.search(rf"│ {name} +│ pass ", text), text
    assert "3 prompts of" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # of the table of rows


def test_the_command_fails_where_a_check_does(
    cli: Callable[[list[str]], None],
    fit_arguments: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2 of 10 checks failed") as ended:
        cli(check_arguments(fit_arguments, **{"model.engine": f"{__name__}.OtherWeights"}))
    assert ended.value.code
    assert capsys.readouterr().out.count("FAIL") == 2


def test_a_model_that_does_not_load_is_a_failed_row(
    cli: Callable[[list[str]], None],
    fit_arguments: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    vision = {"model.policy.lora": "{target_modules: [qkv]}", "model.policy.freeze_vision": "false"}
    with pytest.raises(SystemExit, match="1 of 1 checks failed"):
        cli(check_arguments(fit_arguments, **vision))
    assert "no linear layer of the language model" in " ".join(capsys.readouterr().out.split())


def test_what_the_command_cannot_mean_is_refused(
    cli: Callable[[list[str]], None], fit_arguments: Callable[..., list[str]]
) -> None:
    with pytest.raises(ConfigError) as refused:
        cli(check_arguments(fit_arguments, ckpt_path="last", **{"model.kl_coef": -1}))
    assert [problem.partition(":")[0] for problem in refused.value.problems] == ["ckpt_path", "model.kl_coef"]

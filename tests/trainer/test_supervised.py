"""Supervised fine-tuning on the references: the loss is transformers' own, and training samples and asks nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from balcap.config import ConfigError
from balcap.rollout.references import reference_rollouts
from balcap.trainer.supervised import supervised_update
from balcap.trainer.update import UpdateSettings
from tests.support import ROOT, metrics, optimizer_loop
from tests.tiny_models import mixed_batch

REFERENCES = ["A red circle.", "What is this? A small blue square on a grey background.", "The lazy dog"]
SFT = ["--config", str(ROOT / "configs/methods/sft.yaml")]


@pytest.fixture
def sft(fit_arguments: Any, cli: Any) -> Any:
    """Run a command with the overlay."""

    def run(*more: str, **options: Any) -> None:
        command, *arguments = fit_arguments(**options)
        cli([command, *arguments[:2], *SFT, *arguments[2:], *more])

    return run


def _steps(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row.get("train/loss")]


def test_a_reference_is_a_caption_that_ends(load: Any, family: str) -> None:
    policy = load()
    tokenizer = policy.encoder.tokenizer
    spelled = replace(mixed_batch(), references=[*REFERENCES[:2], f"A{tokenizer.eos_token} sign "])
    rollouts = reference_rollouts(policy, spelled, max_tokens=20, version=3)
    texts = ["".join(tokenizer.convert_ids_to_tokens(ids[mask])) for [ids], [mask] in
             zip(rollouts.token_ids, rollouts.completion_mask, strict=True)]  # fmt: skip
    end = {"qwen": "<|im_end|>", "llava": "</s>"}[family]
    lead = {"qwen": "", "llava": "Ġ"}[family]  # of LLaVA's template: "ASSISTANT: A red circle."
    assert texts[0] == f"{lead}A red circle.{end}".replace(" ", "Ġ")
    assert texts[2].count(end) == 1  # what spells an end of sequence is no end
    assert rollouts.truncated.tolist() == [[False], [True], [False]]
    assert rollouts.completion_mask.sum(-1)[1] == rollouts.lengths[1] == 20
    assert rollouts.lengths[0] == rollouts.completion_mask[0].sum() - 1
    assert rollouts.captions[0] == ["A red circle."]
    assert rollouts.weights_version == 3


@pytest.mark.parametrize(
    "otherwise",
    ["{{ add_generation_prompt }}", "{% if not add_generation_prompt %}{{ messages + '' }}{% endif %}"],
    ids=["another prompt", "it fails"],
)
def test_a_template_that_writes_answers_otherwise_is_left_aside(load: Any, otherwise: str) -> None:
    policy = load()
    encoder, batch = policy.encoder, replace(mixed_batch(), references=REFERENCES)
    encoder.processor.chat_template = otherwise + encoder.processor.chat_template
    expected = encoder.tokenizer(REFERENCES, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in encoder.answers(batch)] == expected


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_loss_is_that_of_transformers_labels(load: Any, shared_prefix: bool) -> None:
    policy, theirs = load(shared_prefix=shared_prefix), load()
    batch = replace(mixed_batch(), references=REFERENCES)
    prompts = policy.encode(batch)
    references = reference_rollouts(policy, batch, 64, 0)
    counts, total = references.completion_mask.sum().item(), torch.zeros(())
    for row in range(len(batch)):
        inputs = prompts.inputs([row], 1, "cpu")
        caption = references.token_ids[row][references.completion_mask[row]][None]
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), caption], 1)
        for key, fill in (("input_ids", caption), ("attention_mask", torch.ones_like(caption))):
            inputs[key] = torch.cat([inputs[key], fill], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat(
                [inputs["mm_token_type_ids"], torch.zeros_like(caption)], 1
            )
        total = total + theirs.model(**inputs, labels=labels).loss * caption.numel() / counts
    total.backward()

    settings = UpdateSettings(micro_batch_size=2, max_grad_norm=None)
    tally = supervised_update(policy, settings, references, prompts, optimizer_loop(policy)).means()
    assert tally["loss"] == pytest.approx(total.item(), abs=1e-5)  # two micro-batches, whose losses add up
    assert tally["nll"] == pytest.approx(total.item(), abs=1e-5)
    moved = dict(policy.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(moved[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)


LORA = "{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_policy_learns_the_references_and_the_judge_is_asked_in_validation_alone(
    sft: Any, tmp_path: Path, lora: str | None
) -> None:
    options = {"data.batch_size": 8, "trainer.max_steps": 6, "model.policy.lora": lora, "data.val_size": 2}
    lr = {"model.optimizer.init_args.lr": 2e-2 if lora else 5e-4, "model.sampling.max_tokens": 128}
    sft(**options, **lr)
    rows = _steps(tmp_path / "run")
    losses = [float(row["train/nll"]) for row in rows]
    assert len(losses) == 6
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1
    assert [row["train/loss"] for row in rows] == [row["train/nll"] for row in rows]
    assert all(float(row["judge/calls"]) == float(row["judge/cost_usd"]) == 0 for row in rows)
    assert not any(row["train/precision"] for row in rows if "train/precision" in row)
    assert all(float(row["train/truncated"]) == 0 for row in rows)
    validated = [row for row in metrics(tmp_path / "run") if row["val/b_capscore"]]
    assert [row["step"] for row in validated] == ["0", "6"]
    assert not list((tmp_path / "run/rollouts").glob("train-*"))


def test_validation_is_of_the_weights_of_now(sft: Any, tmp_path: Path) -> None:
    """An engine that keeps weights of its own gets those of each validation, and not those of every step."""
    options = {"model.engine": "tests.fakes.CountingEngine", "trainer.check_val_every_n_epoch": "null"}
    sft(**options, **{"trainer.max_steps": 4, "trainer.val_check_interval": 2, "data.val_size": 2})
    from tests.fakes import CountingEngine

    assert CountingEngine.versions == [0, 2, 4]


def test_the_mean_of_two_ranks_is_the_gradient_of_one(load: Any) -> None:
    batch, settings = replace(mixed_batch(), references=REFERENCES), UpdateSettings(max_grad_norm=None)
    parts = [batch, batch.select([0]), batch.select([1, 2])]
    tokens = [reference_rollouts(load(), part, 64, 0).completion_mask.sum().float() for part in parts]
    gradients, losses = [], []
    for part, ranks in zip(parts, (1, 2, 2), strict=True):
        policy = load()
        loop = optimizer_loop(policy)
        if ranks == 2:
            loop.world_size, loop.all_gather = 2, lambda tensor: torch.stack(tokens[1:])
        references = reference_rollouts(policy, part, 64, 0)
        tally = supervised_update(policy, settings, references, policy.encode(part), loop)
        losses.append(tally.means()["loss"])
        gradients.append({n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None})
    whole, first, second = gradients
    assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[0], abs=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, gradient, atol=1e-5, rtol=1e-4)


def test_a_kl_term_without_samples_is_refused(sft: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        sft(**{"model.kl_coef": 0.01})
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["model.kl_coef"]


def test_an_estimate_counts_validation_alone(fit_arguments: Any, cli: Any, capsys: Any) -> None:
    command, *arguments = fit_arguments("estimate", **{"trainer.max_steps": 5})
    cli([command, *arguments[:2], *SFT, *arguments[2:], "--rows", "3", "--chars_per_token", "4"])
    assert "5 steps x 2 images, 2 validations x 4 images: 8 rollouts to judge" in capsys.readouterr().out

"""Runs with SpanCredit: one setting switches on what it needs, and only the spread over tokens changes."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from balcap.algorithms import SpanCredit, cgdpo
from balcap.cli import ConfigError
from balcap.judge import Judgments, Verdict
from balcap.judge.tasks import Assertion
from balcap.module import BalCapModule
from balcap.policy import PolicyConfig
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from balcap.trainer.spans import assertion_spans
from balcap.types import CaptionBatch, Rollouts
from tests.support import ROOT, metrics

SPAN_CREDIT = {"model.advantage": "balcap.algorithms.SpanCredit"}
NAMES = ("precision", "recall", "linguistic")


def test_words_become_tokens_and_verdicts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/shapes-base")
    caption = "A red circle."
    ids = [*tokenizer(caption)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) == 5  # "A", " red", " circle", ".", the end
    token_ids = torch.tensor([[[*ids, 0], [*ids, 0], [ids[0], tokenizer.eos_token_id, 0, 0, 0, 0]]])
    mask = torch.arange(6) < torch.tensor([5, 5, 2])[:, None]
    batch = CaptionBatch(["a"], [], [(b"",)], [""], [""])
    rest = torch.zeros(1, 3)
    rollouts = Rollouts(batch, [[caption, caption, "A"]], token_ids, mask[None], rest, rest, rest, rest[0])
    said = [Assertion("It is red.", "red", 2), Assertion("It is a circle.", "circle", 6), Assertion("Calm.")]
    verdicts = [Verdict(True, True), Verdict(False, True), Verdict(True, False)]
    sources = [[2], None, [0, 2]]  # of three units of the reference
    answers = {
        "decompose_spans": [[said, said, None]],
        "verify": [[verdicts, None, None]],
        "match_spans": [[sources, None, None]],
    }
    suite = RewardSuite([Linguistic(), Precision(), Recall()], spans=True, coverage=True)
    assert {"decompose_spans", "match_spans"} <= {task.name for task in suite.needs}
    spans = assertion_spans(suite, rollouts, Judgments(answers, [None]), tokenizer)
    places = [[row.nonzero()[:, 0].tolist() for row in caption] for caption in spans.tokens[0]]
    assert places == [[[1], [2], []], [[1], [2], []], [[], [], []]]
    nan = [math.nan] * 3
    expected = torch.tensor([[1.0, 0.0, 0.0], nan, nan])
    torch.testing.assert_close(spans.verdicts[0, ..., 1], expected, equal_nan=True)
    assert spans.verdicts[..., 0].isnan().all()
    covering = torch.tensor([[1.0, 0.0, 1.0], nan, nan])
    torch.testing.assert_close(spans.verdicts[0, ..., 2], covering, equal_nan=True)
    torch.testing.assert_close(spans.located()[0, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert spans.located()[0, 1:].isnan().all()


@pytest.mark.parametrize("coverage", [False, True])
def test_a_run_credits_tokens_and_keeps_each_captions_advantage(
    fit_arguments, cli, tmp_path: Path, coverage: bool
) -> None:
    settings = {"model.lag": 1, "model.num_captions": 4, "model.advantage.kappa": 1.0}
    cli(fit_arguments(**SPAN_CREDIT, **settings, **{"model.advantage.coverage": coverage}))
    rows = [row for row in metrics(tmp_path / "run") if row.get("train/loss")]
    assert len(rows) == 2
    assert all(float(row["train/assertions_located"]) > 0.9 for row in rows)
    assert all(float(row["train/grad_norm"]) > 0 for row in rows)
    for file in sorted((tmp_path / "run/rollouts").glob("train-*")):
        table = pq.read_table(file).to_pydict()
        assert all(isinstance(text, str) for said in table["assertions"] for text in said)
        shaped = torch.tensor([table[f"shaped/{name}"] for name in NAMES], dtype=torch.float32)
        expected = cgdpo(shaped.T.reshape(-1, 4, 3), torch.ones(3)).flatten()
        torch.testing.assert_close(
            torch.tensor(table["advantage"], dtype=torch.float32), expected, atol=1e-4, rtol=1e-4
        )


def test_with_kappa_0_a_run_is_that_of_cgdpo(fit_arguments, cli, tmp_path: Path) -> None:
    shared = {"trainer.max_steps": 1, "data.val_size": 0}
    cli(fit_arguments(**shared, run_dir=tmp_path / "cgdpo"))
    cli(fit_arguments(**shared, **SPAN_CREDIT, **{"model.advantage.kappa": 0}, run_dir=tmp_path / "kappa_0"))
    ((one,), (other,)) = (
        [row for row in metrics(tmp_path / run) if row.get("train/loss")] for run in ("cgdpo", "kappa_0")
    )
    for name in ("train/loss", "train/grad_norm", "train/precision", "train/recall"):
        assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-7)


def test_what_it_needs_is_said_before_anything_is_paid(fit_arguments, cli) -> None:
    without = {"model.weights": "{recall: 1, linguistic: 1}", "model.advantage.kappa": 2}
    with pytest.raises(ConfigError) as caught:
        cli(fit_arguments(**SPAN_CREDIT, **without))
    problems = caught.value.problems
    assert any("model.advantage: SpanCredit gives credit by verdicts" in problem for problem in problems)
    assert any("model.advantage.init_args.kappa: 2" in problem for problem in problems)
    of_captions = {
        "model.advantage_transforms": "[balcap.algorithms.QGLAS]",
        "model.advantage.coverage": True,
    }
    without = {"model.weights": "{precision: 1, linguistic: 1}"}
    with pytest.raises(ConfigError) as caught:
        cli(fit_arguments(**SPAN_CREDIT, **of_captions, **without))
    text = "\n".join(caught.value.problems)
    assert "QGLAS changes advantages of captions, and SpanCredit gives those of tokens" in text
    assert "model.advantage.init_args.coverage: no reward with a weight says which assertions earn it" in text


def test_an_estimate_prices_the_words(fit_arguments, cli, capsys) -> None:
    settings = {"trainer.max_steps": 2, "model.advantage.coverage": True}
    cli(fit_arguments("estimate", **SPAN_CREDIT, **settings))
    lines = capsys.readouterr().out.split("\n")
    for task in ("decompose_spans", "match_spans"):
        spans = next(line.split("│") for line in lines if task in line)
        assert float(spans[3].replace(",", "")) > 0
        assert float(spans[5].replace(",", "")) > 0


@pytest.mark.parametrize("supervised", [True, False])
def test_supervised_fine_tuning_asks_for_no_words(supervised: bool) -> None:
    judged = {"rewards": [Precision(), Recall()], "weights": {"precision": 1.0, "recall": 1.0}}
    policy = PolicyConfig(str(ROOT / "assets/shapes-base"))
    module = BalCapModule(policy, advantage=SpanCredit(coverage=True), supervised=supervised, **judged)
    asked = {task.name for task in module.rewards.needs}
    assert {"decompose_spans", "match_spans"}.isdisjoint(asked) is supervised

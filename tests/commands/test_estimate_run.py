"""The estimate against what a run then spent, and all that it must not do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import litellm
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console

from balcap.cli import ConfigError
from balcap.commands.estimate_assumptions import Assumptions
from balcap.commands.estimate_run import Estimate
from tests.commands.conftest import Paid
from tests.support import ROOT, metrics

Run = Callable[[str, list[str]], None]
Figures = dict[str, tuple[float, float, float]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Estimate]:
    """The estimates of a test, in order."""
    all_made: list[Estimate] = []
    show = Estimate.show

    def shown(self: Estimate, console: Console) -> None:
        all_made.append(self)
        show(self, console)

    monkeypatch.setattr(Estimate, "show", shown)
    return all_made


class Untouchable(litellm.CustomLLM):
    """A judge that must not be asked."""

    def completion(self, *args: Any, **kwargs: Any) -> litellm.ModelResponse:
        raise AssertionError("an estimate asked the judge")

    async def acompletion(self, *args: Any, **kwargs: Any) -> litellm.ModelResponse:
        raise AssertionError("an estimate asked the judge")


@pytest.fixture
def estimated(run: Run, paid: Paid, tmp_path: Path, made: list[Estimate]) -> Callable[..., Estimate]:
    """The estimate of the run that was paid for, counted as its server counts, without what it left behind."""

    def estimate(*flags: str) -> Estimate:
        files = ["--run_dir", str(tmp_path / "run"), "--model.judge.cache", str(tmp_path / "cache.sqlite")]
        run("estimate", [*paid.arguments, *files, "--chars_per_token", "4", *flags])
        return made[-1]

    return estimate


def _figures(found: Estimate) -> Figures:
    return {task: tuple(figures[:3]) for (task, _), figures in found.used.items()}


def _sums(figures: Figures) -> list[float]:
    return [sum(row[column] for row in figures.values()) for column in range(3)]


def _measured(run: Path) -> list[str]:
    """Flags that say what the captions of a run were like."""
    rows = [row for file in run.glob("rollouts/*.parquet") for row in pq.read_table(file).to_pylist()]
    words = sum(len(row["caption"].split()) for row in rows)
    assertions = sum(len(row["assertions"]) for row in rows)
    return [f"--caption_words={round(words / len(rows))}", f"--words_per_assertion={words / assertions}"]


def test_the_estimate_is_within_a_fifth_of_what_the_run_spends(
    estimated: Callable[..., Estimate], paid: Paid
) -> None:
    found = estimated(*_measured(paid.run))
    figures = _figures(found)
    assert _sums(figures) == pytest.approx(_sums(paid.tasks), rel=0.2)
    assert found.used.total[3] == pytest.approx(paid.usd, rel=0.2)
    assert set(figures) == set(paid.tasks)
    for task, spent in paid.tasks.items():
        assert figures[task] == pytest.approx(spent, rel=0.25), task


def test_with_captions_as_long_as_references_answers_are_rather_over_than_underestimated(
    estimated: Callable[..., Estimate], paid: Paid
) -> None:
    found = estimated()
    calls, tokens_in, tokens_out = _sums(_figures(found))
    spent = _sums(paid.tasks)
    assert [calls, tokens_in] == pytest.approx(spent[:2], rel=0.2)
    assert tokens_in + tokens_out == pytest.approx(spent[1] + spent[2], rel=0.2)
    assert found.used.total[3] == pytest.approx(paid.usd, rel=0.2)
    # This world's captions are shorter and repeat themselves more than the references that stand for them.
    assert 0.9 * spent[2] < tokens_out < 1.4 * spent[2]


def test_steps_and_validations_are_those_of_the_run(estimated: Callable[..., Estimate], paid: Paid) -> None:
    found = estimated()
    rows = metrics(paid.run)
    assert found.plan.batches == len([row for row in rows if row["train/loss"]])
    assert len(found.plan.validations) == len([row for row in rows if row["val/recall"]])
    assert found.plan.validations == (0, 4, 6)
    assert found.plan.train_rows == 15
    assert found.uncertainty()[1] == 0  # all rows were sampled
    # 6 steps of 4 images and 4 captions; 3 validations of 4 images and 2 captions
    assert found.rollouts == 6 * 4 * 4 + 3 * 4 * 2


def test_the_config_of_a_run_folder_can_be_estimated(
    run: Run, paid: Paid, tmp_path: Path, made: list[Estimate]
) -> None:
    cache = ["--model.judge.cache", "null", "--run_dir", str(tmp_path / "run")]
    run("estimate", ["--config", str(paid.run / "config.yaml"), *cache])
    assert made[0].plan.batches == 6


def test_nothing_is_asked_and_nothing_is_written(
    run: Run, fit_arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model.judge.providers": f"{{shapes: {__name__}.Untouchable}}", "trainer.max_steps": 5}
    (tmp_path / "cache").mkdir()  # of the table of rows
    run("estimate", fit_arguments("fit", **options)[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    text = capsys.readouterr().out
    assert "nothing was paid" in text
    assert "--model.judge.prices" in text  # no price is known of this judge
    assert "unknown" in text


def test_prices_of_the_config_come_first_and_the_budget_is_compared(
    run: Run,
    fit_arguments: Callable[..., list[str]],
    made: list[Estimate],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prices = {
        "model.judge.prices": "{shapes/oracle: {input: 1000, output: 0}}",
        "model.judge.budget_usd": 0.5,
    }
    run("estimate", fit_arguments("fit", **prices, **{"trainer.max_steps": 50})[1:])
    total = made[0].used.total
    assert total[3] == pytest.approx(total[1] / 1000, rel=1e-3)
    assert re.search(r"budget_usd=0\.5 is spent at about step \d of 50", capsys.readouterr().out)


def test_units_in_the_rows_are_not_paid_for(
    run: Run, world: Path, fit_arguments: Callable[..., list[str]], tmp_path: Path, made: list[Estimate]
) -> None:
    rows = json.loads((world / "shapes.json").read_text())
    for row in rows:
        row["reference_units"] = ["There is a circle.", "The circle is red."]
    (tmp_path / "units.json").write_text(json.dumps(rows))
    for data in (world / "shapes.json", tmp_path / "units.json"):
        run("estimate", fit_arguments("fit", **{"data.data": data})[1:])
    calls = [_figures(found)["decompose"][0] for found in made]
    # 2 steps of 2 images, and 4 validation images: 8 references
    assert calls[0] - calls[1] == 8


def test_all_problems_are_reported_but_a_missing_key(
    run: Run, fit_arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    wrong = {
        "model.num_captions": 1,
        "data.image_root": "/no/such/folder",
        "trainer.max_steps": -1,
        "model.judge.model": "openai/gpt-4o-mini",
        "model.judge.retries": -1,
    }
    with pytest.raises(ConfigError) as refused:
        run("estimate", fit_arguments("fit", **wrong)[1:])
    keys = ("model.num_captions", "data.image_root", "trainer.max_steps", "model.judge.retries")
    assert len(refused.value.problems) == len(keys)
    for key in keys:
        assert key in str(refused.value), key
    assert not (tmp_path / "judge.sqlite").exists()


@pytest.mark.parametrize("flags", [["--rows", "0"], ["--overlap", "2"], ["--ranks", "0"]])
def test_a_flag_out_of_range_is_named(
    run: Run, fit_arguments: Callable[..., list[str]], flags: list[str]
) -> None:
    with pytest.raises(SystemExit, match=flags[0].removeprefix("--")):
        run("estimate", [*fit_arguments()[1:], *flags])


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A ShareGPT4V folder of twelve photographs of 640 x 480."""
    from sklearn.datasets import load_sample_images

    (tmp_path / "coco/train2017").mkdir(parents=True)
    picture = Image.fromarray(load_sample_images().images[0]).resize((640, 480))
    text = (
        "A temple with a curved roof of yellow tiles stands on a wide stone terrace under a clear blue sky. "
    )
    rows = []
    for number in range(12):
        name = f"coco/train2017/{number}.jpg"
        picture.save(tmp_path / name, quality=60 + number)
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text * 9}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_run_on_eight_gpus_is_estimated_without_one(
    run: Run,
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: list[Estimate],
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    local = ["--data.data", str(photographs / "rows.json"), "--data.image_root", str(photographs)]
    local += ["--data.cache_dir", str(photographs / "tables"), "--data.val_size", "8", "--rows", "2"]
    local += ["--model.judge.cache", str(photographs / "c.sqlite"), "--run_dir", str(photographs / "run")]
    overlay = str(ROOT / "configs/judge/gpt-4o-mini.yaml")
    configs = ["--config", str(ROOT / "configs/qwen7b.yaml"), "--config", overlay]
    run("estimate", [*configs, *local])
    text = capsys.readouterr().out
    for flag in fields(Assumptions):
        assert f"[--{flag.name}]" in text
    run("estimate", [*configs, *local, "--ranks", "8"])
    found = made[-1]
    wanted = yaml.safe_load((ROOT / "configs/qwen7b.yaml").read_text())
    assert found.plan.batches == wanted["trainer"]["max_steps"]
    assert found.plan.images_per_batch == 8 * wanted["data"]["batch_size"]
    assert found.rollouts == 1500 * 64 * 8 + 7 * 8
    assert any("tokens of an image: 14,167" in text for text, _ in found.assumptions)  # 2833 + 2 * 5667
    assert found.used["verify", "openai/gpt-4o-mini"][0] > 1000 * 64  # further visits ask again
    assert 0 < found.uncertainty()[3] < found.used.total[3]
    assert not (photographs / "run").exists()


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", "estimate", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "balcap.commands.estimate" in names
    assert not names & {"transformers", "litellm", "datasets"}
    for flag in ("--ranks", "--caption_words", "--run_dir", "--ckpt_path"):
        assert flag in done.stdout, flag

"""The estimate against what a run then spent, and all that it must not do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litellm
import pytest
import yaml
from PIL import Image

from balcap.cli import ConfigError
from tests.commands.conftest import Paid
from tests.support import ROOT, metrics

Run = Callable[[str, list[str]], None]
Figures = dict[str, tuple[float, float, float]]


class Untouchable(litellm.CustomLLM):
    """A judge that must not be asked."""

    def completion(self, *args: Any, **kwargs: Any) -> litellm.ModelResponse:
        raise AssertionError("an estimate asked the judge")

    async def acompletion(self, *args: Any, **kwargs: Any) -> litellm.ModelResponse:
        raise AssertionError("an estimate asked the judge")


def _estimate(run: Run, paid: Paid, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """The estimate of the run that was paid for, counted as its server counts, without what it left behind."""
    files = ["--run_dir", str(tmp_path / "run"), "--model.judge.cache", str(tmp_path / "cache.sqlite")]
    out = tmp_path / "estimate.json"
    run("estimate", [*paid.arguments, *files, "--chars_per_token", "4", "--json", str(out), *flags])
    return json.loads(out.read_text())


def _figures(data: dict[str, Any]) -> Figures:
    return {row["task"]: (row["calls"], row["tokens_in"], row["tokens_out"]) for row in data["tasks"]}


def _sums(figures: Figures) -> list[float]:
    return [sum(row[column] for row in figures.values()) for column in range(3)]


def test_the_estimate_is_within_a_fifth_of_what_the_run_spends(run: Run, paid: Paid, tmp_path: Path) -> None:
    data = _estimate(run, paid, tmp_path, "--sample_policy", "true")
    figures = _figures(data)
    assert _sums(figures) == pytest.approx(_sums(paid.tasks), rel=0.2)
    assert data["total"]["usd"] == pytest.approx(paid.usd, rel=0.2)
    assert set(figures) == set(paid.tasks)
    for task, spent in paid.tasks.items():
        assert figures[task] == pytest.approx(spent, rel=0.25), task


def test_the_policy_is_sampled_without_the_runs_servers(run: Run, paid: Paid, tmp_path: Path) -> None:
    server = ["--model.engine", "balcap.rollout.VLLMServer"]
    server += ["--model.engine.init_args.urls", '["http://127.0.0.1:9"]']
    data = _estimate(run, paid, tmp_path, "--sample_policy", "true", *server)
    assert _sums(_figures(data)) == pytest.approx(_sums(paid.tasks), rel=0.2)


def test_without_the_policy_answers_are_rather_over_than_underestimated(
    run: Run, paid: Paid, tmp_path: Path
) -> None:
    data = _estimate(run, paid, tmp_path)
    calls, tokens_in, tokens_out = _sums(_figures(data))
    spent = _sums(paid.tasks)
    assert [calls, tokens_in] == pytest.approx(spent[:2], rel=0.2)
    assert tokens_in + tokens_out == pytest.approx(spent[1] + spent[2], rel=0.2)
    assert data["total"]["usd"] == pytest.approx(paid.usd, rel=0.2)
    # This world's captions are shorter and repeat themselves more than the references that stand for them.
    assert 0.9 * spent[2] < tokens_out < 1.4 * spent[2]


def test_steps_and_validations_are_those_of_the_run(run: Run, paid: Paid, tmp_path: Path) -> None:
    data = _estimate(run, paid, tmp_path)
    rows = metrics(paid.run)
    assert data["batches"] == len([row for row in rows if row["train/loss"]])
    assert len(data["validations"]) == len([row for row in rows if row["val/recall"]])
    assert data["validations"] == [0, 4, 6]
    assert data["train_rows"] == 15
    assert data["uncertainty"]["tokens_in"] == 0  # all rows were sampled
    # 6 steps of 4 images and 4 captions; 3 validations of 4 images and 2 captions
    assert data["rollouts"] == 6 * 4 * 4 + 3 * 4 * 2


def test_the_config_of_a_run_folder_can_be_estimated(run: Run, paid: Paid, tmp_path: Path) -> None:
    out = tmp_path / "estimate.json"
    cache = ["--model.judge.cache", "null", "--run_dir", str(tmp_path / "run")]
    run("estimate", ["--config", str(paid.run / "config.yaml"), *cache, "--json", str(out)])
    assert json.loads(out.read_text())["batches"] == 6


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
    run: Run, fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    prices = {
        "model.judge.prices": "{shapes/oracle: {input: 1000, output: 0}}",
        "model.judge.budget_usd": 0.5,
    }
    out = tmp_path / "estimate.json"
    run("estimate", [*fit_arguments("fit", **prices, **{"trainer.max_steps": 50})[1:], "--json", str(out)])
    data = json.loads(out.read_text())
    assert data["total"]["usd"] == pytest.approx(data["total"]["tokens_in"] / 1000, rel=1e-3)
    assert 0 <= data["budget_spent_at_step"] < 50


def test_units_in_the_rows_are_not_paid_for(
    run: Run, world: Path, fit_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    rows = json.loads((world / "shapes.json").read_text())
    for row in rows:
        row["reference_units"] = ["There is a circle.", "The circle is red."]
    (tmp_path / "units.json").write_text(json.dumps(rows))
    calls = []
    for data in (world / "shapes.json", tmp_path / "units.json"):
        out = tmp_path / "estimate.json"
        run("estimate", [*fit_arguments("fit", **{"data.data": data})[1:], "--json", str(out)])
        calls.append(_figures(json.loads(out.read_text()))["decompose"][0])
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
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    local = ["--data.data", str(photographs / "rows.json"), "--data.image_root", str(photographs)]
    local += ["--data.cache_dir", str(photographs / "tables"), "--data.val_size", "8", "--rows", "2"]
    local += ["--model.judge.cache", str(photographs / "c.sqlite"), "--run_dir", str(photographs / "run")]
    out = photographs / "estimate.json"
    overlay = str(ROOT / "configs/judge/gpt-4o-mini.yaml")
    configs = ["--config", str(ROOT / "configs/qwen7b.yaml"), "--config", overlay]
    run("estimate", [*configs, *local, "--json", str(out)])
    text = capsys.readouterr().out
    assert "--ranks" in text
    run("estimate", [*configs, *local, "--json", str(out), "--ranks", "8"])
    data = json.loads(out.read_text())
    wanted = yaml.safe_load((ROOT / "configs/qwen7b.yaml").read_text())
    assert data["batches"] == wanted["trainer"]["max_steps"]
    assert data["images_per_batch"] == 8 * wanted["data"]["batch_size"]
    assert data["rollouts"] == 1500 * 64 * 8 + 7 * 8
    assert any("14,167 tokens" in note["text"] for note in data["assumptions"])  # 2833 + 2 * 5667
    assert 0 < data["uncertainty"]["usd"] < data["total"]["usd"]
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
    for flag in ("--ranks", "--sample_policy", "--json", "--run_dir", "--ckpt_path"):
        assert flag in done.stdout, flag

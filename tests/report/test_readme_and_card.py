"""The README of a run folder and the model card of its export, from files as a run leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_eval_result, metadata_load

from balcap.report.markdown import hub_id, public_name, table
from balcap.report.model_card import write_model_card
from balcap.report.readme import write_readme
from balcap.report.run import Run
from balcap.utils.errors import UserError

CAPTION = "A caption | that nobody publishes."
SETTINGS = {
    "seed_everything": 3,
    "trainer": {"max_steps": 20},
    "model": {
        "policy": {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "lora": None, "freeze_vision": True},
        "judge": {"class_path": "balcap.judge.Judge", "init_args": {"model": "openai/gpt-4o-mini"}},
        "weights": {"precision": 1.0},
        "sampling": {"max_tokens": 77},
        "num_captions": 8,
    },
    "data": {"data": "Lin-Chen/ShareGPT4V", "name": "ShareGPT4V", "batch_size": 16},
}


def validation(run: Path, step: int, precision: list[float]) -> None:
    rows = [
        {"sample_id": f"{image}.png", "caption": CAPTION, "step": step, "length": 10, "reference_length": 20,
         "reward/precision": value}
        for image, value in enumerate(precision)
    ]  # fmt: skip
    (run / "rollouts").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), run / f"rollouts/val-{step:08d}-rank0-000000.parquet")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with settings, metrics, two validations, a benchmark and an export of all weights."""
    run = tmp_path / "mine"
    (run / "export").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (run / "metrics.csv").write_text("step,train/reward_std/precision\n20,0.1\n")
    validation(run, 0, [0.25, 0.5])
    validation(run, 20, [0.75, 1.0])
    of_judge = {"low": 47.0, "high": 51.5, "n": 200, "judge": "openai/gpt-4o-mini"}
    scores = {"DCScore": {"score": 49.26, **of_judge}, "Prism": {**of_judge, "score": None, "n": 0}}
    (run / "benchmarks.json").write_text(json.dumps(scores))
    (run / "export/model.safetensors").touch()
    return run


def test_a_readme_says_what_came_of_the_run_and_how_to_go_on(run: Path) -> None:
    path = write_readme(Run.read(run))
    text = path.read_text()
    assert path == run / "README.md"
    assert "| policy | Qwen/Qwen2.5-VL-7B-Instruct |" in text
    # before: (0.25 + 0.5) / 2; after: (0.75 + 1) / 2; each image gained 0.5. Of two images the interval is their range.
    assert "| precision | 0.375 [0.250, 0.500] | 0.875 [0.750, 1.000] | +0.500 [0.500, 0.500] | 2 |" in text
    assert "| DCScore | 49.3 [47.0, 51.5] | 200 | openai/gpt-4o-mini |" in text
    assert "Prism" not in text  # it has no score
    assert f'AutoModelForImageTextToText.from_pretrained("{run}/export", dtype="auto")' in text
    assert "max_new_tokens=77" in text
    assert f"--config {run}/config.yaml --run_dir {run} --ckpt_path last" in text
    assert "| `metrics.csv` | all metrics by optimizer steps |" in text
    assert "tensorboard" not in text  # it is not there
    assert "All settings are in [config.yaml]" in text
    assert "nobody publishes" not in text


def test_settings_that_differ_from_the_defaults_are_listed(run: Path) -> None:
    changed = {"model": {"advantage": {"class_path": "a.B", "init_args": {"eps": 0.1}}, "kl_coef": "a|b"}}
    (run / "config.changed.yaml").write_text(yaml.safe_dump(changed))
    text = write_readme(Run.read(run)).read_text()
    assert "| `model.advantage.eps` | 0.1 |" in text
    assert "| `model.kl_coef` | a\\|b |" in text
    assert "All settings are in" not in text


def test_a_run_that_went_on_is_repeated_from_its_beginning(run: Path) -> None:
    assert "--run_dir runs/again   # again" in write_readme(Run.read(run)).read_text()
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"ckpt_path": "last", "resume": "auto"}))
    text = write_readme(Run.read(run)).read_text()
    assert "--run_dir runs/again --ckpt_path null --resume null   # again" in text
    assert "--ckpt_path last --resume null   # go on" in text


def test_a_run_of_which_little_is_left_has_a_readme(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n3,0.5\n")
    text = write_readme(Run.read(tmp_path)).read_text()
    assert "| optimizer steps | 3 |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Files"]
    with pytest.raises(UserError, match="there is no run in it"):
        Run.read(tmp_path / "none")


def test_a_model_card_is_read_back_as_it_was_meant(run: Path) -> None:
    path = write_model_card(Run.read(run), run / "export")
    card = ModelCard.load(path)
    assert path == run / "export/README.md"
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert card.data.datasets == "Lin-Chen/ShareGPT4V"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.license is None
    assert card.data.model_name == "Qwen2.5-VL-7B-Instruct-balcap"
    found = {
        (result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results
    }
    assert found == {
        ("Lin-Chen/ShareGPT4V", "precision"): 0.875,
        ("Lin-Chen/ShareGPT4V", "length_ratio"): 0.5,
        ("dcscore", "DCScore"): 49.26,
    }
    (index,) = metadata_load(path)["model-index"]
    expected = metadata_eval_result(
        model_pretty_name="Qwen2.5-VL-7B-Instruct-balcap",
        task_pretty_name="",
        task_id="image-text-to-text",
        metrics_pretty_name="DCScore, judged by openai/gpt-4o-mini",
        metrics_id="DCScore",
        metrics_value=49.26,
        dataset_pretty_name="DCScore",
        dataset_id="dcscore",
    )
    result = expected["model-index"][0]["results"][0]
    del result["task"]["name"], result["metrics"][0]["verified"]
    assert index["results"][1] == result
    assert "+0.500 [0.500, 0.500]" in card.text
    assert "nobody publishes" not in card.text
    assert str(card) == path.read_text()


def test_a_card_of_an_adapter_names_peft_and_the_base(run: Path) -> None:
    adapter = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}
    (run / "export/adapter_config.json").write_text(json.dumps(adapter))
    card = ModelCard.load(write_model_card(Run.read(run), run / "export"))
    assert (card.data.base_model, card.data.library_name) == ("Qwen/Qwen2.5-VL-3B-Instruct", "peft")
    assert "lora" in card.data.tags
    assert 'model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct"' in card.text
    assert 'PeftModel.from_pretrained(model, "OWNER/Qwen2.5-VL-3B-Instruct-balcap")' in card.text


def test_a_card_names_no_place_on_this_machine_and_no_secret(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_TOKEN", "planted-token-1234")
    base, data = run.parent / "models/base-7b", run.parent / "rows.json"
    base.mkdir(parents=True)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["policy"]["model"] = str(base)
    settings["model"]["judge"]["init_args"]["model"] = f"hosted_vllm/{base}"
    settings["model"]["advantage"] = {"class_path": "mine.planted-token-1234"}
    settings["data"]["data"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "export/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    text = write_model_card(Run.read(run), run / "export").read_text()
    assert str(run.parent) not in text
    assert "planted-token" not in text
    data_of_card = ModelCard.load(run / "export/README.md").data
    assert (data_of_card.base_model, data_of_card.datasets) == (None, None)
    assert "precision, judged by base-7b" in text
    assert "held-out images of rows" in text
    assert "planted-token" not in write_readme(Run.read(run)).read_text()


def test_a_card_without_results_is_a_card(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "export").mkdir()
    card = ModelCard.load(write_model_card(Run.read(tmp_path), tmp_path / "export"))
    assert card.data.eval_results is None
    assert "## Results" not in card.text


def test_names_that_may_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("assets/base").mkdir(parents=True)
    assert [hub_id(name) for name in ("a/b", "a", "a/b/c", "data/my.json", "/a/b", "assets/base", "")] == [
        "a/b", None, None, None, None, None, None,
    ]  # fmt: skip
    names = {
        "openai/gpt-4o-mini": "openai/gpt-4o-mini",
        "openrouter/a/b": "openrouter/a/b",
        "hosted_vllm//models/b": "b",
        "~/models/b": "b",
        "assets/base": "base",
    }
    assert {name: public_name(name) for name in names} == names


def test_a_table_keeps_what_stands_in_its_cells() -> None:
    assert table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |"
    assert table(["a", "b"], []) == ""


def test_a_supervised_run_is_not_called_reinforcement_learning(run: Path) -> None:
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "supervised": True, "kl_coef": 0.0}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    text = write_model_card(Run.read(run), run / "export").read_text()
    assert "sft" in metadata_load(run / "export/README.md")["tags"]
    assert "| algorithm | supervised, on the references |" in text
    assert "| images × captions a step | 16 × 1 per rank |" in text
    assert "trained on reference captions, supervised." in text
    assert not any(word in text for word in ("reinforcement", "grpo", "KL coefficient", "| rewards |"))


@pytest.mark.parametrize(
    ("weights", "advantage", "says"),
    [
        (["precision", "recall", "linguistic"], None, "with c-GDPO (BalCapRL, arXiv 2605.07394)."),
        (["precision", "recall", "linguistic"], "balcap.algorithms.GRPO", "recall with GRPO."),
        (["caprl"], None, "by reinforcement learning on caprl with c-GDPO."),
    ],
)
def test_a_method_is_called_by_its_name(
    run: Path, weights: list[str], advantage: str | None, says: str
) -> None:
    model = {**SETTINGS["model"], "weights": dict.fromkeys(weights, 1.0)}
    if advantage:
        model["advantage"] = {"class_path": advantage}
    (run / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": model}))
    assert says in write_readme(Run.read(run)).read_text()
    assert says in write_model_card(Run.read(run), run / "export").read_text()

"""Every overlay in configs/judge is a judge, on top of any other."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from balcap.judge import Judge, TaskModel

FOLDER = Path(__file__).parents[2] / "configs" / "judge"
OVERLAYS = sorted(FOLDER.glob("*.yaml"))
BASE = """
model:
  judge:
    model: base/model
    providers: {base: some.Class}
    per_task: {rate: {model: base/other}}
    params: {temperature: 0.7, api_base: "http://base"}
    concurrency: 7
"""


class Module:
    def __init__(self, judge: Judge):
        self.judge = judge


def parse(*arguments: str) -> Judge:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Module, "model")
    return parser.instantiate_classes(parser.parse_args(list(arguments))).model.judge


def test_there_are_overlays():
    names = {path.stem for path in OVERLAYS}
    assert names == {"oracle", "gpt-4o-mini", "gpt-5-mini", "gpt-5.4", "local-vllm"}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_replaces_all_that_belongs_to_the_model(path, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(BASE)
    judge = parse("--config", str(base), "--config", str(path))
    alone = parse("--config", str(path))
    assert judge.concurrency == 7
    assert judge.model == alone.model != "base/model"
    assert judge.params == alone.params
    assert judge.providers == alone.providers
    assert judge.per_task == alone.per_task == {}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_needs_at_most_its_key(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-0123")
    judge = parse("--config", str(path))
    if not judge.providers:  # the provider of the oracle is tested where it lives
        assert judge.problems() == []
    assert "temperature" not in judge.params or "gpt-5" not in judge.model


def test_one_parameter_from_the_command_line():
    path = FOLDER / "local-vllm.yaml"
    judge = parse("--config", str(path), "--model.judge.params.api_base", "http://host:1/v1")
    assert judge.params == {"api_base": "http://host:1/v1", "temperature": 0, "max_tokens": 4096}


def test_tasks_may_have_their_own_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default cache is made
    base = tmp_path / "base.yaml"
    base.write_text(BASE)
    judge = parse("--config", str(base))
    assert judge.per_task == {"rate": TaskModel(model="base/other")}
    assert judge.problems() == ["model.judge.providers.base: cannot load some.Class: No module named 'some'"]

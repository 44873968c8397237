"""Every overlay in configs/judge is a whole judge, whatever stands before it."""

from __future__ import annotations

import re
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace

from balcap.cli import BalCapCLI, ConfigFile
from balcap.judge import Judge, JudgeSettings, TaskModel
from balcap.judge.client import Deployment
from balcap.judge.models import end_of, import_litellm
from balcap.module import BalCapModule
from balcap.policy import PolicyConfig
from balcap.rewards import Precision
from balcap.utils.redact import secret_problems

FOLDER = Path(__file__).parents[2] / "configs" / "judge"
OVERLAYS = sorted(FOLDER.glob("*.yaml"))
BASE = """
model:
  judge:
    model: base/model
    deployments: [{model: base/model, rpm: 7}]
    fallbacks: [{model: base/other}]
    providers: {base: some.Class}
    per_task: {rate: {model: base/other}}
    params: {temperature: 0.7, api_base: "http://base"}
    prices: {base/model: {input: 1, output: 2}}
    images: {detail: high, max_side: 512}
    concurrency: 7
    budget_usd: 20
"""
each_overlay = pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)


class Module:
    def __init__(self, judge: Judge):
        self.judge = judge


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ConfigFile)
    parser.add_class_arguments(Module, "model")
    return parser


def parsed(*arguments: str) -> Namespace:
    return parser().parse_args(list(arguments)).model.judge


def parse(*arguments: str) -> JudgeSettings:
    return parser().instantiate_classes(parser().parse_args(list(arguments))).model.judge.settings


def models(judge: JudgeSettings) -> set[str]:
    """All that may be asked."""
    others = [*(judge.deployments or ()), *(judge.fallbacks or ()), *(judge.per_task or {}).values()]
    return {judge.model} | {other.model for other in others if other.model}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The keys of all overlays, and an empty folder, where the default cache is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-0123")
    monkeypatch.setenv("OPENROUTER_API_KEY", "planted-key-4567")


def test_there_are_overlays():
    names = {path.stem for path in OVERLAYS}
    judges = {"gpt-4o-mini", "gpt-5-mini", "gpt-5.4", "gpt-6-luna", "local-vllm", "oracle"}
    assert names == judges | {"mixed", "fallback"}


class ParsedOnly(BalCapCLI):
    """The command line, as far as its config."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@each_overlay
def test_an_overlay_replaces_the_judge_of_the_configs_before_it(path, tmp_path):
    before = tmp_path / "before.yaml"
    before.write_text(BASE)
    configs = [FOLDER.parent / "shapes.yaml", before, path]
    flags = [flag for config in configs for flag in ("--config", str(config))]
    config = ParsedOnly(args=["fit", *flags, "--run_dir", str(tmp_path)]).config.fit
    judge, alone = config.model.judge.init_args.as_dict(), parsed("--config", str(path)).init_args.as_dict()
    assert judge.pop("ledger") == str(tmp_path / "judge_ledger.sqlite")  # belongs to the run
    assert alone.pop("ledger") is None
    assert judge == alone
    assert config.model.kl_coef == 0.005  # of shapes.yaml, as everything else


def test_a_config_without_a_model_and_flags_change_the_judge_before_them(tmp_path):
    base, change = tmp_path / "base.yaml", tmp_path / "change.yaml"
    base.write_text(BASE)
    change.write_text("model: {judge: {budget_usd: 5, params: {seed: 1}}}")
    judge = parse(
        "--config", str(base), "--config", str(change), "--model.judge.model", "x/y",
        "--model.judge.params.temperature", "0.1", "--config", "{}",
    )  # fmt: skip
    assert (judge.model, judge.budget_usd, judge.concurrency) == ("x/y", 5, 7)
    assert judge.params == {"temperature": 0.1, "seed": 1}  # a config replaces a mapping, a flag adds to it


def test_a_saved_config_replaces_the_judge_too(tmp_path):
    base, saved = tmp_path / "base.yaml", tmp_path / "saved.yaml"
    base.write_text(BASE)
    saved.write_text("model: {judge: {class_path: balcap.judge.Judge, init_args: {model: x/y}}}")
    assert parse("--config", str(base), "--config", str(saved)) == JudgeSettings("x/y")


@each_overlay
def test_overlay_needs_at_most_its_keys(path, keys):
    judge = parse("--config", str(path), "--model.judge.budget_usd", "5")
    assert judge.problems() == []  # with a budget: every price is known


@each_overlay
def test_overlay_names_the_keys_that_it_needs(path, keys, monkeypatch):
    judge, text = parse("--config", str(path)), path.read_text()
    for name in ("OPENAI_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.delenv(name)
        needed = any(name in problem for problem in judge.problems())
        assert needed == (name in text)
        monkeypatch.setenv(name, "planted-key-0123")


@each_overlay
def test_reasoning_models_get_no_temperature(path):
    judge = parse("--config", str(path))
    asked = [
        (judge.model, judge.params or {}),
        *((o.model, o.params) for o in (judge.per_task or {}).values()),
    ]
    for model, params in asked:
        assert "temperature" not in params or not re.search("gpt-[56]", model)


@each_overlay
def test_prices_in_the_comments_are_those_that_runs_are_billed_by(path):
    judge, litellm = parse("--config", str(path)), import_litellm()
    text = " ".join(path.read_text().replace("#", " ").split())
    stated = {}
    for part in text.split("Price: ")[1:]:
        if prices := re.match(r"(\S+) \$([\d.]+) in / \$([\d.]+) out per 1M tokens", part):
            cached = re.search(
                r"\$([\d.]+) in from the prefix cache \(from litellm's price table, 2026", part
            )
            stated[prices[1]] = [float(price) for price in (prices[2], prices[3], cached[1])]
    assert set(stated) == models(judge) - set(judge.prices or ()) - {"shapes/oracle"}
    names = ("input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost")
    for model, prices in stated.items():
        listed = litellm.get_model_info(model)
        assert prices == pytest.approx([1e6 * listed[name] for name in names])


@each_overlay
def test_overlay_holds_no_secret_and_says_how_to_start_it(path):
    text = path.read_text()
    assert secret_problems(yaml.safe_load(text), path.stem) == []
    assert f"--config configs/judge/{path.name}" in text


def test_mixed_sends_only_images_to_the_model_that_sees():
    judge = parse("--config", str(FOLDER / "mixed.yaml"))
    assert set(judge.per_task) == {"verify"}
    assert judge.per_task["verify"].model != judge.model


def test_fallback_has_two_providers():
    judge = parse("--config", str(FOLDER / "fallback.yaml"))
    assert judge.deployments == [Deployment("openai/gpt-4o-mini", rpm=500)]
    assert [other.model.split("/")[0] for other in judge.fallbacks] == ["openrouter"]


def test_one_parameter_from_the_command_line():
    path = FOLDER / "local-vllm.yaml"
    judge = parse("--config", str(path), "--model.judge.params.api_base", "http://host:1/v1")
    assert judge.params == {"api_base": "http://host:1/v1", "temperature": 0, "max_tokens": 4096}


def test_tasks_may_have_their_own_model(keys, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(BASE)
    judge = parse("--config", str(base))
    assert judge.per_task == {"rate": TaskModel(model="base/other")}
    assert judge.problems() == ["model.judge.providers.base: cannot load some.Class: No module named 'some'"]


@each_overlay
def test_overlays_say_when_their_models_end(path):
    ends = {end_of(model) for model in models(parse("--config", str(path)))} - {None}
    stated = re.findall(r"retires on (\d{4}-\d\d-\d\d)", path.read_text())
    assert {str(end) for end in ends} == set(stated)


def test_a_judge_that_ends_soon_is_named():
    judge = parse("--config", str(FOLDER / "gpt-5-mini.yaml"))
    end = end_of("openai/gpt-5-mini")
    assert judge.endings("take another", today=end - timedelta(days=31)) == []
    (line,) = judge.endings("take another", today=end - timedelta(days=30))
    assert line == f"judge: openai/gpt-5-mini ends on {end}, in 30 days (by litellm's table); take another"
    for day in (end, end + timedelta(days=400)):
        (line,) = judge.endings("take another", today=day)
        assert f"openai/gpt-5-mini ended on {end}" in line


def test_every_model_of_a_judge_may_end_and_unknown_ones_never():
    judge = JudgeSettings(
        "openai/gpt-6-luna",
        deployments=[Deployment("openai/gpt-5-mini"), Deployment("azure/of-mine")],
        fallbacks=[TaskModel("openai/gpt-4o-mini"), TaskModel(params={})],
        per_task={"rate": TaskModel("openai/gpt-5-mini"), "verify": TaskModel("shapes/gpt-4o-mini")},
        providers={"shapes": "examples.shapes.oracle.Oracle"},
    )
    lines = judge.endings("", today=date(2030, 1, 1))
    assert [line.split()[1] for line in lines] == ["openai/gpt-5-mini", "openai/gpt-4o-mini"]
    assert JudgeSettings("openai/gpt-6-luna").endings("", today=date(2030, 1, 1)) == []


def test_a_run_shares_the_limits_of_its_judge_among_its_ranks():
    judge = Judge("openai/gpt-5-mini", cache=None, concurrency=12)
    module = BalCapModule(PolicyConfig("some/model"), [Precision()], {"precision": 1.0}, judge)
    module._trainer = SimpleNamespace(world_size=4, num_nodes=2)
    module.setup("predict")
    assert judge.limits.slots == 3


def test_a_run_says_it_once_at_its_start(monkeypatch, caplog):
    end = date.today() + timedelta(days=9)
    monkeypatch.setattr("balcap.judge.models.end_of", lambda model: end)
    module = BalCapModule(
        PolicyConfig("some/model"), [Precision()], {"precision": 1.0}, Judge("openai/gpt-5-mini", cache=None)
    )
    with caplog.at_level("INFO"):
        module.setup("predict")  # asks no judge
        assert not any("ends on" in line for line in caplog.messages)
        module.setup("validate")
    (line,) = [line for line in caplog.messages if "ends on" in line]
    assert f"openai/gpt-5-mini ends on {end}, in 9 days" in line
    assert "--config configs/judge/gpt-6-luna.yaml" in line
    assert (FOLDER / "gpt-6-luna.yaml").is_file()

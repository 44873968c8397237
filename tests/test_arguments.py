"""What a command line says of a config: what in it is not as by default, and where it is wrong."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from balcap.cli import BalCapCLI
from balcap.config import ConfigError
from balcap.utils.errors import next_line
from main import COMMANDS, RUNS
from tests.support import ROOT

CONFIGS = sorted(
    path for path in ROOT.glob("configs/*.yaml") if not path.stem.startswith(("recaption", "annotate"))
)
OVERLAYS = sorted([*ROOT.glob("configs/judge/*.yaml"), *ROOT.glob("configs/engine/*.yaml")])
SHAPES = str(ROOT / "configs/shapes.yaml")


class Parsed(BalCapCLI):
    """Reads a config, and stops there."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture
def printed(cli, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """What a command prints that ends with status 0."""

    def run(args: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(args)
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def parser() -> Any:
    """That of ``fit``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Parsed(["fit", "--config", SHAPES])._subcommand_parsers["fit"]


def resolved(parser: Any, *configs: Path) -> Any:
    """All settings; where they are from is not among them."""
    return parser.parse_args([word for path in configs for word in ("--config", str(path))]).clone(
        with_meta=False
    )


@pytest.mark.parametrize(
    "configs", [*((p,) for p in CONFIGS), *((CONFIGS[0], p) for p in OVERLAYS)], ids=lambda ps: ps[-1].stem
)
def test_what_changed_is_the_same_config(configs: tuple[Path, ...], parser: Any, tmp_path: Path) -> None:
    config = resolved(parser, *configs)
    text = parser.dump(config, skip_unset=False, skip_default=True)
    (tmp_path / "changed.yaml").write_text(text)
    again = resolved(parser, tmp_path / "changed.yaml")
    for one in (config, again):
        one.pop("config")
    assert again == config
    content = yaml.safe_load(text)
    assert not {"seed", "run_dir"} & {*content["model"], *content["data"]}  # they are linked
    assert "ledger" not in content["model"]["judge"]["init_args"]
    assert "dropout" not in (content["model"]["policy"].get("lora") or {})
    assert content["model"]["rewards"][0] == {"class_path": "balcap.rewards.Precision"}


@pytest.mark.parametrize("command", ["fit", "check", "plan", "estimate", "validate", "predict", "test"])
def test_changed_prints_it_for_every_subcommand(command: str, printed) -> None:
    text = printed([command, "--config", SHAPES, "--changed", "--data.batch_size", "3"])
    assert yaml.safe_load(text)["data"]["batch_size"] == 3
    assert "lag" not in yaml.safe_load(text)["model"]


def test_changed_goes_with_print_config_in_any_order(printed) -> None:
    config = ["--config", SHAPES]
    first = printed(["fit", "--changed", *config, "--print_config"])
    assert printed(["fit", "--print_config", *config, "--changed"]) == first
    assert len(printed(["fit", *config, "--print_config"])) > 2 * len(first)
    recaption = ["recaption", "--config", str(ROOT / "configs/recaption.yaml"), "--changed"]
    assert "retries" not in printed(recaption)


@pytest.mark.parametrize(
    ("text", "says", "then"),
    [
        ("model: {polcy: {model: x}}", "model.polcy. Is it model.policy?", "--help"),
        ("model: {policy: {modle: x}}", "model.policy.modle. Is it model.policy.model?", "--help"),
        (
            "model: {policy: {lora: {rank: 3}}}",
            "model.policy.lora.rank. Is it model.policy.lora.r?",
            "--model.policy.lora.help",
        ),
        (
            "model: {rewards: [{class_path: balcap.rewards.Precision, init_args: {pointible: true}}]}",
            "Is it model.rewards[0].init_args.pointable?",
            "--model.rewards.help balcap.rewards.Precision",
        ),
        (
            "model: {judge: {model: openai/gpt-6-luna, timout_s: 3}}",
            "Is it model.judge.timeout_s?",
            "--model.judge.help",
        ),
        (
            "model: {judge: {budgetusd: 3}}",
            "Is it model.judge.budget_usd?",
            "--model.judge.help balcap.judge.Judge",
        ),
        (
            "model: {judge: {model: a/b, per_task: {rate: {parms: {}}}}}",
            "Is it model.judge.per_task.rate.params?",
            "--model.judge.help",
        ),
        (
            "model: {engine: {class_path: balcap.rollout.vllm_or_hf, init_args: {max_sequence: 3}}}",
            "Is it model.engine.init_args.max_sequences?",
            "--help",
        ),
        (
            "model: {optimizer: {init_args: {lrr: 3}}}",
            "init_args.lr?",
            "--model.optimizer.help torch.optim.AdamW",
        ),
        ("{batch_size: 3}", "batch_size. Is it data.batch_size?", "--help"),
        (
            "model: {policy: {lora: {beauty: 3}}}",
            "there are alpha, dropout, r, target_modules",
            "--model.policy.lora.help",
        ),
        ("model: [", "is no YAML", "--help"),
    ],
)
def test_an_unknown_key_of_a_file_is_named_with_its_neighbour(
    text: str, says: str, then: str, parser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", SHAPES, "--config", str(path)])
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"Error: {path}")
    assert says in lines[0]
    assert last == f"Next: python main.py fit {then}"


def test_what_may_be_anything_may_hold_any_keys(parser: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {judge: {params: {noise: {flip: 0.1}}}}")
    config = parser.parse_args(["--config", SHAPES, "--config", str(path)])
    assert config.model.judge.init_args.params == {"noise": {"flip": 0.1}}


@pytest.mark.parametrize(
    ("flags", "says", "then"),
    [
        (["--model.polcy.model=x"], "Is it model.policy.model?", "--help"),
        (
            ["--model.policy.lora.rank=3"],
            "Is it model.policy.lora.r?",
            "--model.policy.lora.help balcap.policy.LoraSettings",
        ),
        (
            ["--model.judge.timout_s=3"],
            "Is it model.judge.timeout_s?",
            "--model.judge.help balcap.judge.Judge",
        ),
        (
            ["--model.optimizer.lrr=1"],
            "Is it model.optimizer.lr?",
            "--model.optimizer.help torch.optim.AdamW",
        ),
        (["--config", "configs/qwen3vl_4b.yaml"], "no such file. Is it configs/qwen3vl-4b.yaml?", "--help"),
        (["--model.advantage", "balcap.algorithms.CGDP"], "Is it balcap.algorithms.CGDPO?", "--help"),
    ],
)
def test_an_unknown_flag_is_named_with_its_neighbour(
    flags: list[str], says: str, then: str, parser: Any, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", SHAPES, *flags])
    text = capsys.readouterr().err
    assert says in text
    assert text.splitlines()[-1] == f"Next: python main.py fit {then}"


def test_every_help_that_an_error_names_exists(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        "--model.policy.lora.help",
        "--model.judge.help",
        "--model.judge.help balcap.judge.Judge",
        "--model.rewards.help balcap.rewards.Precision",
        "--model.optimizer.help torch.optim.AdamW",
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(flags.split())
        assert end.value.code in (0, None), flags


@pytest.mark.parametrize(
    ("word", "found"), [("trian", "fit"), ("reprot", "report"), ("valdate", "validate"), ("xyz", None)]
)
def test_an_unknown_command_is_answered_with_all_commands(word: str, found: str | None, cli, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli([word, "--config", SHAPES])
    assert end.value.code == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"Error: there is no command {word}." + (f" Is it {found}?" if found else "")
    assert last == f"Next: python main.py {found or '<command>'} --help"


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_every_command_is_listed_with_a_line(
    args: list[str], cli, capsys: pytest.CaptureFixture[str]
) -> None:
    cli(args)
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == [*RUNS, *COMMANDS]
    assert set(RUNS) == set(BalCapCLI.subcommands())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("problems", "then"),
    [
        (["run_dir: a holds a run already; continue it with b"], "python main.py fit -c x --resume auto"),
        (["run_dir: a holds a run already, not that of b"], "python main.py fit -c x --run_dir FOLDER"),
        (
            ["data.image_root is required: b", "model.judge.model: a needs in the environment: A, B"],
            "export A=...; export B=...; python main.py fit -c x --data.image_root FOLDER",
        ),
        (["model.lag: 3"], "python main.py fit -c x --changed"),
        (
            ["model.policy.model: runs/a/export is no folder of an HF model"],
            "python main.py fit --config runs/a/config.yaml --ckpt_path last",
        ),
    ],
)
def test_a_refused_config_ends_with_the_command_that_gets_on(problems: list[str], then: str) -> None:
    assert str(ConfigError(problems, ["fit", "-c", "x"])).splitlines()[-1] == f"Next: {then}"


def test_a_checkpoint_that_is_not_there_is_answered_with_a_start() -> None:
    given = ["fit", "--ckpt_path", "last", "-c", "x"]
    problem = "ckpt_path: there is no checkpoint in a; start with --resume auto, which needs none"
    assert next_line(given, [problem]) == "\nNext: python main.py fit -c x --resume auto"
    assert next_line(given, ["something else"]) == ""


def test_other_commands_answer_alike(tmp_path: Path, cli, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("judge: {model: a/b, retires: 3}")
    with pytest.raises(SystemExit):
        cli(["recaption", "--config", str(tmp_path / "mine.yaml")])
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("mine.yaml: there is no setting judge.retires. Is it judge.retries?")
    assert last == "Next: python main.py recaption --judge.help"
    with pytest.raises(SystemExit):
        cli(["export", "--model.policy.modl", "x", "--out", "y"])
    assert "Is it model.policy.model?" in capsys.readouterr().err


def test_every_config_is_in_the_index_of_the_readme_with_what_it_says() -> None:
    index = (ROOT / "README.md").read_text().partition("## Which config")[2].partition("\n## ")[0]
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml")}
    assert set(re.findall(r"\]\((configs/[^)]+)\)", index)) == there
    prices = {
        "gpt-6-luna": "0.10 / 0.50",
        "gpt-4o-mini": "0.15 / 0.60",
        "gpt-5-mini": "0.25 / 2.00",
        "gpt-5.4": "2.50 / 15.00",
    }
    for judge, price in prices.items():
        into, out = price.split(" / ")
        assert f"${into} in / ${out} out" in (ROOT / f"configs/judge/{judge}.yaml").read_text()
        assert re.search(rf"^\| {price}.*judge/{judge}.yaml", index, re.MULTILINE), judge

"""``init``: what it writes parses, passes ``check`` on a tiny model and can be estimated; what it asks is checked."""

from __future__ import annotations

import io
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from balcap.cli import BalCapCLI
from balcap.commands.init_config import COMMENTS, CONFIGS, HARDWARE, judges

JUDGES = ("gpt-6-luna", "gpt-5.4", "local-vllm", "oracle", "anthropic/claude-haiku-4-5")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _nobody_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def write(world: Path, folders: dict[str, Path], tmp_path: Path, cli) -> Callable[..., Path]:
    """`write(hardware="16gb", …)`: the file that init writes for a tiny Qwen on the small world."""

    def write(**answers: str) -> Path:
        out = tmp_path / "my.yaml"
        given = {
            "model": folders["qwen"],
            "data": world / "shapes.json",
            "hardware": "80gb",
            "out": out,
        } | answers
        cli(["init", "--force", *(f"--{name}={value}" for name, value in given.items())])
        return out

    return write


@pytest.fixture(scope="module")
def parser() -> Any:
    """That of ``fit``."""

    class Parsed(BalCapCLI):
        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Parsed(["fit", "--config", str(CONFIGS / "shapes.yaml")])._subcommand_parsers["fit"]


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_file_parses_and_says_why(hardware: str, write, parser: Any) -> None:
    base = yaml.safe_load((CONFIGS / f"{HARDWARE[hardware].config}.yaml").read_text())
    for judge in JUDGES:
        path = write(hardware=hardware, judge=judge, budget="7.5")
        text = path.read_text()
        config = parser.parse_args(["--config", str(path)])
        named = CONFIGS / f"judge/{judge}.yaml"
        overlay = yaml.safe_load(named.read_text())["model"]["judge"] if named.is_file() else {"model": judge}
        assert yaml.safe_load(text)["model"]["judge"].items() >= {**overlay, "budget_usd": 7.5}.items()
        assert config.model.judge.init_args.budget_usd == 7.5
        assert config.model.kl_coef == base["model"]["kl_coef"]
        assert config.model.policy.load_in_4bit == base["model"]["policy"].get("load_in_4bit", False)
        assert config.trainer.devices == base["trainer"].get("devices", "auto")
        assert len(re.findall("   # .", text)) > 8
    assert config.model.num_captions == {"16gb": 6, "24gb": 6, "48gb": 4}.get(hardware, 8)


def test_comments_are_about_settings_that_there_are(parser: Any) -> None:
    names = {*COMMENTS, *(name for one in HARDWARE.values() for name in (*one.comments, *one.changed))}
    dests = {action.dest for action in parser._actions}
    assert {name for name in names if name.partition(".init_args")[0] not in dests} == set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hardware", HARDWARE)
def test_what_is_written_passes_check_on_a_tiny_model(
    hardware: str, write, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(hardware=hardware, judge="gpt-6-luna")
    here = [
        "--trainer.accelerator",
        "cpu",
        "--model.policy.dtype",
        "float32",
        "--model.policy.load_in_4bit",
        "false",
    ]
    here += ["--model.sampling.max_tokens", "8", "--data.cache_dir", str(tmp_path / "cache")]
    run("check", ["--config", str(path), "--images", "2", *here])
    out = capsys.readouterr().out
    assert "pass" in out
    assert "FAIL" not in out


@pytest.mark.filterwarnings("ignore")
def test_what_is_written_can_be_estimated(write, run, tmp_path: Path, capsys) -> None:
    path = write(hardware="8x80gb", judge="gpt-5.4")
    run("estimate", ["--config", str(path), "--rows", "2", "--data.cache_dir", str(tmp_path / "cache")])
    assert "gpt-5.4" in capsys.readouterr().out


def test_questions_are_asked_again_until_the_answer_can_be(
    world: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = ["40gb", "24GB", "nonsense", str(folders["qwen"]), "/no/such.json", str(world / "shapes.json")]
    answers += ["gpt-7", "gpt-5.4", "much", "-1", "$12.5"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(answers) + "\n"))
    cli(["init"])
    out = capsys.readouterr().out
    for refused in ("'40gb' is none of cpu, 16gb", "'nonsense' is no folder, and no hub id", "/no/such.json is not a file",
                    "'gpt-7' is none of fallback, ", "'much' is no number of dollars", "'-1' is no number"):  # fmt: skip
        assert refused in out, refused
    assert "60 rows; of the first 20, 20 can be read and 20 have their images" in out
    assert [line for line in out.splitlines() if line.startswith("  python")] == [
        f"  python main.py {command} --config my.yaml" for command in ("check", "estimate", "fit")
    ]
    written = yaml.safe_load((tmp_path / "my.yaml").read_text())
    assert written["model"]["policy"]["model"] == str(folders["qwen"])
    assert written["model"]["judge"]["model"] == "openai/gpt-5.4"
    assert written["model"]["judge"]["budget_usd"] == 12.5
    assert written["data"]["image_root"] == str(world)


def test_without_answers_defaults_are_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    cli(["init", "--hardware", "16gb"])
    out = capsys.readouterr().out
    for name in ("model", "data", "image_root", "judge", "budget"):
        assert re.search(rf"^{name}: \S+ \(the default; --{name} changes it\)$", out, re.MULTILINE), name
    written = (tmp_path / "my.yaml").read_text()
    assert yaml.safe_load(written)["model"]["judge"]["budget_usd"] == 20


def test_the_command_in_its_header_writes_the_file_again(write, cli) -> None:
    path = write(hardware="24gb", budget="none")
    text = path.read_text()
    (command,) = re.findall("^# python main.py (init .+)$", text, re.MULTILINE)
    cli([*shlex.split(command), "--force"])
    assert path.read_text() == text


def test_enter_takes_a_default_though_it_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Terminal("\n" * 6))
    cli(["init"])
    assert yaml.safe_load((tmp_path / "my.yaml").read_text())["data"]["image_root"] == "data/sharegpt4v"
    monkeypatch.setattr("sys.stdin", Terminal(""))
    with pytest.raises(SystemExit, match="hardware: no answer; give it as --hardware"):
        cli(["init", "--force"])


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--hardware=cray", "--hardware: 'cray' is none of cpu, 16gb, 24gb, 48gb, 80gb, 8x80gb"),
        ("--model=./nowhere", "is no folder of an HF model"),
        ("--data=nowhere.json", "nowhere.json is not a file, nor does it look like a hub id"),
        ("--judge=gpt-7", f"--judge: 'gpt-7' is none of {', '.join(judges())}"),
        ("--budget=0", "--budget: '0' is no number of dollars above 0"),
        ("--image_root=/no/such", "--image_root: /no/such does not exist"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_with_what_can(flag: str, says: str, tmp_path: Path, cli) -> None:
    with pytest.raises(SystemExit) as refused:
        cli(["init", flag, "--out", str(tmp_path / "my.yaml")])
    assert says in str(refused.value)
    assert not (tmp_path / "my.yaml").exists()


def test_a_file_that_is_there_stays(tmp_path: Path, cli) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    with pytest.raises(SystemExit, match="is there already; name another file, or add --force"):
        cli(["init", "--out", str(path)])
    assert path.read_text() == "mine"


def test_missing_images_are_refused(tmp_path: Path, write) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SystemExit, match=r"--image_root: .*60 rows; .* 0 have their images; .* does not exist"
    ):
        write(image_root=tmp_path / "empty")


def test_a_judge_without_a_price_has_its_budget_as_a_comment(write, capsys) -> None:
    path = write(judge="hosted_vllm/mine", budget="3")
    assert "budget: needs the price of hosted_vllm/mine first" in capsys.readouterr().out
    assert "budget_usd" not in yaml.safe_load(path.read_text())["model"]["judge"]
    assert "# budget_usd: 3" in path.read_text()


def test_other_families_get_no_limit_of_pixels(write, folders: dict[str, Path]) -> None:
    policy = yaml.safe_load(write(model=folders["llava"]).read_text())["model"]["policy"]
    assert "max_pixels" not in policy
    assert policy["lora"] == {}  # the family's own layers

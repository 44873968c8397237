"""The command line, the shipped configs, the progress bar, and what must not be written anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from balcap.commands import rows_run
from balcap.commands.annotate_settings import AnnotateSettings
from balcap.commands.recaption import RecaptionSettings
from balcap.commands.rows_settings import RowsSettings
from balcap.judge import JudgeSettings
from tests.support import ROOT


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", "recaption", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "balcap.data.settings" in names
    assert not names & {"torch", "lightning", "transformers", "litellm", "datasets", "peft"}
    assert "--retry_quarantined" in done.stdout
    assert "rows that an earlier run has put into" in done.stdout


SHIPPED = ["recaption.yaml", "recaption_shapes.yaml", "annotate.yaml", "annotate_shapes.yaml"]


def settings_of(name: str) -> type[RowsSettings]:
    return AnnotateSettings if name.startswith("annotate") else RecaptionSettings


def configured(name: str, *more: str) -> RowsSettings:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(settings_of(name))
    settings = parser.instantiate(parser.parse_args(["--config", str(ROOT / "configs" / name), *more]))
    settings.pop("config")
    return settings_of(name)(**settings.as_dict())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_need_at_most_images_and_a_key(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    local = ["--image_root", str(world), "--out", str(tmp_path / "new.json")]
    local += ["--data", str(world / "shapes.json")] if "shapes" in name else []
    missing = configured(name, *local).problems()
    assert [problem for problem in missing if "OPENAI_API_KEY" not in problem] == []
    # of who writes captions, and of who says what they assert; of one judge for all
    assert len(missing) == {"recaption.yaml": 2, "annotate.yaml": 1}.get(name, 0)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    assert configured(name, *local).problems() == []


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_repeat_no_default(name: str) -> None:
    from inspect import signature

    from balcap.judge import JudgeSettings

    given = yaml.safe_load((ROOT / "configs" / name).read_text())
    for values, kind in ((given.pop("judge"), JudgeSettings), (given, settings_of(name))):
        defaults = {key: p.default for key, p in signature(kind).parameters.items()}
        assert not [key for key, value in values.items() if defaults[key] == value]


def test_the_ledger_lies_beside_the_file_unless_it_is_named(tmp_path: Path) -> None:
    settings = configured("recaption_shapes.yaml", "--out", str(tmp_path / "a.b.json"))
    assert settings.judge.settings.ledger == str(tmp_path / "a.b.json.ledger.sqlite")
    own = configured("recaption_shapes.yaml", "--judge.ledger", "mine.sqlite")
    assert own.judge.settings.ledger == "mine.sqlite"


def test_no_key_is_written_anywhere(
    recaption_arguments, cli, server, over_http, tmp_path: Path, out: Path, capsys, caplog, monkeypatch
) -> None:
    key = "sk-planted-0123456789abcdef"
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", key)
    named = {"judge.params.api_key": "os.environ/HOSTED_VLLM_API_KEY"}
    server.script = [None] * 6 + ["400", "401", "429", "500"]  # which quote it
    with pytest.raises(SystemExit):
        cli(recaption_arguments(**over_http, **named, max_rows=20))
    assert any(key in str(given) for given in server.keys)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"new.json.settings.json", "new.json.ledger.sqlite", "judge.sqlite"} <= {p.name for p in written}
    assert [path for path in written if key.encode() in path.read_bytes()] == []
    said = capsys.readouterr()
    assert key not in said.out + said.err + caplog.text


@pytest.mark.parametrize(("terminal", "end"), [(False, "\n"), (True, "\r")])
def test_progress_is_a_line_now_and_then_and_in_a_terminal_one_that_changes(
    recaption_arguments, cli, capsys, monkeypatch, terminal: bool, end: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(rows_run, "POLL_S", 0.01)
    monkeypatch.setattr(rows_run, "PLAIN_EVERY_S", 0.0)
    cli(recaption_arguments(max_rows=5))
    first, *_, last = capsys.readouterr().out.removesuffix("\n").split(end)
    assert first == "0/5 rows  $0.00  0 quarantined"
    assert last.startswith("5 of 5 rows are captioned")


def test_a_judge_that_ends_soon_is_named_first(recaption_arguments, cli, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        JudgeSettings, "endings", lambda self, instead: [f"judge: {self.model} ends; {instead}"]
    )
    cli(recaption_arguments(max_rows=2))
    assert capsys.readouterr().err.startswith("judge: shapes/oracle ends; take another judge.model")

"""The command line, the shipped configs, the progress bar, and what must not be written anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from balcap.recaption import progress as room
from balcap.recaption.progress import RecaptionProgress
from balcap.recaption.settings import Recaptioner
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
    assert "balcap.recaption.settings" in names
    assert not names & {"torch", "lightning", "transformers", "litellm", "datasets", "peft"}
    assert "--retry_quarantined" in done.stdout
    assert "rows that an earlier run has put into" in done.stdout


def configured(name: str, *more: str) -> Recaptioner:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recaptioner)
    settings = parser.instantiate(parser.parse_args(["--config", str(ROOT / "configs" / name), *more]))
    settings.pop("config")
    return Recaptioner(**settings.as_dict())


@pytest.mark.parametrize("name", ["recaption.yaml", "recaption_shapes.yaml"])
def test_the_shipped_configs_need_at_most_images_and_a_key(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    local = ["--image_root", str(world), "--out", str(tmp_path / "new.json")]
    local += ["--data", str(world / "shapes.json")] if "shapes" in name else []
    missing = configured(name, *local).problems()
    assert [problem for problem in missing if "OPENAI_API_KEY" not in problem] == []
    assert len(missing) == (0 if "shapes" in name else 2)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    assert configured(name, *local).problems() == []


@pytest.mark.parametrize("name", ["recaption.yaml", "recaption_shapes.yaml"])
def test_the_shipped_configs_repeat_no_default(name: str) -> None:
    from inspect import signature

    from balcap.judge import JudgeSettings

    given = yaml.safe_load((ROOT / "configs" / name).read_text())
    judges = {key: given.pop(key, {}) for key in ("judge", "decompose_judge")}
    for values, kind in ((given, Recaptioner), *((values, JudgeSettings) for values in judges.values())):
        defaults = {key: p.default for key, p in signature(kind).parameters.items()}
        assert not [key for key, value in values.items() if defaults[key] == value]


def test_the_journal_ledger_and_quarantine_lie_beside_the_file(tmp_path: Path) -> None:
    recaptioner = configured("recaption_shapes.yaml", "--out", str(tmp_path / "a.b.json"))
    assert recaptioner.judge.settings.ledger == str(tmp_path / "a.b.json.ledger.sqlite")
    assert recaptioner.files.journal == tmp_path / "a.b.json.journal.jsonl"
    assert recaptioner.files.quarantine == tmp_path / "a.b.json.quarantine.jsonl"
    own = configured("recaption_shapes.yaml", "--judge.ledger", "mine.sqlite")
    assert own.judge.settings.ledger == "mine.sqlite"


def test_no_key_is_written_anywhere(
    recaption_arguments, cli, server, over_http, tmp_path: Path, out: Path, capsys, caplog, monkeypatch
) -> None:
    key = "sk-planted-0123456789abcdef"
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", key)
    server.script = [None] * 6 + ["400", "401", "429", "500"]  # which quote it
    with pytest.raises(SystemExit):
        cli(recaption_arguments(**over_http, max_rows=20))
    assert any(key in str(given) for given in server.keys)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"new.json.journal.jsonl", "new.json.ledger.sqlite", "judge.sqlite"} <= {p.name for p in written}
    assert [path for path in written if key.encode() in path.read_bytes()] == []
    said = capsys.readouterr()
    assert key not in said.out + said.err + caplog.text


# ---- progress


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(room, "time", clock)
    return clock


def test_pace_and_dollars_are_those_of_this_run(clock: Clock) -> None:
    progress = RecaptionProgress(total=3000, done=2000, dollars=lambda: 0.5)
    assert progress.status(1000.0) == "2000/3000 rows  $0.50  0 quarantined"
    progress.done, progress.quarantined = 2100, 3
    # 100 rows in 25 s are 4 a second; 900 are left, 225 s; $0.50 for 100 rows is $4.50 for 900 more.
    assert (
        progress.status(1025.0)
        == "2100/3000 rows  4.0 rows/s  0:03:45 left  $0.50 of about $5.00  3 quarantined"
    )


def test_a_line_now_and_then_where_there_is_no_terminal(clock: Clock, capsys) -> None:
    with RecaptionProgress(total=100, done=0, dollars=lambda: 0.0) as progress:
        for second in range(40):
            clock.now = 1000.0 + second
            progress.done = second
            progress.show()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0/100", "15/100", "30/100", "39/100"]


def test_a_bar_where_there_is_one(clock: Clock, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    with RecaptionProgress(total=100, done=0, dollars=lambda: 0.0) as progress:
        clock.now += 10
        progress.done = 50
        progress.show()
    said = capsys.readouterr().out
    assert "50/100 rows  5.0 rows/s  0:00:10 left" in said
    assert "\x1b[" in said

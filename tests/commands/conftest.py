"""On the small world: the recaption and annotate commands, a study, and a real run that an estimate is compared with."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.judge_server import JudgeServer
from tests.support import ROOT

SETTINGS = {
    "data.batch_size": 4,
    "data.val_size": 4,
    "data.val_batch_size": 4,
    "data.max_rows": 20,  # 15 to train on: 24 images are one epoch and a part of the next
    "data.num_workers": 0,
    "model.num_captions": 4,
    "model.val_captions": 2,
    "model.sampling.max_tokens": 48,
    "model.policy.model": ROOT / "assets/shapes-base",
    "model.judge.model": "openai/gpt-4o-mini",
    "model.judge.providers": "null",
    "trainer.max_steps": 6,
    "trainer.max_time": "null",
    "trainer.val_check_interval": 4,
    "trainer.check_val_every_n_epoch": "null",
}


@dataclass(frozen=True)
class Paid:
    """What a run spent.

    Attributes:
        run: its folder.
        arguments: of ``fit``, without the command and the run folder.
        tasks: task -> (calls, tokens in, tokens out), by its ledger.
        usd: dollars, likewise.
    """

    run: Path
    arguments: list[str]
    tasks: dict[str, tuple[int, int, int]]
    usd: float


def command(name: str, arguments: list[str]) -> None:
    """One command of the project, in process."""
    from main import main

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main([name, *arguments])


@pytest.fixture(scope="session")
def paid(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Paid:
    """A fit on the embedded world, judged through HTTP."""
    from examples.shapes.oracle import answer

    tmp = tmp_path_factory.mktemp("paid")
    environment = pytest.MonkeyPatch()
    environment.setenv("OPENAI_API_KEY", "sk-of-nobody-at-all")
    server = JudgeServer(answer)
    try:
        settings = SETTINGS | {
            "data.data": world / "shapes.json",
            "data.image_root": world,
            "data.cache_dir": tmp / "tables",
            "model.judge.params": f"{{api_base: '{server.url}'}}",
        }
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        arguments = ["--config", str(ROOT / "configs/shapes.yaml"), *arguments]
        files = ["--run_dir", str(tmp / "run"), "--model.judge.cache", str(tmp / "cache.sqlite")]
        command("fit", [*arguments, *files])
    finally:
        server.close()
        environment.undo()
    with sqlite3.connect(tmp / "run/judge_ledger.sqlite") as ledger:
        rows = ledger.execute(
            "SELECT task, count(*), sum(tokens_in), sum(tokens_out) FROM calls GROUP BY task"
        ).fetchall()
        (usd,) = ledger.execute("SELECT sum(usd) FROM calls").fetchone()
    return Paid(tmp / "run", arguments, {task: tuple(figures) for task, *figures in rows}, usd)


@pytest.fixture
def run() -> Callable[[str, list[str]], None]:
    """`command`, as a fixture."""
    return command


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "new.json"


@pytest.fixture
def recaption_arguments(world: Path, tmp_path: Path, out: Path) -> Callable[..., list[str]]:
    """Arguments of a recaption of the small world's 60 pictures, or of another command over its rows; options override,
    None leaves out."""

    def arguments(command: str = "recaption", **options: object) -> list[str]:
        defaults: dict[str, object] = {
            "data": world / "shapes.json",
            "image_root": world,
            "out": out,
            "cache_dir": tmp_path / "cache",
            "judge.cache": tmp_path / "judge.sqlite",
            "judge.concurrency": 4,
        }
        pairs = {**defaults, **{key.replace("__", "."): value for key, value in options.items()}}
        flags = [f"--{key}={value}" for key, value in pairs.items() if value is not None]
        return [command, "--config", str(ROOT / f"configs/{command}_shapes.yaml"), *flags]

    return arguments


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """The oracle behind HTTP."""
    from examples.shapes.oracle import answer

    running = JudgeServer(answer)
    yield running
    running.close()


@pytest.fixture
def over_http(server: JudgeServer) -> dict[str, object]:
    """Options that send the judge's questions to `server`."""
    params = {"judge.params.api_base": server.url}
    return {"judge.model": "hosted_vllm/oracle", "judge.providers": "null", "judge.retries": 0, **params}


@pytest.fixture
def study_file(fit_arguments, tmp_path: Path):
    """`study_file(**keys)`: a study of two settings and two seeds, one step each, in a YAML."""

    def write(settings: dict[str, Any] | None = None, **keys: Any) -> str:
        flags = [word.removeprefix("--").partition("=") for word in fit_arguments()[3:]]
        shared = {name: value for name, _, value in flags if name != "run_dir"}
        short = {
            "trainer.max_steps": 1,
            "data.val_size": 2,
            "data.val_batch_size": 2,
            "model.sampling.max_tokens": 8,
        }
        content = {
            "out": str(tmp_path / "study"),
            "base": [str(ROOT / "configs/shapes.yaml")],
            "seeds": [0, 1],
            "runs": {
                "ours": None,
                "grpo": {"configs": [str(ROOT / "configs/methods/grpo.yaml")], "title": "GRPO"},
            },
            "settings": shared | short | (settings or {}),
            "evaluate": False,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content | keys, sort_keys=False))
        return str(path)

    return write

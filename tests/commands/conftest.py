"""The recaption command on the small world, in process or as a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.judge_server import JudgeServer
from tests.support import ROOT


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "new.json"


@pytest.fixture
def recaption_arguments(world: Path, tmp_path: Path, out: Path) -> Callable[..., list[str]]:
    """Arguments of a recaption of the small world's 60 pictures; options override, None leaves out."""

    def arguments(**options: object) -> list[str]:
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
        return ["recaption", "--config", str(ROOT / "configs/recaption_shapes.yaml"), *flags]

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

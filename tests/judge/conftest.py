from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from judge_fakes import JudgeServer
from PIL import Image

from balcap.judge import Judge, retry


@pytest.fixture(scope="session")
def one_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


@pytest.fixture
def server(one_server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> JudgeServer:
    one_server.script, one_server.always = [], None
    one_server.requests.clear()
    one_server.keys.clear()
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return one_server


@pytest.fixture
def make_judge(server: JudgeServer) -> Iterator[Callable[..., Judge]]:
    """Judges that talk to the server as gpt-4o-mini, without a cache unless one is named."""
    made: list[Judge] = []

    def make(**settings: Any) -> Judge:
        defaults = {"model": "openai/gpt-4o-mini", "params": {"api_base": server.url}, "cache": None}
        made.append(Judge(**{**defaults, "timeout_s": 5.0, "retries": 2, **settings}))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


@pytest.fixture(scope="session")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()

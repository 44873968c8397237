"""One cache for several machines, against a real server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balcap.commands.ledger import cache as show
from balcap.judge import Judge
from balcap.judge.cache import BUSY_S
from balcap.judge.errors import StoreError
from balcap.judge.redis_cache import (
    ANSWERS,
    TIMEOUT_S,
    RedisCache,
    describe,
    is_redis,
    open_cache,
    without_password,
)
from balcap.judge.tasks import Decompose
from balcap.utils.redact import redact

redis = pytest.importorskip("redis")
pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server here")


@contextlib.contextmanager
def serving(port: int, folder: Path) -> Iterator[None]:
    command = [
        "redis-server",
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--requirepass",
        "secret",
    ]
    process = subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
    try:
        until(lambda: bool(redis.Redis(port=port, password="secret").ping()))
        yield
    finally:
        process.terminate()
        process.wait(30)


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.exceptions.RedisError):
            if there():
                return
        time.sleep(0.05)
    pytest.fail("the server did not start")


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def url(port: int, tmp_path: Path, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("JUDGE_CACHE", f"redis://:secret@127.0.0.1:{port}/0")
    with serving(port, tmp_path):
        yield "os.environ/JUDGE_CACHE"


def test_what_one_process_puts_another_finds(url: str) -> None:
    one, other = open_cache(url), open_cache(url)
    one.put("a", "verify", "m", '{"true": true}')
    one.put("b", "verify", "m", "[]")
    assert other.get_many(["a", "x", "b"]) == {"a": '{"true": true}', "b": "[]"}
    assert other.get_many([]) == {}
    answers, size = describe(url)
    assert answers == 2
    assert size > 0
    one.close()
    other.close()
    other.close()


def test_no_judge_of_the_job_pays_again(url: str) -> None:
    def asked() -> tuple[list[list[str]], int, int]:
        judge = Judge("shapes/oracle", providers={"shapes": "examples.shapes.oracle.Oracle"}, cache=url)
        assert judge.problems() == []
        answers = judge.run(judge.ask(Decompose, ["A red circle.", "A blue star."]))
        stats = judge.stats()
        judge.close()
        return answers, stats.calls, stats.cache_hits

    first, calls, _ = asked()
    second, again, hits = asked()
    assert (calls, again, hits) == (1, 0, 2)
    assert first == second


def test_a_server_that_goes_away_costs_nothing_that_was_put(
    port: int, tmp_path: Path, caplog, monkeypatch
) -> None:
    url = f"redis://:secret@127.0.0.1:{port}/0"
    with serving(port, tmp_path):
        cache = RedisCache(url)
        cache.put("a", "verify", "m", "1")
    assert cache.get_many(["a"]) == {}
    cache.put("b", "verify", "m", "2")
    cache.put("c", "verify", "m", "3")
    assert cache.get_many(["b", "c", "a"]) == {"b": "2", "c": "3"}
    assert len(caplog.records) == 1
    assert "cannot read redis://127.0.0.1" in caplog.text
    assert "secret" not in caplog.text
    with serving(port, tmp_path):
        later = time.monotonic() + BUSY_S
        monkeypatch.setattr(time, "monotonic", lambda: later)
        cache.put("d", "verify", "m", "4")
        monkeypatch.undo()
        other = RedisCache(url)
        assert other.get_many(["a", "b", "c", "d"]) == {"a": "1", "b": "2", "c": "3", "d": "4"}
        cache.close()
        other.close()


def test_a_server_that_hangs_is_left_alone_for_a_while(url: str, port: int, monkeypatch) -> None:
    cache = open_cache(url)
    cache.put("a", "verify", "m", "1")
    client = redis.Redis(port=port, password="secret")
    client.client_pause(int(1300 * TIMEOUT_S))  # milliseconds in which every command waits
    began = time.monotonic()
    for _ in range(5):
        assert cache.get_many(["a"]) == {}
    assert time.monotonic() - began < 2 * TIMEOUT_S  # one question waited, the others did not ask
    client.ping()  # waits as well
    later = time.monotonic() + BUSY_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert cache.get_many(["a"]) == {"a": "1"}


def test_what_cannot_be_used_is_said_before_a_run_and_without_the_password(
    url: str, port: int, monkeypatch, capsys
) -> None:
    assert RedisCache.problem(url) is None
    plain = RedisCache.problem(f"redis://:secret@127.0.0.1:{port}/0")
    assert plain is not None
    assert plain.startswith("model.judge.cache: keys come from the environment")
    for password in ("hidden", "hid/den", "hid#den", "hid%den"):
        monkeypatch.setenv("OTHER", f"redis://:{password}@127.0.0.1:{port}/0")
        wrong = RedisCache.problem("os.environ/OTHER")
        assert wrong is not None
        assert wrong.startswith("model.judge.cache: os.environ/OTHER cannot be used as the judge's cache (")
        assert "hid" not in wrong
    nobody = "redis://127.0.0.1:1/0"
    judge = Judge("shapes/oracle", providers={"shapes": "examples.shapes.oracle.Oracle"}, cache=nobody)
    assert any("model.judge.cache: redis://127.0.0.1:1/0" in problem for problem in judge.problems())
    with pytest.raises(StoreError, match="Start the server, name another one or a file"):
        open_cache(nobody)
    redis.Redis(port=port, password="secret").set(ANSWERS, "something else")
    assert "is a string of something else" in str(RedisCache.problem(url))


def test_a_variable_keeps_the_password_out_of_the_config(url: str, monkeypatch) -> None:
    cache = open_cache("os.environ/JUDGE_CACHE")
    cache.put("a", "verify", "m", "1")
    assert open_cache("os.environ/JUDGE_CACHE").get_many(["a"]) == {"a": "1"}
    assert redact("at redis://:secret@host:6379/0") == "at redis://***@host:6379/0"
    monkeypatch.setenv("JUDGE_CACHE", "runs/cache.sqlite")
    assert "the variable JUDGE_CACHE holds no URL" in str(RedisCache.problem("os.environ/JUDGE_CACHE"))
    assert without_password("rediss://user:pass@host:6379/1") == "rediss://host:6379/1"
    assert not is_redis("runs/judge_cache.sqlite")


def test_the_command_shows_it_and_prunes_nothing(url: str, capsys) -> None:
    open_cache(url).put("a", "verify", "m", "1")
    show(url)
    assert ": 1 answers, about" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="drops answers by its own settings"):
        show(url, older_than_days=1)
    with pytest.raises(SystemExit, match="cannot be read as a judge's cache"):
        show("redis://127.0.0.1:1/0")

"""The cache: paid for once, by whatever process, whenever it was killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from balcap.judge import Judge, JudgeFailure, StoreError
from balcap.judge.cache import JudgmentCache
from balcap.judge.images import ImagePolicy, Images
from balcap.judge.prompt import Question, Route
from balcap.judge.tasks import Rate, Verify
from tests.judge_questions import rate, verify


def read(cache: JudgmentCache, key: str) -> str | None:
    return cache.get_many([key]).get(key)


def test_the_second_time_is_free(make_judge, server, tmp_path):
    path = str(tmp_path / "runs" / "c.sqlite")
    first = make_judge(cache=path)
    rating = first.run(rate(first, "A cat."))
    assert first.run(rate(first, "A cat.")) == rating  # at once: the write may still be under way
    first.close()
    second = make_judge(cache=path)
    assert second.run(rate(second, "A cat.")) == rating
    assert server.calls == 1
    assert (second.stats().calls, second.stats().cache_hits) == (0, 1)


def test_failures_are_not_kept(make_judge, server, tmp_path):
    judge = make_judge(cache=str(tmp_path / "c.sqlite"), retries=0)
    server.script = ["out_of_range"]
    with pytest.raises(JudgeFailure):
        judge.run(rate(judge, "A cat."))
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0


def test_another_version_of_the_prompt_asks_again(make_judge, server, tmp_path, monkeypatch):
    judge = make_judge(cache=str(tmp_path / "c.sqlite"))
    judge.run(rate(judge, "A cat."))
    monkeypatch.setattr(Rate, "version", "another")
    judge.run(rate(judge, "A cat."))
    assert server.calls == 2


def test_a_stored_answer_that_no_longer_fits_is_asked_again(make_judge, server, tmp_path):
    path = tmp_path / "c.sqlite"
    judge = make_judge(cache=str(path))
    judge.run(rate(judge, "A cat."))
    judge.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET answer = ?", ('{"clarity": 99}',))
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert server.calls == 2


DEFAULT = ImagePolicy()


def test_the_key_depends_on_all_that_changes_an_answer(png, monkeypatch):
    def key(
        image: Images = png, says: str = "A", model: str = "m", images=DEFAULT, among=(), **params
    ) -> str:
        routes = [Route(model, params)]
        return Question(Verify(), {"image": image}, routes, images, among, bool(among)).keys(says)[0]

    keys = [
        key(),
        key(image=png + b"x"),
        key(says="B"),
        key(among=("A", "B")),
        key(model="n"),
        key(temperature=1),
        key(images=ImagePolicy(max_side=64)),
        Question(Rate(), {"image": png}, [Route("m", {})], ImagePolicy(), ()).keys("A")[0],
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(image=(png,)) == keys[0]  # a row of one image
    several = [key(image=(png, png + b"x")), key(image=(png + b"x", png)), key(image=(png, png))]
    assert len({*keys, *several}) == len(keys) + 3
    recorded = "2449ebe3b706b764ef0e91b820489467ec961be3128742a4d28b0ea4712e4ea0"
    assert key(image=b"png") == recorded, "answers that were paid for stay valid, until the version changes"
    assert key(says=" a. ") == keys[0]  # the same assertion
    assert key(api_base="http://elsewhere", api_key="os.environ/X") == keys[0]  # a server may move
    monkeypatch.setattr(Verify, "version", "another")
    assert key() not in keys


def test_no_text_of_the_prompt_is_stored(make_judge, tmp_path, png):
    path = tmp_path / "c.sqlite"
    judge = make_judge(cache=str(path))
    judge.run(verify(judge, png, ["A planted assertion"]))
    judge.close()
    rows = sqlite3.connect(path).execute("SELECT task, model, answer FROM answers").fetchall()
    assert rows == [("verify", "openai/gpt-4o-mini", '{"true":true,"pointable":true}')]
    assert b"planted" not in path.read_bytes()


def test_machines_of_a_cluster_keep_their_own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_RANK", "2")
    cache = JudgmentCache(tmp_path / "c.sqlite")
    cache.close()
    assert [path.name for path in tmp_path.iterdir()] == ["c.node2.sqlite"]
    monkeypatch.setenv("GROUP_RANK", "0")
    JudgmentCache(tmp_path / "c.sqlite").close()
    assert (tmp_path / "c.sqlite").exists()


WRITER = """
import sys, time
from balcap.judge.cache import JudgmentCache
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache = JudgmentCache(path)
print("open", flush=True)
sys.stdin.readline()
for i in range(count):
    cache.put(f"{name} {i}", "rate", "m", '{"i": %d}' % i)
    print(i, flush=True)
    time.sleep(0.0005)
cache.close()
"""


def writer(path, name: str, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_ranks_that_start_and_write_together(tmp_path):
    path = tmp_path / "c.sqlite"
    ranks = [writer(path, f"rank{rank}", 300) for rank in range(3)]
    for rank in ranks:
        rank.communicate("go\n", timeout=120)
        assert rank.returncode == 0
    cache = JudgmentCache(path)
    assert [read(cache, f"rank{rank} {i}") for rank in range(3) for i in (0, 299)] == [
        '{"i": 0}',
        '{"i": 299}',
    ] * 3
    cache.close()
    assert sqlite3.connect(path).execute("SELECT count(*) FROM answers").fetchone() == (900,)


def test_killed_in_the_middle_of_writing(tmp_path):
    path = tmp_path / "c.sqlite"
    process = writer(path, "killed", 100_000)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    arrived = []
    for line in process.stdout:
        if line.strip().isdigit():
            arrived.append((time.monotonic(), int(line)))
        if len(arrived) == 500:
            os.kill(process.pid, signal.SIGKILL)
            died = time.monotonic()
            break
    process.communicate(timeout=120)
    cache = JudgmentCache(path)
    # All that had arrived a quarter of a second before the end is there (busy machines write late).
    old = [i for when, i in arrived if when < died - 0.25]
    assert old
    assert all(read(cache, f"killed {i}") is not None for i in old)
    cache.put("after", "rate", "m", "{}")
    cache.close()
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT answer FROM answers WHERE key = 'after'").fetchone() == ("{}",)


def test_a_file_that_is_something_else(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to look like one. " * 100)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    newer = tmp_path / "newer.sqlite"
    JudgmentCache(newer).close()
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 99")
    for path, why in ((text, "not a database"), (other, "something else"), (newer, "format 99")):
        judge = Judge("openai/gpt-4o-mini", cache=str(path))
        with pytest.raises(StoreError, match=rf"model\.judge\.cache: .*{path.name}.*{why}"):
            judge.run(rate(judge, "A cat."))
        assert str(path) in (JudgmentCache.problem(path) or "")
    assert text.read_text().startswith("not a database")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    problem = JudgmentCache.problem(tmp_path / "file" / "c.sqlite")
    assert problem is not None
    assert problem.startswith("model.judge.cache: ")


def test_no_cache_keeps_nothing():
    cache = JudgmentCache(None)
    cache.put("key", "rate", "m", "{}")
    assert read(cache, "key") is None
    cache.close()


def test_damage_is_named(tmp_path):
    path = tmp_path / "c.sqlite"
    cache = JudgmentCache(path)
    for i in range(2000):
        cache.put(f"{i:064d}", "rate", "m", "{}")
    cache.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    damaged = JudgmentCache(path)
    with pytest.raises(StoreError, match=r"model\.judge\.cache: .*malformed"):
        read(damaged, f"{7:064d}")
    damaged.close()

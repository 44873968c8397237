"""Every call is a row, and the budget holds."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time

import pytest

from balcap.judge import BudgetSpent, JudgeFailure, Price, Rate, Reply, StoreError
from balcap.judge.client import Deployment
from balcap.judge.ledger import Ledger
from tests.judge_questions import rate, verify


def rows(path) -> list[dict]:
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM calls ORDER BY id")]


def test_every_call_is_a_row(make_judge, server, png, tmp_path):
    path = tmp_path / "run" / "ledger.sqlite"
    judge = make_judge(ledger=str(path), retries=2)
    assert Ledger.problem(path) is None
    assert not path.parent.exists()  # checking makes nothing
    server.script = ["503", "out_of_range", None]
    before = time.time()
    judge.run(rate(judge, "A cat."))
    judge.run(verify(judge, png, ["A cat", "A mat"]))
    server.script = ["refusal"]
    with pytest.raises(JudgeFailure):
        judge.run(rate(judge, "A dog."))
    judge.close()
    found = rows(path)
    shown = [(row["task"], row["items"], row["attempt"], row["outcome"], row["tokens_in"]) for row in found]
    assert shown == [
        ("rate", 1, 1, "server", 0),
        ("rate", 1, 2, "invalid", 1000),  # an answer of no use is paid for all the same
        ("rate", 1, 3, "ok", 1000),
        ("verify", 2, 1, "ok", 1000),
        ("rate", 1, 1, "refused", 1000),
    ]
    # gpt-4o-mini: 1000 * 0.15e-6 + 100 * 0.60e-6 = 0.00021
    assert [row["usd"] for row in found] == pytest.approx([0, 0.00021, 0.00021, 0.00021, 0.00021])
    assert {row["model"] for row in found} == {"openai/gpt-4o-mini"}
    assert all(before <= row["at"] <= time.time() and 0 < row["latency_s"] < 60 for row in found)
    stats = judge.stats()
    assert stats.calls == 5
    assert stats.cost_usd == pytest.approx(sum(row["usd"] for row in found)) == pytest.approx(judge.spent())


def test_prices_of_the_config_come_first(make_judge, server):
    price = Price(input=2.0, output=10.0, cached=0.5)
    judge = make_judge(prices={"openai/gpt-4o-mini": price})
    judge.run(rate(judge, "A cat."))
    # 1000 * 2e-6 + 100 * 10e-6
    assert judge.spent() == pytest.approx(0.003)
    # 400 fresh, 600 cached, 100 out: (400 * 2 + 600 * 0.5 + 100 * 10) / 1e6
    assert price.usd(1000, 100, 600) == pytest.approx(0.0021)


def test_an_unknown_price_is_no_zero(make_judge, server, tmp_path):
    path = tmp_path / "l.sqlite"
    judge = make_judge(model="hosted_vllm/some-model", ledger=str(path))
    judge.run(rate(judge, "A cat."))
    judge.close()
    assert rows(path)[0]["usd"] is None
    assert judge.stats().unpriced_calls == 1


@pytest.mark.parametrize("concurrency", [1, 5])
def test_the_budget_is_overshot_by_the_calls_under_way_at_most(make_judge, server, concurrency):
    server.latency = 0.02
    judge = make_judge(budget_usd=0.0042, concurrency=concurrency)  # 20 calls
    answers = judge.run(judge.ask(Rate, [f"A cat {number}." for number in range(200)]))
    server.latency = 0.0
    assert isinstance(judge.stopped, BudgetSpent)
    assert "model.judge.budget_usd" in str(judge.stopped)
    assert 20 <= server.calls < 20 + concurrency
    there = [answer for answer in answers if not isinstance(answer, JudgeFailure)]
    assert len(there) == server.calls  # nothing that was paid for is thrown away
    assert {answer.kind for answer in answers if isinstance(answer, JudgeFailure)} == {"stopped"}


def test_a_budget_counts_earlier_processes(make_judge, server, tmp_path):
    path = str(tmp_path / "l.sqlite")
    for calls in (3, 6, 6):
        judge = make_judge(ledger=path, budget_usd=0.00125)  # 5.95 calls: the sixth still starts
        for number in range(3):
            judge.run(judge.ask(Rate, [f"{calls} {number} {time.time()}"]))
        judge.close()
        assert server.calls == calls
    assert judge.spent() == pytest.approx(6 * 0.00021)


def test_a_budget_counts_the_other_machines_of_a_job_and_those_that_it_has_no_more(
    make_judge, server, tmp_path, monkeypatch
):
    path = str(tmp_path / "l.sqlite")

    def spend(node: int, calls: int, machines: int, elsewhere: float = 0.0):
        monkeypatch.setenv("GROUP_RANK", str(node))
        judge = make_judge(ledger=path, budget_usd=0.00125)  # 5.95 calls: the sixth still starts
        judge.share(2 * machines, machines)
        judge.spent_elsewhere(elsewhere)
        before = server.calls
        for number in range(calls):
            judge.run(judge.ask(Rate, [f"{node} {number} {time.time()}"]))
        judge.close()
        return server.calls - before, judge

    assert spend(0, 2, machines=3)[0] == 2
    assert spend(1, 1, machines=3, elsewhere=2 * 0.00021)[0] == 1
    made, judge = spend(2, 9, machines=3, elsewhere=3 * 0.00021)
    assert made == 3
    assert judge.spent() == pytest.approx(3 * 0.00021)  # its own, which the others will hear of
    made, judge = spend(0, 9, machines=1)  # goes on with the first machine alone
    assert made == 0
    assert judge.spent() == pytest.approx(6 * 0.00021)
    made, judge = spend(1, 9, machines=2, elsewhere=2 * 0.00021)
    assert made == 3  # what the third has spent, the first one counts


def test_ranks_share_the_limits_of_a_judge(make_judge):
    places = [Deployment("openai/gpt-4o-mini", rpm=100, tpm=7, max_parallel=9), Deployment("openai/gpt-4o")]
    judge = make_judge(deployments=places, concurrency=10)
    judge.share(8, 1)
    shared = [Deployment("openai/gpt-4o-mini", rpm=12, tpm=1, max_parallel=1), Deployment("openai/gpt-4o")]
    assert judge.limits.concurrency == judge.limits.slots == 1
    assert judge.limits.deployments == shared == judge.make_client().deployments
    assert (judge.settings.concurrency, judge.settings.deployments) == (10, places)
    alone = make_judge()
    alone.share(8, 2)
    assert alone.limits.slots == 64  # of each rank, where nobody has named a number


def test_a_rank_keeps_its_part_of_the_calls_under_way(make_judge, server):
    server.latency = 0.05
    judge = make_judge(concurrency=8)
    judge.share(4, 1)
    start = time.monotonic()
    judge.run(judge.ask(Rate, [f"A cat {number}." for number in range(10)]))
    assert server.calls == 10
    assert time.monotonic() - start > 5 * 0.05  # two at once


WRITER = """
import sys
from balcap.judge import Reply
from balcap.judge.client import Deployment
from balcap.judge.ledger import Ledger
ledger = Ledger(sys.argv[1])
for i in range(200):
    ledger.add(0.0, "rate", "m", 1, 1, "ok", Reply("", 10, 1, 0, 0.001), 0.1)
    ledger.spent()
print("done", flush=True)
sys.stdin.readline()
ledger.close()
"""


def test_ranks_see_what_the_others_spend(tmp_path):
    path = tmp_path / "l.sqlite"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "done\n"
    mine = Ledger(path)
    mine.add(0.0, "rate", "m", 1, 1, "ok", Reply("", 10, 1, 0, 0.001), 0.1)
    deadline = time.monotonic() + 10
    while mine.spent() < 0.6 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mine.spent() == pytest.approx(3 * 200 * 0.001 + 0.001)  # while they are still running
    for rank in ranks:
        rank.communicate("go\n", timeout=120)
    mine.close()
    assert len(rows(path)) == 601


def test_a_file_that_is_something_else_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database, but long enough to look like one. " * 100)
    with pytest.raises(StoreError, match=r"model\.judge\.ledger: .*notes\.txt"):
        Ledger(path)
    assert str(path) in (Ledger.problem(path) or "")


VERSION_1 = """
CREATE TABLE calls (id INTEGER PRIMARY KEY, at REAL NOT NULL, task TEXT NOT NULL, model TEXT NOT NULL,
  items INTEGER NOT NULL, attempt INTEGER NOT NULL, outcome TEXT NOT NULL, tokens_in INTEGER NOT NULL,
  tokens_out INTEGER NOT NULL, tokens_cached INTEGER NOT NULL, usd REAL, latency_s REAL NOT NULL, pid INTEGER NOT NULL);
INSERT INTO calls VALUES (NULL, 0.0, 'rate', 'm', 1, 1, 'server', 10, 1, 0, 0.25, 0.1, 7);
PRAGMA application_id = 1650551916;
PRAGMA user_version = 1;
"""  # as earlier versions made it; the number spells "ball"


def test_a_failed_call_keeps_the_words_of_the_provider_without_the_key_that_it_quotes(
    make_judge, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "pl4nted+key/0123456789")
    path = tmp_path / "l.sqlite"
    params = {"api_base": server.url, "api_key": "os.environ/OPENAI_API_KEY"}
    judge = make_judge(ledger=str(path), params=params, retries=1)
    server.script = ["401", "out_of_range", None]  # a server that quotes the key; an answer of no use
    with pytest.raises(JudgeFailure):
        judge.run(rate(judge, "A cat."))
    judge.run(rate(judge, "A dog."))
    judge.close()
    assert set(server.keys) == {"Bearer pl4nted+key/0123456789"}
    denied, invalid, fine = rows(path)
    assert (denied["outcome"], invalid["outcome"], fine["outcome"]) == ("denied", "invalid", "ok")
    assert "AuthenticationError" in denied["detail"]
    assert "***" in denied["detail"]
    assert invalid["detail"].startswith("invalid answer of openai/gpt-4o-mini")
    assert fine["detail"] is None
    assert not [file.name for file in tmp_path.iterdir() if b"pl4nted" in file.read_bytes()]


def test_words_are_kept_without_secrets_whoever_adds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ACME_TOKEN", "another-planted-token")
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(0.0, "rate", "m", 1, 1, "denied", Reply(), 0.1, "no such user: another-planted-token")
    ledger.close()
    assert [row["detail"] for row in rows(tmp_path / "l.sqlite")] == ["no such user: ***"]


def test_a_ledger_of_version_1_goes_on_as_version_2(tmp_path):
    path = tmp_path / "l.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(VERSION_1)
    assert Ledger.problem(path) is None
    Ledger.connect(path).close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)  # who only looks changes nothing
    for _ in range(2):
        ledger = Ledger(path)
        ledger.add(0.0, "rate", "m", 1, 1, "server", Reply(), 0.1, "busy")
        ledger.close()
        assert ledger.spent() == pytest.approx(0.25)
    assert [(row["outcome"], row["detail"]) for row in rows(path)] == [
        ("server", None), ("server", "busy"), ("server", "busy"),
    ]  # fmt: skip
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)

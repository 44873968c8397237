"""``main.py cache`` and ``main.py ledger``: shown and pruned while others may be writing."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing

import pytest

from balcap.commands.ledger import failure_words
from balcap.judge import Reply
from balcap.judge.cache import JudgmentCache, describe
from balcap.judge.ledger import Ledger
from main import main


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "c.sqlite"
    cache = JudgmentCache(path)
    for number in range(20):
        task, model = ("rate", "m") if number % 2 else ("verify", "n")
        cache.put(f"key {number}", task, model, "x" * 50_000)
    cache.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET at = ? WHERE task = 'rate'", (time.time() - 10 * 86400,))
    return path


def left(path) -> dict[str, int]:
    with sqlite3.connect(path) as database:
        return dict(database.execute("SELECT task, count(*) FROM answers GROUP BY task").fetchall())


def test_shown_and_left_alone(cache, capsys):
    main(["cache", "--path", str(cache)])
    shown = capsys.readouterr().out
    assert "verify" in shown
    assert "10" in shown
    assert left(cache) == {"rate": 10, "verify": 10}


@pytest.mark.parametrize(
    ("flags", "rest"),
    [
        (["--older_than_days", "5"], {"verify": 10}),
        (["--older_than_days", "50"], {"rate": 10, "verify": 10}),
        (["--task", "verify"], {"rate": 10}),
        (["--model", "n", "--older_than_days", "5"], {"rate": 10, "verify": 10}),
        (["--max_mb", "0.51"], {"verify": 10}),  # the oldest go first
        (["--max_mb", "0"], {}),
    ],
)
def test_pruned_as_asked(cache, capsys, flags, rest):
    answers, size = describe(cache)
    assert (answers, size > 1_000_000) == (20, True)
    main(["cache", "--path", str(cache), *flags])
    assert left(cache) == rest
    assert f"deleted {20 - sum(rest.values()):,} answers" in capsys.readouterr().out
    assert describe(cache)[1] < size or rest == {"rate": 10, "verify": 10}


def test_a_ledger_is_summed_up(tmp_path, capsys):
    ledger = Ledger(tmp_path / "judge_ledger.sqlite")
    for outcome, usd in (("ok", 0.5), ("ok", 0.25), ("server", 0.0)):
        ledger.add(0.0, "rate", "openai/m", 1, 1, outcome, Reply("", 1000, 10, 0, usd), 0.1)
    ledger.close()
    main(["ledger", str(tmp_path)])  # the run folder
    shown = capsys.readouterr().out
    assert "3 calls, $0.7500" in shown
    assert "2,000" in shown
    assert "words of failures" not in shown


def test_the_most_frequent_words_of_failures_are_shown(tmp_path, capsys):
    ledger = Ledger(tmp_path / "judge_ledger.sqlite")
    said = [("limited", f"slow down, try again in {n}.5s [/tpm]") for n in range(3)]
    said += [("server", f"overloaded since {word}") for word in ("a", "b", "b", "c", "c", "d")]
    for outcome, words in said:
        ledger.add(0.0, "rate", "m", 1, 1, outcome, Reply(), 0.1, words)
    with closing(Ledger.connect(tmp_path / "judge_ledger.sqlite")) as connection:
        assert failure_words(connection, most=2) == [
            ("limited", 3, "slow down, try again in 0.5s [/tpm]"),
            ("server", 2, "overloaded since b"),
            ("server", 2, "overloaded since c"),
        ]
    ledger.close()
    main(["ledger", str(tmp_path)])
    assert "try again in 0.5s [/tpm]" in capsys.readouterr().out


def test_a_ledger_of_version_1_is_shown_and_left_as_it_is(tmp_path, capsys):
    file = tmp_path / "judge_ledger.sqlite"
    Ledger(file).close()
    with closing(sqlite3.connect(file)) as database:
        database.execute("ALTER TABLE calls DROP COLUMN detail")
        database.execute("PRAGMA user_version = 1")
    main(["ledger", str(tmp_path)])
    assert "0 calls, $0.0000" in " ".join(capsys.readouterr().out.split())
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="does not exist"):
        main(["cache", "--path", str(tmp_path / "none.sqlite")])
    (tmp_path / "judge_ledger.sqlite").write_text("no database, but long enough to look like one. " * 50)
    with pytest.raises(SystemExit, match="cannot be read as a judge's ledger"):
        main(["ledger", str(tmp_path)])

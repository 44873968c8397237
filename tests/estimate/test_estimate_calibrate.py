"""Measured figures in the place of assumptions."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from balcap.estimate import calibrate
from balcap.estimate.language import Language
from balcap.estimate.usage import Usage, Usages
from balcap.judge.ledger import Call, Ledger

VERIFY, RATE = ("verify", "openai/gpt-4o-mini"), ("rate", "openai/gpt-4o-mini")


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Nine calls of verify about 10 to 50 assertions: 100 + 3 n tokens in, 2 n out; one more that failed; 40
    of rate; one of another task."""
    path = tmp_path / "judge_ledger.sqlite"
    book = Ledger(path)
    for n in (10, 20, 30, 40, 50, 30, 30, 30, 30):
        book.add(Call(0.0, *VERIFY, n, 1, "ok", 100 + 3 * n, 2 * n, 0, 0.0, 1.0))
    book.add(Call(0.0, *VERIFY, 30, 1, "server", 0, 0, 0, 0.0, 1.0))
    for _ in range(40):
        book.add(Call(0.0, *RATE, 1, 1, "ok", 600, 20, 0, 0.0, 1.0))
    book.add(Call(0.0, "match", "openai/gpt-4o-mini", 8, 1, "ok", 900, 100, 0, 0.0, 1.0))
    book.close()
    return path


def test_a_ledger_tells_what_a_call_and_an_item_use(ledger: Path) -> None:
    booked = calibrate.read_ledger(ledger)
    assert set(booked) == {VERIFY, RATE}  # one call of match tells nothing
    assert booked[VERIFY].per_call == pytest.approx((100, 0))
    assert booked[VERIFY].per_item == pytest.approx((3, 2))
    assert booked[RATE].per_call == pytest.approx((0, 0))  # one item each: what is whose cannot be told
    assert booked[RATE].per_item == pytest.approx((600, 20))


def test_reading_a_ledger_leaves_no_trace(ledger: Path) -> None:
    before = sorted(ledger.parent.iterdir())
    calibrate.read_ledger(ledger)
    assert sorted(ledger.parent.iterdir()) == before


def test_tokens_and_repetitions_are_those_of_the_ledger(ledger: Path) -> None:
    used = Usages({VERIFY: Usage(18, 600, 1.0, 1.0), ("match", "x"): Usage(1, 2, 3, 4)})
    found = calibrate.as_booked(used, calibrate.read_ledger(ledger))
    # 10 calls for 9 answers; 18 * 100 + 600 * 3 tokens in, 600 * 2 out; the failed call was billed nothing
    assert found[VERIFY].calls == pytest.approx(20)
    assert found[VERIFY].tokens_in == pytest.approx(3600)
    assert found[VERIFY].tokens_out == pytest.approx(1200)
    assert found["match", "x"] == Usage(1, 2, 3, 4)


def test_the_language_follows_the_ledger(ledger: Path) -> None:
    booked = calibrate.read_ledger(ledger)
    # The ledger: 270 verified assertions for 40 rated captions, 6.75 each. Played: 9 each.
    used = Usages({VERIFY: Usage(items=90), RATE: Usage(items=10)})
    shared = calibrate.language_of_ledger(Language(growth=0.8), booked, used, captions=8)
    # 8 ** (g - 0.8) = 6.75 / 9 -> g = 0.8 - 0.1383
    assert shared is not None
    assert shared.growth == pytest.approx(0.6617, abs=1e-3)
    assert shared.words_per_assertion == pytest.approx(4.1)
    alone = calibrate.language_of_ledger(Language(), booked, used, captions=1)
    assert alone is not None
    assert alone.words_per_assertion == pytest.approx(4.1 * 9 / 6.75)
    assert calibrate.language_of_ledger(Language(), booked, Usages(), captions=8) is None


def test_a_growth_that_is_not_enough_is_made_up_for_by_more_assertions(ledger: Path) -> None:
    booked = calibrate.read_ledger(ledger)
    used = Usages({VERIFY: Usage(items=10), RATE: Usage(items=10)})  # 1 each, the ledger holds 6.75
    found = calibrate.language_of_ledger(Language(growth=0.8), booked, used, captions=2)
    assert found is not None
    assert found.growth == 1
    # growth 1 makes 2 ** 0.2 = 1.149 times as many; the words the rest: 6.75 / 1.149 = 5.876
    assert found.words_per_assertion == pytest.approx(4.1 / 5.876, rel=1e-3)


def test_another_file_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        calibrate.read_ledger(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no database")
    with pytest.raises(ValueError, match="no ledger"):
        calibrate.read_ledger(tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "other.sqlite").execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match="no ledger"):
        calibrate.read_ledger(tmp_path / "other.sqlite")


def test_units_that_are_paid_for_measure_the_language() -> None:
    references = ["one two three four five six"] * 20
    units = [["one two three.", "four five six now."]] * 20  # 6 words / 2 units; 3 and 4 words
    found = calibrate.language_of_units(Language(), references, units)
    assert found is not None
    assert (found.words_per_assertion, found.words_in_assertion) == (3.0, 3.5)
    assert calibrate.language_of_units(Language(), references[:3], units[:3]) is None  # too few
    assert calibrate.language_of_units(Language(), references, [None] * 20) is None

"""``main.py annotate`` on the embedded world: questions and rubrics in rows, killed and continued."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from balcap.commands.annotate_run import quiz_of
from balcap.config import ConfigError
from balcap.judge.tasks import WrittenQuestion
from examples.shapes.language import covered, main_facts, read_fact
from examples.shapes.scene import scene_of
from tests.commands.recaption_fakes import FAULTY, FaultyOracle, about
from tests.commands.test_recaption_resume import answered, cached, start, wait_for
from tests.commands.test_recaption_runs import as_sent, names, quarantine, read
from tests.judge_replies import image_urls, task_of
from tests.judge_server import JudgeServer
from tests.support import ROOT, metrics

PLAIN = ("id", "image", "conversations")


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    """The small world's rows without questions and rubrics."""
    path = tmp_path / "plain.json"
    path.write_text(json.dumps([{key: row[key] for key in PLAIN} for row in read(world / "shapes.json")]))
    return path


@pytest.fixture
def annotate(recaption_arguments: Any, cli: Any, data: Path) -> Any:
    def run(**options: object) -> None:
        FaultyOracle.reset(options.pop("fault", lambda messages: None))  # type: ignore[arg-type]
        cli(recaption_arguments("annotate", **{"data": data, **options}))

    return run


def _begin_anew(out: Path) -> None:
    out.unlink()
    out.with_name(f"{out.name}.settings.json").unlink()


def test_questions_are_those_that_the_image_answers_and_their_words_do_not(
    annotate: Any, data: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate(max_rows=12, trials=0)
    everything = read(out)
    assert [{key: row[key] for key in PLAIN} for row in everything] == read(data)[:12]
    assert {row["questions_model"] for row in everything} == {"shapes/oracle"}
    assert all(0 < len(row["questions"]) <= 8 for row in everything)
    assert f"12 of 12 rows have questions ({out}); $0.00 in this run." in capsys.readouterr().out
    _begin_anew(out)
    annotate(max_rows=12, trials=3)
    for before, after in zip(everything, read(out), strict=True):
        kept = [question for question in before["questions"] if question in after["questions"]]
        assert kept == after["questions"]
        # Who does not see the image says "No" to all that may be there.
        assert not any(question["answer"] == "No" for question in kept)
    dropped = sum(len(row["questions"]) for row in everything) - sum(len(r["questions"]) for r in read(out))
    assert any(q["answer"] == "No" for row in everything for q in row["questions"])
    assert 0 < dropped < sum(len(row["questions"]) for row in everything) / 2


def test_a_question_that_the_judge_gets_wrong_with_the_image_is_left_out(
    annotate: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.shapes import oracle

    monkeypatch.setattr(oracle, "_truth", lambda scene: f"The background is {scene.background}.")
    annotate(max_rows=12, trials=1)
    rows = [row for row in read(out) if "questions" in row]
    assert any(
        question["question"] == "What colour is the background?"
        for row in rows
        for question in row["questions"]
    )
    # What is not said, the oracle guesses; and it says "No" to all that may be there.
    assert not any(q["question"].startswith("Is there") for row in rows for q in row["questions"])


def test_choices_are_shuffled_and_the_right_one_is_known() -> None:
    questions = [WrittenQuestion(f"Which {n}?", ["a", "b", "c", "d"], "c") for n in range(8)]
    items, places = quiz_of(questions, "x/0")
    assert quiz_of(questions, "x/0") == (items, places)
    assert quiz_of(questions, "x/1") != (items, places)
    assert [item["options"][place] for item, place in zip(items, places, strict=True)] == ["c"] * 8
    assert len(set(places)) > 1


def test_a_rubric_is_of_what_is_there(annotate: Any, world: Path, out: Path) -> None:
    annotate(what="rubric", number=5, max_rows=9)
    for row in read(out):
        facts = set(main_facts(scene_of((world / row["image"]).read_bytes())))
        assert 0 < len(row["rubric"]) <= 5
        assert all(covered(read_fact(one["criterion"]), facts) for one in row["rubric"])
        assert {one["weight"] for one in row["rubric"]} <= {1, 2, 3}
        assert row["rubric_model"] == "shapes/oracle"
        assert "questions" not in row
    assert {task for (task,) in _ledger(out, "SELECT DISTINCT task FROM calls")} == {"write_rubric"}
    written = out.read_bytes()
    out.unlink()
    annotate(what="rubric", number=5, max_rows=9)  # from the cache
    assert out.read_bytes() == written
    assert _ledger(out, "SELECT count(*) FROM calls") == [(9,)]


def _ledger(out: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(out.with_name(f"{out.name}.ledger.sqlite")) as ledger:
        return ledger.execute(query).fetchall()


def test_rows_that_fail_are_kept_as_they_were_and_counted(
    annotate: Any, world: Path, data: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read(data)[:10]
    rows[1]["image"] = "shapes/missing.png"
    rows.append({**rows[0], "id": "again"})  # another row of an image that is there
    rows.append("no row")
    data.write_text(json.dumps(rows))
    kinds = {"refusal": "refused", "prose": "invalid", "400": "rejected"}
    wrong = dict(zip(names(world)[3:6], kinds, strict=True))
    options = {**FAULTY, "judge.max_failed_share": 1}
    annotate(**options, fault=about(wrong, as_sent(world)))
    new = read(out)
    assert len(new) == 12
    without = [number for number, row in enumerate(new) if "questions" not in row]
    assert without == [1, 3, 4, 5, 11]
    assert [new[number] for number in without] == [rows[number] for number in without]
    assert new[10] == {**rows[10], "questions": new[0]["questions"], "questions_model": "faulty/model"}
    assert {entry["row"]: entry["kind"] for entry in quarantine(out)} == {
        1: "missing_file", 3: "refused", 4: "invalid", 5: "rejected", 11: "malformed_row"
    }  # fmt: skip
    assert "6 of 11 rows have questions" in capsys.readouterr().out
    before = len(_ledger(out, "SELECT 1 FROM calls"))
    annotate(**options)  # not asked again, until somebody wants it
    assert len(_ledger(out, "SELECT 1 FROM calls")) == before
    annotate(**options, retry_quarantined="true")
    assert [number for number, row in enumerate(read(out)) if "questions" not in row] == [1, 11]


def test_a_row_of_which_no_question_is_left_is_listed(
    annotate: Any, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples.shapes import oracle

    monkeypatch.setattr(oracle, "_truth", lambda scene: "")  # with the image it guesses as it does without
    with pytest.raises(SystemExit):
        annotate(max_rows=4)
    assert [entry["kind"] for entry in quarantine(out)] == ["no_questions"] * 4
    assert "was not written, since no row has an answer" in capsys.readouterr().err


def test_the_budget_ends_the_run_and_a_larger_one_continues_it(
    annotate: Any, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    price = json.dumps({"faulty/model": {"input": 10.0, "output": 100.0}})
    options = {**FAULTY, "judge.prices": price, "judge.budget_usd": 0.3, "max_rows": 30}
    annotate(**options)  # returns: a spent budget is no error
    said = capsys.readouterr().out
    assert "judge.budget_usd: $0.3" in said
    assert "The same command goes on from here" in said
    assert not out.exists()
    asked = FaultyOracle.asked.copy()
    annotate(**{**options, "judge.budget_usd": 9})
    assert len(read(out)) == 30
    assert not set(asked) & set(FaultyOracle.asked)
    assert set((asked + FaultyOracle.asked).values()) == {1}


def test_kill_9_at_any_moment_loses_no_row_and_pays_for_none_twice(
    recaption_arguments: Any,
    cli: Any,
    server: JudgeServer,
    over_http: dict[str, object],
    data: Path,
    tmp_path: Path,
) -> None:
    def arguments(name: str) -> list[str]:
        own = {"out": tmp_path / name / "new.json", "judge.cache": tmp_path / f"{name}.sqlite"}
        return recaption_arguments(
            "annotate", **{"data": data, **over_http, **own, "max_rows": 24, "trials": 1}
        )

    cli(arguments("whole"))
    total = cached(tmp_path / "whole.sqlite").total()
    server.requests.clear()
    server.records.clear()
    server.latency = 0.08
    process = start(arguments("killed"))
    wait_for(
        process, tmp_path / "killed.sqlite", random.Random(time.time_ns()).randrange(4, int(0.8 * total))
    )
    process.kill()
    process.communicate()
    known = cached(tmp_path / "killed.sqlite").total()
    assert 4 <= known < total
    assert not (tmp_path / "killed/new.json").exists()
    server.latency = 0.0
    cli(arguments("killed"))
    assert (tmp_path / "killed/new.json").read_bytes() == (tmp_path / "whole/new.json").read_bytes()
    again = [count - 1 for count in Counter(answered(server)).values()]
    assert sum(again) <= 4  # in flight when it was killed: so many calls at once


def test_all_problems_are_reported_at_once(annotate: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        annotate(what="null", number=0, trials=-1, out="rows.txt")
    assert sorted(problem.split()[0].rstrip(":") for problem in refused.value.problems) == [
        "number", "out", "trials", "what"
    ]  # fmt: skip


def test_what_was_written_trains(
    annotate: Any, fit_arguments: Any, cli: Any, out: Path, tmp_path: Path
) -> None:
    annotate(max_rows=12, trials=1)
    questions = tmp_path / "questions.json"
    questions.write_bytes(out.read_bytes())
    _begin_anew(out)
    annotate(data=questions, what="rubric", max_rows=12)
    for method, reward in (("caprl", "caprl"), ("rubicap", "rubicap")):
        options = {"data.data": out, "data.val_size": 2, "trainer.max_steps": 1, "run_dir": tmp_path / method}
        command, *arguments = fit_arguments(**options)
        overlay = ["--config", str(ROOT / f"configs/methods/{method}.yaml")]
        cli([command, *arguments[:2], *overlay, *arguments[2:]])
        (row,) = [row for row in metrics(tmp_path / method) if row["train/loss"]]
        assert 0 <= float(row[f"train/{reward}"]) <= 1


def test_who_is_blind_is_shown_no_image(annotate: Any) -> None:
    seen: Counter[tuple[str, bool]] = Counter()

    def watch(messages: Any) -> None:
        seen[task_of(messages), bool(image_urls(messages))] += 1

    annotate(**FAULTY, max_rows=3, trials=2, fault=watch)
    assert seen == {("write_questions", True): 3, ("quiz", True): 6, ("quiz", False): 6}

"""Means, paired differences and verdicts of a study, and the files that they are written to."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from balcap.benchmarks.scores import Score
from balcap.report.run import Run
from balcap.report.study import (
    Arm,
    Claim,
    Group,
    Study,
    dominated,
    measure_title,
    steps_until,
    t_interval,
    verdict,
)
from balcap.report.study_curves import curve_table, learning_curve
from balcap.report.study_page import attention, write_study
from tests.report_runs import write_run


def _run(folder: Path, scores: dict[str, float | None], recall: float = 0.5) -> Run:
    """A run whose folder holds little: benchmarks, and two validations."""
    folder.mkdir(parents=True)
    entries = {name: {"score": score, "low": None, "high": None, "n": 20} for name, score in scores.items()}
    (folder / "benchmarks.json").write_text(json.dumps(entries))
    (folder / "metrics.csv").write_text(f"step,val/recall\n0,0.1\n9,{recall}\n")
    return Run.read(folder)


def _study(tmp_path: Path, **options: object) -> Study:
    """Two settings of three seeds: differences of DCScore 2, 3, 4; the second lacks CaptionQA for its last seed."""
    arms = []
    for name, start, gains in (("base", 50.0, (0, 0, 0)), ("new", 50.0, (2, 3, 4))):
        runs: dict[int, Run | None] = {}
        for seed, gain in enumerate(gains):
            captionqa = None if (name, seed) == ("new", 2) else 60.0 - gain
            scores = {"dcscore": start + 10 * seed + gain, "dcscore/recall": 1.0, "captionqa": captionqa}
            runs[seed] = _run(tmp_path / f"{name}-{seed}", scores)
        arms.append(Arm(name, name.title(), runs))
    return Study(title="A question", arms=arms, reference="base", axes=("dcscore", "captionqa"), **options)


def test_an_interval_is_students() -> None:
    # mean 3, s = 1, n = 3: 4.3027 * 1 / sqrt(3) = 2.4841
    score = t_interval([2.0, 3.0, 4.0])
    assert (score.value, score.n) == (3.0, 3)
    assert score.low == pytest.approx(3 - 2.4841, abs=1e-4)
    assert score.high == pytest.approx(3 + 2.4841, abs=1e-4)
    assert t_interval([5.0]).value == 5.0
    assert math.isnan(t_interval([5.0]).low)
    assert math.isnan(t_interval([]).value)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    study = _study(tmp_path)
    gap = study.difference("new", "dcscore")
    assert (gap.value, gap.n) == (3.0, 3)
    # seeds are 10 apart, which the pairing takes out: 4.3027 / sqrt(3) around 3, not more than 10
    assert gap.low == pytest.approx(3 - 2.4841, abs=1e-4)
    assert study.arm("new").mean("dcscore").low < 50
    assert study.measures == ["dcscore", "captionqa", "val/recall"]


@pytest.mark.parametrize(
    ("expect", "low", "high", "word"),
    [
        ("higher", 0.1, 0.3, "holds"),
        ("higher", -0.1, 0.3, "does not show"),
        ("higher", -0.3, -0.1, "contradicted"),
        ("lower", -0.3, -0.1, "holds"),
        ("lower", 0.1, 0.3, "contradicted"),
        ("equal", -0.1, 0.2, "holds"),
        ("equal", -0.1, 0.6, "does not show"),
        ("equal", 0.6, 0.9, "contradicted"),
        ("equal", math.nan, math.nan, "does not show"),
        ("higher", math.nan, math.nan, "does not show"),
    ],
)
def test_a_verdict_needs_the_whole_interval(expect: str, low: float, high: float, word: str) -> None:
    assert verdict(expect, Score((low + high) / 2, low, high, 3), within=0.5) == word


def test_what_is_missing_is_counted_and_is_no_zero(tmp_path: Path) -> None:
    study = _study(tmp_path)
    assert study.missing("captionqa") == {"New": 1}
    assert study.arm("new").mean("captionqa").value == 57.5  # of 58 and 57
    assert study.difference("new", "captionqa").n == 2
    assert any("CaptionQA is missing for finished runs: New 1." in line for line in attention(study))
    arms = [study.arms[0], Arm("gone", "Gone", {0: None, 1: None, 2: None})]
    gone = Study("t", arms, "base", [Claim("c", "gone", "dcscore")], unfinished={"gone-0": "to do"})
    assert gone.verdicts[0].word == "not run"
    assert "gone-0: to do; its figures are missing." in list(attention(gone))
    paths = write_study(gone, tmp_path / "out")
    rows = list(csv.DictReader(paths[1].open()))
    row = next(row for row in rows if (row["run"], row["measure"]) == ("gone", "dcscore"))
    assert (row["mean"], row["seeds"], row["missing_seeds"], row["seed_0"]) == ("", "0", "3", "")
    assert "| Gone | – (0 of 3 seeds) |" in paths[0].read_text()


def test_a_measure_that_no_run_has_is_named_once_with_the_nearest(tmp_path: Path) -> None:
    claims = [Claim("Better", "new", "dcscores"), Claim("Sooner", "new", "val/recal@0.3")]
    study = _study(tmp_path, given_measures=["dcscore", "val/recal"], claims=claims)
    assert list(attention(study)) == [
        "val/recal: no finished run has this measure. Is it val/recall?",
        "dcscores: no finished run has this measure. Is it dcscore?",
    ]


def test_dominated_needs_every_view() -> None:
    points = {"a": (1.0, 2.0, 3.0), "b": (1.0, 1.0, 3.0), "c": (0.0, 5.0, 0.0), "twin": (1.0, 2.0, 3.0)}
    assert dominated(points) == {"b"}


def test_the_files_tell_the_same(tmp_path: Path) -> None:
    claims = [
        Claim("New is better", "new", "dcscore", source="Table 3"),
        Claim("New is better at questions", "new", "captionqa"),
        Claim("New is worse", "new", "dcscore", expect="lower"),
    ]
    report = tmp_path / "new-1/report.html"
    study = _study(tmp_path, claims=claims)
    report.write_text("a report")
    paths = write_study(study, tmp_path)
    text, page = paths[0].read_text(), paths[3].read_text()
    said = "DCScore, New − Base: +3.0 [+0.5, +5.5] (expected higher; 3 seeds)"
    assert f"| New is better | **holds** | {said} | Table 3 |" in text
    assert (
        "| New is better at questions | **does not show** |" in text
    )  # -2 and -3: two seeds, a wide interval
    assert "| New is worse | **contradicted** |" in text
    assert said in page
    assert 'href="new-1/report.html"' in page
    assert page.count('href="new-') == 1
    assert "1 Base; 2 New. Hollow" in page
    assert "http://" not in page.split("<script")[0]
    assert "DCScore, 20 images" in text
    rows = {(row["run"], row["measure"]): row for row in csv.DictReader(paths[1].open())}
    row = rows["new", "dcscore"]
    assert (float(row["mean"]), float(row["difference"]), row["images"]) == (63.0, 3.0, "20")
    assert float(row["seed_2"]) == 74.0
    assert rows["base", "dcscore"]["difference"] == ""
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_groups_have_tables_and_references_of_their_own(tmp_path: Path) -> None:
    study = _study(tmp_path)
    third = Arm("third", "Third", {0: None, 1: study.arm("new").runs[1], 2: None})
    fourth = Arm("fourth", "Fourth", dict.fromkeys(study.seeds))
    groups = [
        Group("Table A", ["new", "base"]),
        Group("Table B", ["third", "base"], "base"),
        Group("Table C", ["fourth", "base"]),
    ]
    claims = [Claim("New is better", "new", "dcscore"), Claim("Fourth is better", "fourth", "dcscore")]
    unfinished = {f"third-{seed}": "to do" for seed in (0, 2)}
    whole = Study(
        title="t",
        arms=[*study.arms, third, fourth],
        reference="base",
        claims=claims,
        given_measures=("dcscore",),
        curve="val/recall",
        axes=study.axes,
        unfinished=unfinished,
        groups=groups,
    )
    paths = write_study(whole, tmp_path / "out")
    text, page = paths[0].read_text(), paths[3].read_text()
    first, second = text.split("## Table B")
    assert "## Table A" in first
    assert "### Difference to New" in first
    assert "| Base | -3.0 [-5.5, -0.5] |" in first
    assert "### Difference to Base" in second
    assert "| Third | 63.0 (1 of 3 seeds) |" in second
    assert "Table C" not in text + page, "none of its own runs is finished"
    assert "| Fourth is better | **not run** |" in second
    assert "| New is better | **holds** |" in second  # of the whole study, against its own reference
    assert "third-0, third-2: to do; their figures are missing." in text
    assert page.count("<h2>Table") == 2
    assert page.count("while training") >= 2
    rows = list(csv.DictReader(paths[1].open()))
    assert [(row["group"], row["run"]) for row in rows] == [
        ("Table A", "new"), ("Table A", "base"), ("Table B", "third"), ("Table B", "base"), ("Table C", "fourth"),
        ("Table C", "base"),
    ]  # fmt: skip
    assert float(rows[1]["difference"]) == -3.0
    assert rows[3]["difference"] == ""
    nothing = Study("t", [study.arms[0], fourth], "base", groups=[Group("Table C", ["fourth"])])
    assert [part.title for part in nothing.shown] == ["Table C"], "a page without any table says less"


def test_many_unfinished_runs_are_counted(tmp_path: Path) -> None:
    whole = Study("t", _study(tmp_path).arms, "base", unfinished={f"run-{n}": "to do" for n in range(8)})
    named = ", ".join(f"run-{n}" for n in range(6))
    assert f"{named} and 2 more: to do; their figures are missing." in list(attention(whole))


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    study = _study(tmp_path, claims=[Claim("New is better", "new", "dcscore")])
    arms = [Arm(arm.name, arm.title, {0: arm.runs[0]}) for arm in study.arms]
    one = Study("t", arms, "base", study.claims, axes=study.axes)
    text = write_study(one, tmp_path / "out")[0].read_text()
    assert "One seed: there is no interval" in text
    assert (
        "| New is better | **does not show** | DCScore, New − Base: +2.0 (expected higher; 1 seed) |" in text
    )


def test_images_of_a_validation_are_counted(tmp_path: Path) -> None:
    run = Run.read(write_run(tmp_path / "a", steps=3, images=7))
    shutil.rmtree(tmp_path / "a/rollouts/_images")
    assert Arm("a", "a", {0: run}).images("val/recall") == [7]
    assert Arm("a", "a", {0: run}).images("train/recall") == []


def test_the_step_at_which_a_level_is_reached_lies_between_two_validations() -> None:
    series = ([0.0, 10.0, 20.0, 30.0], [0.2, 0.6, math.nan, 0.4])
    assert steps_until(series, 0.5) == pytest.approx(7.5)
    assert steps_until(series, 0.1) == 0  # from the start
    assert steps_until(([0.0, 10.0, 20.0], [0.2, math.nan, 0.6]), 0.4) == pytest.approx(10)
    assert math.isnan(steps_until(series, 0.7))
    assert math.isnan(steps_until(([], []), 0.7))


def test_learning_curves_and_levels_are_written(tmp_path: Path) -> None:
    measures = ("val/recall", "val/recall@0.3", "val/recall@0.9")
    study = _study(tmp_path, given_measures=measures, curve="val/recall")
    curve = learning_curve(study.arm("new"), "val/recall")
    assert {step: score.value for step, score in curve.items()} == {
        0: pytest.approx(0.1),
        9: pytest.approx(0.5),
    }
    assert study.arm("new").mean("val/recall@0.3").value == pytest.approx(4.5)
    assert curve_table(study, "val/recall") == [["", "9"], ["Base", "0.500"], ["New", "+0.000 ± 0.000"]]
    text = "\n".join(attention(study))
    assert "steps to recall 0.9: never reached in finished runs: Base 3, New 3." in text
    files = {path.name: path for path in write_study(study, tmp_path)}
    assert "recall (held out) while training" in files["study.html"].read_text()
    assert "| New | 0.500 [0.500, 0.500] | 4.500 [4.500, 4.500] | –" in files["study.md"].read_text()


def test_measures_are_named_as_people_write_them() -> None:
    names = ("dcscore", "b_capscore/linguistic", "val/b_capscore", "train/kl", "mine")
    titles = ["DCScore", "b-CapScore, linguistic", "b-CapScore (held out)", "train, kl", "mine"]
    assert [measure_title(name) for name in names] == titles

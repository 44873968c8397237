"""Does a metric agree with people? Against values worked by hand, and on the embedded world with its judge."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcap.benchmarks.agreement import JudgedMetric, Pair, Rated, agreement, main, pairs_of, read_table
from balcap.data.reader import ImageFolder
from balcap.judge import Judge, Rate, Rating
from examples.shapes.captions import clean, flawed
from examples.shapes.oracle import answer
from examples.shapes.scene import scene_of
from tests.judge_replies import task_of
from tests.judge_server import JudgeServer


def test_the_three_figures_by_hand() -> None:
    # human 1 2 3 4, metric 1 3 2 4: of six pairs five agree and one does not: tau = 4 / 6; rho = 1 - 6 * 2 / 60
    rated = [
        Rated(f"{i}", human, metric)
        for i, (human, metric) in enumerate(zip((1, 2, 3, 4), (1, 3, 2, 4), strict=True))
    ]
    # right, wrong, a tie of the metric (half), a tie of the people (left out), a missing one (left out)
    pairs = [Pair("0", 1, 1), Pair("1", 1, -1), Pair("2", -1, 0), Pair("3", 0, 1), Pair("4", 1, math.nan)]
    found = agreement(rated, pairs)
    assert found["kendall_tau_b"].value == pytest.approx(4 / 6)
    assert found["spearman"].value == pytest.approx(1 - 6 * 2 / 60)
    assert found["pairwise_accuracy"].value == pytest.approx(0.5)
    assert (found["kendall_tau_b"].n, found["pairwise_accuracy"].n) == (4, 3)


def test_pairs_are_of_one_image() -> None:
    rated = [Rated("a", 1, 5), Rated("a", 2, 4), Rated("b", 3, 3)]
    assert pairs_of(rated) == [Pair("a", -1, 1)]


def test_captions_of_one_image_are_drawn_together() -> None:
    draw = np.random.default_rng(0)
    alone = [Rated(str(i), x, x + draw.normal()) for i, x in enumerate(draw.normal(size=40))]
    repeated = [Rated(one.image, one.human, one.metric) for one in alone for _ in range(5)]
    one, five = agreement(alone, [])["spearman"], agreement(repeated, [])["spearman"]
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.15), "no more is known of them"


@pytest.fixture
def table(world: Path, tmp_path: Path) -> Path:
    """Two captions of each of 30 pictures: people like the true one."""
    rows = []
    for number, entry in enumerate(json.loads((world / "shapes.json").read_text())[:30]):
        scene, rng = scene_of((world / entry["image"]).read_bytes()), np.random.default_rng(number)
        shared = {"image": entry["image"], "reference": entry["conversations"][1]["value"]}
        rows.append(
            shared
            | {
                "caption_1": clean(scene, rng),
                "caption_2": flawed(scene, rng),
                "human": 1,
                "len_1": 2,
                "len_2": 1,
            }
        )
    path = tmp_path / "people.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def server():
    server = JudgeServer()
    yield server
    server.close()


JUDGE = json.dumps(
    {"model": "shapes/oracle", "providers": {"shapes": "examples.shapes.oracle.Oracle"}, "cache": None}
)


@pytest.mark.parametrize("metric", ["b_capscore", "precision", "compare"])
def test_the_worlds_judge_agrees_with_its_people(table: Path, world: Path, metric: str, capsys) -> None:
    main([str(table), "--metric", metric, "--image_root", str(world), f"--judge={JUDGE}"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pairwise_accuracy")
    assert float(line.split()[1]) > 0.8
    assert line.endswith("(30 images)")


def test_a_column_needs_no_judge(table: Path, capsys) -> None:
    main([str(table), "--metric", "column:len"])
    assert "pairwise_accuracy  +1.000 [+1.000, +1.000]  (30 images)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no column none; it has image"):
        main([str(table), "--metric", "column:none"])


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"image": "a", "caption": "x"}], "row 0: it has no human; it has image, caption"),
        ([{"image": "a", "caption_1": "x", "human": 1}], "row 0: it has no caption_2"),
        ([{"image": "a", "caption_1": "x", "caption_2": "y", "human": "left"}], "human is 'left'"),
        ({}, "holds no list of rows"),
        (["x"], "row 0: it is no object"),
        ([{"image": "a", "caption": ["x"], "human": 1}], "row 0: \\['x'\\] is no text"),
        ([{"image": "a", "caption": "x", "human": "good"}], "row 0: human is 'good', which is no number"),
    ],
)
def test_tables_that_cannot_be_used(rows: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=why):
        read_table(path)


def test_what_is_missing_is_named(table: Path) -> None:
    with pytest.raises(ValueError, match=r"metric: 'cider' is none of .*, column:<name>"):
        main([str(table), "--metric", "cider"])
    with pytest.raises(ValueError, match="needs --judge"):
        main([str(table)])


def test_what_cannot_be_scored_is_refused_before_anything_is_paid(
    table: Path, world: Path, tmp_path: Path
) -> None:
    rows = [
        {key: value for key, value in row.items() if key != "reference"}
        for row in csv.DictReader(table.open())
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="b_capscore needs a column reference; row 0 has none"):
        main([str(path), "--image_root", str(world), f"--judge={JUDGE}"])
    with pytest.raises(ValueError, match="image_root: there is no folder /no/such"):
        main([str(table), "--image_root", "/no/such", f"--judge={JUDGE}"])


def test_a_judge_that_stops_is_said(table: Path, world: Path, server) -> None:
    server.always = "500"
    judge = json.dumps(
        {"model": "openai/gpt-4o-mini", "cache": None, "retries": 0, "params": {"api_base": server.url}}
    )
    with pytest.raises(ValueError, match=r"stopped: the judge is not available"):
        main([str(table), "--metric", "linguistic", "--image_root", str(world), f"--judge={judge}"])


def test_a_missing_judgment_is_missing_though_another_is_zero(world: Path, tmp_path: Path) -> None:
    """The language of an empty-handed caption is rated 0, and its precision cannot be had: NaN, not 0."""
    entry = json.loads((world / "shapes.json").read_text())[0]

    def half(messages: Any) -> dict[str, Any]:
        if task_of(messages) == "rate":
            return Rate().encode([Rating(0.0, 0.0, 0.0)])
        if task_of(messages) == "verify":
            return {"verdicts": []}  # never as many as were asked for
        return answer(messages)

    server = JudgeServer(half)
    params = {"api_base": server.url}
    judge = Judge("openai/gpt-4o-mini", cache=None, retries=0, max_failed_share=1.0, params=params)
    try:
        judged = JudgedMetric(judge, ImageFolder(world), "b_capscore")
        row = {"image": entry["image"], "caption": "There is a red circle.", "reference": "A red circle."}
        judged.judge_all([row])
        assert math.isnan(judged.score(entry["image"], row["caption"]))
    finally:
        judge.close()
        server.close()

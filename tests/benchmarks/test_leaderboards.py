"""Published leaderboards follow from their own columns by our rules: what is a mean of what.

CaptionQA: overall, natural, document, e-commerce, embodied (github.com/CaptionQA/website, 2025-11). CapArena-Auto: average,
against GPT-4o, CogVLM2 and MiniCPM-V, words (readme of njucckevin/CapArena).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from balcap.benchmarks import CapArena
from balcap.benchmarks.caparena import BASELINES, Battle, official_scores
from balcap.benchmarks.captionqa import DOMAINS
from balcap.benchmarks.scores import Statistic

BOARDS = json.loads((Path(__file__).parent / "leaderboards.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", BOARDS["captionqa"], ids=lambda row: row[0])
def test_captionqa_is_the_mean_of_its_domains(row: list[Any]) -> None:
    overall, *domains = row[1:]
    # 10, 20, 30, 40 questions: the domains count alike, whatever their size
    weights = [10.0, 20.0, 30.0, 40.0]
    totals = [mean * weight for mean, weight in zip(domains, weights, strict=True)]
    board = Statistic.of(list("abcd"), totals, weights, list(DOMAINS)).score()
    assert board.value == pytest.approx(overall, abs=0.0051)


@pytest.mark.parametrize("row", BOARDS["caparena"], ids=lambda row: row[0])
@pytest.mark.parametrize("official", [True, False])
def test_caparena_is_the_mean_over_three_baselines(row: list[Any], official: bool) -> None:
    model, mean, *scores = row[:5]
    battles = []
    for name, score in zip(BASELINES, scores, strict=True):
        if name == model:
            continue  # it has no battles against itself
        margin = round(2 * score)  # (wins - losses) / 2 of 200 battles
        outcomes = ["win" if margin > 0 else "loss"] * abs(margin) + ["tie"] * (200 - abs(margin))
        battles += [Battle(name, outcome, 100) for outcome in outcomes]  # type: ignore[arg-type]
    assert official_scores(battles)[1] == pytest.approx(mean, abs=0.0051)
    points = {"win": 1.0, "loss": -1.0, "tie": 0.0}
    records = [{"baseline": b.baseline, "words": b.words, "points": points[str(b.outcome)]} for b in battles]
    found = CapArena(data="-", official=official).statistics([str(i) for i in range(len(records))], records)
    if official or model not in BASELINES:  # officially also where one of the three is missing
        assert found["caparena"](range(len(records))) == pytest.approx(mean, abs=0.0051)
    for name, score in zip(BASELINES, scores, strict=True):
        if name != model:
            assert found[f"caparena/{name}"].score().value == pytest.approx(score)

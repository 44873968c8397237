"""The official results of recorded judge answers: what the authors' own code made of them.

The cases are made up; `parity/` holds some of each kind. ``BALCAP_PARITY`` may name a folder with more.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from balcap.benchmarks import caparena, captionqa, dcscore
from balcap.benchmarks.caparena import Battle
from balcap.benchmarks.scores import Statistic
from balcap.judge.questions import CANNOT

FOLDERS = [Path(__file__).parent / "parity", *map(Path, filter(None, [os.environ.get("BALCAP_PARITY")]))]


def cases(name: str) -> list[Any]:
    return [json.loads((folder / name).read_text(encoding="utf-8")) for folder in FOLDERS]


def exact(value: Any) -> Any:
    return pytest.approx(value, abs=1e-9, rel=0)


# ── DCScore ──────────────────────────────────────────────────────────────────────────────────────────


def official_image(image: dict[str, Any]) -> tuple[dcscore.ImageScore | None, list[str]]:
    """As the runner does it: at most five tries; what the failed ones failed after."""
    failed = []
    for answers in image["tries"][: dcscore.MOST_TRIES]:
        try:
            return dcscore.official_try(
                answers["extract"],
                answers["match"] or [],
                answers["verify"] or [],
                len(image["oracle_facts"]),
            ), failed
        except dcscore.TryFailed as error:
            failed.append(error.after)
    return None, failed


@pytest.mark.parametrize("data", cases("dcscore.json"))
def test_dcscore_image_by_image(data: dict[str, Any]) -> None:
    scores = []
    for image in data["images"]:
        expected = image["expected"]
        score, failed = official_image(image["input"])
        assert failed == [entry["after"] for entry in expected["failed_tries"]], image["id"]
        assert (score is not None) == expected["valid"], image["id"]
        if score is None:
            continue
        scores.append(score.score)
        assert len(failed) + 1 == expected["tries_used"]
        for (whole, relevant), trial in zip(score.trials, expected["trials"], strict=True):
            for passed, ending in ((whole, ""), (relevant, "_relevant")):
                got = (passed.precision, passed.recall, passed.f1, passed.total)
                names = ("precision", "recall", "f1_score", "total_atomic_facts")
                assert got == exact(tuple(trial[f"{name}{ending}"] for name in names)), image["id"]
        for what, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
            assert score.mean(what) == exact(expected[name])
            assert score.mean(what, relevant=True) == exact(expected[f"{name}_relevant"])
        assert score.score == exact(expected["score"])
    dropped = [image["id"] for image in data["images"] if official_image(image["input"])[0] is None]
    assert dropped == data["expected"]["dropped"]
    assert (len(data["images"]), len(scores)) == (data["expected"]["images"], data["expected"]["valid"])
    assert 100 * fmean(scores) == exact(data["expected"]["dcscore"])
    assert f"DCScore: {100 * fmean(scores):.2f}" == data["expected"]["printed"]


@pytest.mark.parametrize("data", cases("dcscore.json"))
def test_dcscore_answers_are_parsed_as_the_authors_do(data: dict[str, Any]) -> None:
    def kind(text: str | None) -> Any:
        value = dcscore.parse_answer(text)
        return len(value) if isinstance(value, list) else None if value is None else type(value).__name__

    for image in data["images"]:
        for answers, parsed in zip(image["input"]["tries"], image["expected"]["parsed"], strict=False):
            assert kind(answers["extract"]) == parsed["extract"], image["id"]
            for call in ("match", "verify"):
                if parsed[call] is not None:
                    assert [kind(text) for text in answers[call]] == parsed[call], image["id"]


# ── CaptionQA ────────────────────────────────────────────────────────────────────────────────────────


def captionqa_run(
    data: dict[str, Any], images: list[dict[str, Any]], run: str, by_domain: bool = False
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each image with question number -> what was scored, of one run of the authors' script."""
    captioned = [
        image
        for image in images
        if image["row"].get("id") is not None and str(image["row"]["id"]) in data["captions"]
    ]
    asked = captionqa.ask([image["row"] for image in captioned], official=True, by_domain=by_domain)
    for image, questions in zip(captioned, asked, strict=True):
        scored = {}
        for question in questions:
            shown = captionqa.letter_of(image["answers"][run][question.number], len(question.options))
            score = question.score(shown)
            chosen = None if shown is None else question.options[shown]
            scored[question.number] = {
                "order": list(question.order),
                "options": [str(option) for option in question.options],
                "letter": None if shown is None else captionqa.LETTERS[shown],
                "chosen": chosen,
                "correct": shown is not None
                and chosen != CANNOT
                and question.order[shown] == question.answer,
                "cannot": chosen == CANNOT,
                "score": score,
                "category": question.category,
            }
        yield image, scored


@pytest.mark.parametrize("data", cases("captionqa.json"))
@pytest.mark.parametrize("run", ["all", *captionqa.DOMAINS])
def test_captionqa_question_by_question(data: dict[str, Any], run: str) -> None:
    images = [image for image in data["images"] if run in ("all", image["row"].get("domain"))]
    field = "all" if run == "all" else "domain"
    done: list[dict[str, Any]] = []
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for image, scored in captionqa_run(data, images, field):
        for number, expected in enumerate(image["expected"][field]):
            got = scored.get(number)
            assert (got is None) == (expected is None)
            if got is not None:
                assert {name: got[name] for name in expected} == {
                    name: exact(value) if name == "score" else value for name, value in expected.items()
                }
        done += scored.values()
        by_domain.setdefault(image["row"]["domain"], []).extend(scored.values())
    expected = data["expected"]["all"] if run == "all" else data["expected"]["domain_runs"][run]
    assert_same(summary(done), expected)
    if run == "all":
        for domain in captionqa.DOMAINS:
            assert_same(summary(by_domain[domain]), data["expected"]["all_per_domain"][domain])


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """What the authors' script prints."""
    total, correct = sum(one["score"] for one in done), sum(one["correct"] for one in done)
    categories: dict[str, list[float]] = {}
    for one in done:
        categories.setdefault(one["category"] or "unknown", []).append(one["score"])
    return {
        "questions": len(done),
        "total_score": total,
        "average_score": total / len(done),
        "correct": correct,
        "accuracy": correct / len(done),
        "cannot": sum(one["cannot"] for one in done),
        "per_category": {
            name: {"questions": len(scores), "score": fmean(scores)} for name, scores in categories.items()
        },
    }


def assert_same(got: Any, expected: Any) -> None:
    """Equal, numbers to 1e-9, whatever the nesting."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same(got[key], expected[key])
    else:
        assert got == exact(expected)


@pytest.mark.parametrize("data", cases("captionqa.json"))
@pytest.mark.parametrize(("run", "mean"), [("all", "all_domain_mean"), ("domain", "domain_runs_mean")])
def test_captionqa_is_the_mean_of_the_domains(data: dict[str, Any], run: str, mean: str) -> None:
    done = list(captionqa_run(data, data["images"], run, by_domain=run == "domain"))
    totals = [sum(one["score"] for one in scored.values()) for _, scored in done]
    weights = [float(len(scored)) for _, scored in done]
    domains = [image["row"]["domain"] for image, _ in done]
    names = [str(number) for number in range(len(done))]
    assert Statistic.of(names, totals, weights, domains).score().value == exact(data["expected"][mean])


# ── CapArena ─────────────────────────────────────────────────────────────────────────────────────────


def battle_of(one: dict[str, Any]) -> tuple[Battle, str | None, int]:
    """A battle, its label, and the calls that it took."""
    given, label, calls = one["input"], None, 0
    for text in given["answers"][: caparena.CALLS]:
        calls += 1
        if (label := caparena.label_of(text)) is not None:
            break
    outcome = caparena.outcome_of(label, given["order"] == "test_first")
    words = caparena.count_words(given["test_caption"], official=True)
    return Battle(given["baseline"], outcome, words), label, calls


@pytest.mark.parametrize("data", cases("caparena.json"))
def test_caparena_battle_by_battle(data: dict[str, Any]) -> None:
    for run in data["runs"]:
        battles, counts = [], {name: Counter[str]() for name in caparena.BASELINES}
        for one in run["battles"]:
            if not one["expected"].get("judged_by_official", True):
                continue
            battle, label, calls = battle_of(one)
            battles.append(battle)
            counts[battle.baseline][battle.outcome or ("label_not_accepted" if label else "no_label")] += 1
            expected = one["expected"]
            assert (label, calls) == (expected["label"], expected["calls"])
            unjudged = {"label_not_accepted", "no_label"}
            assert (battle.outcome or expected["outcome"]) == expected["outcome"]
            assert (battle.outcome is None) == (expected["outcome"] in unjudged)
        scores, mean = caparena.official_scores(battles)
        for name, own in run["expected"]["per_baseline"].items():
            seen = counts[name]
            named = {"wins": seen["win"], "losses": seen["loss"], "ties": seen["tie"]}
            judged = sum(named.values())
            unjudged = {kind: seen[kind] for kind in ("label_not_accepted", "no_label")}
            assert_same(named | unjudged | {"judged": judged, "score": scores[name]}, own)
        assert mean == exact(run["expected"]["score_avg"])
        words = fmean(battle.words for battle in battles)
        assert words == exact(run["expected"]["length_avg"])
        printed = [f"{number:.2f}" for number in (mean, *scores.values(), words)]
        assert " | ".join([run["test_model"], *printed, ""]).strip() == run["expected"]["printed"]

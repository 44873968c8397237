"""From sampled rows to the whole run, and what is printed."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from balcap.estimate.forecast import Course, Forecast, Sample, Setting, forecast, landmarks, play
from balcap.estimate.language import Language, stand_in
from balcap.estimate.plan import Plan
from balcap.estimate.rehearsal import Counting
from balcap.estimate.report import Note, Report
from balcap.estimate.tokens import reasoning_tokens, text_counter
from balcap.estimate.usage import Usage, Usages
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from balcap.judge import Group, Judge, Task
from balcap.judge.client import Price
from balcap.judge.tasks import Message, Schema
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite

MODEL = "openai/gpt-4o-mini"
REFERENCE = "a b c d e f g h i j k l m n o p q r s t"  # 20 words: 5 assertions at 4 words each


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def _setting(judge: Judge, **language: float) -> Setting:
    from balcap.estimate.rehearsal import PaidAnswers

    suite = RewardSuite([Precision(), Recall(), Linguistic()])
    spoken = Language(**{"words_per_assertion": 4, "words_in_assertion": 3, "growth": 1.0, **language})
    counting = Counting(lambda text: 1, image=1000, reasoning=0, schema=False)
    return Setting(
        judge, suite, spoken, counting, PaidAnswers(None), lambda s, n: stand_in(s.reference, 20, n)
    )


def _sample(units: Sequence[str] | None = None) -> Sample:
    return Sample("a", _png(), REFERENCE, units)


def _calls(used: Usages) -> dict[str, float]:
    return {task: usage.calls for (task, _), usage in used.items()}


def _items(used: Usages) -> dict[str, float]:
    return {task: usage.items for (task, _), usage in used.items()}


def test_a_group_shares_calls_and_a_reference_is_taken_apart_once() -> None:
    course = play(_setting(Judge(MODEL, cache="x")), "group", [_sample()], captions=8, visits=2)
    first, second = course.mean(1), course.mean(2)
    # 8 captions, 4 a call, and the reference; 40 assertions, 60 a call; 8 captions in one match; each rated alone
    assert _calls(first) == {"decompose": 3, "verify": 1, "match": 1, "rate": 8}
    assert _items(first) == {"decompose": 9, "verify": 40, "match": 8, "rate": 8}
    assert _calls(second) == {"decompose": 2, "verify": 1, "match": 1, "rate": 8}
    # a system and a user text of one token each, and the image
    assert first["verify", MODEL].tokens_in == 1002
    assert first["rate", MODEL].tokens_in == 8 * 2


def test_units_of_the_data_are_not_asked_for() -> None:
    course = play(_setting(Judge(MODEL)), "group", [_sample(["A dog."])], captions=8, visits=1)
    assert _items(course.mean(1)) == {"decompose": 8, "verify": 40, "match": 8, "rate": 8}


def test_the_settings_of_the_judge_split_the_calls() -> None:
    judge = Judge(MODEL, per_call={"verify": 10, "rate": 4, "decompose": 8})
    course = play(_setting(judge), "group", [_sample()], captions=8, visits=1)
    assert _calls(course.mean(1)) == {"decompose": 2, "verify": 4, "match": 1, "rate": 2}


def test_per_rollout_asks_about_each_caption_alone() -> None:
    course = play(_setting(Judge(MODEL)), "per_rollout", [_sample()], captions=8, visits=1)
    assert _calls(course.mean(1)) == {"decompose": 9, "verify": 8, "match": 8, "rate": 8}
    assert _items(course.mean(1))["verify"] == 40


def test_verdicts_are_remembered_over_epochs_as_far_as_captions_repeat_themselves() -> None:
    course = play(_setting(Judge(MODEL), growth=0.5), "group", [_sample()], captions=4, visits=9)
    # n captions hold 5 n ** 0.5 assertions: 10 after 4, 14.1 after 8, 28.3 after 32, 30 after 36
    verified = [_items(course.mean(visit)).get("verify", 0) for visit in (1, 2, 9)]
    assert verified == pytest.approx([10, 4.14, 1.72], abs=1)


def test_visits_in_between_are_filled_in() -> None:
    used = {1: [Usages({("t", "m"): Usage(calls=10)})], 3: [Usages({("t", "m"): Usage(calls=4)})]}
    course = Course(used)
    assert _calls(course.mean(2)) == {"t": 7}
    assert _calls(course.over([100, 100, 10])) == {"t": 100 * 10 + 100 * 7 + 10 * 4}


@given(st.integers(1, 2000))
def test_few_visits_are_played_of_many(visits: int) -> None:
    played = landmarks(visits)
    assert played[0] == 1
    assert played[-1] == visits
    assert played == sorted(set(played))
    assert len(played) <= 25


def _run(budget: float | None = None, price: Price | None = Price(10.0, 0.0)) -> Report:  # noqa: B008
    """10 steps of 2 images, validation of 3 images before and after; 5 rows. Every group is a call of 100
    tokens at $10 a million: $0.001; the first visit costs three times as much."""
    plan = Plan(batches=10, images_per_batch=2, train_rows=5, validations=(0, 10), val_images=3)
    one = {("rate", MODEL): Usage(1, 1, 100, 10)}
    course = Course({1: [Usages(one) * 3], 2: [Usages(one)], 4: [Usages(one)]})
    val = Course({1: [Usages(one)], 2: [Usages(one)]})
    found = Forecast(plan, course.over(plan.visits()), val.over([3, 3]), course, val, (2, 1))
    return Report(found, ("per_rollout", found), lambda model: price, [Note("so it is", "--flag")], budget)


def test_a_run_is_the_sum_of_its_visits() -> None:
    report = _run()
    # 5 first visits of 3 calls, 15 others, 6 validated images
    assert report.forecast.used.all.calls == 5 * 3 + 15 + 6
    # 36 calls * 100 tokens * $10 / 1e6; 20 groups of 2 captions and 6 single ones
    data = report.as_json()
    assert data["total"]["usd"] == pytest.approx(0.036)
    assert data["rollouts"] == 46
    assert data["usd_per_1k_rollouts"] == pytest.approx(1000 * 0.036 / 46)
    assert data["validation"]["calls"] == 6


@pytest.mark.parametrize(
    ("budget", "step"),
    [
        (0.001, 0),  # the first validation costs $0.003
        (0.0089, 1),  # each of the first two steps costs $0.006: 2 groups at their first visit
        (0.015, 2),
        (0.0189, 3),  # the third costs $0.004: the last first visit, and a second one
        (0.0211, 5),  # then $0.002 a step
        (0.036, 10),
        (0.0361, None),
    ],
)
def test_a_budget_is_spent_at_a_step(budget: float, step: int | None) -> None:
    assert _run(budget).as_json()["budget_spent_at_step"] == step


def _shown(report: Report) -> str:
    console = Console(file=io.StringIO(), width=110)
    report.show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_printed_names_sums_and_assumptions() -> None:
    text = _shown(_run(budget=0.015))
    for part in (
        "rate",
        MODEL,
        "46 rollouts",
        "$0.0360",
        "per_rollout",
        "so it is",
        "--flag",
        "step 2 of 10",
    ):
        assert part in text, part
    assert "lasts for the whole run" in _shown(_run(budget=1.0))


def test_an_unknown_price_leaves_calls_and_tokens() -> None:
    report = _run(budget=1.0, price=None)
    data = report.as_json()
    assert data["total"]["usd"] is None
    assert data["total"]["calls"] == 36
    assert data["unpriced_models"] == [MODEL]
    json.dumps(data)
    text = _shown(report)
    assert "unknown" in text
    assert "--model.judge.prices" in text
    assert "36" in text


@pytest.mark.parametrize(
    ("model", "params", "tokens"),
    [
        ("openai/gpt-4o-mini", {}, 0),
        ("openai/gpt-5-mini", {}, 800),
        ("openai/gpt-5-mini", {"reasoning_effort": "minimal"}, 0),
        ("openai/gpt-5.4", {}, 0),
        ("openai/gpt-5.4", {"reasoning_effort": "low"}, 200),
        ("openai/gpt-5", {"reasoning_effort": {"effort": "high"}}, 2500),
        ("anthropic/claude-sonnet-4-5", {}, 0),
        ("anthropic/claude-sonnet-4-5", {"thinking": {"type": "enabled", "budget_tokens": 500}}, 500),
        ("anthropic/claude-sonnet-4-5", {"thinking": {"type": "disabled"}}, 0),
        ("gemini/gemini-2.5-flash", {}, 800),
    ],
)
def test_reasoning_is_assumed_by_model_and_parameters(
    model: str, params: dict[str, Any], tokens: int
) -> None:
    assert reasoning_tokens(model, params) == tokens


def test_texts_are_counted_by_characters_or_by_a_tokenizer() -> None:
    count, said = text_counter(4.0)
    assert count("123456789") == 2
    assert "4 characters" in said
    count, said = text_counter(None)
    assert count("The dog is brown.") == 5
    assert "tokenizer" in said


def test_a_forecast_multiplies_rows_by_the_plan() -> None:
    plan = Plan(batches=3, images_per_batch=4, train_rows=100, validations=(0, 3), val_images=5)
    sample = _sample(["A dog."])
    found = forecast(_setting(Judge(MODEL)), "group", plan, [sample], [sample], (8, 1))
    # 12 groups and 10 validated captions; one decompose call for 4 captions or for one
    assert _calls(found.train) == {"decompose": 24, "verify": 12, "match": 12, "rate": 96}
    assert _calls(found.val) == {"decompose": 10, "verify": 10, "match": 10, "rate": 10}
    assert found.rollouts == 106


class Mood(Task[str]):
    """A kind of judgment that nobody has heard of."""

    name = "mood"
    version = "1"
    schema = Schema
    answer_type = str

    def messages(self, items: Sequence[str], **context: Any) -> list[Message]:
        return [{"role": "system", "content": "Task: mood"}, {"role": "user", "content": str(items)}]

    def parse(self, answer: Any, items: Sequence[str], **context: Any) -> list[str]:
        return ["calm" for _ in items]

    async def inputs(self, group: Group) -> tuple[dict[str, Any], list[list[Any] | None]]:
        return {}, [[caption] for caption in group.captions]


def test_a_task_of_ones_own_is_counted_with_a_short_answer() -> None:
    class Calm(Linguistic):
        needs = (Mood,)

    setting = replace(_setting(Judge(MODEL)), suite=RewardSuite([Calm()]))
    course = play(setting, "group", [_sample()], captions=3, visits=1)
    assert _calls(course.mean(1)) == {"mood": 3}
    assert course.unknown == {"mood"}
    assert course.mean(1)["mood", MODEL].tokens_out > 0

"""The dry run of sampled rows, and from there to the whole run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from balcap.commands.estimate_assumptions import Assumptions
from balcap.commands.estimate_dry_run import FakeClient, Usage, dry_run, stand_ins
from balcap.commands.estimate_plan import Plan
from balcap.commands.estimate_run import Estimate
from balcap.judge import Deployment, Group, JudgeSettings, Price, Task, TaskModel
from balcap.rewards import (
    CapRL,
    CapRLLength,
    ClaimDiff,
    Completeness,
    Correctness,
    Linguistic,
    Precision,
    Recall,
    RewardSuite,
    RubiCap,
)
from balcap.types import CaptionBatch

MODEL = "openai/gpt-4o-mini"
REFERENCE = " ".join(f"a{number}" for number in range(20))  # 20 words: 5 assertions at 4 words each


def rows_of(
    units: Sequence[str] | None = None, images: int = 1, columns: dict[str, Any] | None = None
) -> CaptionBatch:
    picture = Image.new("RGB", (64, 64))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    extras = {name: [value] for name, value in (columns or {}).items()}
    extras |= {"reference_units": [units]} if units else {}
    return CaptionBatch(
        ["a"], [(picture,) * images], [(buffer.getvalue(),) * images], ["Describe it."], [REFERENCE], extras
    )


def captions_of(count: int) -> list[list[str]]:
    """Captions of 20 words that share nothing."""
    return [[" ".join(f"{number}w{word}" for word in range(20)) for number in range(count)]]


def play(
    settings: JudgeSettings | None = None,
    captions: int = 8,
    visits: tuple[int, int] = (1, 0),
    units: Sequence[str] | None = None,
    suite: RewardSuite | None = None,
    images: int = 1,
    columns: dict[str, Any] | None = None,
) -> Usage:
    """What one row uses: every text is a token, an image 1000."""
    assume = Assumptions(words_per_assertion=4, image_tokens=1000, reasoning_tokens=0, chars_per_token=1)
    client = FakeClient(settings or JudgeSettings(MODEL), lambda text: 1, assume)
    suite = suite or RewardSuite([Precision(), Recall(), Linguistic()])
    (used,) = dry_run(client, suite, rows_of(units, images, columns), captions_of(2 * captions), visits)
    return used


def calls(used: Usage) -> dict[str, float]:
    return {task: figures[0] for (task, _), figures in used.items()}


def test_a_group_shares_calls() -> None:
    used = play()
    # 8 captions, 4 a call, and the reference; 40 assertions in one call; 8 captions in one match; each rated alone
    assert calls(used) == {"decompose": 3, "verify": 1, "match": 1, "rate": 8}
    # a system and a user text of one token each, and the image; the answers a token each
    assert used["verify", MODEL][:3].tolist() == [1, 1002, 1]
    assert used["rate", MODEL][:3].tolist() == [8, 16, 8]
    # $0.15 and $0.60 per million tokens
    assert used["rate", MODEL][3] == pytest.approx((16 * 0.15 + 8 * 0.6) / 1e6)


def test_rewards_of_other_methods_are_priced() -> None:
    suite = RewardSuite([CapRL(), CapRLLength(), Correctness(), Completeness(), ClaimDiff(), RubiCap()])
    questions = [{"question": f"What {n}?", "choices": ["a", "b"], "answer": "a"} for n in range(9)]
    columns = {"questions": questions, "rubric": [{"criterion": "Names it.", "weight": 1}]}
    used = play(suite=suite, columns=columns)
    # 8 captions: 8 questions about each, a grade and a comparison of each with the image, and all under the rubric
    assert calls(used) == {"answer": 64, "grade": 8, "differences": 8, "rubric": 1}
    assert used["answer", MODEL][:3].tolist() == [64, 128, 64]
    assert used["grade", MODEL][:3].tolist() == [8, 8016, 8]


def test_all_images_of_a_row_are_counted() -> None:
    # two images, with a number before each and a sentence after them, and the system and user texts
    assert play(images=2)["verify", MODEL][:3].tolist() == [1, 2002, 1]


def test_units_of_the_data_are_not_asked_for() -> None:
    assert calls(play(units=["A dog."]))["decompose"] == 2


def test_the_settings_of_the_judge_split_the_calls() -> None:
    settings = JudgeSettings(MODEL, per_call={"verify": 10, "rate": 4, "decompose": 8})
    assert calls(play(settings)) == {"decompose": 2, "verify": 4, "match": 1, "rate": 2}
    alone = JudgeSettings(MODEL, grouping="per_rollout")
    assert calls(play(alone)) == {"decompose": 9, "verify": 8, "match": 8, "rate": 8}


def test_a_reference_is_decomposed_once_over_all_visits_unless_nothing_is_remembered() -> None:
    # 10 images for the first time, 5 again
    assert calls(play(visits=(10, 5)))["decompose"] == 10 * 3 + 5 * 2
    assert calls(play(JudgeSettings(MODEL, cache=None), visits=(10, 5)))["decompose"] == 15 * 3


class Mood(Task[str]):
    """A kind of judgment without an example."""

    name = "mood"
    version = "1"
    answer_type = str

    def messages(self, items: Sequence[str], **context: Any) -> list[dict[str, Any]]:
        return [{"role": "system", "content": "Task: mood"}, {"role": "user", "content": str(items)}]

    def parse(self, answer: Any, items: Sequence[str], **context: Any) -> list[str]:
        return ["calm" for _ in items]

    async def inputs(self, group: Group) -> tuple[dict[str, Any], list[list[Any] | None]]:
        return {}, [[caption] for caption in group.captions]


class Calm(Linguistic):
    needs = (Mood,)


def test_a_task_without_an_example_is_named() -> None:
    with pytest.raises(ValueError, match=r"mood: the task has no example\(\)"):
        play(captions=3, suite=RewardSuite([Calm()]))


def test_stand_ins_are_as_long_as_asked_and_all_different() -> None:
    references = ["a b c d e f g h i j", "k l m", "n o p q", ""]
    captions = stand_ins(references, 0, 9, 10, overlap=0.0)
    assert all(len(caption.split()) == 10 for caption in captions)
    assert len(set(captions)) == 9
    assert stand_ins(references, 0, 2, 0, overlap=0.5) == ["", ""]
    assert stand_ins([""], 0, 2, 3, overlap=0.5) == ["", ""]


def test_stand_ins_share_the_beginning_of_the_reference() -> None:
    references = ["a b c d e f", "k l m n"]
    # the others' words and then its own, from the start and from the sixth of these ten on
    assert stand_ins(references, 0, 2, 6, overlap=0.5) == ["a b c k l m", "a b c c d e"]
    assert stand_ins(references, 0, 2, 6, overlap=1.0) == ["a b c d e f"] * 2
    assert stand_ins(references, 1, 1, 6, overlap=1.0) == ["k l m n a b"]  # a reference that is too short


def test_a_value_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"--overlap 1\.5 is out of range: 0 to 1"):
        Assumptions(overlap=1.5)


# ---- the whole run


def used_by(settings: JudgeSettings, calls: float) -> Usage:
    """A row with so many calls of ten tokens."""
    client = FakeClient(settings, lambda text: 5, Assumptions(chars_per_token=1))
    suite = RewardSuite([Linguistic()])
    (used,) = dry_run(client, suite, rows_of(), captions_of(2), (int(calls), 0))
    return used


def estimate(settings: JudgeSettings, **options: Any) -> Estimate:
    """10 steps of 2 images out of 12 rows, of which 3 were sampled: 100, 200 and 300 calls of ten tokens."""
    plan = Plan(batches=10, images_per_batch=2, train_rows=12, validations=(), val_images=0)
    rows = [used_by(settings, calls) for calls in (100, 200, 300)]
    return Estimate(settings, plan, rollouts=20, train=rows, **options)


def test_rows_are_averaged_and_their_spread_is_the_interval() -> None:
    found = estimate(JudgeSettings("a/b", prices={"a/b": Price(1000.0, 0.0)}))
    # $1000 per million tokens of input: 200 calls of 10 tokens are $2
    assert found.used.total.tolist() == [200, 2000, 1000, pytest.approx(2)]
    # standard deviation 100 calls; 2 * 100 / sqrt(3) * sqrt(1 - 3 / 12) = 100
    assert found.uncertainty().tolist() == pytest.approx([100, 1000, 500, 1])
    assert "$ per 1,000 rollouts: $100.00" in shown(found)


@pytest.mark.parametrize(
    "settings",
    [
        JudgeSettings("a/b", per_task={"rate": TaskModel("c/d")}, prices={"c/d": Price(1000.0, 0.0)}),
        JudgeSettings("a/b", deployments=[Deployment("c/d")], prices={"c/d": Price(1000.0, 0.0)}),
        JudgeSettings("a/b", fallbacks=[TaskModel("c/d")], prices={"a/b": Price(1000.0, 0.0)}),
    ],
    ids=["of a task's own model", "of a deployment", "without the fallbacks"],
)
def test_prices_are_those_of_who_is_asked(settings: JudgeSettings) -> None:
    found = estimate(settings)
    assert found.used.total[3] == pytest.approx(2)


def shown(found: Estimate) -> str:
    console = Console(file=io.StringIO(), width=110)
    found.show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_judge_without_a_price_is_named() -> None:
    found = estimate(JudgeSettings("a/b", budget_usd=1.0), assumptions=[("so it is", "--flag")])
    assert found.used.total[0] == 200
    text = shown(found)
    assert "budget" not in text
    assert "unknown" in text
    assert "The price of a/b is unknown" in text
    assert "so it is  [--flag]" in text


@pytest.mark.parametrize(("budget", "step"), [(0.5, 2), (1.99, 9), (2.01, None)])
def test_a_budget_is_compared(budget: float, step: int | None) -> None:
    found = estimate(JudgeSettings("a/b", prices={"a/b": Price(1000.0, 0.0)}, budget_usd=budget))
    expected = "lasts for the whole run" if step is None else f"at about step {step} of 10"
    assert expected in shown(found)

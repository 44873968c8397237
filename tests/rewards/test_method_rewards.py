"""Rewards of other methods: scores worked by hand, what the embedded world's judge says, what a failing judge leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from balcap.judge import Judge
from balcap.judge.questions import CANNOT, drawn
from balcap.rewards import CapRL, CapRLLength, Reward, RewardSuite, caprl_length, score_answers
from balcap.types import CaptionBatch, Rollouts
from balcap.utils.errors import UserError
from examples.shapes.oracle import answer
from examples.shapes.scene import Scene, Thing, draw_scene, png_bytes
from tests.judge_server import JudgeServer

SCENE = Scene((Thing("red", "circle", "large", "top left"), Thing("blue", "star", "small", "center")), "grey")
GOOD = "There is a large red circle in the top left corner. A small blue star sits in the center."
POOR = "There is a green circle."
QUESTIONS = [
    {"question": "What colour is the circle?", "choices": ["red", "green", "blue"], "answer": "red"},
    {"question": "How large is the blue star?", "choices": ["small", "large"], "answer": "A"},
    {"question": "What colour is the background?", "choices": ["grey", "teal"], "answer": "grey"},
]


@pytest.fixture(scope="module")
def image() -> bytes:
    return png_bytes(draw_scene(SCENE, np.random.default_rng(0)), SCENE)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer(answer)
    yield server
    server.close()


@pytest.fixture
def judge(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    """Right, and asked once: whatever goes wrong with a request is a judgment that is missing."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    params = {"api_base": server.url}
    judge = Judge(
        "openai/gpt-4o-mini", params=params, cache=None, retries=0, concurrency=1, max_failed_share=1.0
    )
    yield judge
    judge.close()


def rollouts_of(captions: Sequence[str], image: bytes, reference: str = "", **columns: Any) -> Rollouts:
    """One image, with these captions and columns."""
    extras = {name: [value] for name, value in columns.items()}
    batch = CaptionBatch(["image"], [()], [(image,)], ["Describe."], [reference], extras)
    zeros = torch.zeros(1, len(captions), 1)
    lengths = torch.tensor([[len(caption.split()) for caption in captions]])
    flags = zeros[..., 0].bool()
    return Rollouts(batch, [captions], zeros.long(), zeros.bool(), zeros, flags, lengths, torch.tensor([1]))


def scores(judge: Judge, rollouts: Rollouts, *rewards: Reward) -> list[list[float]]:
    """``[G][K]`` of the one image."""
    suite = RewardSuite(rewards)
    return suite(rollouts, suite.gather(judge, rollouts))[0].tolist()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), equal_nan=True)


# ---- CapRL


def test_answers_by_hand() -> None:
    # right, wrong, right and one that nobody answered: 2 of the 3 that were answered
    assert score_answers([True, False, True, None]) == pytest.approx(2 / 3)
    assert score_answers([False, False]) == 0.0
    assert math.isnan(score_answers([None, None]))
    assert math.isnan(score_answers([]))


def test_the_length_reward_by_hand() -> None:
    # up to 2,048 tokens 1; at 2,304 a quarter of the 1,024 tokens to 3,072 is gone: 0.75; from 3,072 on 0
    lengths = torch.tensor([[0, 2048, 2304, 3072, 5000]])
    assert caprl_length(lengths).tolist() == [[1.0, 1.0, 0.75, 0.0, 0.0]]
    with pytest.raises(ValueError, match="longest: 10 must lie between 0 and its none: 10"):
        CapRLLength(longest=10, none=10)


def test_all_captions_of_an_image_are_asked_the_same_questions() -> None:
    many = [{**QUESTIONS[0], "question": f"Question {number}?"} for number in range(20)]
    asked = drawn(many, "image", 8)
    assert asked == drawn(many, "image", 8)
    assert len({question.number for question in asked}) == 8
    assert [q.number for q in asked] != [q.number for q in drawn(many, "another image", 8)]
    assert len({tuple(q.options) for q in asked}) > 1  # shuffled
    yes_no = {"question": "Is there a dog?", "choices": ["Yes", "No"], "answer": "No"}
    (one,) = drawn(
        [yes_no, {"question": "Without a right choice?", "choices": ["a", "b"], "answer": "c"}], "", 8
    )
    assert sorted(one.options) == [CANNOT, "No", "Yes"]
    with pytest.raises(UserError, match="image: column questions: the question 'Which\\?' is no object"):
        drawn(["Which?"], "image", 8)  # type: ignore[list-item]


def test_captions_are_worth_what_they_answer(judge: Judge, server: JudgeServer, image: bytes) -> None:
    rollouts = rollouts_of([GOOD, POOR, GOOD], image, questions=QUESTIONS)
    found = scores(judge, rollouts, CapRL(), CapRLLength())
    # GOOD tells colour and size, and nothing of the background ("cannot answer": 0): 2/3. POOR tells a wrong colour.
    close(found, [[2 / 3, 1.0], [0.0, 1.0], [2 / 3, 1.0]])
    assert server.calls == 6  # three questions, two different captions; the same question stands in both
    texts = [request["messages"][1]["content"] for request in server.requests]
    assert not any("image_url" in str(text) for text in texts)
    asked = [str(text).partition("<questions>")[2] for text in texts]
    assert sorted(asked[:3]) == sorted(asked[3:])


def test_questions_that_fail_are_left_out_and_all_of_them_are_nan(
    judge: Judge, server: JudgeServer, image: bytes
) -> None:
    # One call at a time: the first caption's first answer fails, then all of the second's
    server.script = ["500", None, None, "500", "refusal", "short"]
    rollouts = rollouts_of([GOOD, POOR], image, questions=QUESTIONS)
    suite = RewardSuite([CapRL(), CapRLLength()])
    judgments = suite.gather(judge, rollouts)
    first, second = suite(rollouts, judgments)[0].tolist()
    asked = [question.number for question in drawn(QUESTIONS, "image", 8)]
    right = [number < 2 for number in asked[1:]]  # of the background GOOD says nothing
    close([first, second], [[sum(right) / 2, 1.0], [math.nan, math.nan]])
    assert judgments.failures == {"answer": 1}
    assert judgments.reasons


def test_a_row_without_questions_is_missing_and_asks_nobody(
    judge: Judge, server: JudgeServer, image: bytes
) -> None:
    found = scores(judge, rollouts_of([GOOD, POOR], image, questions=None), CapRL(), CapRLLength())
    close(found, [[math.nan] * 2] * 2)
    assert server.calls == 0

"""Multiple-choice questions about an image, as they are asked of whoever sees only a caption.

A question is an object with ``question``, ``choices``, ``answer`` (one of them, or its letter) and, if it has one, a
``category``: CaptionQA's format, which the data column ``questions`` has as well.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balcap.utils.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CANNOT = "Cannot answer from the caption"
_AUXILIARY = re.compile(
    "(?:is|are|was|were|do|does|did|have|has|had|can|could|will|would|should|shall|may|might|must) "
)


@dataclass(frozen=True)
class AskedQuestion:
    """A question as it is asked.

    Attributes:
        number: its place among its image's questions, from 0.
        text: the question.
        options: in the order in which they are shown; `CANNOT` may be among them.
        order: place in the data set's choices of each; their number for `CANNOT`.
        answer: place of the right option in the data set's choices.
        num_choices: of the data set.
        category: of the question.
    """

    number: int
    text: str
    options: Sequence[str]
    order: Sequence[int]
    answer: int
    num_choices: int
    category: str

    def score(self, shown: int | None) -> float:
        """Points, in [0, 1], of the option at a place as shown; None for none."""
        if shown is None:
            return 0.0
        if self.options[shown] == CANNOT:
            return round(1 / self.num_choices + 0.05, 4)
        return float(self.order[shown] == self.answer)


def is_yes_no(question: str, choices: Sequence[Any], official: bool = False) -> bool:
    """Whether a question gets no "cannot answer"."""
    texts = [str(choice).strip().lower() for choice in choices]
    if not official:
        return all(any(re.match(rf"{word}\b", text) for text in texts) for word in ("yes", "no"))
    if all(any(word in text for text in texts) for word in ("yes", "no")):
        return True
    return bool(_AUXILIARY.match(question.strip().lower()))


def as_asked(
    number: int,
    question: Mapping[str, Any],
    draw: random.Random,
    official: bool = False,
    always_cannot: bool = False,
) -> AskedQuestion | None:
    """A question with its options shuffled; None if it has not two choices, or no right one.

    Args:
        number: its place among its image's questions.
        question: ``question``, ``choices``, ``answer`` (a choice, or its letter), ``category`` if it has one.
        draw: shuffles.
        official: as CaptionQA's authors read a question.
        always_cannot: yes/no questions have `CANNOT` among their options, too.

    Raises:
        TypeError: it is no object.
    """
    if not isinstance(question, Mapping):
        raise TypeError(f"the question {question!r} is no object")
    choices, answer, text = (
        question.get("choices") or [],
        question.get("answer"),
        question.get("question", ""),
    )
    if not official and answer is not None:
        answer = str(answer)
        if len(answer) == 1 and answer not in map(str, choices) and answer.upper() in LETTERS[: len(choices)]:
            answer = str(choices[LETTERS.index(answer.upper())])  # a letter, as in other sets
    same = [isinstance(answer, str) and answer.strip() == str(choice).strip() for choice in choices]
    if len(choices) < 2 or not any(same):
        return None
    options = [str(choice) for choice in choices]
    if always_cannot or not is_yes_no(text, choices, official):
        options.append(CANNOT)
    order = list(range(len(options)))
    draw.shuffle(order)
    category = question.get("category") or ""
    if isinstance(category, list):
        category = category[0]
    shown = [options[i] for i in order]
    return AskedQuestion(number, text, shown, order, same.index(True), len(choices), category)


def drawn(column: Sequence[Mapping[str, Any]] | None, sample_id: str, most: int) -> list[AskedQuestion]:
    """Some of a row's questions, all with `CANNOT` among their options: the same ones, in the same order and with the
    same order of options, wherever `sample_id` is the same.

    Args:
        column: the row's ``questions``; those that cannot be asked are left out.
        sample_id: of the row.
        most: of so many.

    Raises:
        UserError: one of them is no object.
    """
    draw = random.Random(sample_id)
    try:
        questions = [
            as_asked(number, one, draw, always_cannot=True) for number, one in enumerate(column or ())
        ]
    except TypeError as error:
        raise UserError(f"{sample_id}: column questions: {error} with question, choices and answer") from None
    there = [question for question in questions if question is not None]
    return draw.sample(there, min(most, len(there)))

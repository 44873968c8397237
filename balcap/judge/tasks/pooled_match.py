"""Pooled match: which of the facts that the captions of a group have told together does each caption cover?

For images without a reference. The pool takes the reference's place as pooled runs take that of complete relevance
judgments in retrieval (Spärck Jones and van Rijsbergen, 1975): what no caption of the group says is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from balcap.judge.task import Group, Items
from balcap.judge.tasks.decompose import Decompose
from balcap.judge.tasks.match import Match
from balcap.judge.tasks.verify import Verdict, Verify, normalise


class PooledMatch(Match):
    """One bool per unit of the pool, in order: the assertions of all captions of a group that are true and pointable.

    A unit that a caption states in the same words (`normalise`) is covered without a call. `Match` is asked about
    captions that lack a unit then, under all units, so that they share calls and answers as for a reference.

    The same fact in other words is another unit, and counts again: for every caption alike.

    A caption whose verdicts are missing has no answer, and adds nothing to the pool. Where the pool is empty the
    answer is ``[]``.
    """

    name = "pooled_match"

    async def judge_group(self, group: Group) -> list[list[bool] | None]:
        said, verdicts = await group.get(Decompose), await group.get(Verify)
        units = pooled_units(said, verdicts)
        answers: list[list[bool] | None] = [
            None if one is None else _stated(units, assertions or ())
            for assertions, one in zip(said, verdicts, strict=True)
        ]
        lacking = [place for place, answer in enumerate(answers) if answer is not None and not all(answer)]
        items: Items = [[tuple(said[place] or ())] for place in lacking]
        for place, match in zip(lacking, await group.answers(Match, items, units=units), strict=True):
            stated = answers[place] or ()
            either = None if match is None else [any(pair) for pair in zip(stated, match[0], strict=True)]
            answers[place] = either
        return answers


def pooled_units(
    said: Sequence[Sequence[str] | None], verdicts: Sequence[Sequence[Verdict] | None]
) -> tuple[str, ...]:
    """The assertions that are true and pointable, each once, in the order of the captions.

    Args:
        said: ``[G]`` assertions of each caption.
        verdicts: ``[G]`` one per assertion; None where they are missing.
    """
    units: dict[str, str] = {}
    for assertions, of_caption in zip(said, verdicts, strict=True):
        for assertion, verdict in zip(assertions or (), of_caption or ()):  # noqa: B905  verdicts may be missing
            if verdict.true and verdict.pointable:
                units.setdefault(normalise(assertion), assertion)
    return tuple(units.values())


def _stated(units: Sequence[str], assertions: Sequence[str]) -> list[bool]:
    """Which units are among the assertions."""
    own = set(map(normalise, assertions))
    return [normalise(unit) in own for unit in units]

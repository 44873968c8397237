"""Columns: further keys of the rows (`data.columns`), each of one JSON kind, kept as JSON text in the table.

``reference_units``, the assertions of the caption as recaptioning writes them, is always one of them. The objects of
``questions`` and ``rubric`` are looked into (`entry_problem`). A value that is not as it should be makes its row bad: to
pay a judge for what was to be there already, or to score against half a column, would be a surprise.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from balcap.data.settings import SHAREGPT4V_KEYS

REFERENCE_UNITS = "reference_units"

QUESTIONS, RUBRIC = "questions", "rubric"
"""What CapRL and RubiCap need; ``main.py annotate`` writes them."""

MALFORMED_COLUMN = "malformed_column"
"""Cause of a bad row: the value of a column is of another kind than in the rows before."""

_KINDS = {str: "text", bool: "boolean", int: "number", float: "number", dict: "object", list: "list"}


def storable(text: str) -> str:
    """Arrow stores UTF-8: half of a surrogate pair, legal in JSON, becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def kind_of(value: Any) -> str:
    """``text``, ``number``, ``boolean``, ``object``, or ``list of texts`` and so on; objects are not looked into.

    An empty list is a ``list``, which fits every kind of list; one of several kinds is a ``list of mixed
    values``. What JSON does not know has the name of its Python type.
    """
    if not isinstance(value, list):
        return _KINDS.get(type(value), type(value).__name__)
    kinds = {kind_of(item).split()[0] for item in value}
    if len(kinds) > 1:
        return "list of mixed values"
    return f"list of {kinds.pop()}s" if kinds else "list"


def entry_problem(name: str, entry: Mapping[str, Any]) -> str:
    """What an object in a list of the column lacks, "" for nothing; of ``questions`` and ``rubric``."""
    text = entry.get({QUESTIONS: "question", RUBRIC: "criterion"}.get(name, ""))
    has_text = isinstance(text, str) and text.strip()
    if name == QUESTIONS and not (has_text and isinstance(entry.get("choices") or [], list)):
        return "a question, and a list of choices"
    weight = entry.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if name == RUBRIC and not (has_text and is_number and 0 < float(weight or 0) < math.inf):
        return "a criterion, and a weight above 0"
    return ""


class Columns:
    """Takes the columns out of one raw row after the other; the first row that has a column decides its kind,
    where it is not known.

    Args:
        names: the columns to take, besides ``reference_units``.

    Attributes:
        names: all columns that are taken.
        unseen: those asked for of which no row had a value so far.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self.names = sorted({REFERENCE_UNITS, *names})
        self.unseen = set(names)
        self._keys: set[str] = set()
        self._kinds = {REFERENCE_UNITS: ("list of texts", "")}  # and where it was seen
        self._kinds |= dict.fromkeys((QUESTIONS, RUBRIC), ("list of objects", ""))

    def take(self, raw: Mapping[str, Any], row: int) -> tuple[dict[str, str | None], str]:
        """The columns of a row that is good otherwise.

        Args:
            raw: the row as parsed.
            row: its number in the file.

        Returns:
            JSON text by column, None where the row has no value or a malformed one; and what is malformed,
            "" if nothing is.
        """
        self._keys.update(raw)
        texts: dict[str, str | None] = dict.fromkeys(self.names)
        problem = ""
        for name in self.names:
            value = raw.get(name)
            if value is None:
                continue
            try:
                text = storable(json.dumps(value, ensure_ascii=False))
                self._check_kind(name, value, row)
                texts[name] = text
                self.unseen.discard(name)
            except (TypeError, ValueError, RecursionError) as error:
                problem = f'column "{name}": {error}'
        return texts, problem

    def _check_kind(self, name: str, value: Any, row: int) -> None:
        kind, here = kind_of(value), f" as in row {row}"
        for entry in value if kind == "list of objects" else ():
            if lacking := entry_problem(name, entry):
                raise ValueError(f"an object lacks {lacking}: {entry!r:.60}")
        expected, where = self._kinds.setdefault(name, (kind, here))
        both_lists = kind.startswith("list") and expected.startswith("list")
        if name == REFERENCE_UNITS and kind == expected and not all(unit.strip() for unit in value):
            kind = "a blank text among them"
        elif both_lists and expected == "list":
            self._kinds[name] = kind, here
            return
        elif kind == expected or (both_lists and (kind == "list" or expected == "list of mixed values")):
            return
        raise ValueError(f"expected {expected}{where}, found {kind}: {value!r:.60}")

    def unseen_message(self) -> str:
        """What to say about the `unseen` columns."""
        unseen, keys = sorted(self.unseen), sorted(self._keys.difference(SHAREGPT4V_KEYS))
        there = ", ".join(keys) or "none"
        written = [name for name in unseen if name in (QUESTIONS, RUBRIC)]
        hint = f"; python main.py annotate --what {written[0]} writes them" if written else ""
        return f"data.columns: no good row has {', '.join(unseen)}; columns that rows have: {there}{hint}"


def read_columns(texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Column -> value of one row of the table; None where it has none."""
    return {name: None if text is None else json.loads(text) for name, text in texts.items()}

"""The authors' own questions: their prompts, read from a clone of their repository, and answers as plain text.

Their prompts are theirs: they are read where the user has them and stand nowhere here.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from balcap.data.json_files import DataError
from balcap.judge.task import Message, StandaloneTask


class Prompt(TypedDict):
    """A user's message, and which draw of its answer this is: equal ones are asked once."""

    prompt: str
    draw: int


class OfficialTask(StandaloneTask[str]):
    """A question in the authors' words: system message, image if there is one, text. The answer is text.

    Subclasses give `name` and the authors' sampling parameters.
    """

    version = "1"  # the prompt itself is in the key
    schema = None
    answer_type = str
    one_item = True

    def messages(  # type: ignore[override]
        self, items: Sequence[Prompt], *, system: str, image: bytes | None = None
    ) -> list[Message]:
        (item,) = items
        parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
        parts.append({"type": "text", "text": item["prompt"]})
        return [{"role": "system", "content": system}, {"role": "user", "content": parts}]

    def parse(self, answer: str, items: Sequence[Prompt], **context: Any) -> list[str]:
        return [answer]

    def encode(self, answers: Sequence[str]) -> str:
        return answers[0]


def read_prompts(path: str | Path, *names: str) -> dict[str, str]:
    """String constants and f-strings of a Python file, by the name that they are first assigned to; nothing is run.

    Args:
        path: the file.
        names: which.

    Returns:
        Templates for ``str.format``; the fields of an f-string keep their names.

    Raises:
        DataError: no such file, or it has no such constant.
    """
    try:
        tree = ast.parse(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"code: {path} cannot be read: {error}") from None
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, template = node.targets[0].id, _template(node.value)
            if name in names and template is not None:
                found.setdefault(name, template)
    if missing := [name for name in names if name not in found]:
        raise DataError(f"code: {path} defines no text {', '.join(missing)}; is it another version?")
    return found


def _template(value: ast.expr) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}"
            if isinstance(part, ast.FormattedValue)
            else str(part.value).replace("{", "{{").replace("}", "}}")  # type: ignore[attr-defined]
            for part in value.values
        )
    return None

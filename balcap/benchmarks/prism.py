"""Prism: a caption takes the place of the image, and a text-only LLM answers a VQA set from it (arXiv 2406.14544).

How much of an image a caption carries, measured on any multiple-choice set that one has: no new data, no image for the
judge. The score is accuracy in percent. As CapRL uses it (arXiv 2509.22647).
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image

from balcap.benchmarks.base import Benchmark, BenchmarkImage, Record, given, read_bytes
from balcap.benchmarks.captionqa import points_statistic
from balcap.benchmarks.scores import Statistic
from balcap.data.images import BadImage
from balcap.data.json_files import read_text
from balcap.judge import Judge
from balcap.judge.tasks.answer import LETTERS, Answer, Choice

Question = tuple[Choice, int]
"""A question, and the place of its right option."""


class Prism(Benchmark):
    """Accuracy, in percent, of a text-only LLM that sees the caption in place of the image (arXiv 2406.14544).

    Questions about the same image are asked about the same caption.

    Args:
        data: a TSV of VLMEvalKit (``question``, ``A`` … , ``answer``, and ``image`` in base64 or ``image_path``), or a JSON
            or JSON-lines file of ``{"image", "question", "choices", "answer"}``; the answer is a letter or the text of a
            choice.
        image_root: folder of ``image`` or ``image_path``; not needed for images in base64.
        settings: as of `Benchmark`.
    """

    name = "prism"
    tasks = (Answer,)
    source = "any multiple-choice VQA set, such as MMStar of https://github.com/open-compass/VLMEvalKit"

    def __init__(self, data: str, **settings: Any) -> None:
        super().__init__(data, **settings)

    def load(self) -> list[BenchmarkImage]:
        rows = self._tsv() if self.data.endswith(".tsv") else self.read_json()
        questions: dict[str, list[Question]] = {}
        images: dict[str, BenchmarkImage] = {}
        encoded: dict[str, str] = {}
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise self.row_error(number, "it is no object")
            where, picture = self._image(row, number, encoded)
            questions.setdefault(where, []).append(self._question(row, number))
            if where not in images:
                read = self.reader(where) if picture is None else partial(_read_encoded, picture)
                images[where] = BenchmarkImage(where, read, questions[where])
        return list(images.values())

    def _tsv(self) -> list[dict[str, str]]:
        csv.field_size_limit(sys.maxsize)  # images stand in the cells
        return list(csv.DictReader(io.StringIO(read_text(self.data)), delimiter="\t"))

    def _image(self, row: Mapping[str, Any], number: int, encoded: dict[str, str]) -> tuple[str, str | None]:
        """Id of a row's image, and its base64 text if that is how it is given. Rows may name the row that has it."""
        if name := row.get("image_path"):
            return str(name), None
        picture = row.get("image")
        if isinstance(picture, list):
            picture = picture[0] if len(picture) == 1 else None
        if not picture:
            raise self.row_error(number, "it has no image")
        if not self.data.endswith(".tsv"):
            return str(picture), None
        if len(picture) < 64:  # the index of the row that holds the picture
            if picture not in encoded:
                raise self.row_error(
                    number, f"its image is that of row {picture}, which does not come before it"
                )
            picture = encoded[picture]
        encoded[str(row.get("index", number))] = picture
        return f"image {hashlib.sha256(picture.encode()).hexdigest()[:16]}", picture

    def _question(self, row: Mapping[str, Any], number: int) -> Question:
        options = row.get("choices") or row.get("options") or [row[c] for c in LETTERS if row.get(c)]
        if isinstance(options, Mapping):
            options = list(options.values())
        options, answer = [str(option) for option in options], str(row.get("answer") or "").strip()
        if "question" not in row or not 2 <= len(options) <= len(LETTERS):
            raise self.row_error(number, f"it needs a question and 2 to 26 choices, it has {len(options)}")
        if answer in options:
            place = options.index(answer)
        elif len(answer) == 1 and answer.upper() in LETTERS[: len(options)]:
            place = LETTERS.index(answer.upper())
        else:
            raise self.row_error(number, f"the answer {answer!r} is none of the choices")
        text = "\n".join(filter(None, [str(row.get("hint") or "").strip(), str(row["question"])]))
        return {"question": text, "options": options}, place

    async def judge_caption(self, judge: Judge, image: BenchmarkImage, caption: str) -> Record:
        questions: Sequence[Question] = image.row
        answers = given(await judge.ask(Answer, [choice for choice, _ in questions], caption=caption))
        points = [
            None if answer is None else float(answer == right)
            for answer, (_, right) in zip(answers, questions, strict=True)
        ]
        return {"points": points, "failed": points.count(None)}

    def statistics(self, ids: Sequence[str], records: Sequence[Record]) -> dict[str, Statistic]:
        return {self.name: points_statistic(ids, records)}


def _read_encoded(picture: str) -> tuple[bytes, Image.Image]:
    try:
        return read_bytes(base64.b64decode(picture, validate=False))
    except binascii.Error as error:
        raise BadImage("not_an_image", f"its base64 is broken: {error}") from None

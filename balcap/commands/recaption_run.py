"""A recaption run: rows in, captions and what they assert out (`rows_run.py`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from balcap.commands.recaption_settings import RecaptionSettings
from balcap.commands.rows_files import QuarantinedRow
from balcap.commands.rows_run import RowsRun
from balcap.data.layouts import LAYOUT_KEYS, PLACEHOLDER, image_paths, normalise
from balcap.data.reader import prompt_for
from balcap.judge import Decompose, JudgeFailure, Recaption


class RecaptionRun(RowsRun):
    """A chunk is as many captions as one call decomposes. A second row of an image is no row of its own."""

    settings: RecaptionSettings
    done = "are captioned"

    def __init__(self, settings: RecaptionSettings) -> None:
        super().__init__(settings)
        self.chunk = (self.judge.settings.per_call or {}).get(Decompose.name, Decompose.per_call)
        for row, first in self.same.items():
            image, why = self.table[row]["sample_id"], f"row {first} has the same image"
            self.bad[row] = QuarantinedRow(row, image, "duplicate_image", why)

    async def ask_chunk(self, rows: Sequence[int]) -> None:
        answers = zip(rows, await asyncio.gather(*map(self._caption, rows)), strict=True)
        captions = {row: caption for row, caption in answers if caption is not None}
        if self.is_ending():
            return
        decomposed = await self.judge.ask(Decompose, list(captions.values()))
        for (row, caption), units in zip(captions.items(), decomposed, strict=True):
            if isinstance(units, JudgeFailure):
                self.give_up(row, units.kind, str(units))
            elif not units:
                self.give_up(row, "no_units", "the new caption asserts nothing")
            else:
                self.settle(row, [caption, units], answers=2)

    async def _caption(self, row: int) -> str | None:
        """The row's new caption; None where there is none."""
        flat, settings = self.table[row], self.settings
        images = await self.read_images(row)
        if images is None:
            return None
        question = prompt_for(flat["sample_id"], flat["question"], settings.prompts or (), settings.seed)
        (answer,) = await self.judge.ask(Recaption, [question], image=images)
        if isinstance(answer, JudgeFailure):
            self.give_up(row, answer.kind, str(answer))
            return None
        return answer

    def new_row(self, row: int, raw: Any) -> dict[str, Any] | None:
        if row not in self.answered:
            return None
        caption, units = json.loads(self.answered[row])
        return output_row(raw, caption, units, self.settings)


def output_row(
    raw: dict[str, Any], caption: str, units: Sequence[str], settings: RecaptionSettings
) -> dict[str, Any]:
    """A row of the data set in ShareGPT4V's layout, with its new caption, and the old one as ``original_caption``;
    other keys stay.

    Args:
        raw: the row as it was.
        caption: the new caption.
        units: what it asserts.
        settings: which question the row was asked, and who answered.
    """
    flat = normalise(raw, 0)
    paths = image_paths(flat["sample_id"])
    turns = raw.get("conversations") or ()
    human = next((turn.get("value") for turn in turns if str(turn.get("from")) == "human"), None)
    if settings.prompts or not human or PLACEHOLDER not in human:
        asked = prompt_for(flat["sample_id"], flat["question"], settings.prompts or (), settings.seed)
        human = asked if PLACEHOLDER in asked else f"{PLACEHOLDER * len(paths)}\n{asked}"
    return {
        **{key: value for key, value in raw.items() if key not in LAYOUT_KEYS},
        "image": paths if len(paths) > 1 else paths[0],
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": caption}],
        "original_caption": "\n".join(flat["captions"]),
        "caption_model": settings.asked_model(Recaption),
        "reference_units": units,
        "units_model": settings.asked_model(Decompose),
    }

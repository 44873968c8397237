"""One row of the table -> one image with its prompt and reference, or a line in bad_rows.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from balcap.data.bad_rows import BadRowLog
from balcap.data.files import ImageFolder
from balcap.data.images import BadImage
from balcap.data.prompt import prompt_for
from balcap.types import CaptionBatch, Cursor


class Table(Protocol):
    """Rows with the columns of `balcap.data.sharegpt4v.normalise`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Sample:
    """What one row gives to a batch; fields as in `CaptionBatch`."""

    sample_id: str
    image: Image.Image
    image_bytes: bytes
    prompt: str
    reference: str
    reference_units: Sequence[str] | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads rows by index.

    Attributes:
        table: the rows.
        images: where their files are.
        bad_rows: where bad ones are listed.
        seed: chooses among `prompts`.
        prompts: one of these for every image, always the same one; empty for the row's own question.
        forgiven: causes on the row itself that do not matter here.
    """

    table: Table
    images: ImageFolder
    bad_rows: BadRowLog
    seed: int = 0
    prompts: Sequence[str] = ()
    forgiven: frozenset[str] = frozenset()

    def read(self, index: int) -> Sample | None:
        """The sample, or None if the row is bad; it is then listed."""
        row = self.table[index]
        try:
            if row["problem"] and row["problem"] not in self.forgiven:
                raise BadImage(row["problem"], row["detail"])
            data, image = self.images.read(row["sample_id"])
        except BadImage as bad:
            self.bad_rows.add(row["row"], row["sample_id"], bad.cause, bad.detail)
            return None
        prompt = prompt_for(row["sample_id"], row["question"], self.prompts, self.seed)
        return Sample(row["sample_id"], image, data, prompt, row["caption"], row["reference_units"])


def to_batch(samples: Sequence[Sample], cursor: Cursor | None = None) -> CaptionBatch:
    """Samples side by side."""
    return CaptionBatch(
        sample_ids=[s.sample_id for s in samples],
        images=[s.image for s in samples],
        image_bytes=[s.image_bytes for s in samples],
        prompts=[s.prompt for s in samples],
        references=[s.reference for s in samples],
        extras={"reference_units": [s.reference_units for s in samples]},
        cursor=cursor,
    )

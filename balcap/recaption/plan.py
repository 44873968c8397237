"""Which rows take part, and what their answers depend on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balcap.data.order import select_rows
from balcap.data.sharegpt4v import TEXT_ONLY_CAUSES, DataError, column
from balcap.judge import Judge
from balcap.judge.tasks import Decompose, Task
from balcap.judge.tasks.recaption import Recaption
from balcap.recaption.journal import Quarantined
from balcap.recaption.settings import Recaptioner

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The rows that take part.

    Attributes:
        rows: those that can be captioned, in the order of the data set.
        bad: those that cannot, which is seen without reading their image.
    """

    rows: list[int]
    bad: list[Quarantined]

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)


def plan_rows(settings: Recaptioner, table: Dataset) -> Plan:
    """Choose the rows. A missing caption or question is no fault here, a second row of an image is.

    Raises:
        DataError: none is left.
    """
    root = Path(settings.image_root or "").expanduser()
    sample_ids, causes = column(table, "sample_id"), column(table, "problem")
    chosen, left_out = select_rows(sample_ids, root, settings.folders, settings.max_rows)
    for folder, count in left_out.items():
        log.warning("folder_not_on_disk: %s/%s does not exist, %d rows left out", root, folder, count)
    if not len(chosen):
        raise DataError(
            f"image_root: no row of {settings.data} is left: {', '.join(left_out) or 'none'} not found under "
            f"{root} (folders={settings.folders})"
        )
    first: dict[str, int] = {}
    plan = Plan([], [])
    for row in map(int, chosen):
        image, cause = sample_ids[row], causes[row]
        if cause and cause not in TEXT_ONLY_CAUSES:
            plan.bad.append(Quarantined(row, image, cause, table[row]["detail"]))
        elif first.setdefault(image, row) != row:
            plan.bad.append(
                Quarantined(row, image, "duplicate_image", f"row {first[image]} has the same image")
            )
        else:
            plan.rows.append(row)
    return plan


def identity(settings: Recaptioner, digest: str) -> dict[str, Any]:
    """All that answers depend on, by the keys that set it: what a journal may be continued with.

    Args:
        settings: of the run.
        digest: of the data set's content.
    """
    assert settings.judge is not None
    found = {
        "data (digest of its content)": digest,
        "prompts": settings.prompts,
        "seed": settings.seed if settings.prompts else None,
        "judge.images": repr(settings.judge.settings.images),
        **_asked("judge", settings.judge, Recaption),
        "decompose": settings.decompose,
    }
    if settings.decompose:
        found |= _asked("decompose_judge", settings.decompose_judge or settings.judge, Decompose)
    return found


def _asked(key: str, judge: Judge, task: type[Task[Any]]) -> dict[str, Any]:
    first, *others = judge.settings.routes(task.name)
    found: dict[str, Any] = {
        f"{key}.model": first.model,
        f"{key}.params": first.content,
        f"{key}.fallbacks": [[other.model, other.content] for other in others],
        f"{task.name} (version of its prompt)": task.version,
    }
    return found


def asked_model(judge: Judge, task: type[Task[Any]]) -> str:
    """Who is asked, for whoever reads the file: with fallbacks, any of them may have answered."""
    return " or ".join(dict.fromkeys(route.model for route in judge.settings.routes(task.name)))

"""The settings that commands over all rows of a data set share, checked before anything is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from balcap.data.images import MAX_PIXELS
from balcap.data.settings import DataSettings
from balcap.judge import Judge, Task
from balcap.judge.redis_cache import is_redis

_DATA_SETTINGS = ("data", "image_root", "name", "folders", "max_rows", "link_targets", "max_pixels_in_file",
                  "prompts", "seed", "cache_dir")  # fmt: skip
"""Settings that are those of `DataSettings`, where a command has them."""


@dataclass
class RowsSettings:
    """What is asked about the rows of a data set, and where it is written.

    Run it again with the same settings and it goes on where it was, however it ended: what is in the judge's
    cache is not paid for again.

    Args:
        data: rows of a data set: path of a ``.json`` or ``.jsonl`` file, or a hub id such as
            ``Lin-Chen/ShareGPT4V``. Rows need an image and may lack a caption.
        image_root: folder that the image paths in the rows start from. Only files below it are read, since
            images are sent to the judge.
        out: the ``.json`` file to write. Beside it lie its settings, the list of quarantined rows, and the
            ledger.
        judge: who is asked; ``per_task`` may name another model for a task. It needs a ``cache``, from which a run
            goes on; its ``ledger`` is kept beside `out` unless it names another.
        name: configuration of a hub data set, such as ``ShareGPT4V``.
        folders: use only images below these folders of `image_root`, such as ``coco/train2017``; null for
            all.
        max_rows: use only the first this many rows that are left after `folders`; null for all. It may be
            raised later: rows that are done are not paid for again.
        link_targets: folders outside `image_root` that symbolic links in it may lead to.
        max_pixels_in_file: width x height up to which an image is decoded, a guard against decompression
            bombs.
        retry_quarantined: ask again about rows that an earlier run has put into quarantine.
        partial: write `out` even if rows are left for the next run, without them.
        cache_dir: folder for the table made from the JSON; null for the Hugging Face cache.

    Attributes:
        command: that has these settings.
    """

    command: ClassVar[str]

    data: str | None = None
    image_root: str | None = None
    out: str | None = None
    judge: Judge | None = None
    name: str | None = None
    folders: list[str] | None = None
    max_rows: int | None = None
    link_targets: list[str] | None = None
    max_pixels_in_file: int = MAX_PIXELS
    retry_quarantined: bool = False
    partial: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.judge is not None and self.judge.settings.ledger is None and self.out is not None:
            self.judge.settings.ledger = str(self.beside_out("ledger.sqlite"))

    @property
    def out_path(self) -> Path:
        return Path(self.out or "").expanduser()

    def beside_out(self, suffix: str) -> Path:
        """``<out>.<suffix>``."""
        return self.out_path.with_name(f"{self.out_path.name}.{suffix}")

    def problems(self) -> list[str]:
        """What is wrong, each message beginning with the key to change. Reads no data, calls no provider."""
        shared = {name: getattr(self, name) for name in _DATA_SETTINGS if hasattr(self, name)}
        problems = [own_keys(text) for text in DataSettings(**shared).problems("fit")] + self._out_problems()
        if self.judge is None:
            return [
                *problems,
                "judge is required: who is asked, such as judge.model openai/gpt-5-mini",
            ]
        problems += self.judge.problems(key="judge")
        if self.judge.settings.cache is None:
            problems.append(
                "judge.cache must be a file or a server: an interrupted run goes on from its answers"
            )
        return problems

    def _out_problems(self) -> list[str]:
        if self.out is None:
            return ["out is required: the .json file to write"]
        path, settings = self.out_path, self.beside_out("settings.json")
        if path.suffix != ".json" or path.is_dir():
            wrong = "must be a file that ends in .json"
        elif self.data and Path(self.data).expanduser().resolve() == path.resolve():
            wrong = "is the data set itself (data); name another file"
        elif path.exists() and not settings.exists():
            wrong = f"exists and was not written by {self.command} (no {settings.name}); name another file"
        else:
            return []
        return [f"out: {self.out} {wrong}"]

    def tasks(self) -> list[type[Task[Any]]]:
        """Everything that is asked."""
        raise NotImplementedError

    def own_identity(self) -> dict[str, Any]:
        """Of the command's own settings those that answers depend on, by their keys."""
        raise NotImplementedError

    def identity(self, digest: str) -> dict[str, Any]:
        """All that answers depend on, by the keys that set it; `digest` is of the data set's content."""
        assert self.judge is not None
        judge, cache = self.judge.settings, self.judge.settings.cache or ""
        identity: dict[str, Any] = {
            "data (digest of its content)": digest,
            **self.own_identity(),
            "judge.images": repr(judge.images),
            "judge.cache": cache if is_redis(cache) else str(Path(cache).expanduser().resolve()),
        }
        for task in self.tasks():
            asked = [{"model": route.model, "params": route.content} for route in judge.routes(task.name)]
            identity |= {f"judge ({task.name})": asked, f"{task.name} (version of its prompt)": task.version}
        return identity

    def asked_model(self, task: type[Task[Any]]) -> str:
        """Who is asked, for whoever reads the file: with fallbacks, any of them may have answered."""
        assert self.judge is not None
        return " or ".join(dict.fromkeys(route.model for route in self.judge.settings.routes(task.name)))


def own_keys(text: str) -> str:
    """A message of `balcap.data` or of the judge, which names keys as they are in training, with those of here."""
    text = re.sub(rf"\bdata\.({'|'.join(_DATA_SETTINGS)})\b", r"\1", text)
    return text.replace("model.judge", "judge")

"""What a benchmark is: images to caption, questions to a judge about each caption, and scores."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from balcap.benchmarks.official import read_prompts
from balcap.benchmarks.scores import Statistic
from balcap.data.images import decode_image
from balcap.data.json_files import DataError, read_json
from balcap.data.reader import ImageFolder, within_large
from balcap.judge import Judge, JudgeFailure, Task
from balcap.rollout import Sampling
from balcap.utils.files import file_state

Record = dict[str, Any]
"""What is known of one judged caption, as JSON: points, and ``failed``, the judgments that are missing."""


@dataclass(frozen=True, eq=False)
class BenchmarkImage:
    """One image to caption.

    Attributes:
        id: unique in the benchmark.
        read: the file's bytes and the decoded image; raises `BadImage`.
        row: what the benchmark knows of it.
    """

    id: str
    read: Callable[[], tuple[bytes, Image.Image]] = field(repr=False)
    row: Any = field(repr=False, default=None)

    async def file(self) -> bytes:
        """The file's bytes, read beside the event loop; raises `BadImage`."""
        return (await asyncio.to_thread(self.read))[0]


class Benchmark(ABC):
    """A benchmark of captioners. Subclasses say what they are in their docstring, their source with it.

    Args:
        data: its file, or the name of a data set on the hub.
        image_root: the folder of its images.
        judge: of this benchmark; null for the run's.
        prompt: what the captioner is asked.
        sampling: of the captioner; by default as its authors have it.
        limit: images that are taken, the first ones; null for all.
        official: count as the authors' code does; see the head of the file.
        code: the authors' Python file with their prompts, in a clone of their repository; needed by `official`.

    Attributes:
        name: of the score.
        official_judge: whom the authors ask; with another, scores are not comparable with theirs.
        source: where data and images come from.
        skipped: cause -> rows of the file that cannot be used, once it is loaded.
        tasks: the questions to the judge.
        official_prompts: names of the authors' prompts in their code; none where there is no official way.
    """

    name: ClassVar[str]
    official_judge: ClassVar[str | None] = None
    source: ClassVar[str]
    tasks: ClassVar[tuple[type[Task[Any]], ...]]
    official_prompts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        data: str,
        image_root: str | None = None,
        judge: Judge | None = None,
        prompt: str = "Describe this image in detail.",
        sampling: Sampling = Sampling(temperature=0.0, max_tokens=512),  # noqa: B008  frozen
        limit: int | None = None,
        official: bool = False,
        code: str | None = None,
    ) -> None:
        self.data, self.image_root, self.judge = data, image_root, judge
        self.prompt, self.sampling, self.limit = prompt, sampling, limit
        self.official, self.code = official, code
        self.skipped: Counter[str] = Counter()
        self._images: list[BenchmarkImage] = []

    def problems(self, key: str) -> list[str]:
        """What is wrong with the settings, each with the key to change."""
        problems = [] if self.judge is None else self.judge.problems(f"{key}.judge")
        if self.limit is not None and self.limit < 1:
            problems.append(f"{key}.limit: {self.limit} must be at least 1, or null for all images")
        problems += self._official_problems(key) if self.official else []
        at = Path(self.data).expanduser()
        if not at.exists() and (at.suffix or self.data.startswith((".", "/", "~"))):
            problems.append(f"{key}.data: there is no {self.data}; it comes from {self.source}")
        if self.image_root is not None and not Path(self.image_root).expanduser().is_dir():
            problems.append(
                f"{key}.image_root: there is no folder {self.image_root}; images come from {self.source}"
            )
        # at a temperature of 0 a captioner takes the likeliest tokens
        rules = Sampling(self.sampling.temperature or 1.0, self.sampling.top_p, self.sampling.max_tokens)
        return [*problems, *rules.problems(f"{key}.sampling")]

    def _official_problems(self, key: str) -> list[str]:
        if not self.official_prompts:
            return [f"{key}.official: {self.name} has no official judge or prompts; leave it out"]
        if self.code is None:
            return [
                f"{key}.code: official runs ask in the authors' own words; clone {self.source} and name their file"
            ]
        try:
            _ = self.prompts
        except DataError as error:
            return [f"{key}.{error}"]
        return []

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The authors' own, as templates; raises `DataError`."""
        return read_prompts(str(self.code), *self.official_prompts)

    def images(self) -> list[BenchmarkImage]:
        """The images, in a fixed order.

        Raises:
            DataError: the file is not as expected, naming what was found.
        """
        if not self._images:
            try:
                self._images = self.load()
            except (
                AttributeError,
                TypeError,
                KeyError,
                IndexError,
                UnicodeError,
            ) as error:  # whatever stands in a row
                what = f"{type(error).__name__}: {error}"
                raise DataError(
                    f"{self.name}: {self.data} is not as expected ({what}); {self.source} has the format"
                ) from error
        if not self._images:
            why = ", ".join(f"{count} {cause}" for cause, count in self.skipped.items()) or "it is empty"
            raise DataError(f"{self.name}: {self.data} holds no image that can be used: {why}")
        counts = Counter(image.id for image in self._images)
        if twice := [image for image, count in counts.items() if count > 1]:
            raise DataError(f"{self.name}: {self.data} has two rows for {twice[0]}; each image stands once")
        return self._images[: self.limit]

    @property
    def prompt_version(self) -> str:
        """Of the questions to the judge."""
        own = ", ".join(f"{task.name} {task.version}" for task in self.tasks)
        return f"the authors' ({self.source})" if self.official else own

    @abstractmethod
    def load(self) -> list[BenchmarkImage]:
        """All images of the file."""

    @abstractmethod
    async def judge_caption(self, judge: Judge, image: BenchmarkImage, caption: str) -> Record:
        """What the judge says of a caption. Runs on the judge's loop."""

    @abstractmethod
    def statistics(self, ids: Sequence[str], records: Sequence[Record]) -> dict[str, Statistic]:
        """Score name -> its statistic over the judged images; the first is the benchmark's own."""

    def identity(self) -> dict[str, Any]:
        """Which images and questions: captions of another file, or folder, are not taken for theirs."""
        path = Path(self.data).expanduser()
        root = self.image_root and str(Path(self.image_root).expanduser().resolve())
        data = [str(path.resolve()), *file_state(path)] if path.exists() else self.data
        return {"data": data, "image_root": root}

    def harness_input(self, captions: Mapping[BenchmarkImage, str]) -> tuple[str, str] | None:
        """Name and text of the file that the authors' scripts score; None where there are none."""
        return None

    # ---- for subclasses

    def read_json(self) -> Any:
        """The rows of the file; raises `DataError`."""
        return read_json(self.data)

    def reader(self, name: str) -> Callable[[], tuple[bytes, Image.Image]]:
        """Reads an image of `image_root`."""
        if not isinstance(name, str):
            raise DataError(f"{self.name}: {self.data} names an image {name!r}, which is no file name")
        if self.image_root is None:
            raise DataError(f"{self.name}: image_root is needed, the folder of its images ({self.source})")
        folder = ImageFolder(self.image_root)
        return lambda: folder.read(name)

    def row_error(self, row: int, what: str) -> DataError:
        """A row that is not as expected."""
        return DataError(f"{self.name}: {self.data}, row {row}: {what}; {self.source} has the format")


def read_bytes(data: bytes) -> tuple[bytes, Image.Image]:
    """An image that is there as bytes, as `BenchmarkImage.read` gives it."""
    return within_large(data, decode_image(data))


def given(answers: Sequence[Any]) -> list[Any | None]:
    """Answers of a judge, None where they are missing."""
    return [None if isinstance(answer, JudgeFailure) else answer for answer in answers]

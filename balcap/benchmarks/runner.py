"""One captioner on one benchmark: captions, judgments, scores; resumable at any moment.

Captions are on disk as soon as they exist, and answers in the judge's cache as soon as they come: the same command
goes on from there, and pays nothing twice. Images are captioned in fixed batches, which the ranks share: a batch's
captions do not depend on who draws them, so any number of processes gives the same numbers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from balcap.benchmarks.base import Benchmark, BenchmarkImage, Record
from balcap.benchmarks.scores import Statistic, known
from balcap.data.images import BadImage
from balcap.judge import Judge
from balcap.judge.models import takes_sampling_parameters
from balcap.trainer.distributed import gather_objects, stop_together
from balcap.trainer.pipeline import RolloutPipeline
from balcap.types import CaptionBatch
from balcap.utils.errors import UserError
from balcap.utils.files import append_jsonl, atomic_write, read_jsonl

log = logging.getLogger(__name__)

IN_FLIGHT = 64
"""Captions that are judged at once: so many images are in memory."""
EVERY_S = 15.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Result:
    """A benchmark's scores of one captioner.

    Attributes:
        name: of the benchmark.
        statistics: score name -> statistic; the first is the benchmark's own.
        failed: judgments that are missing.
        left_out: cause -> images that could not be read.
        judge: whom it asked, as litellm names it.
        comparable: the judge is the one that the authors ask.
        notes: what a reader of the number should know.
        prompt_version: of the questions.
        caption_words: mean words of a caption.
    """

    name: str
    statistics: Mapping[str, Statistic]
    failed: int
    left_out: Mapping[str, int]
    judge: str
    comparable: bool
    notes: Sequence[str]
    prompt_version: str
    caption_words: float

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Score name -> score, low, high, n and how it came about, as JSON."""
        shared = {
            "failed": self.failed,
            "judge": self.judge,
            "prompt_version": self.prompt_version,
            "comparable": self.comparable,
            "left_out": dict(self.left_out),
            "caption_words": self.caption_words,
            "notes": list(self.notes),
        }
        entries = {}
        for name, statistic in self.statistics.items():
            score = statistic.score()
            entries[name] = {"score": known(score.value), **score.interval(), "n": score.n, **shared}
        return entries


class BenchmarkRun:
    """Captions of one captioner for one benchmark, and what is said of them.

    Args:
        benchmark: what is measured.
        folder: for its files: ``captions.jsonl`` (image, caption) and, when it is done, ``judged.jsonl`` and what the
            authors' scripts read.
        identity: what the captions depend on beside the benchmark: weights, processor. Captions of another captioner are
            never taken for this one's.
        judge: where the benchmark has none of its own.
        batch_size: images of a batch that is captioned.
        seed: of the captions, where they are drawn.
        fresh: begin anew, whatever the folder holds.
        limit: images that are taken, within the benchmark's own; None for all of these.

    Raises:
        DataError: the benchmark's file is not as expected.
        UserError: the folder holds captions of another captioner.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        folder: Path,
        identity: Mapping[str, Any],
        judge: Judge | None,
        batch_size: int,
        seed: int = 0,
        fresh: bool = False,
        limit: int | None = None,
    ) -> None:
        self.benchmark, self.folder, self.batch_size, self.fresh = benchmark, folder, batch_size, fresh
        own = benchmark.judge or judge
        if own is None:
            raise UserError(f"{benchmark.name}: there is no judge; set its judge or model.judge")
        if judge is not None and own.settings.ledger is None:
            own.settings.ledger = judge.settings.ledger
        self.judge = own
        self.identity = json.loads(
            json.dumps(
                {
                    **identity,
                    **benchmark.identity(),
                    "prompt": benchmark.prompt,
                    "sampling": asdict(benchmark.sampling),
                    "seed": seed,
                }
            )
        )
        self.images = benchmark.images()[:limit]
        self.left_out: Counter[str] = Counter()
        self._skipped = benchmark.skipped  # of the file, alike on all ranks

    def run(self, trainer: Trainer, pipeline: RolloutPipeline, stage: int) -> Result:
        """Caption what has no caption, have it judged, and score. A collective: all ranks call it, all get the result.

        Raises:
            EngineFailed, RunStopped: on all ranks; what is done is kept.
        """
        batches = list(self._batches())
        mine = batches[trainer.global_rank :: trainer.world_size]
        self.judge.share(trainer.world_size, trainer.num_nodes)
        self._claim(trainer)
        captions = self._read_captions()
        todo = [(number, batch) for number, batch in mine if any(image.id not in captions for image in batch)]
        self._caption(trainer, pipeline, stage, todo, captions)
        try:
            records = self._judge(trainer, [image for _, batch in mine for image in batch], captions)
        finally:
            if self.benchmark.judge is not None:
                self.judge.close()
        everyone: dict[str, Record] = {}
        for others in gather_objects(trainer, records):
            everyone |= others
        left_out: Counter[str] = sum(gather_objects(trainer, self.left_out), Counter())
        return self._finish(trainer, everyone, left_out + self._skipped)

    def _batches(self) -> Iterator[tuple[int, Sequence[BenchmarkImage]]]:
        for number, start in enumerate(range(0, len(self.images), self.batch_size)):
            yield number, self.images[start : start + self.batch_size]

    # ---- captions

    def _claim(self, trainer: Trainer) -> None:
        """Whose captions the folder holds."""
        wrong = None
        if trainer.is_global_zero:
            settings = self.folder / "captions.settings.json"
            for path in [settings, *self._caption_files()] if self.fresh else []:
                path.unlink(missing_ok=True)
            before = _read_settings(settings) if settings.is_file() else self.identity
            if other := sorted(key for key in self.identity if before.get(key) != self.identity[key]):
                wrong = UserError(
                    f"{self.folder} holds captions that were made with another {', '.join(other)}; choose another folder "
                    "with --run_dir"
                )
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(settings) as file:
                    json.dump(self.identity, file, indent=2)
        wrong = gather_objects(trainer, wrong)[0]
        if wrong is not None:
            raise wrong

    def _caption_files(self) -> list[Path]:
        return sorted(self.folder.glob("captions*.jsonl"))

    def _read_captions(self) -> dict[str, str]:
        return {row["image"]: row["caption"] for path in self._caption_files() for row in read_jsonl(path)}

    def _caption(
        self,
        trainer: Trainer,
        pipeline: RolloutPipeline,
        stage: int,
        todo: Sequence[tuple[int, Sequence[BenchmarkImage]]],
        captions: dict[str, str],
    ) -> None:
        rank = trainer.global_rank
        path = self.folder / ("captions.jsonl" if rank == 0 else f"captions.rank{rank}.jsonl")
        progress = _Progress(f"{self.benchmark.name}: captions", sum(len(batch) for _, batch in todo))

        def read() -> Iterator[tuple[int, CaptionBatch]]:
            for number, images in todo:
                if (batch := self._read(images)) is not None:
                    yield number, batch

        def keep(ids: Sequence[str], texts: Sequence[str]) -> None:
            new = [(i, text) for i, text in zip(ids, texts, strict=True) if i not in captions]
            append_jsonl(path, [{"image": i, "caption": text} for i, text in new])
            captions.update(new)
            progress.add(len(ids))

        unreadable = self.left_out.total()
        pipeline.sample_each(read(), stage, self.benchmark.sampling, keep)
        without = sum(image.id not in captions for _, images in todo for image in images)
        self.left_out["refused_by_processor"] += without - (self.left_out.total() - unreadable)
        self.left_out = +self.left_out

    def _read(self, images: Sequence[BenchmarkImage]) -> CaptionBatch | None:
        """The images that can be read, as one batch."""
        good = []
        for image in images:
            try:
                good.append((image.id, *image.read()))
            except BadImage as bad:
                self._leave_out(image, bad)
        if not good:
            return None
        ids, files, decoded = zip(*good, strict=True)
        prompts = [self.benchmark.prompt] * len(ids)
        one_each = [(image,) for image in decoded], [(file,) for file in files]
        return CaptionBatch(ids, *one_each, prompts, [""] * len(ids))

    def _leave_out(self, image: BenchmarkImage, bad: BadImage) -> None:
        self.left_out[bad.cause] += 1
        log.warning("%s: left out %s: %s", self.benchmark.name, image.id, bad)

    # ---- judgments

    def _judge(
        self, trainer: Trainer, images: Sequence[BenchmarkImage], captions: Mapping[str, str]
    ) -> dict[str, Record]:
        """Image -> what is said of its caption; waits for all."""
        todo = [image for image in images if image.id in captions]
        progress = _Progress(f"{self.benchmark.name}: judged", len(todo), self.judge)
        records: dict[str, Record] = {}

        async def one(image: BenchmarkImage, slots: asyncio.Semaphore) -> None:
            async with slots:
                try:
                    records[image.id] = await self.benchmark.judge_caption(
                        self.judge, image, captions[image.id]
                    )
                except BadImage as bad:  # it could be read when it was captioned
                    self._leave_out(image, bad)
                progress.add(1)

        async def everything() -> None:
            slots = asyncio.Semaphore(IN_FLIGHT)
            await asyncio.gather(*(one(image, slots) for image in todo))

        self.judge.run(everything())
        stop_together(trainer, self.judge.stopped)
        return records

    # ---- the end

    def _finish(self, trainer: Trainer, records: Mapping[str, Record], left_out: Mapping[str, int]) -> Result:
        ids = [image.id for image in self.images if image.id in records]
        captions = self._read_captions()
        if trainer.is_global_zero:
            with atomic_write(self.folder / "judged.jsonl") as file:
                for i in ids:
                    file.write(
                        json.dumps({"image": i, "caption": captions[i], **records[i]}, ensure_ascii=False)
                        + "\n"
                    )
            written = {image: captions[image.id] for image in self.images if image.id in captions}
            if (harness := self.benchmark.harness_input(written)) is not None:
                with atomic_write(self.folder / harness[0]) as file:
                    file.write(harness[1])
        benchmark, model = self.benchmark, self.judge.settings.model
        comparable = bool(benchmark.official_judge) and model.lower().endswith(
            str(benchmark.official_judge).lower()
        )
        notes = []
        if benchmark.official_judge and not comparable:
            notes.append(f"not comparable: officially {benchmark.official_judge} judges")
        if comparable and not benchmark.official:
            notes.append("not comparable: asked in our words (official: false)")
        if model.partition("/")[0] not in (
            self.judge.settings.providers or {}
        ) and not takes_sampling_parameters(model):
            notes.append(f"{model} takes no sampling parameters")
        if left_out:
            notes.append("left out: " + ", ".join(f"{count} {cause}" for cause, count in left_out.items()))
        result = Result(
            benchmark.name,
            benchmark.statistics(ids, [records[i] for i in ids]),
            sum(record.get("failed", 0) for record in records.values()),
            left_out,
            model,
            comparable and benchmark.official,
            notes,
            benchmark.prompt_version,
            sum(len(captions[i].split()) for i in ids) / max(1, len(ids)),
        )
        if result.failed:
            rank_zero_info(f"{benchmark.name}: {result.failed} judgments are missing, and in no score")
        return result


def _read_settings(path: Path) -> dict[str, Any]:
    """Empty where the file is broken: then nobody knows whose captions they are."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        return {}


class _Progress:
    """A line now and then: how far it is, how long it will take, what it has cost."""

    def __init__(self, what: str, total: int, judge: Judge | None = None) -> None:
        self.what, self.total, self.judge, self.done = what, total, judge, 0
        self.began = self.shown = time.monotonic()

    def add(self, number: int) -> None:
        """So many more are done."""
        self.done += number
        now = time.monotonic()
        if now - self.shown >= EVERY_S:
            self.shown = now
            left = (now - self.began) / self.done * (self.total - self.done)
            cost = f"  ${self.judge.stats().cost_usd:.2f}" if self.judge else ""
            when = timedelta(seconds=round(left))
            rank_zero_info(f"{self.what} {self.done}/{self.total}{cost}  {when} left")

"""What benchmarks will cost: some captions of each are judged in a dry run that asks nobody."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from balcap.benchmarks.base import Benchmark
from balcap.commands.estimate_assumptions import Assumptions
from balcap.commands.estimate_dry_run import DryRunJudge, FakeClient
from balcap.commands.estimate_tokens import text_counter
from balcap.data.images import BadImage
from balcap.data.json_files import DataError
from balcap.judge import Judge
from balcap.judge.tasks.recaption import EXAMPLE

WORDS = 120
"""Of a caption, unless ``--caption_words`` says otherwise."""


def benchmark_usage(benchmark: Benchmark, judge: Judge, assume: Assumptions) -> tuple[int, np.ndarray]:
    """Images of a benchmark, and what judging one of them uses: calls, tokens in, tokens out, dollars.

    Raises:
        DataError: its file or its images cannot be read.
    """
    client = FakeClient(judge.settings, text_counter(assume.chars_per_token), assume)
    images, asked = benchmark.images(), DryRunJudge(client)
    step, judged = max(1, len(images) // assume.rows), 0
    try:
        for number, image in enumerate(images[::step]):
            words = islice(cycle(EXAMPLE.split()), number, number + (assume.caption_words or WORDS))
            try:
                asked.run(benchmark.judge_caption(asked, image, " ".join(words)))
            except BadImage as bad:
                if not judged:
                    raise DataError(f"{benchmark.name}: {image.id}: {bad}") from None
                continue
            judged += 1
    finally:
        asked.close()
    return len(images), client.used.total / max(1, judged)


def show_benchmarks(
    benchmarks: Sequence[Benchmark],
    default: Judge | None,
    evaluations: int,
    limit: int | None,
    assume: Assumptions,
    console: Console,
) -> None:
    """A table of what one run of each benchmark costs, and what those within the fit do.

    Args:
        benchmarks: which.
        default: the judge of those that have none of their own.
        evaluations: within the fit.
        limit: images of each of those.
        assume: as in the estimate.
        console: where it goes.
    """
    table = Table("benchmark", "judge", title="What one run of each benchmark asks (estimate)")
    for name in ("images", "calls", "tokens in", "tokens out", "dollars"):
        table.add_column(name, justify="right")
    within: Any = np.zeros(4)
    for benchmark in benchmarks:
        judge = benchmark.judge or default
        assert judge is not None
        try:
            images, each = benchmark_usage(benchmark, judge, assume)
        except DataError as error:
            console.print(f"{benchmark.name} is not estimated: {error}", markup=False)
            continue
        calls, tokens_in, tokens_out, usd = images * each
        within = within + evaluations * min(images, limit or images) * each
        dollars = "unknown" if np.isnan(usd) else f"${usd:,.2f}"
        numbers = (f"{number:,.0f}" for number in (images, calls, tokens_in, tokens_out))
        table.add_row(benchmark.name, judge.settings.model, *numbers, dollars)
    console.print(table)
    console.print(
        f"  captions of {assume.caption_words or WORDS} words are assumed  [--caption_words]", markup=False
    )
    if evaluations:
        console.print(
            f"Within the fit they run {evaluations} times: {within[0]:,.0f} calls, ${within[3]:,.2f}",
            markup=False,
        )

"""How much of what concurrency and latency allow a judge delivers, and what it leaves behind.

    python perf/judge_throughput.py            5,000 ratings of distinct captions, about two minutes
    python perf/judge_throughput.py --quick    300, 16 at once: too few for 64 to find their rhythm

The judge runs as in training, through litellm with cache and ledger on disk; the server is a process of its
own and takes a second for every answer. With C calls under way at once and a latency of L seconds
no client can do more than C / L judgments per second; ``throughput_share`` is what is reached of that, start
and end of the measured part included. Growth of descriptors, threads and resident memory counts from a pause
after the first judgments (at most 500) to the end.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from balcap.judge import Judge, JudgeFailure, Rate
from perf.report import arguments, report
from tests.judge_server import server_process

LATENCY = 1.0  # seconds
CAPTION = (
    "A woman in a yellow raincoat walks a small brown dog along a wet pavement. Behind them stands a row of "
    "brick houses with white window frames, and a blue bicycle leans against the nearest fence. The sky is "
    "grey. To the left, a red post box catches the light of a street lamp; number {} is painted on it."
)


def held() -> tuple[int, int, float]:
    """File descriptors, threads and resident megabytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return descriptors, threads, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def rate_all(judge: Judge, captions: Sequence[str], at_once: int) -> int:
    """Rate every caption, `at_once` waiting for their answers at a time; how many failed."""
    left = iter(captions)

    async def worker() -> int:
        failed = 0
        for caption in left:
            (answer,) = await judge.ask(Rate, [caption])
            failed += isinstance(answer, JudgeFailure)
        return failed

    return sum(await asyncio.gather(*(worker() for _ in range(at_once))))


def measure(judgments: int, concurrency: int) -> dict[str, Any]:
    """Run both parts, the second one in whole rounds of `concurrency`.

    Returns:
        ``throughput_share`` and ``judgments_per_s`` of the measured part; ``fd_growth``, ``thread_growth`` and
        ``rss_growth_mb`` (10^6 bytes) over it; ``cpu_ms_per_judgment``, processor time of this process;
        ``failed``, judgments of both parts.
    """
    captions = [CAPTION.format(number) for number in range(judgments)]
    first = min(500, judgments // 2)
    first = max(0, judgments - -(-(judgments - first) // concurrency) * concurrency)
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(answer="tests.judge_replies.right_answer", latency=LATENCY) as server,
    ):
        judge = Judge(
            "openai/gpt-4o-mini",
            params={"api_base": server.url, "temperature": 0},
            concurrency=concurrency,
            cache=f"{folder}/cache.sqlite",
            ledger=f"{folder}/ledger.sqlite",
        )
        failed = judge.run(rate_all(judge, captions[:first], 2 * concurrency))
        before, cpu, started = held(), time.process_time(), time.perf_counter()
        failed += judge.run(rate_all(judge, captions[first:], 2 * concurrency))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        growth = [now - then for now, then in zip(held(), before, strict=True)]
        judge.close()
    rate = (judgments - first) / seconds
    return {
        "throughput_share": rate * LATENCY / concurrency,
        "judgments_per_s": rate,
        **dict(zip(("fd_growth", "thread_growth", "rss_growth_mb"), growth, strict=True)),
        "cpu_ms_per_judgment": 1000 * cpu / (judgments - first),
        "failed": failed,
    }


def main() -> None:
    """Measure, print a table and one line of JSON."""
    quick = arguments(__doc__).parse_args().quick
    judgments, concurrency = (300, 16) if quick else (5000, 64)
    figures = measure(judgments, concurrency)
    title = f"{judgments} ratings, {concurrency} at once, {LATENCY:g} s each"
    report(title, ("", "measured"), figures.items(), figures)


if __name__ == "__main__":
    main()

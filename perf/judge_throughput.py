"""How much of what concurrency and latency allow a judge delivers, and what it leaves behind.

    python perf/judge_throughput.py            5,000 ratings of distinct captions, about two minutes
    python perf/judge_throughput.py --quick    300, 16 at once: too few for 64 to find their rhythm

The judge runs as in training, through litellm with cache and ledger on disk; the server is a process of its
own and takes `--latency` seconds for every answer. With C calls under way at once and a latency of L seconds
no client can do more than C / L judgments per second; ``throughput_share`` is what is reached of that, start
and end of the measured part included. Growth of descriptors, threads and resident memory counts from a pause
after the first judgments (at most 500) to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from rich.console import Console
from rich.table import Table

from balcap.judge import Judge, JudgeFailure, Rate
from tests.judge_server import server_process

CAPTION = (
    "A woman in a yellow raincoat walks a small brown dog along a wet pavement. Behind them stands a row of "
    "brick houses with white window frames, and a blue bicycle leans against the nearest fence. The sky is "
    "grey. To the left, a red post box catches the light of a street lamp; number {} is painted on it."
)


@dataclass(frozen=True)
class Result:
    """The last line, as JSON.

    Attributes:
        throughput_share: of concurrency / latency.
        judgments_per_s: in the measured part.
        fd_growth: file descriptors.
        thread_growth: threads.
        rss_growth_mb: resident memory, 10^6 bytes.
        cpu_ms_per_judgment: processor time of the client's process.
        judgments: that were asked for, first part included.
        failed: how many of them are missing.
        calls: requests that were sent.
    """

    throughput_share: float
    judgments_per_s: float
    fd_growth: int
    thread_growth: int
    rss_growth_mb: float
    cpu_ms_per_judgment: float
    judgments: int
    failed: int
    calls: int


def held() -> tuple[int, int, float]:
    """File descriptors, threads and resident megabytes of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return descriptors, threads, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def rate_all(judge: Judge, captions: Sequence[str], at_once: int) -> int:
    """Rate every caption, `at_once` waiting for their answers at a time; how many failed."""
    left: Iterator[str] = iter(captions)

    async def worker() -> int:
        failed = 0
        for caption in left:
            (answer,) = await judge.ask(Rate, [caption])
            failed += isinstance(answer, JudgeFailure)
        return failed

    return sum(await asyncio.gather(*(worker() for _ in range(at_once))))


def measure(judgments: int, concurrency: int, latency: float) -> Result:
    """Run it; both parts, so that the second one is whole rounds of `concurrency`."""
    captions = [CAPTION.format(number) for number in range(judgments)]
    first = min(500, judgments // 2)
    first = max(0, judgments - -(-(judgments - first) // concurrency) * concurrency)
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(answer="tests.judge_replies.right_answer", latency=latency) as server,
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
        calls = judge.stats().calls
        judge.close()
    rate = (judgments - first) / seconds
    return Result(
        throughput_share=round(rate * latency / concurrency, 4),
        judgments_per_s=round(rate, 2),
        fd_growth=int(growth[0]),
        thread_growth=int(growth[1]),
        rss_growth_mb=round(growth[2], 2),
        cpu_ms_per_judgment=round(1000 * cpu / (judgments - first), 3),
        judgments=judgments,
        failed=failed,
        calls=calls,
    )


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description="Throughput of the judge, and what it leaves behind.")
    parser.add_argument("--judgments", type=int, help="5,000 unless --quick")
    parser.add_argument("--concurrency", type=int, help="64 unless --quick")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds")
    parser.add_argument("--quick", action="store_true", help="300 judgments, 16 at once")
    options = parser.parse_args()
    judgments = options.judgments or (300 if options.quick else 5000)
    concurrency = options.concurrency or (16 if options.quick else 64)
    result = measure(judgments, concurrency, options.latency)
    table = Table(
        title=f"{judgments} ratings, {concurrency} at once, {options.latency:g} s each",
        show_header=False,
    )
    table.add_row("judgments per second", f"{result.judgments_per_s:.1f}")
    table.add_row("of what is possible", f"{result.throughput_share:.1%}")
    table.add_row("processor time per judgment", f"{result.cpu_ms_per_judgment:.1f} ms")
    table.add_row("more file descriptors", f"{result.fd_growth:+d}")
    table.add_row("more threads", f"{result.thread_growth:+d}")
    table.add_row("more resident memory", f"{result.rss_growth_mb:+.1f} MB")
    table.add_row("missing", str(result.failed))
    Console().print(table)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

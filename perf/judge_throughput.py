"""How much of what concurrency and latency allow a judge delivers.

    python perf/judge_throughput.py            5,000 ratings of distinct captions, 64 at once, about two minutes
    python perf/judge_throughput.py --quick    300, 16 at once: shows that it runs

The judge runs as in training, through litellm with cache and ledger on disk; the server is a process of its
own and takes a second for every answer. With C calls under way at once and a latency of L seconds
no client can do more than C / L judgments per second; ``throughput_share`` is what is reached of that, start
and end of the measured part included; the first eight rounds do not count.
"""

from __future__ import annotations

import asyncio
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
WARMUP = 8  # rounds
CAPTION = (
    "A woman in a yellow raincoat walks a small brown dog along a wet pavement. Behind them stands a row of "
    "brick houses with white window frames, and a blue bicycle leans against the nearest fence. The sky is "
    "grey. To the left, a red post box catches the light of a street lamp; number {} is painted on it."
)


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


def measure(rounds: int, concurrency: int) -> dict[str, Any]:
    """Rate `rounds` times `concurrency` captions, after `WARMUP` rounds that do not count.

    Returns:
        ``throughput_share``, ``judgments_per_s``; ``cpu_ms_per_judgment``, processor
        time of this process; ``failed``, of all judgments.
    """
    judgments, first = rounds * concurrency, WARMUP * concurrency
    captions = [CAPTION.format(number) for number in range(first + judgments)]
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
        cpu, started = time.process_time(), time.perf_counter()
        failed += judge.run(rate_all(judge, captions[first:], 2 * concurrency))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        judge.close()
    return {
        "throughput_share": judgments / seconds * LATENCY / concurrency,
        "judgments_per_s": judgments / seconds,
        "cpu_ms_per_judgment": 1000 * cpu / judgments,
        "failed": failed,
    }


def main() -> None:
    """Measure, print a table and one line of JSON."""
    rounds, concurrency = (10, 16) if arguments(__doc__).parse_args().quick else (70, 64)
    figures = measure(rounds, concurrency)
    title = f"{rounds} rounds of {concurrency} ratings at once, {LATENCY:g} s each"
    report(title, ("", "measured"), figures.items(), figures)


if __name__ == "__main__":
    main()

"""The simulation of `perf/scaling.py`: arithmetic where nothing is random, and a run that was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perf.scaling import MEASURED, MEASURED_STEPS, Job, simulate

# 4 images, whose captions end after 10 s; calls of 2 s, two in a row; updating takes 3 s, the rest 0.5
STEADY = Job(
    gpus=1, images=4, lag=0, tokens=(100, 100), token_s=0.1, update_image_s=0.75, step_s=0.5, latency=2.0,
    latency_p99=2.0 + 1e-9, concurrency=1000,
)  # fmt: skip


def test_one_step_after_the_other() -> None:
    steps = simulate(STEADY, 6)
    assert steps.seconds == pytest.approx(10 + 4 + 3 + 0.5, rel=1e-6)
    assert steps.judge == pytest.approx(4, rel=1e-6)
    assert steps.waited == pytest.approx(4, rel=1e-6)
    assert steps.together == 0


def test_with_a_lag_the_judge_works_meanwhile() -> None:
    steps = simulate(replace(STEADY, lag=1), 6)
    assert steps.seconds == pytest.approx(10 + 3 + 0.5, rel=1e-6)
    assert steps.waited == 0


def test_few_calls_at_once_follow_one_another() -> None:
    # 4 x 13 calls by 2 at once: at least 26 x 2 s
    assert simulate(replace(STEADY, concurrency=2), 3).judge == pytest.approx(52, rel=1e-6)


@pytest.mark.parametrize("limits", [{"rpm": 60.0}, {"tpm": 60.0 * STEADY.call_tokens}])
def test_the_account_is_shared_by_all_ranks(limits: dict[str, float]) -> None:
    # one call a second, 3 x 4 x 13 calls a step
    steps = simulate(replace(STEADY, gpus=3, lag=1, **limits), 8)
    assert steps.seconds == pytest.approx(156, rel=0.02)


def test_all_ranks_wait_for_the_slowest_call_of_any() -> None:
    job = replace(STEADY, latency_p99=10.0)
    alone, many = simulate(job, 20), simulate(replace(job, gpus=16), 20)
    assert many.seconds > alone.seconds + 3
    assert many.together > 3
    assert simulate(replace(job, gpus=16, timeout=6.0), 20).seconds < many.seconds - 1


@pytest.mark.parametrize("lag", [0, 1])
def test_one_rank_is_as_fast_as_it_was_measured(lag: int) -> None:
    assert simulate(replace(MEASURED, lag=lag), 200).seconds == pytest.approx(MEASURED_STEPS[lag], rel=0.15)

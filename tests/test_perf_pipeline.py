"""The arithmetic of `perf/pipeline.py`, and that TRL's reward function gives every caption its own reward."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from balcap.data import CaptionDataModule
from balcap.judge import Judge
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from perf.pipeline import LAG0, LAG1, TRL, Case, Step, measured, summary
from perf.report import rollouts_of_texts

CASE = Case(steps=2, warmup=1)


def row(judge: float) -> dict[str, str]:
    stages = {"rollout": 2.0, "judge": judge, "judge_wait": 1.0, "update": 1.5, "sync": 0.5}
    return {f"time/{k}_s": str(v) for k, v in stages.items()} | {"judge/failed": "1.0"}


def steps(*seconds: float, judge: float = 6.0) -> list[Step]:
    return [Step(s, 2.0, judge, 1.0, 1.5, 0.5, missing=0) for s in seconds]


def test_steps_are_what_lies_between_the_ends_of_updates() -> None:
    rows = [row(5.0), row(6.0), row(7.0), {}]  # the last step of a run with a lag samples nothing
    first, second = measured(rows, [100.0, 104.0, 109.5, 110.0], CASE)
    assert (first.seconds, second.seconds) == (4.0, 5.5)
    assert (first.judge, second.judge) == (6.0, 7.0)
    assert (first.rollout, first.update, first.sync) == (2.0, 1.5, 0.5)
    assert first.missing == 1
    with pytest.raises(RuntimeError, match=r"2 steps in metrics.csv and 3 in TensorBoard instead of 3"):
        measured(rows[:2], [1.0, 2.0, 3.0], CASE)


def test_ratios_by_hand() -> None:
    # lag 1: mean 5, median 4; device 2 + 1.5 + 0.5 = 4, judge 6. lag 0: mean 10, median 9.
    results = {LAG1: steps(4.0, 4.0, 7.0), LAG0: steps(9.0, 9.0, 12.0), TRL: steps(15.0)}
    figures = summary(results)
    assert figures["step_over_slowest"] == 5 / 6
    assert figures["step_by_arithmetic_s"] == 5.0  # max(4, (6 + 4) / 2)
    assert (figures["step_ratio_lag0"], figures["step_ratio_trl"]) == (2.0, 3.0)
    assert (figures["step_ratio_lag0_median"], figures["step_ratio_trl_median"]) == (2.25, 3.75)
    assert figures["means"]["lag1"] == {
        "seconds": 5.0,
        "rollout": 2.0,
        "judge": 6.0,
        "judge_wait": 1.0,
        "update": 1.5,
        "sync": 0.5,
    }
    quick = summary({LAG1: steps(5.0, judge=1.0), LAG0: steps(5.0), TRL: steps(5.0)})
    assert quick["step_over_slowest"] == 1.25  # the device is slower than the judge
    assert quick["step_by_arithmetic_s"] == 4.0


@pytest.fixture
def oracle():
    judge = Judge("shapes/oracle", providers={"shapes": "examples.shapes.oracle.Oracle"}, cache=None)
    yield judge
    judge.close()


def test_trl_rewards_are_the_weighted_sums_of_ours(oracle: Judge, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from perf.pipeline_trl import Peer

    data = CaptionDataModule(
        data=str(world / "shapes.json"),
        image_root=str(world),
        batch_size=2,
        val_size=0,
        num_workers=0,
        run_dir=str(tmp_path),
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    # Two captions of each image, those of an image together: its own reference, and the other image's
    texts = [batch.references, batch.references[::-1]]
    suite = RewardSuite([Precision(), Recall(), Linguistic()])
    weights = {"precision": 1.0, "recall": 2.0, "linguistic": 0.5}
    peer = Peer(oracle, weights, captions=2)
    given = asyncio.run(
        peer.reward(
            prompts=[],
            completions=[[{"role": "assistant", "content": text}] for group in texts for text in group],
            sample_id=[batch.sample_ids[i // 2] for i in range(4)],
            image_bytes=[batch.image_bytes[i // 2][0] for i in range(4)],
            reference=[batch.references[i // 2] for i in range(4)],
            trainer_state=None,
        )
    )
    rollouts = rollouts_of_texts(batch, texts)
    wanted = suite(rollouts, suite.gather(oracle, rollouts))  # [2, 2, 3]
    sums = (wanted * torch.tensor([1.0, 2.0, 0.5])).sum(-1)
    assert given == pytest.approx(sums.flatten().tolist())
    assert float(sums[0, 0]) > float(sums[0, 1])  # what is said of the other image is worth less
    assert float(sums[1, 0]) > float(sums[1, 1])
    assert peer.missing == 0
    assert peer.judge_s > 0


def test_a_caption_that_nobody_judged_has_no_reward_in_trl(world: Path, monkeypatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("OPENAI_API_KEY", "dummy")
    from perf.pipeline_trl import Peer

    judge = Judge(
        "openai/gpt-4o-mini",
        params={"api_base": "http://127.0.0.1:9/v1"},
        retries=0,
        max_failed_share=1.0,
        cache=None,
    )
    image = next((world / "shapes").glob("*.png")).read_bytes()
    peer = Peer(judge, {"precision": 1.0, "recall": 1.0, "linguistic": 1.0}, captions=2)
    try:
        given = asyncio.run(
            peer.reward(
                completions=[
                    [{"role": "assistant", "content": "A circle."}],
                    [{"role": "assistant", "content": "A star."}],
                ],
                sample_id=["a", "a"],
                image_bytes=[image, image],
                reference=["", ""],
            )
        )
    finally:
        judge.close()
    assert given == [None, None]
    assert peer.missing == 8  # decompose, verify, match and rate of both

"""TRL's part of `perf/pipeline.py`, a process of its own: what a careful user of ``GRPOTrainer`` would write.

TRL calls one asynchronous reward function with all captions of a step, those of an image standing together. It
judges each image's group as our runs do and returns the weighted sum of the rewards, None where all are missing.
Settings in which TRL's defaults would be slower here are changed: no activation checkpointing, no logging, and the
vision tower is frozen, as in our runs. bfloat16 autocast over float32 weights works in it on CPUs, in generation too.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from balcap.judge import Judge
from balcap.policy import PolicyConfig
from balcap.policy.loading import load_model, load_processor, prepare
from balcap.policy.prompts import PromptEncoder
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from balcap.types import CaptionBatch
from perf.pipeline import CONFIG, OVERLAY, Case, Step
from perf.report import DATA, ROOT, batches, rollouts_of_texts

MODEL = yaml.safe_load((ROOT / CONFIG).read_text())["model"]  # of the embedded world's config
JUDGE = yaml.safe_load((ROOT / OVERLAY).read_text())["model"]["judge"]


class Peer(TrainerCallback):
    """Rewards as TRL wants them, and the seconds of every step.

    Args:
        judge: of all captions.
        weights: of the rewards, by name.
        captions: G; each image's stand together.

    Attributes:
        steps: done.
        rollout, judge_s: seconds in this step.
        missing: judgments in this step.
    """

    def __init__(self, judge: Judge, weights: dict[str, float], captions: int) -> None:
        self.judge, self.captions = judge, captions
        self.steps: list[Step] = []
        self.suite = RewardSuite([Precision(), Recall(), Linguistic()])
        self.weights = torch.tensor([weights[name] for name in self.suite.names])
        self.on_train_begin()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self.rollout = self.judge_s = 0.0
        self.missing = 0
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends, the next one begins."""
        seconds, judge = time.perf_counter() - self.began, self.judge_s
        update = seconds - self.rollout - judge
        self.steps.append(Step(seconds, self.rollout, judge, judge, update, 0.0, self.missing))
        self.on_train_begin()

    async def reward(
        self, completions: Any, sample_id: Any, image_bytes: Any, reference: Any, **_: Any
    ) -> list[float | None]:
        """The weighted sum of the rewards of each caption; None where all are missing."""
        started = time.perf_counter()
        texts = [message[0]["content"].strip() for message in completions]
        G = self.captions
        batch = CaptionBatch(sample_id[::G], [], [(file,) for file in image_bytes[::G]], [], reference[::G])
        rollouts = rollouts_of_texts(batch, [texts[i : i + G] for i in range(0, len(texts), G)])
        judgments = await asyncio.to_thread(self.suite.gather, self.judge, rollouts)
        self.judge_s += time.perf_counter() - started
        self.missing += sum(judgments.failures.values())
        rewards = self.suite(rollouts, judgments).flatten(0, 1)  # [B * G, K]
        missing, sums = rewards.isnan().all(-1).tolist(), (rewards * self.weights).nansum(-1).tolist()
        return [None if gone else total for total, gone in zip(sums, missing, strict=True)]


def rows(case: Case, seed: int, run_dir: Path) -> Dataset:
    """The images of our runs, in their order: `case.images` for each update."""
    examples = [
        {
            "prompt": [{"role": "user", "content": batch.prompts[i]}],
            "image": batch.images[i][0],
            "sample_id": batch.sample_ids[i],
            "image_bytes": batch.image_bytes[i][0],
            "reference": batch.references[i],
        }
        for batch in itertools.islice(batches(DATA, case.images, run_dir, seed), case.updates)
        for i in range(len(batch))
    ]
    return Dataset.from_list(examples)


def settings(case: Case, seed: int, out: Path, banned: list[int]) -> GRPOConfig:
    """What our runs have, in TRL's words; temperature 1, gradients clipped to 1: its defaults too."""
    optimizer = MODEL["optimizer"]["init_args"]
    return GRPOConfig(
        output_dir=str(out),
        seed=seed,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=case.images * case.captions,
        steps_per_generation=case.steps_per_generation,
        num_generations=case.captions,
        max_completion_length=MODEL["sampling"]["max_tokens"],
        generation_kwargs={"suppress_tokens": banned},
        max_steps=case.updates,
        shuffle_dataset=False,
        loss_type="dapo",  # the mean over all tokens, as ours
        beta=MODEL["kl_coef"],
        learning_rate=optimizer["lr"],
        weight_decay=optimizer["weight_decay"],
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def train(case: Case, seed: int, url: str, out: Path) -> list[Step]:
    """Steps of a run of `case.updates` updates."""
    judge = Judge(**JUDGE, params={"api_base": url}, ledger=str(out / "ledger.sqlite"))
    policy = PolicyConfig(**{**MODEL["policy"], "model": str(ROOT / MODEL["policy"]["model"])})
    model, processor = prepare(load_model(policy), policy), load_processor(policy)
    processor.tokenizer.padding_side = "left"  # TRL takes it for granted, and misplaces images without a word
    peer = Peer(judge, MODEL["weights"], case.captions)
    trainer = GRPOTrainer(
        model,
        reward_funcs=peer.reward,
        args=settings(case, seed, out, PromptEncoder(processor, model.config).banned_token_ids),
        train_dataset=rows(case, seed, out),
        processing_class=processor,
        callbacks=[peer],
    )
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        generated = generate(*args, **kwargs)
        peer.rollout = time.perf_counter() - peer.began  # all that the step has done so far
        return generated

    model.generate = timed
    trainer.train()
    judge.close()
    return peer.steps


def main() -> None:
    """``python -m perf.pipeline_trl JSON FOLDER``: leaves ``steps.json`` in the folder."""
    options, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    seed, url = options.pop("seed"), options.pop("url")
    steps = train(Case(**options), seed, url, out)
    (out / "steps.json").write_text(json.dumps([asdict(step) for step in steps]))


if __name__ == "__main__":
    main()

"""Run folders as fits leave them, without a fit: for tests of reports, and for their speed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from balcap.judge.client import Reply
from balcap.judge.ledger import Ledger
from balcap.report.thumbnails import FOLDER, thumbnail_path, write_thumbnail
from callbacks.rollout_log import _schema, write_parquet

REWARDS = ("precision", "recall", "linguistic")
THINGS = ("dog", "boat", "lamp", "door", "tree", "cup")
COLOURS = ("red", "green", "blue", "white")


def write_run(
    folder: Path,
    steps: int = 30,
    groups: int = 2,
    captions: int = 4,
    images: int = 16,
    seed: int = 0,
    failed: float = 0.0,
    texts: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    log_every: int = 1,
    image_size: int = 96,
    assertions: int = 6,
) -> Path:
    """A run folder: settings, metrics, rollouts with thumbnails, a ledger, benchmarks.

    Args:
        folder: of the run.
        steps: optimizer steps; validation is before the first and after the last one.
        groups, captions: B and G of a step.
        images: that are held out.
        seed: of everything, and of the settings.
        failed: share of captions whose verification failed.
        texts: put into captions, assertions, references and prompts, each in turn.
        settings: merged into those of the model, one level deep.
        log_every: training steps between two that are logged.
        image_size: pixels.
        assertions: per caption.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "policy": {"model": "Qwen/Qwen3-VL-4B-Instruct", "lora": {"r": 64}, "freeze_vision": True},
        "judge": {"class_path": "balcap.judge.Judge", "init_args": {"model": "openai/gpt-6-luna"}},
        "weights": dict.fromkeys(REWARDS, 1.0),
        "num_captions": captions,
        "kl_coef": 0.01,
        "reward_transforms": None,
    }
    config = {
        "seed_everything": seed,
        "run_dir": str(folder),
        "trainer": {"max_steps": steps},
        "model": model | (settings or {}),
        "data": {"data": "rows.json", "image_root": "no images", "batch_size": groups},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "config.changed.yaml").write_text(yaml.safe_dump({"model": {"kl_coef": 0.01}}))
    _write_metrics(folder, steps, random)
    rows = _Rows(random, failed, texts, assertions)
    for step, skill in ((0, 0.4), (steps, 0.9)):
        held_out = [rows.row(f"coco/{i % 3}/{i:04}.jpg", "val", step, i, 0, skill) for i in range(images)]
        _write(folder, held_out, f"val-{step:08d}-rank0-000000")
    for step in range(1, steps + 1, log_every):
        skill = 0.4 + 0.5 * step / steps
        of_step = [
            rows.row(f"sam/{step}-{b}.jpg", "train", step, b, g, skill)
            for b in range(groups)
            for g in range(captions)
        ]
        _write(folder, of_step, f"train-{step:08d}-rank0-{step - 1:06d}")
        if step > steps - 5 * log_every:
            for row in of_step[::captions]:
                _draw(folder, row["sample_id"], image_size, random)
    for row in held_out:
        _draw(folder, row["sample_id"], image_size, random)
    _write_ledger(folder, steps, failed)
    score = {"score": 80.5, "low": 79.0, "high": 82.0, "n": images, "failed": 0, "judge": "openai/gpt-6-luna"}
    (folder / "benchmarks.json").write_text(json.dumps({"dcscore": score, "dcscore/recall": score}))
    return folder


class _Rows:
    def __init__(self, random: np.random.Generator, failed: float, texts: Sequence[str], number: int) -> None:
        self.random, self.failed, self.texts, self.number = random, failed, list(texts), number
        self.used = 0

    def text(self) -> str:
        if not self.texts:
            return ""
        self.used += 1
        return self.texts[self.used % len(self.texts)]

    def row(
        self, image: str, stage: str, step: int, group: int, rollout: int, skill: float
    ) -> dict[str, Any]:
        random = self.random
        things = [f"{random.choice(COLOURS)} {random.choice(THINGS)}" for _ in range(self.number)]
        assertions = [
            f"There is a {thing}." if i % 2 else f"The {thing} is large." for i, thing in enumerate(things)
        ]
        judged = random.random() >= self.failed
        true = [bool(random.random() < skill) for _ in assertions]
        pointable = [bool(random.random() < 0.9) for _ in assertions]
        covered = [bool(random.random() < skill) for _ in assertions]
        values = {
            "precision": float(np.mean(np.logical_and(true, pointable))) if judged else None,
            "recall": float(np.mean(covered)),
            "linguistic": float(min(1.0, skill + 0.1 * random.random())),
        }
        length, reference = int(random.integers(10, 120)), 50
        inside = 0.5 <= length / reference <= 2.0
        shaped = values | {"linguistic": values["linguistic"] if inside else 0.0}
        odd = self.text()
        return {
            "stage": stage,
            "step": step,
            "batch": step,
            "rank": 0,
            "group": group,
            "rollout": rollout,
            "sample_id": image,
            "prompt": f"Describe this image.{odd}",
            "reference": f"A reference. {odd}",
            "caption": f"A photo of a {', a '.join(things)}. {odd}",
            "truncated": False,
            "length": length,
            "reference_length": reference,
            "weights_version": step,
            **{f"reward/{name}": value for name, value in values.items()},
            **{f"shaped/{name}": value for name, value in shaped.items()},
            "advantage": float(random.normal()) if stage == "train" else None,
            "assertions": [f"{text}{odd}" for text in assertions],
            "true": true if judged else None,
            "pointable": pointable if judged else None,
            "reference_units": [f"{text}{odd}" for text in assertions],
            "covered": covered,
            "clarity": 0.9,
            "fluency": 0.8,
            "coherency": 0.7,
        }


def _write(folder: Path, rows: list[dict[str, Any]], name: str) -> None:
    write_parquet(pa.Table.from_pylist(rows, schema=_schema(REWARDS)), folder / f"rollouts/{name}.parquet")


def _draw(folder: Path, sample_id: str, size: int, random: np.random.Generator) -> None:
    # smooth, as photographs are: noise would be the worst case of JPEG
    small = random.integers(0, 255, (12, 12, 3)).astype(np.uint8)
    image = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    write_thumbnail(image, thumbnail_path(folder / "rollouts" / FOLDER, sample_id))


def _write_metrics(folder: Path, steps: int, random: np.random.Generator) -> None:
    names = [
        f"train/{name}"
        for name in (*REWARDS, "b_capscore", "length_ratio", "caption_tokens", "kl", "entropy")
    ]
    names += [f"train/reward_std/{name}" for name in REWARDS] + [
        f"train/zero_variance/{name}" for name in REWARDS
    ]
    names += ["train/grad_norm", "train/length_masked", "judge/failed", "judge/cost_usd", "judge/cache_hits"]
    names += [f"time/{name}_s" for name in ("step", "rollout", "judge_wait", "update", "sync")]
    validated = [f"val/{name}" for name in (*REWARDS, "b_capscore", "length_ratio", "caption_tokens")]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *names, *validated])
        writer.writeheader()
        for step in range(steps + 1):
            row: dict[str, Any] = {"step": step}
            if step in (0, steps):
                writer.writerow(row | dict.fromkeys(validated, 0.4 + 0.5 * step / steps))
            if step:
                writer.writerow(
                    row | {name: abs(0.5 * step / steps + 0.1 * random.normal()) for name in names}
                )


def _write_ledger(folder: Path, steps: int, failed: float) -> None:
    ledger = Ledger(folder / "judge_ledger.sqlite")
    for number in range(min(steps, 2000)):
        good = number % 10 >= 10 * failed
        outcome, detail = (
            ("ok", None) if good else ("rate_limit", "openai/gpt-6-luna: 429 slow down, <b>please</b>")
        )
        reply = Reply(text="", tokens_in=900, tokens_out=50, tokens_cached=300, usd=0.002)
        task = ("decompose", "verify", "match", "rate")[number % 4]
        ledger.add(1.7e9 + number, task, "openai/gpt-6-luna", 4, 1, outcome, reply, 0.1 + number % 7, detail)
    ledger.close()

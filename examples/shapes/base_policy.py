"""Builds the base policy in ``assets/``: a small Qwen2.5-VL that sees well and speaks badly.

Two stages of supervised training on scenes drawn from a seed::

    python -m examples.shapes.base_policy --out assets/shapes-base --seed 0

Vocabulary and weights are made anew; architecture, image processor and chat template are the files in ``assets/``.
First true captions, with a loss beside it that asks every image token what lies in its cell, until the
model names what is there; then, briefly, flawed captions. Reinforcement learning can undo the second
stage, which is about speech; it could not teach the first.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from examples.shapes import scene as world
from examples.shapes.captions import QUESTIONS, clean, flawed, reference
from examples.shapes.language import is_pointable, is_true, read_facts
from examples.shapes.scene import Scene, draw_scene, sample_scene

log = logging.getLogger(__name__)

BASE = Path(__file__).parents[2] / "assets/shapes-base"
VOCABULARY = 640
PATCHES = 6  # of 14 pixels, on a side, merged 2 x 2: one image token per place
IMAGE = "<|image_pad|>"
ALL_MARKS = [(colour, kind) for colour in world.MARK_COLOURS for kind in world.MARKS]
KINDS: tuple[Sequence[Any], ...] = (world.COLOURS, world.SHAPES, world.SIZES, ALL_MARKS)

Writer = Callable[[Scene, np.random.Generator], str]
Loss = Callable[[np.random.Generator], Tensor]


def build_processor(seed: int = 0) -> Any:
    """The processor in ``assets/`` with a byte-level BPE trained anew on the world's captions."""
    from transformers import AutoProcessor

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(2000)]
    corpus = [write(scene, rng) for scene in scenes for write in (reference, clean, flawed)]
    processor = AutoProcessor.from_pretrained(BASE)
    processor.tokenizer = processor.tokenizer.train_new_from_iterator(
        [*corpus, *(QUESTIONS * 20)], VOCABULARY
    )
    return processor


def build_model(seed: int = 0) -> Any:
    """A randomly initialised Qwen2.5-VL of about two million parameters: ``config.json`` in ``assets/``."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(BASE), dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(BASE)
    return model


# ── what is trained on ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Pool:
    """Scenes and their preprocessed pixels; captions are written anew at every use."""

    scenes: list[Scene]
    pixels: Tensor  # [N, patches, values per patch], half precision
    cells: Tensor  # [N, 9, 4]

    def images(self, rows: np.ndarray) -> dict[str, Tensor]:
        """``pixel_values`` and ``image_grid_thw`` of some scenes."""
        grid = torch.tensor([[1, PATCHES, PATCHES]] * len(rows))
        return {"pixel_values": self.pixels[rows].float().flatten(0, 1), "image_grid_thw": grid}


def _cell_labels(scene: Scene) -> list[list[int]]:
    """Class of colour, shape, size and mark in each of the nine places; 0 where there is none."""
    labels = [[0] * len(KINDS) for _ in world.PLACES]
    for thing in scene.things:
        values = (thing.colour, thing.shape, thing.size, thing.mark)
        classes = [1 + kinds.index(value) if value else 0 for kinds, value in zip(KINDS, values, strict=True)]
        labels[world.PLACES.index(thing.place)] = classes
    return labels


def _draw_pool(processor: Any, n: int, seed: int) -> _Pool:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(n)]
    read = partial(processor.image_processor, return_tensors="pt")
    pixels = [read(images=draw_scene(scene, rng))["pixel_values"].half() for scene in scenes]
    return _Pool(scenes, torch.stack(pixels), torch.tensor([_cell_labels(s) for s in scenes]))


def _inputs(
    processor: Any, pool: _Pool, rows: np.ndarray, rng: np.random.Generator, captions: Sequence[str] = ()
) -> dict[str, Any]:
    """Model inputs: questions padded on the left, or with captions, and then labels on these alone, on the right."""
    tokenizer = processor.tokenizer
    questions = [QUESTIONS[rng.integers(len(QUESTIONS))] for _ in rows]
    end, image = tokenizer.eos_token, IMAGE * len(world.PLACES)
    head, tail = f"<|im_start|>user\n<|vision_start|>{image}<|vision_end|>", f"{end}\n<|im_start|>assistant\n"
    prompts = tokenizer([head + question + tail for question in questions])["input_ids"]
    answers = [tokenizer(caption + end)["input_ids"] for caption in captions] or [[]] * len(rows)
    batch = tokenizer.pad(
        {"input_ids": [p + a for p, a in zip(prompts, answers, strict=True)]},
        padding_side="right" if captions else "left",
        return_tensors="pt",
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int(),
        **pool.images(rows),
    }
    if captions:
        written = torch.arange(ids.shape[1]) >= torch.tensor([[len(p)] for p in prompts])
        inputs["labels"] = ids.where(written & mask.bool(), -100)
    return inputs


# ── training ─────────────────────────────────────────────────────────────────────────────────────────


class _CellProbe(nn.Module):
    """Asks every image token for colour, shape, size and mark in its cell, and all of them for the background."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = [1 + len(kinds) for kinds in KINDS]
        self.head = nn.Linear(hidden, sum(self.sizes))
        self.ground = nn.Linear(hidden, len(world.BACKGROUNDS))

    def forward(self, features: Tensor, cells: Tensor, grounds: Tensor) -> Tensor:
        """features [B, 9, hidden], cells [B, 9, 4], grounds [B] -> mean cross-entropy."""
        parts = self.head(features).split(self.sizes, dim=-1)
        losses = [F.cross_entropy(p.flatten(0, 1), cells[..., i].flatten()) for i, p in enumerate(parts)]
        return sum(losses, F.cross_entropy(self.ground(features.mean(1)), grounds))


def _fit(
    name: str, module: nn.Module, loss_of: Loss, steps: int, lr: float, seed: int, max_norm: float = math.inf
) -> None:
    """`steps` of AdamW on what of `module` is not frozen; gradients are clipped to `max_norm`."""
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        loss = loss_of(rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("%s %5d  loss %.3f", name, step, loss.item())


def _seeing(model: Any, probe: _CellProbe, pool: _Pool, batch: int) -> Loss:
    """The probe's loss: cheap, and most of what there is to learn."""

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(pool.scenes), size=batch)
        features = torch.stack(model.model.get_image_features(**pool.images(rows)).pooler_output)
        grounds = torch.tensor([world.BACKGROUNDS.index(pool.scenes[r].background) for r in rows])
        return probe(features, pool.cells[rows], grounds)

    return loss


def _speaking(model: Any, processor: Any, write: Writer, pool: _Pool, batch: int) -> Loss:
    """The language model's on captions that `write` makes up anew for every picture.

    bfloat16 arithmetic on float32 weights: twice as fast on a CPU that has it.
    """

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(pool.scenes), size=batch)
        captions = [write(pool.scenes[r], rng) for r in rows]
        with torch.autocast("cpu", torch.bfloat16):
            return model(**_inputs(processor, pool, rows, rng, captions)).loss

    return loss


@torch.no_grad()
def stated_facts(model: Any, processor: Any, n: int = 256, seed: int = 10_000, sample: bool = False) -> dict:
    """Shares of stated facts that are true, per kind and for all but marks, on `n` unseen pictures."""
    pool = _draw_pool(processor, n, seed)
    rng, model = np.random.default_rng(seed), model.eval()
    right: dict[str, list[bool]] = {}
    texts: list[str] = []
    for start in range(0, n, 64):
        rows = np.arange(start, min(n, start + 64))
        inputs = _inputs(processor, pool, rows, rng)
        out = model.generate(**inputs, do_sample=sample, max_new_tokens=160, top_k=0)
        written = out[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            for fact in filter(is_pointable, read_facts(text)):
                right.setdefault(fact[0], []).append(is_true(fact, pool.scenes[row]))
    seen = [ok for kind, oks in right.items() if kind != "mark" for ok in oks]
    return {
        "all_but_marks": float(np.mean(seen)) if seen else 0.0,
        **{kind: (round(float(np.mean(oks)), 3), len(oks)) for kind, oks in sorted(right.items())},
        "examples": texts[:2],
    }


def build(
    out: Path = BASE,
    seed: int = 0,
    look_steps: int = 1000,
    clean_steps: int = 1800,
    flawed_steps: int = 200,
    batch: int = 64,
    pool_size: int = 12_000,
    facts: int = 256,
) -> dict:
    """Train, save to `out` in half precision, and return (and write beside it) what the model sees and its recipe.

    `facts` is the number of unseen pictures that the report is about.
    """
    processor = build_processor(seed)
    model = build_model(seed)
    pool, visual, probe = (
        _draw_pool(processor, pool_size, seed + 1),
        model.model.visual,
        _CellProbe(model.config.text_config.hidden_size),
    )
    looking = _seeing(model, probe, pool, 2 * batch)
    _fit("look", nn.ModuleList([visual, probe]), looking, look_steps, 1e-3, seed)
    visual.requires_grad_(False)
    report: dict[str, Any] = {}
    for i, (write, steps, lr) in enumerate(((clean, clean_steps, 2e-3), (flawed, flawed_steps, 5e-4))):
        name, loss = write.__name__, _speaking(model.train(), processor, write, pool, batch)
        _fit(name, model, loss, steps, lr, seed + 1 + i, max_norm=1.0)
        report[name] = stated_facts(model, processor, facts, sample=write is flawed)
        log.info("after %s captions: %s", name, report[name])
    report["built_with"] = {
        "seed": seed, "look_steps": look_steps, "clean_steps": clean_steps, "flawed_steps": flawed_steps,
        "batch": batch, "pool_size": pool_size, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    model.half().save_pretrained(out, safe_serialization=True)
    processor.save_pretrained(out)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    auto_cli(build, as_positional=False)

"""Builds the base policy in ``assets/``: a small Qwen2.5-VL that sees well and speaks badly.

Two stages of supervised training on scenes drawn from a seed::

    python -m examples.shapes.base_policy --out assets/shapes-base --seed 0

First true captions, with a loss beside it that asks every image token what lies in its cell, until the
model names what is there; then, briefly, flawed captions. Reinforcement learning can undo the second
stage, which is about speech; it could not teach the first.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shapes.captions import QUESTIONS, clean, flawed, reference
from examples.shapes.draw import draw_scene
from examples.shapes.language import is_pointable, is_true, read_facts
from examples.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MARK_COLOURS,
    MARKS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
)

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

log = logging.getLogger(__name__)

IMAGE_SIZE = 84  # 6 x 6 patches of 14, merged 2 x 2: one image token per place
ALL_MARKS = [(colour, kind) for colour in MARK_COLOURS for kind in MARKS]
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(
    seed: int = 0, vocab_size: int = 640, image_size: int = IMAGE_SIZE
) -> Qwen2_5_VLProcessor:
    """Byte-level BPE trained on the world's captions, in Qwen2.5-VL's own processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(2000)]
    corpus = [write(scene, rng) for scene in scenes for write in (reference, clean, flawed)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus, *(QUESTIONS * 20)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=2048,
    )
    pixels = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=pixels, patch_size=14, temporal_patch_size=2, merge_size=2
        ),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(
            size=pixels, patch_size=14, temporal_patch_size=2, merge_size=2
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: Qwen2_5_VLProcessor, hidden: int = 160, layers: int = 4, vision_hidden: int = 96, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL; the default is about two million parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    half = hidden // 4 // 2  # rotary pairs of one of four heads, split over time, height and width
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": hidden * 3,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_hidden * 3,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


# ── supervised training ──────────────────────────────────────────────────────────────────────────────


def _cell_labels(scene: Scene) -> list[tuple[int, int, int, int]]:
    """(colour, shape, size, mark) class of each of the nine places; 0 where there is none."""
    labels = [(0, 0, 0, 0)] * len(PLACES)
    for thing in scene.things:
        mark = 1 + ALL_MARKS.index(thing.mark) if thing.mark else 0
        labels[PLACES.index(thing.place)] = (
            1 + COLOURS.index(thing.colour),
            1 + SHAPES.index(thing.shape),
            1 + SIZES.index(thing.size),
            mark,
        )
    return labels


@dataclass(frozen=True)
class _Pool:
    """Scenes and their preprocessed pixels; captions are written anew at every use."""

    scenes: list[Scene]
    pixels: Tensor  # [N, patches, values per patch], half precision
    grid: Tensor  # [1, 3]
    cells: Tensor  # [N, 9, 4]


def _draw_pool(processor: Any, n: int, seed: int) -> _Pool:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(n)]
    chunks, grid = [], torch.empty(0)
    for start in range(0, n, 256):
        part = scenes[start : start + 256]
        out = processor.image_processor(images=[draw_scene(s, rng) for s in part], return_tensors="pt")
        grid = out["image_grid_thw"][:1]
        chunks.append(out["pixel_values"].view(len(part), -1, out["pixel_values"].shape[-1]).half())
    return _Pool(scenes, torch.cat(chunks), grid, torch.tensor([_cell_labels(s) for s in scenes]))


def _collate(
    processor: Any, pool: _Pool, rows: np.ndarray, captions: list[str], rng: np.random.Generator
) -> dict:
    """Model inputs with labels on the caption and its end token only."""
    tokenizer = processor.tokenizer
    image = "<|image_pad|>" * int(pool.grid.prod() // 4)
    heads = [
        f"<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{QUESTIONS[rng.integers(len(QUESTIONS))]}"
        "<|im_end|>\n<|im_start|>assistant\n"
        for _ in rows
    ]
    prompts = tokenizer(heads)["input_ids"]
    answers = tokenizer([caption + "<|im_end|>" for caption in captions])["input_ids"]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        n = len(p) + len(a)
        ids[i, :n] = torch.tensor(p + a)
        labels[i, len(p) : n] = torch.tensor(a)
        mask[i, :n] = 1
    token_types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": token_types,
        "pixel_values": pool.pixels[rows].float().flatten(0, 1),
        "image_grid_thw": pool.grid.expand(len(rows), 3),
        "labels": labels,
    }


class _Eye(nn.Module):
    """Asks every image token for colour, shape, size and mark in its cell, and all of them for the background."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(SIZES), 1 + len(ALL_MARKS))
        self.head = nn.Linear(hidden, sum(self.sizes))
        self.ground = nn.Linear(hidden, len(BACKGROUNDS))

    def forward(self, features: Tensor, cells: Tensor, grounds: Tensor) -> Tensor:
        """features [B, 9, hidden], cells [B, 9, 4], grounds [B] -> mean cross-entropy."""
        parts = self.head(features).split(self.sizes, dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), cells[..., i].flatten()) for i, part in enumerate(parts)
        ]
        return sum(losses, F.cross_entropy(self.ground(features.mean(1)), grounds))


def _image_features(model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    out = model.model.get_image_features(pixels, grid)
    out = getattr(out, "pooler_output", out)
    return (
        torch.stack(list(out)) if isinstance(out, (list, tuple)) else out.view(len(grid), -1, out.shape[-1])
    )


def _schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.05) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=steps, pct_start=warmup
    )


def _train(
    model: Any,
    processor: Any,
    pools: Callable[[int], _Pool],
    write: Callable[[Scene, np.random.Generator], str],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """The language model on captions that `write` makes up anew for every picture; the eye stays as it is.

    bfloat16 arithmetic on float32 weights: twice as fast on a CPU that has it.
    """
    model.model.visual.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = _schedule(optimizer, steps)
    rng, start = np.random.default_rng(seed), time.time()
    model.train()
    for step in range(steps):
        pool = pools(step)
        rows = rng.integers(len(pool.scenes), size=batch)
        captions = [write(pool.scenes[r], rng) for r in rows]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**_collate(processor, pool, rows, captions, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("step %5d  loss %.3f  %4.0f s", step, loss.item(), time.time() - start)


def _look(
    model: Any, pools: Callable[[int], _Pool], eye: _Eye, steps: int, batch: int, lr: float, seed: int
) -> None:
    """The vision tower alone, through the eye's loss: cheap, and most of what there is to learn."""
    params = [*model.model.visual.parameters(), *eye.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = _schedule(optimizer, steps)
    rng, start = np.random.default_rng(seed), time.time()
    for step in range(steps):
        pool = pools(step)
        rows = rng.integers(len(pool.scenes), size=batch)
        features = _image_features(model, pool.pixels[rows].float().flatten(0, 1), pool.grid.expand(batch, 3))
        grounds = torch.tensor([BACKGROUNDS.index(pool.scenes[r].background) for r in rows])
        loss = eye(features, pool.cells[rows], grounds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log.info("look %5d  loss %.3f  %4.0f s", step, loss.item(), time.time() - start)


@torch.no_grad()
def stated_facts(model: Any, processor: Any, n: int = 256, seed: int = 10_000, sample: bool = False) -> dict:
    """Shares of stated facts that are true, per kind and for all but marks, on `n` unseen pictures."""
    pool = _draw_pool(processor, n, seed)
    rng, model = np.random.default_rng(seed), model.eval()
    right: dict[str, list[bool]] = {}
    example: list[str] = []
    for start in range(0, n, 64):
        rows = np.arange(start, min(n, start + 64))
        inputs = _collate(processor, pool, rows, [""] * len(rows), rng)
        del inputs["labels"]
        texts = _answer(model, processor, inputs, sample)
        example = texts[:2]
        for row, text in zip(rows, texts, strict=True):
            for fact in read_facts(text):
                if is_pointable(fact):
                    right.setdefault(fact[0], []).append(is_true(fact, pool.scenes[row]))
    seen = [ok for kind, oks in right.items() if kind != "mark" for ok in oks]
    return {
        "all_but_marks": float(np.mean(seen)) if seen else 0.0,
        **{kind: (round(float(np.mean(oks)), 3), len(oks)) for kind, oks in sorted(right.items())},
        "examples": example,
    }


def _answer(model: Any, processor: Any, inputs: dict, sample: bool) -> list[str]:
    """Captions for questions of unequal length: the padding moves to the left, as generation wants it."""
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        length -= 1  # the end token of the empty caption
        for key, fill in (
            ("input_ids", tokenizer.pad_token_id),
            ("attention_mask", 0),
            ("mm_token_type_ids", 0),
        ):
            row = inputs[key][i]
            kept = row[:length].clone()
            row.fill_(fill)
            row[len(row) - length :] = kept
    out = model.generate(**inputs, do_sample=sample, max_new_tokens=160, eos_token_id=end, top_k=0)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _pools(processor: Any, size: int, renew: int, seed: int) -> Callable[[int], _Pool]:
    """A pool that is drawn anew every `renew` steps, so that no picture is seen often."""
    state: dict[int, _Pool] = {}

    def pool(step: int) -> _Pool:
        key = step // renew
        if key not in state:
            state.clear()
            state[key] = _draw_pool(processor, size, seed + 1 + key)
        return state[key]

    return pool


def save(model: Any, processor: Any, out: Path) -> None:
    """An HF folder in half precision, which loads with ``from_pretrained``."""
    model.half().save_pretrained(out, safe_serialization=True)
    processor.save_pretrained(out)


def build(
    out: Path,
    seed: int = 0,
    look_steps: int = 1000,
    clean_steps: int = 1800,
    flawed_steps: int = 200,
    batch: int = 64,
    pool_size: int = 12_000,
    facts: int = 256,
    stages: Path | None = None,
) -> dict:
    """Train, save to `out`, and return (and write beside it) what the model sees and how it was made.

    `facts` is the number of unseen pictures that the report is about. With `stages`, weights are kept
    there after each stage, and a stage that is there is not run again.
    """
    processor = build_processor(seed)
    model = build_model(processor, seed=seed)
    pools = _pools(processor, pool_size, renew=2500, seed=seed)

    def stage(name: str, run: Callable[[], None]) -> None:
        path = stages / f"{name}.pt" if stages else None
        if path and path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return
        run()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)

    eye = _Eye(model.lm_head.in_features)
    stage("look", lambda: _look(model, pools, eye, look_steps, 2 * batch, 1e-3, seed))
    stage("clean", lambda: _train(model, processor, pools, clean, clean_steps, batch, 2e-3, seed + 1))
    report: dict[str, Any] = {"clean": stated_facts(model, processor, facts)}
    log.info("after clean captions: %s", report["clean"])
    _train(model, processor, pools, flawed, flawed_steps, batch, 5e-4, seed + 2)
    report["flawed"] = stated_facts(model, processor, facts, sample=True)
    log.info("after flawed captions: %s", report["flawed"])
    report["built_with"] = {
        "seed": seed, "look_steps": look_steps, "clean_steps": clean_steps, "flawed_steps": flawed_steps,
        "batch": batch, "pool_size": pool_size, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    save(model, processor, out)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _arguments() -> Iterator[tuple[str, dict]]:
    yield "--out", {"type": Path, "default": Path("assets/shapes-base")}
    yield "--seed", {"type": int, "default": 0}
    yield "--look_steps", {"type": int, "default": 1000}
    yield "--clean_steps", {"type": int, "default": 1800}
    yield "--flawed_steps", {"type": int, "default": 200}
    yield "--batch", {"type": int, "default": 64}
    yield "--pool_size", {"type": int, "default": 12_000}
    yield "--stages", {"type": Path, "default": None}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, options in _arguments():
        parser.add_argument(name, **options)
    build(**vars(parser.parse_args()))

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
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from examples.shapes import scene as world
from examples.shapes.captions import QUESTIONS, clean, flawed, reference
from examples.shapes.language import is_pointable, is_true, read_facts
from examples.shapes.scene import Scene, draw_scene, sample_scene

log = logging.getLogger(__name__)

VOCABULARY = 640
PATCHES = 6  # of 14 pixels, on a side, merged 2 x 2: one image token per place
HIDDEN = 160
ALL_MARKS = [(colour, kind) for colour in world.MARK_COLOURS for kind in world.MARKS]
PAD, END, IMAGE, VIDEO = "<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Writer = Callable[[Scene, np.random.Generator], str]
Loss = Callable[[np.random.Generator], Tensor]


def build_processor(seed: int = 0) -> Any:
    """Byte-level BPE trained on the world's captions, in Qwen2.5-VL's own processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(2000)]
    corpus = [write(scene, rng) for scene in scenes for write in (reference, clean, flawed)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator([*corpus, *(QUESTIONS * 20)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=2048,
    )
    size = {"shortest_edge": (14 * PATCHES) ** 2, "longest_edge": (14 * PATCHES) ** 2}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size)
    return Qwen2_5_VLProcessor(images, fast, videos, chat_template=CHAT_TEMPLATE)


def build_model(processor: Any, seed: int = 0) -> Any:
    """A randomly initialised Qwen2.5-VL of about two million parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": HIDDEN,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            # 20 rotary pairs of a head: time, height and width
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 7, 7]},
            "bos_token_id": ids[PAD],
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_heads": 4,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=ids[END], pad_token_id=ids[PAD])
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


def _cell_labels(scene: Scene) -> list[tuple[int, int, int, int]]:
    """(colour, shape, size, mark) class of each of the nine places; 0 where there is none."""
    labels = [(0, 0, 0, 0)] * len(world.PLACES)
    for thing in scene.things:
        labels[world.PLACES.index(thing.place)] = (
            1 + world.COLOURS.index(thing.colour),
            1 + world.SHAPES.index(thing.shape),
            1 + world.SIZES.index(thing.size),
            1 + ALL_MARKS.index(thing.mark) if thing.mark else 0,
        )
    return labels


def _draw_pool(processor: Any, n: int, seed: int) -> _Pool:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(n)]
    chunks = []
    for start in range(0, n, 256):
        images = [draw_scene(scene, rng) for scene in scenes[start : start + 256]]
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        chunks.append(pixels.view(len(images), -1, pixels.shape[-1]).half())
    return _Pool(scenes, torch.cat(chunks), torch.tensor([_cell_labels(s) for s in scenes]))


def _inputs(
    processor: Any, pool: _Pool, rows: np.ndarray, rng: np.random.Generator, captions: Sequence[str] = ()
) -> dict[str, Any]:
    """Model inputs: questions padded on the left, or with captions, and then labels on these alone, on the right."""
    tokenizer = processor.tokenizer
    image = IMAGE * len(world.PLACES)
    questions = [QUESTIONS[rng.integers(len(QUESTIONS))] for _ in rows]
    head, tail = f"<|im_start|>user\n<|vision_start|>{image}<|vision_end|>", f"{END}\n<|im_start|>assistant\n"
    prompts = tokenizer([head + question + tail for question in questions])["input_ids"]
    answers = [tokenizer(caption + END)["input_ids"] for caption in captions] or [[]] * len(rows)
    pairs = list(zip(prompts, answers, strict=True))

    def padded(sequences: Iterable[list[int]], value: int) -> Tensor:
        side = "right" if captions else "left"
        return pad_sequence([torch.tensor(s) for s in sequences], True, value, padding_side=side)

    ids = padded((p + a for p, a in pairs), tokenizer.pad_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": padded(([1] * len(p + a) for p, a in pairs), 0),
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int(),
        **pool.images(rows),
    }
    return inputs | {"labels": padded(([-100] * len(p) + a for p, a in pairs), -100)} if captions else inputs


# ── training ─────────────────────────────────────────────────────────────────────────────────────────


class _CellProbe(nn.Module):
    """Asks every image token for colour, shape, size and mark in its cell, and all of them for the background."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = [1 + len(kinds) for kinds in (world.COLOURS, world.SHAPES, world.SIZES, ALL_MARKS)]
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
    out: Path,
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
    model = build_model(processor, seed)
    pool, visual, probe = _draw_pool(processor, pool_size, seed + 1), model.model.visual, _CellProbe(HIDDEN)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/shapes-base"))
    parser.add_argument("--seed", type=int, default=0)
    build(**vars(parser.parse_args()))

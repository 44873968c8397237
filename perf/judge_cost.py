"""What judging a group in one call saves: calls, tokens and dollars, with identical rewards.

    python perf/judge_cost.py            32 images, about four minutes on two cores
    python perf/judge_cost.py --quick    4 images, short captions only

The shipped base policy samples G = 8 captions of every picture at temperature 1. The oracle of the embedded
world judges them twice: one call per rollout and kind of judgment, without a cache (``per_rollout``, the
baseline), and per group, as training does. A second epoch judges new captions of the same pictures with what
the first left in the cache. The provider runs in this process and bills what OpenAI would; dollars come out of
the judge's own ledger.

Tokens of text are counted by o200k_base, with 3 per message and 3 per answer; the schema of the answer is not
counted. A picture has 640 x 480 pixels: 2,833 + 2 * 5,667 = 14,167 tokens of gpt-4o-mini (a base and two tiles
of 512), 20 * 15 patches of 32 pixels * 1.2 = 360 of gpt-5-mini, whose reasoning is taken as none.

short       the embedded world as it is: captions of 18 to 112 tokens
long        three of its captions on end, of three scenes: nearer to the length of captions of photographs. Every
            rollout of a group describes the same three scenes; half as many images
distinct    likewise, but no two rollouts of a group describe a common scene: what they share is chance, the worst
            case. Captions of photographs lie between this and the one above
prefix      short, where the provider has every prefix in its cache that it has seen before (OpenAI: from 1,024
            tokens on, in steps of 128). More than concurrent calls can hope for; it favours the baseline, which
            sends the same picture eight times
"""

from __future__ import annotations

# ruff: noqa: E402  the project's root must be on the path first
import argparse
import asyncio
import hashlib
import io
import json
import logging
import math
import os
import sqlite3
import sys
import tempfile
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from balcap.judge import Judge
from balcap.judge.client import Price
from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.rewards import Linguistic, Precision, Recall
from balcap.rewards.suite import RewardSuite, merge
from balcap.rollout import Sampling
from balcap.rollout.hf import HFGenerate
from balcap.types import CaptionBatch
from examples.shapes.captions import QUESTIONS, reference
from examples.shapes.scene import draw_scene, png_bytes
from examples.shapes.oracle import answer
from examples.shapes.scene import sample_scene

G = 8
SCENES_PER_LONG_CAPTION = 3
JUDGE_SIZE = (640, 480)
MODELS = ("gpt-4o-mini", "gpt-5-mini")
PRICES = {  # US$ per 1M tokens, 2026-11-23; the cached ones from litellm's price table of that day
    "gpt-4o-mini": Price(input=0.15, output=0.60, cached=0.075),
    "gpt-5-mini": Price(input=0.25, output=2.00, cached=0.025),
}
PREFIX = "-prefix"  # of a model's name: the provider has a prefix cache


# ---- what the provider bills


@cache
def encoding() -> Any:
    """o200k_base, whose vocabulary litellm ships."""
    import tiktoken

    folder = Path(litellm.__file__).parent / "litellm_core_utils/tokenizers"
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))
    return tiktoken.get_encoding("o200k_base")


@lru_cache(maxsize=4096)
def text_tokens(text: str) -> int:
    return len(encoding().encode(text, disallowed_special=()))


@lru_cache(maxsize=256)
def image_tokens(model: str, url: str) -> int:
    """Of a picture in a ``data:`` URL."""
    width, height = Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).size
    if model.startswith("gpt-4o-mini"):
        scale = min(1.0, 2048 / max(width, height), 768 / min(width, height))
        tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
        return 2833 + 5667 * tiles
    patches = math.ceil(width / 32) * math.ceil(height / 32)
    assert patches <= 1536, "larger pictures are scaled down first"
    return round(1.2 * patches)


def pieces(model: str, messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """The prompt in its order: (content, tokens) of texts, in pieces of a prefix cache, and of pictures."""
    for message in messages:
        parts: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}]
        if not isinstance(message["content"], str):
            parts = message["content"]
        yield message["role"], 3
        for part in parts:
            if part["type"] == "image_url":
                yield part["image_url"]["url"], image_tokens(model, part["image_url"]["url"])
            else:
                ids = encoding().encode(part["text"], disallowed_special=())
                yield from ((str(ids[i : i + 128]), len(ids[i : i + 128])) for i in range(0, len(ids), 128))
    yield "assistant", 3


class Metered(litellm.CustomLLM):
    """The oracle's answers at the token counts of the model that it is called by."""

    seen: set[str] = set()  # noqa: RUF012  prefixes; emptied before every measurement

    async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
        """See `litellm.acompletion`."""
        model, messages, response = kwargs["model"], kwargs["messages"], kwargs["model_response"]
        content = json.dumps(answer(messages))
        response.choices[0].message.content = content
        response.choices[0].finish_reason = "stop"
        prompt = list(pieces(model, messages))
        asked, said = sum(tokens for _, tokens in prompt), text_tokens(content)
        response.usage = litellm.Usage(
            prompt_tokens=asked,
            completion_tokens=said,
            total_tokens=asked + said,
            prompt_tokens_details={"cached_tokens": self._cached(prompt) if model.endswith(PREFIX) else 0},
        )
        return response

    def _cached(self, prompt: list[tuple[str, int]]) -> int:
        digest, total, cached = hashlib.sha256(), 0, 0
        for content, tokens in prompt:
            digest.update(content.encode())
            total += tokens
            if digest.hexdigest() in self.seen:
                cached = total
            self.seen.add(digest.hexdigest())
        return cached // 128 * 128 if cached >= 1024 else 0


# ---- what is judged


@dataclass(frozen=True)
class Picture:
    """What a judge is asked about.

    Attributes:
        image: PNG of 640 x 480 pixels, the scene in its text chunk.
        reference: its reference caption.
        captions: ``[G]`` of the policy.
    """

    image: bytes
    reference: str
    captions: list[str]


def world(scenes: int) -> CaptionBatch:
    """Scenes as the policy sees them, with the judge's larger files."""
    images, files, references, prompts = [], [], [], []
    for number in range(scenes):
        rng = np.random.default_rng([11, number])
        scene = sample_scene(rng)
        references.append(reference(scene, rng))
        prompts.append(QUESTIONS[rng.integers(len(QUESTIONS))])
        images.append(draw_scene(scene, rng))
        files.append(png_bytes(images[-1].resize(JUDGE_SIZE, Image.Resampling.LANCZOS), scene))
    return CaptionBatch([str(i) for i in range(scenes)], images, files, prompts, references)


def sample(batch: CaptionBatch, seed: int) -> list[list[str]]:
    """``[B][G]`` captions of the base policy, temperature 1."""
    policy = Policy.load(PolicyConfig(model=str(ROOT / "assets/shapes-base"), dtype="float32"), False)
    engine = HFGenerate()
    engine.attach(policy)
    torch.manual_seed(seed)
    found: list[Any] = []
    for start in range(0, len(batch), 32):
        part = batch.select(range(start, min(start + 32, len(batch))))
        found += engine.generate(part, policy.encode(part), G, Sampling(max_tokens=128)).captions
    return found


def short(batch: CaptionBatch, captions: list[list[str]], images: int) -> list[Picture]:
    return [Picture(batch.image_bytes[i], batch.references[i], captions[i]) for i in range(images)]


def long(batch: CaptionBatch, captions: list[list[str]], images: int, common: bool) -> list[Picture]:
    """`common`: all rollouts of a group describe the same three scenes; else each three of its own."""
    N, n = SCENES_PER_LONG_CAPTION, len(batch)
    made = []
    for i in range(images):
        first = [N * i if common else N * (i + g) for g in range(G)]
        texts = [" ".join(captions[(f + k) % n][g] for k in range(N)) for g, f in enumerate(first)]
        said = " ".join(batch.references[(N * i + k) % n] for k in range(N))
        made.append(Picture(batch.image_bytes[N * i % n], said, texts))
    return made


# ---- judging


@dataclass(frozen=True)
class Bill:
    """Of one pass over all pictures.

    Attributes:
        rewards: ``[B, G, 3]``.
        calls: to the provider.
        tokens_in, tokens_out: billed.
        usd: in all.
        usd_of: task -> dollars.
        verify_calls: of `calls`.
    """

    rewards: torch.Tensor
    calls: int
    tokens_in: int
    tokens_out: int
    usd: float
    usd_of: dict[str, float] = field(default_factory=dict)
    verify_calls: int = 0


def judged(pictures: Sequence[Picture], model: str, grouping: str, folder: Path, cache: str | None) -> Bill:
    """One pass, in one step, through a judge of its own."""
    Metered.seen.clear()
    ledger = folder / f"ledger-{len(list(folder.iterdir()))}.sqlite"
    name, suite = f"metered/{model}", RewardSuite([Precision(), Recall(), Linguistic()])
    judge = Judge(
        name,
        providers={"metered": f"{Metered.__module__}.{Metered.__qualname__}"},
        prices={name: PRICES[model.removesuffix(PREFIX)]},
        grouping=grouping,  # type: ignore[arg-type]
        cache=None if cache is None else str(folder / cache),
        ledger=str(ledger),
    )

    async def gather() -> Any:
        rows = [(str(i), p.image, p.reference, p.captions) for i, p in enumerate(pictures)]
        return merge(await asyncio.gather(*(suite.gather_group(judge, *row) for row in rows)))

    judgments = judge.run(gather())
    stats = judge.stats()
    judge.close()
    assert not stats.failed, judgments.reasons
    assert stats.unpriced_calls == 0
    with sqlite3.connect(ledger) as rows:
        paid = dict(rows.execute("SELECT task, sum(usd) FROM calls GROUP BY task").fetchall())
        verify_calls = rows.execute("SELECT count(*) FROM calls WHERE task = 'verify'").fetchone()[0]
    assert math.isclose(sum(paid.values()), stats.cost_usd)
    usage = (stats.calls, stats.tokens_in, stats.tokens_out, stats.cost_usd)
    return Bill(suite(None, judgments), *usage, paid, verify_calls)


@dataclass(frozen=True)
class Comparison:
    """The same captions judged both ways, and new ones of the same pictures after that."""

    rollouts: int
    tokens_per_caption: float
    per_rollout: Bill
    group: Bill
    second_epoch: Bill

    @property
    def rewards_equal(self) -> bool:
        one, other = self.per_rollout.rewards, self.group.rewards
        return not one.isnan().any() and torch.equal(one, other)

    @property
    def verify_ratio(self) -> float:
        return self.per_rollout.usd_of["verify"] / self.group.usd_of["verify"]

    @property
    def total_ratio(self) -> float:
        return self.per_rollout.usd / self.group.usd

    @property
    def calls_ratio(self) -> float:
        return self.per_rollout.calls / self.group.calls


def compare(first: Sequence[Picture], second: Sequence[Picture], model: str, folder: Path) -> Comparison:
    """`second`: other captions of the pictures of `first`."""
    place = Path(tempfile.mkdtemp(dir=folder))
    captions = [caption for picture in first for caption in picture.captions]
    return Comparison(
        len(captions),
        sum(map(text_tokens, captions)) / len(captions),
        judged(first, model, "per_rollout", place, None),
        judged(first, model, "group", place, "cache.sqlite"),
        judged(second, model, "group", place, "cache.sqlite"),
    )


# ---- the report


def table(found: dict[tuple[str, str], Comparison]) -> Table:
    shown = Table(title=f"Cost of judging, G = {G}, 640 x 480 pixels; text counted by o200k_base")
    for name in ("captions", "judge", "mode"):
        shown.add_column(name)
    names = (
        "calls",
        "verify",
        "tokens in",
        "out",
        "$ verify",
        "$",
        "$/1k rollouts",
        "saved, verify",
        "saved",
    )
    for name in names:
        shown.add_column(name, justify="right")
    for (kind, model), both in found.items():
        modes = {"per_rollout": both.per_rollout, "group": both.group, "second epoch": both.second_epoch}
        for mode, bill in modes.items():
            first, verify = mode == "per_rollout", bill.usd_of.get("verify", 0.0)
            shown.add_row(
                f"{kind}, {both.tokens_per_caption:.0f} tokens" if first else "",
                model if first else "",
                mode,
                f"{bill.calls:,}",
                f"{bill.verify_calls:,}",
                f"{bill.tokens_in:,}",
                f"{bill.tokens_out:,}",
                f"{verify:.4f}",
                f"{bill.usd:.4f}",
                f"{1000 * bill.usd / both.rollouts:.3f}",
                f"{both.per_rollout.usd_of['verify'] / verify:.2f}x" if verify else "all",
                f"{both.per_rollout.usd / bill.usd:.2f}x",
                end_section=mode == "second epoch",
            )
    return shown


def figures(found: dict[tuple[str, str], Comparison]) -> dict[str, Any]:
    """The last line. Where a name says nothing else: short captions at gpt-4o-mini's prices."""
    main, mini = found["short", "gpt-4o-mini"], found["short", "gpt-5-mini"]
    result: dict[str, Any] = {
        "usd_ratio_verify": main.verify_ratio,
        "usd_ratio_total": main.total_ratio,
        "calls_ratio": main.calls_ratio,
        "rewards_equal": all(both.rewards_equal for both in found.values()),
        "usd_ratio_verify_gpt_5_mini": mini.verify_ratio,
        "usd_ratio_total_gpt_5_mini": mini.total_ratio,
        "second_epoch_usd_share": main.second_epoch.usd / main.group.usd,
        "second_epoch_calls_share": main.second_epoch.calls / main.group.calls,
        "second_epoch_usd_share_gpt_5_mini": mini.second_epoch.usd / mini.group.usd,
        "usd_per_1k_rollouts": {
            name: {
                mode: 1000 * bill.usd / both.rollouts
                for mode, bill in (
                    ("per_rollout", both.per_rollout),
                    ("group", both.group),
                    ("second_epoch", both.second_epoch),
                )
            }
            for name, both in (("gpt_4o_mini", main), ("gpt_5_mini", mini))
        },
    }
    for (kind, model), both in found.items():
        if kind != "short":
            name = f"{kind}_{model.removesuffix(PREFIX)}".replace("-", "_").replace(".", "_")
            result[f"usd_ratio_verify_{name}"] = both.verify_ratio
            result[f"usd_ratio_total_{name}"] = both.total_ratio
            result[f"calls_ratio_{name}"] = both.calls_ratio
    return result


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print the table and, last, the figures as JSON; returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="pictures, each with 8 captions")
    parser.add_argument("--quick", action="store_true", help="4 pictures, short captions only")
    options = parser.parse_args(args)
    images = 4 if options.quick else options.images
    logging.getLogger("transformers").setLevel(logging.ERROR)

    half = max(images // 2, 1)
    batch = world(images if options.quick else max(images, SCENES_PER_LONG_CAPTION * max(half, G)))
    one, two = sample(batch, seed=0), sample(batch, seed=1)
    cases = {
        ("short", model): [short(batch, captions, images) for captions in (one, two)] for model in MODELS
    }
    cases["prefix", "gpt-4o-mini"] = cases["short", "gpt-4o-mini"]
    for kind, model in product(() if options.quick else ("long", "distinct"), MODELS):
        cases[kind, model] = [long(batch, captions, half, kind == "long") for captions in (one, two)]
    with tempfile.TemporaryDirectory() as folder:
        found = {
            (kind, model): compare(first, second, model + PREFIX * (kind == "prefix"), Path(folder))
            for (kind, model), (first, second) in cases.items()
        }
    console = Console(width=160)
    console.print(table(found))
    result = figures(found)
    rounded = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 4))
    print(json.dumps(rounded))
    return rounded


if __name__ == "__main__":
    main()

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
            case, at gpt-4o-mini's prices. Captions of photographs lie between this and the one above
prefix      short, where the provider has every prefix in its cache that it has seen before (OpenAI: from 1,024
            tokens on, in steps of 128). More than concurrent calls can hope for; it favours the baseline, which
            sends the same picture eight times
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm
import numpy as np
import torch
from PIL import Image

from balcap.judge import Judge
from balcap.judge.models import Price
from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from balcap.rollout import Sampling
from balcap.rollout.hf import HFGenerate
from balcap.types import CaptionBatch, Rollouts
from examples.shapes.captions import QUESTIONS, reference
from examples.shapes.oracle import Oracle, parts_of
from examples.shapes.scene import draw_scene, png_bytes, sample_scene
from perf.report import ROOT, arguments, report, rollouts_of_texts

G = 8
SCENES_PER_LONG_CAPTION = 3
JUDGE_SIZE = (640, 480)
PRICES = {  # US$ per 1M tokens, 2026-11-23; the cached ones from litellm's price table of that day
    "gpt-4o-mini": Price(input=0.15, output=0.60, cached=0.075),
    "gpt-5-mini": Price(input=0.25, output=2.00, cached=0.025),
}
IMAGE_TOKENS = {"gpt-4o-mini": 2833 + 2 * 5667, "gpt-5-mini": 360}  # of 640 x 480 pixels, see above
PREFIX = "-prefix"  # of a model's name: the provider has a prefix cache


# ---- what the provider bills


@cache
def encoding() -> Any:
    """o200k_base, whose vocabulary litellm ships."""
    import tiktoken

    folder = Path(litellm.__file__).parent / "litellm_core_utils/tokenizers"
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))
    return tiktoken.get_encoding("o200k_base")


def pieces(model: str, messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """The prompt in its order: (content, tokens) of texts, in pieces of a prefix cache, and of pictures."""
    for message in messages:
        yield message["role"], 3
        for part in parts_of(message):
            if part["type"] == "image_url":
                yield part["image_url"]["url"], IMAGE_TOKENS[model.removesuffix(PREFIX)]
            else:
                ids = encoding().encode_ordinary(part["text"])
                yield from ((str(ids[i : i + 128]), len(ids[i : i + 128])) for i in range(0, len(ids), 128))
    yield "assistant", 3


class Metered(Oracle):
    """The oracle at the token counts of the model that it is called by."""

    seen: set[str] = set()  # noqa: RUF012  prefixes; emptied before every measurement

    def usage(self, model: str, messages: list[dict[str, Any]], content: str) -> litellm.Usage:
        """What the provider would bill."""
        digest, asked, cached = hashlib.sha256(), 0, 0
        for piece, tokens in pieces(model, messages):
            digest.update(piece.encode())
            asked += tokens
            if digest.hexdigest() in self.seen:
                cached = asked
            self.seen.add(digest.hexdigest())
        cached = cached // 128 * 128 if model.endswith(PREFIX) and cached >= 1024 else 0
        said = len(encoding().encode_ordinary(content))
        return litellm.Usage(asked, said, asked + said, prompt_tokens_details={"cached_tokens": cached})


# ---- what is judged


def world(scenes: int) -> CaptionBatch:
    """Scenes as the policy sees them, with the judge's larger files."""
    images, files, references, prompts = [], [], [], []
    for number in range(scenes):
        rng = np.random.default_rng([11, number])
        scene = sample_scene(rng)
        references.append(reference(scene, rng))
        prompts.append(QUESTIONS[rng.integers(len(QUESTIONS))])
        images.append((drawn := draw_scene(scene, rng),))
        files.append((png_bytes(drawn.resize(JUDGE_SIZE, Image.Resampling.LANCZOS), scene),))
    return CaptionBatch([str(i) for i in range(scenes)], images, files, prompts, references)


def sample(batch: CaptionBatch, seed: int) -> list[list[str]]:
    """``[B][G]`` captions of the base policy, temperature 1."""
    policy = Policy.load(PolicyConfig(model=str(ROOT / "assets/shapes-base"), dtype="float32"), False)
    engine = HFGenerate(max_sequences=256)
    engine.attach(policy)
    torch.manual_seed(seed)
    rollouts = engine.generate(batch, policy.encode(batch), G, Sampling(max_tokens=128))
    return [list(group) for group in rollouts.captions]


def long(batch: CaptionBatch, captions: list[list[str]], images: int, common: bool) -> Rollouts:
    """`common`: all rollouts of a group describe the same three scenes; else each describes three of its own."""
    N, n = SCENES_PER_LONG_CAPTION, len(batch)
    references, texts = [], []
    for i in range(images):
        first = [N * i if common else N * (i + g) for g in range(G)]
        texts.append([" ".join(captions[(f + k) % n][g] for k in range(N)) for g, f in enumerate(first)])
        references.append(" ".join(batch.references[(N * i + k) % n] for k in range(N)))
    pictures = batch.select([N * i % n for i in range(images)])
    return rollouts_of_texts(replace(pictures, references=references), texts)


# ---- judging


@dataclass(frozen=True)
class Bill:
    """Of one pass over all pictures, out of the ledger.

    Attributes:
        calls: to the provider.
        tokens_in, tokens_out: billed.
        usd_verify: of verify.
        usd: in all.
        rewards: ``[B, G, 3]``.
    """

    calls: int
    tokens_in: int
    tokens_out: int
    usd_verify: float
    usd: float
    rewards: torch.Tensor


def judged(rollouts: Rollouts, model: str, grouping: str, ledger: Path, cache: Path | None) -> Bill:
    """One pass, in one step, through a judge of its own."""
    Metered.seen.clear()
    name, suite = f"metered/{model}", RewardSuite([Precision(), Recall(), Linguistic()])
    judge = Judge(
        name,
        providers={"metered": f"{Metered.__module__}.{Metered.__qualname__}"},
        prices={name: PRICES[model.removesuffix(PREFIX)]},
        grouping=grouping,
        cache=cache and str(cache),
        ledger=str(ledger),
    )
    judgments = suite.gather(judge, rollouts)
    judge.close()
    assert not judgments.failures.total(), judgments.reasons
    with sqlite3.connect(ledger) as rows:
        sums = "count(*), sum(tokens_in), sum(tokens_out), sum(usd * (task = 'verify')), sum(usd)"
        return Bill(*rows.execute(f"SELECT {sums} FROM calls").fetchone(), suite(rollouts, judgments))


def compare(first: Rollouts, second: Rollouts, model: str) -> dict[str, Bill]:
    """The same captions judged both ways, then with the second way's cache `second`, others of the same pictures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = folder / "cache"
        return {
            "per_rollout": judged(first, model, "per_rollout", folder / "1", None),
            "group": judged(first, model, "group", folder / "2", cache),
            "second_epoch": judged(second, model, "group", folder / "3", cache),
        }


# ---- the report


def figures(results: dict[tuple[str, str], dict[str, Bill]]) -> dict[str, Any]:
    """The last line. Where a name says nothing else: short captions at gpt-4o-mini's prices."""
    made: dict[str, Any] = {"rewards_equal": True, "usd_per_1k_rollouts": {}}
    for (kind, model), bills in results.items():
        name = f"{kind}_{model.removesuffix(PREFIX)}".replace("-", "_").removeprefix("short_")
        suffix = "" if name == "gpt_4o_mini" else f"_{name}"
        one, other, again = bills.values()
        made["rewards_equal"] &= torch.equal(one.rewards, other.rewards)  # False for NaN
        made[f"usd_ratio_verify{suffix}"] = one.usd_verify / other.usd_verify
        made[f"usd_ratio_total{suffix}"] = one.usd / other.usd
        made[f"calls_ratio{suffix}"] = one.calls / other.calls
        made[f"second_epoch_usd_share{suffix}"] = again.usd / other.usd
        rollouts = one.rewards[..., 0].numel()
        made["usd_per_1k_rollouts"][name] = {mode: 1000 * bill.usd / rollouts for mode, bill in bills.items()}
    return made


def main() -> None:
    """Judge, print a table and one line of JSON."""
    quick = arguments(__doc__).parse_args().quick
    images = 4 if quick else 32
    logging.getLogger("transformers").setLevel(logging.ERROR)
    batch = world(images if quick else SCENES_PER_LONG_CAPTION * images // 2)
    samples = [sample(batch, seed) for seed in (0, 1)]
    some = batch.select(range(images))
    short = [rollouts_of_texts(some, captions[:images]) for captions in samples]
    cases = {("short", model): short for model in PRICES} | {("prefix", "gpt-4o-mini" + PREFIX): short}
    if not quick:
        alike, apart = (
            [long(batch, each, images // 2, common) for each in samples] for common in (True, False)
        )
        cases |= {("long", model): alike for model in PRICES} | {("distinct", "gpt-4o-mini"): apart}
    results = {case: compare(*pair, case[1]) for case, pair in cases.items()}
    title = f"Cost of judging, G = {G}, 640 x 480 pixels; text counted by o200k_base"
    columns = ("captions", "judge", "mode", "calls", "tokens in", "out", "$ verify", "$")
    rows = [
        (*case, mode, *astuple(bill)[:-1]) for case, bills in results.items() for mode, bill in bills.items()
    ]
    report(title, columns, rows, figures(results))


if __name__ == "__main__":
    main()

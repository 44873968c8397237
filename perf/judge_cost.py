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
import json
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
from balcap.judge.client import Price
from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from balcap.rollout import Sampling
from balcap.rollout.hf import HFGenerate
from balcap.types import CaptionBatch, Rollouts
from examples.shapes.captions import QUESTIONS, reference
from examples.shapes.oracle import answer
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
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield message["role"], 3
        for part in parts:
            if part["type"] == "image_url":
                yield part["image_url"]["url"], IMAGE_TOKENS[model.removesuffix(PREFIX)]
            else:
                ids = encoding().encode_ordinary(part["text"])
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
        asked = sum(tokens for _, tokens in prompt)
        said = len(encoding().encode_ordinary(content))
        cached = {"cached_tokens": self._cached(prompt) if model.endswith(PREFIX) else 0}
        response.usage = litellm.Usage(asked, said, asked + said, prompt_tokens_details=cached)
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
    """Of one pass over all pictures.

    Attributes:
        rewards: ``[B, G, 3]``.
        calls: to the provider.
        tokens_in, tokens_out: billed.
        usd_verify: of verify.
        usd: in all.
    """

    rewards: torch.Tensor
    calls: int
    tokens_in: int
    tokens_out: int
    usd_verify: float
    usd: float


def judged(rollouts: Rollouts, model: str, grouping: str, folder: Path, cache: str | None) -> Bill:
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
    judgments = suite.gather(judge, rollouts)
    stats = judge.stats()
    judge.close()
    assert not stats.failures, judgments.reasons
    assert stats.unpriced_calls == 0
    with sqlite3.connect(ledger) as rows:
        paid = dict(rows.execute("SELECT task, sum(usd) FROM calls GROUP BY task").fetchall())
    usage = (stats.calls, stats.tokens_in, stats.tokens_out)
    return Bill(suite(rollouts, judgments), *usage, paid.get("verify", 0.0), stats.cost_usd)


def compare(first: Rollouts, second: Rollouts, model: str) -> dict[str, Bill]:
    """The same captions judged both ways, then with the second way's cache `second`, others of the same pictures."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "per_rollout": judged(first, model, "per_rollout", Path(folder), None),
            "group": judged(first, model, "group", Path(folder), "cache.sqlite"),
            "second_epoch": judged(second, model, "group", Path(folder), "cache.sqlite"),
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
        usd = {mode: 1000 * bill.usd / rollouts for mode, bill in bills.items()}
        made["usd_per_1k_rollouts"][name] = usd
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
        (*case, mode, *astuple(bill)[1:]) for case, bills in results.items() for mode, bill in bills.items()
    ]
    report(title, columns, rows, figures(results))


if __name__ == "__main__":
    main()

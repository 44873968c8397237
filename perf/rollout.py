"""Captions sampled on the policy itself and from vLLM in the trainer's process, against HF ``generate``.

    python perf/rollout.py                          a CPU: the embedded world's policy, about three minutes
    python perf/rollout.py --quick                  a few captions: shows that it runs
    python perf/rollout.py --size 3b|7b             a GPU: random weights, bfloat16
    ... --per_request_seeds                         what vLLM loses where each caption has a seed of its own

vLLM is measured where it is installed (``pip install -e ".[vllm]"``, or on a CPU the environment of ``make test-vllm``).

All engines caption images of one batch with the same policy, in this process; HF ``generate`` and the policy itself in
turns, then vLLM, because it changes the threads of a CPU when it starts. Caption tokens per second, end of sequence
included; medians. HF captions as many images as fit into one call, which is its rate for any number; vLLM gets the weights
anew before each run, as in training, so that its caches are empty. Large sizes run under bfloat16 autocast, as in training;
vLLM knows no autocast.

The policy's log-probs of vLLM's captions must be vLLM's own: mean |difference| at most 0.1, which bfloat16 keeps and
other weights, images or prompts do not. Else there are no figures.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import torch

from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.rollout import HFGenerate, Sampling, VLLMInProcess
from examples.shapes.dataset import write_dataset
from perf import update_case
from perf.report import arguments, batches, report, seconds_of
from tests.wide_heads import write_wide_base

HF, OURS, VLLM = "HF generate", "each prompt once", "vLLM in process"
PROMPT_PIXELS = 896**2  # of the large sizes: 1,024 image tokens
LIMIT = 0.1  # nats


@dataclass(frozen=True)
class Case:
    """What is measured, alike for both engines.

    Attributes:
        size: ``shapes``, or ``3b`` or ``7b`` of `perf.update_case.SIZES`.
        images: B, that vLLM captions in one call.
        captions: G.
        max_tokens: of a caption.
        at_once: captions in one call of HF ``generate``.
        runs: of each engine.
        device, dtype: of the policy.
        pixels: of an image, None for its own.
        per_request_seeds: of vLLM.
    """

    size: str
    images: int = 32
    captions: int = 8
    max_tokens: int = 128
    at_once: int = 256
    runs: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    pixels: int | None = None
    per_request_seeds: bool = False


def write_model(case: Case, folder: Path) -> None:
    """A model with its processor that both engines load: the embedded world's, or random weights."""
    if case.size == "shapes":
        write_wide_base(folder)
    else:
        random = update_case.Case(case.size, 400, 1, device=case.device, dtype=case.dtype)
        for part in update_case.build(random):
            part.save_pretrained(folder)


def engines(case: Case, model: Path, data: Path) -> dict[str, Any]:
    """Rates of the engines, and how far vLLM's log-probs are from the policy's; None where it is not installed.

    Raises:
        RuntimeError: vLLM's captions are not the policy's.
    """
    limits = {"min_pixels": case.pixels, "max_pixels": case.pixels}
    policy = Policy.load(PolicyConfig(str(model), dtype=case.dtype, **limits), False).to(case.device)
    batch = next(iter(batches(data, case.images, data / "run")))
    sampling = Sampling(max_tokens=case.max_tokens)
    own = {HF: HFGenerate(case.at_once, shared_prompts=False), OURS: HFGenerate(case.at_once)}
    for engine in own.values():
        engine.attach(policy)
    few = min(case.images, max(1, case.at_once // case.captions))

    def draw(engine: Any, images: int) -> tuple[float, Any]:
        """Caption tokens per second, and the captions."""
        part, made = batch.select(range(images)), []
        prompts = policy.encode(part)
        with autocast(case) if engine in own.values() else nullcontext():
            seconds = seconds_of(lambda: made.append(engine.generate(part, prompts, case.captions, sampling)))
        return int(made[0].completion_mask.sum()) / seconds, made[0]

    rates: dict[str, list[float]] = {name: [] for name in own}
    for engine in own.values():
        draw(engine, 1)
    for _ in range(case.runs):
        for name, engine in own.items():
            rates[name].append(draw(engine, few)[0])
    medians: dict[str, float | None] = {name: median(each) for name, each in rates.items()}
    if find_spec("vllm") is None:
        return {"tokens_per_s": medians | {VLLM: None}}
    vllm = VLLMInProcess(enforce_eager=case.device == "cpu", per_request_seeds=case.per_request_seeds)
    vllm.attach(policy)
    vllm.sync(policy, 0)
    start_s = seconds_of(lambda: draw(vllm, 1))
    difference = mismatch(case, policy, draw(vllm, min(2, few))[1])
    if difference > LIMIT:
        raise RuntimeError(f"vLLM's log-probs differ from the policy's by {difference:.3f} on average")
    fast = []
    for _ in range(case.runs):
        vllm.sync(policy, 0)  # as before every step: nothing of these images is left in its caches
        fast.append(draw(vllm, case.images)[0])
    vllm.close()
    return {"tokens_per_s": medians | {VLLM: median(fast)}, "mismatch_mean": difference, "start_s": start_s}


def mismatch(case: Case, policy: Any, rollouts: Any) -> float:
    """Mean |log-prob of policy - of sampler| per token, in nats."""
    with torch.no_grad(), autocast(case):
        own, _ = policy.logps(rollouts, policy.encode(rollouts.batch), list(range(len(rollouts))))
    mask = rollouts.completion_mask
    return float((own.float().cpu() - rollouts.sampler_logps)[mask].abs().mean())


def autocast(case: Case) -> Any:
    """As the trainer computes: the demo in float32."""
    return nullcontext() if case.size == "shapes" else torch.autocast(case.device, torch.bfloat16)


def plan(options: Namespace) -> Case:
    """The case that the command line asks for."""
    case = Case(options.size)
    if torch.cuda.is_available():
        case = replace(case, device="cuda", dtype="bfloat16")
    if case.size != "shapes":
        case = replace(case, images=256, max_tokens=250, at_once=128, runs=3, pixels=PROMPT_PIXELS)
    return replace(case, images=4, captions=2, runs=1) if options.quick else case


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=["shapes", "3b", "7b"], default="shapes", help="of the policy")
    parser.add_argument("--per_request_seeds", action="store_true", help="of vLLM")
    options = parser.parse_args()
    case = replace(plan(options), per_request_seeds=options.per_request_seeds)
    with tempfile.TemporaryDirectory() as temporary:
        model, data = (Path(temporary) / name for name in ("model", "data"))
        write_model(case, model)
        write_dataset(data, case.images)
        measured = engines(case, model, data)
    rates = measured["tokens_per_s"]
    title = f"{case.images} images x {case.captions} captions"
    ratio = {"rollout_ratio_hf": rates[VLLM] / rates[HF] if rates[VLLM] else None}
    ratio["prompts_once_ratio_hf"] = rates[OURS] / rates[HF]
    if rates[VLLM] is None:
        print("vLLM is not installed here; it is not measured")
    report(
        title,
        ("engine", "caption tokens / s"),
        rates.items(),
        ratio | {"engines": measured, "case": asdict(case)},
    )


if __name__ == "__main__":
    main()

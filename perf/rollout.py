"""Captions from vLLM in the trainer's process against HF ``generate``: speed, weight sync, and the whole step.

    python perf/rollout.py                          a CPU: the embedded world's policy, about six minutes
    python perf/rollout.py --quick                  two steps, a few captions: shows that it runs
    python perf/rollout.py --size 3b|7b [--lora]    a GPU (3b is the default there): random weights, bfloat16

Needs vLLM (``pip install -e ".[vllm]"``, or on a CPU the environment of ``make test-vllm``).

engines  Both engines caption images of one batch with the same policy, in this process; HF first, because vLLM
         changes the threads of a CPU when it starts. Caption tokens per second, end of sequence included; medians. HF
         captions as many images as fit into one call of ``generate``, which is its rate for any number; vLLM gets
         the weights anew before each run, as in training, so that its caches are empty. On CPUs HF runs under
         bfloat16 autocast, as in training; vLLM knows no autocast and computes in float32. Then the weights: `sync`
         (everything that the engine does to sample from new ones, without waking), and on GPUs falling asleep and
         waking.
steps    ``main.py fit`` with either engine, each in a process of its own; medians of ``time/*_s``. The judge
         is the embedded world's, in process, and nothing is cached.

The policy's log-probs of vLLM's captions must be vLLM's own: mean |difference| at most 0.1, which bfloat16 keeps and
other weights, images or prompts do not. Else there are no figures.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import torch

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.policy import Policy
from balcap.rollout import HFGenerate, Sampling, VLLMInProcess
from examples.shapes.dataset import write_dataset
from perf import update_case
from perf.report import arguments, batches, fit, installed, report, run_python, seconds_of

HF, VLLM = "HF generate", "vLLM in process"
STAGES = ("step", "rollout", "judge_wait", "update", "sync")
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
        step_images: B of a step.
        steps: of each run of ``fit``, without `warmup`.
        lora: an adapter of rank 16 on all linear layers, else full tuning.
        device: ``cpu`` or ``cuda``.
    """

    size: str
    images: int = 32
    captions: int = 8
    max_tokens: int = 128
    at_once: int = 256
    runs: int = 5
    step_images: int = 8
    steps: int = 20
    warmup: int = 3
    lora: bool = False
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def pixels(self) -> int | None:
        return None if self.size == "shapes" else PROMPT_PIXELS


def write_model(case: Case, folder: Path) -> None:
    """A model with its processor that both engines load: the embedded world's, or random weights."""
    if case.size == "shapes":
        run_python(["-m", "examples.shapes.padded", "--out", str(folder)], folder)
        return
    model, processor = update_case.build(
        update_case.Case(case.size, 400, 1, device=case.device, dtype=case.dtype)
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────


def load(case: Case, model: Path, data: Path) -> tuple[Any, Any]:
    """The policy as ``fit`` loads it, on its device, and a batch of images."""
    lora = LoraSettings(update_case.LORA, r=16) if case.lora else None
    config = PolicyConfig(
        str(model), dtype=case.dtype, lora=lora, min_pixels=case.pixels, max_pixels=case.pixels
    )
    policy = Policy.load(config, with_reference=False).to(case.device)
    return policy, next(iter(batches(data, case.images, data / "run")))


def engines(case: Case, model: Path, data: Path) -> dict[str, Any]:
    """Rates of both engines, and seconds and megabytes of the weights' way to vLLM.

    Raises:
        RuntimeError: the engine's captions are not the policy's.
    """
    policy, batch = load(case, model, data)
    sampling = Sampling(max_tokens=case.max_tokens)
    hf, vllm = HFGenerate(case.at_once), VLLMInProcess(enforce_eager=case.device == "cpu")
    hf.attach(policy)
    vllm.attach(policy)
    vllm.sync(policy, 0)
    few = min(case.images, max(1, case.at_once // case.captions))

    def draw(engine: Any, images: int) -> tuple[float, Any]:
        """Caption tokens per second, and the captions."""
        part, made = batch.select(range(images)), []
        prompts = policy.encode(part)
        with autocast(case) if engine is hf else nullcontext():
            seconds = seconds_of(lambda: made.append(engine.generate(part, prompts, case.captions, sampling)))
        return int(made[0].completion_mask.sum()) / seconds, made[0]

    draw(hf, 1)
    rates = {HF: [draw(hf, few)[0] for _ in range(case.runs)], VLLM: []}
    start_s = seconds_of(lambda: draw(vllm, 1))
    _, sample = draw(vllm, min(2, few))
    difference = mismatch(case, policy, sample)
    if difference > LIMIT:
        raise RuntimeError(f"vLLM's log-probs differ from the policy's by {difference:.3f} on average")
    for _ in range(case.runs):
        vllm.sync(policy, 0)  # as before every step: nothing of these images is left in its caches
        rates[VLLM].append(draw(vllm, case.images)[0])
    sent = weights(case, policy, vllm)
    vllm.close()
    rates = {name: median(each) for name, each in rates.items()}
    return {"tokens_per_s": rates, "mismatch_mean": difference, "start_s": start_s, **sent}


def mismatch(case: Case, policy: Any, rollouts: Any) -> float:
    """Mean |log-prob of policy - of sampler| per token, in nats."""
    with torch.no_grad(), autocast(case):
        own, _ = policy.logps(rollouts, policy.encode(rollouts.batch), list(range(len(rollouts))))
    mask = rollouts.completion_mask
    return float((own.float().cpu() - rollouts.sampler_logps)[mask].abs().mean())


def weights(case: Case, policy: Any, vllm: Any) -> dict[str, float | None]:
    """Medians of seconds, and megabytes of one sync; sleeping and waking are None on a CPU."""
    size = sum(p.numel() * p.element_size() for p in policy.model.parameters() if p.requires_grad)
    seconds: dict[str, list[float]] = {"sync_s": [], "sleep_s": [], "wake_s": []}
    for version in range(1, case.runs + 1):
        wake = seconds_of(lambda: vllm._wake("weights"))
        seconds["sync_s"].append(seconds_of(lambda version=version: vllm.sync(policy, version)))
        if case.device == "cuda":
            seconds["wake_s"].append(wake + seconds_of(lambda: vllm._wake("kv_cache")))
            seconds["sleep_s"].append(seconds_of(lambda: vllm._sleep(policy)))
    return {"sync_mb": size / 1e6} | {key: median(each) if each else None for key, each in seconds.items()}


def autocast(case: Case) -> torch.autocast:
    """As the trainer computes."""
    return torch.autocast(case.device, torch.bfloat16)


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────


def steps(case: Case, model: Path, data: Path, out: Path) -> dict[str, dict[str, float]]:
    """Median seconds of each stage of a step, with either engine."""
    options: dict[str, Any] = {
        "trainer.accelerator": "gpu" if case.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": case.warmup + case.steps,
        "data.data": data / "shapes.json",
        "data.image_root": data,
        "data.batch_size": case.step_images,
        "data.val_size": 0,
        "model.policy.model": model,
        "model.policy.dtype": case.dtype,
        "model.policy.min_pixels": case.pixels or "null",
        "model.policy.max_pixels": case.pixels or "null",
        "model.num_captions": case.captions,
        "model.sampling.max_tokens": case.max_tokens,
        "model.judge.cache": "null",
    }
    if case.lora:
        options["model.policy.lora"] = json.dumps({"target_modules": update_case.LORA, "r": 16})
    engine = "model.engine"
    eager = str(case.device == "cpu").lower()
    chosen = {
        HF: {engine: "balcap.rollout.HFGenerate", f"{engine}.init_args.max_sequences": case.at_once},
        VLLM: {engine: "balcap.rollout.VLLMInProcess", f"{engine}.init_args.enforce_eager": eager},
    }
    medians = {}
    for name, engine_options in chosen.items():
        rows = fit({**options, **engine_options}, out)[case.warmup :]
        shutil.rmtree(out)  # its checkpoints are as large as the model
        medians[name] = {stage: median(float(row[f"time/{stage}_s"]) for row in rows) for stage in STAGES}
    return medians


# ── the report ───────────────────────────────────────────────────────────────────────────────────────


def summary(measured: dict[str, Any], stepped: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios and everything they come from."""
    rates = measured["tokens_per_s"]
    return {
        "rollout_ratio_hf": rates[VLLM] / rates[HF],
        "step_ratio_hf": stepped[HF]["step"] / stepped[VLLM]["step"],
        "engines": measured,
        "steps": stepped,
    }


def plan(options: Namespace) -> Case:
    """The case that the command line asks for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(options.size or ("3b" if device == "cuda" else "shapes"), lora=options.lora, device=device)
    if case.size != "shapes":
        large = {"images": 256, "max_tokens": 250, "at_once": 128, "runs": 3, "step_images": 32}
        case = replace(case, **large, steps=2, warmup=1)
    if options.quick:
        case = replace(case, images=4, captions=2, runs=1, step_images=2, steps=1, warmup=1)
    return case


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=["shapes", "3b", "7b"], help="of the policy")
    parser.add_argument("--lora", action="store_true", help="train an adapter, else all weights")
    case = plan(parser.parse_args())
    if not installed("vllm"):
        sys.exit('vLLM is not installed: pip install -e ".[vllm]"')
    with tempfile.TemporaryDirectory() as temporary:
        model, data, out = (Path(temporary) / name for name in ("model", "data", "out"))
        write_model(case, model)
        write_dataset(data, max(case.images, case.step_images * (case.warmup + case.steps)) + 8)
        stepped = steps(case, model, data, out)
        measured = engines(case, model, data)
    rows = [(name, measured["tokens_per_s"][name], *stepped[name].values()) for name in (HF, VLLM)]
    title = f"{case.images} images x {case.captions} captions; seconds of a step of {case.step_images} images"
    columns = ("engine", "caption tokens / s", *STAGES)
    report(title, columns, rows, summary(measured, stepped) | {"case": asdict(case)})


if __name__ == "__main__":
    main()

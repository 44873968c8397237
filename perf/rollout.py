"""Captions from vLLM in the trainer's process against HF ``generate``: speed, weight sync, and the whole step.

    python perf/rollout.py                          a CPU: the embedded world's policy, about six minutes
    python perf/rollout.py --quick                  two steps, a few captions: shows that it runs
    python perf/rollout.py --size 3b|7b [--lora]    a GPU (3b is the default there): random weights, bfloat16
    python perf/rollout.py --only engines|steps     one half of it

Needs vLLM (``pip install -e ".[vllm]"``, or on a CPU the environment of ``make test-vllm``).

engines  Both engines caption images of one batch with the same policy, in this process; HF first, because vLLM
         changes the threads of a CPU when it starts. Caption tokens per second, end of sequence included; medians. HF
         captions as many images as fit into one call of ``generate``, which is its rate for any number; vLLM gets
         the weights anew before each run, as in training, so that its caches are empty. On CPUs HF runs under
         bfloat16 autocast, as in training; vLLM knows no autocast and computes in float32. Then the weights: `sync`
         (everything that the engine does to sample from new ones, without waking), and on GPUs falling asleep and
         waking.
steps    ``main.py fit`` with either engine, in turns, each in a process of its own; medians of ``time/*_s``. The judge
         is the embedded world's, in process, and nothing is cached.

The policy's log-probs of vLLM's captions must be vLLM's own: mean |difference| at most 0.1, which bfloat16 keeps and
other weights, images or prompts do not. Else there are no figures.
"""

from __future__ import annotations

# ruff: noqa: E402  the project's root must be on the path first
import argparse
import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import torch
from rich.console import Console
from rich.table import Table

HF, VLLM = "HF generate", "vLLM in process"
STAGES = ("step", "rollout", "judge_wait", "update", "sync")
PROMPT_PIXELS = 896**2  # of the large sizes: 1,024 image tokens
LIMIT = 0.1  # nats


@dataclass(frozen=True)
class Case:
    """What is measured, alike for both engines.

    Attributes:
        size: ``shapes``, or a key of `perf.update_case.SIZES`.
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
    steps: int = 10
    warmup: int = 3
    rounds: int = 2
    lora: bool = False
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def pixels(self) -> int | None:
        return PROMPT_PIXELS if self.size in ("3b", "7b") else None


# ── models and images ────────────────────────────────────────────────────────────────────────────────


def write_model(case: Case, folder: Path) -> None:
    """A model with its processor that both engines load: the embedded world's, or random weights."""
    if case.size == "shapes":
        command = [sys.executable, "-m", "examples.shapes.padded", "--out", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return
    from perf.update_case import Case as Shape
    from perf.update_case import build

    shape = Shape(case.size, prompt=400, captions=1, device=case.device, dtype=case.dtype)
    model, processor = build(shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def dataset(case: Case, folder: Path) -> Path:
    """Images of the embedded world in ShareGPT4V's format."""
    from examples.shapes.dataset import write_dataset

    write_dataset(folder, max(case.images, case.step_images * (case.warmup + case.steps)) + 8)
    return folder


def policy_of(case: Case, model: Path) -> Any:
    """The policy as ``fit`` loads it, on its device."""
    from balcap.policy import LoraSettings, PolicyConfig
    from balcap.policy.policy import Policy
    from perf.update_case import LORA

    config = PolicyConfig(
        str(model),
        dtype=case.dtype,
        lora=LoraSettings(LORA, r=16) if case.lora else None,
        min_pixels=case.pixels,
        max_pixels=case.pixels,
    )
    policy = Policy.load(config, with_reference=False)
    policy.to(case.device)
    return policy


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────


def engines(case: Case, model: Path, data: Path) -> dict[str, Any]:
    """Rates of both engines, and seconds and megabytes of the weights' way to vLLM.

    Raises:
        RuntimeError: the engine's captions are not the policy's.
    """
    from balcap.data import CaptionDataModule
    from balcap.rollout import HFGenerate, Sampling, VLLMInProcess

    policy = policy_of(case, model)
    module = CaptionDataModule(
        data=str(data / "shapes.json"),
        image_root=str(data),
        batch_size=case.images,
        val_size=0,
        num_workers=0,
        run_dir=str(data / "run"),
    )
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    sampling = Sampling(max_tokens=case.max_tokens)
    hf, vllm = HFGenerate(case.at_once), VLLMInProcess(enforce_eager=case.device == "cpu")
    hf.attach(policy)
    vllm.attach(policy)
    vllm.sync(policy, 0)
    fitting = list(range(min(case.images, max(1, case.at_once // case.captions))))

    def draw(engine: Any, rows: list[int], captions: int) -> tuple[float, Any]:
        part = batch.select(rows)
        prompts = policy.encode(part)
        _synchronize()
        began = time.perf_counter()
        with _autocast(case) if engine is hf else nullcontext():
            rollouts = engine.generate(part, prompts, captions, sampling)
        _synchronize()
        return time.perf_counter() - began, rollouts

    rates: dict[str, list[float]] = {HF: [], VLLM: []}
    draw(hf, fitting[:1], case.captions)
    for _ in range(case.runs):
        seconds, rollouts = draw(hf, fitting, case.captions)
        rates[HF].append(int(rollouts.completion_mask.sum()) / seconds)
    start_s, _ = draw(vllm, [0], 1)
    _, sample = draw(vllm, fitting[:2], case.captions)
    difference = mismatch(case, policy, sample)
    if difference > LIMIT:
        raise RuntimeError(f"vLLM's log-probs differ from the policy's by {difference:.3f} on average")
    for _ in range(case.runs):
        vllm.sync(policy, 0)  # as before every step: nothing of these images is left in its caches
        seconds, rollouts = draw(vllm, list(range(case.images)), case.captions)
        rates[VLLM].append(int(rollouts.completion_mask.sum()) / seconds)
    said = weights(case, policy, vllm)
    vllm.close()
    return {
        "tokens_per_s": {name: median(each) for name, each in rates.items()},
        "prompt_tokens": int(policy.encode(batch.select([0])).items[0]["input_ids"].shape[1]),
        "caption_tokens": float(sample.lengths.float().mean()),
        "mismatch_mean": difference,
        "start_s": start_s,
        **said,
    }


def mismatch(case: Case, policy: Any, rollouts: Any) -> float:
    """Mean |log-prob of policy - of sampler| per token, in nats."""
    with torch.no_grad(), _autocast(case):
        own, _ = policy.logps(rollouts, policy.encode(rollouts.batch), list(range(len(rollouts))))
    mask = rollouts.completion_mask
    return float((own.float().cpu() - rollouts.sampler_logps)[mask].abs().mean())


def weights(case: Case, policy: Any, vllm: Any) -> dict[str, float | None]:
    """Medians of seconds, and megabytes of one sync; sleeping and waking are None on a CPU."""
    size = sum(p.numel() * p.element_size() for p in policy.model.parameters() if p.requires_grad)
    seconds: dict[str, list[float]] = {"sync_s": [], "sleep_s": [], "wake_s": []}
    for version in range(1, case.runs + 1):
        wake = _timed(lambda: vllm._wake("weights"))
        seconds["sync_s"].append(_timed(lambda version=version: vllm.sync(policy, version)))
        if case.device == "cuda":
            seconds["wake_s"].append(wake + _timed(lambda: vllm._wake("kv_cache")))
            seconds["sleep_s"].append(_timed(lambda: vllm._sleep(policy)))
    return {"sync_mb": size / 1e6} | {key: median(each) if each else None for key, each in seconds.items()}


def _timed(do: Callable[[], Any]) -> float:
    _synchronize()
    began = time.perf_counter()
    do()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _autocast(case: Case) -> torch.autocast:
    return torch.autocast(case.device, torch.bfloat16)


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────


def steps(case: Case, model: Path, data: Path, out: Path) -> dict[str, dict[str, float]]:
    """Median seconds of each stage of a step, with either engine."""
    rows: dict[str, list[dict[str, str]]] = {HF: [], VLLM: []}
    for number in range(case.rounds):
        for name in rows:
            rows[name] += fit(case, name, number, model, data, out / f"{number}-{name.split()[0]}")
    return {
        name: {stage: median(float(row[f"time/{stage}_s"]) for row in each) for stage in STAGES}
        for name, each in rows.items()
    }


def fit(case: Case, engine: str, seed: int, model: Path, data: Path, out: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` that count.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    from perf.update_case import LORA

    options: dict[str, Any] = {
        "run_dir": out,
        "seed_everything": seed,
        "trainer.accelerator": "gpu" if case.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": case.warmup + case.steps,
        "trainer.max_time": "null",
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
        "export.enabled": "false",
        "progress.refresh_rate": 0,
    }
    if case.lora:
        options["model.policy.lora"] = json.dumps({"target_modules": LORA, "r": 16})
    if engine == VLLM:
        options["model.engine"] = "balcap.rollout.VLLMInProcess"
        options["model.engine.init_args.enforce_eager"] = str(case.device == "cpu").lower()
    else:
        options["model.engine"] = "balcap.rollout.HFGenerate"
        options["model.engine.init_args.max_sequences"] = case.at_once
    flags = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "main.py", "fit", "--config", "configs/shapes.yaml", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fit with {engine} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    with (out / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/step_s")]
    shutil.rmtree(out)  # its checkpoints are as large as the model
    print(f"fit with {engine}: {rows[-1]['time/step_s']} s in its last step", file=sys.stderr)
    return rows[case.warmup :]


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────


def summary(measured: dict[str, Any], stepped: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Ratios (None for a half that was not measured), and everything they come from."""
    rates = measured.get("tokens_per_s")
    return {
        "rollout_ratio_hf": round(rates[VLLM] / rates[HF], 3) if rates else None,
        "step_ratio_hf": round(stepped[HF]["step"] / stepped[VLLM]["step"], 3) if stepped else None,
        "engines": measured,
        "steps": stepped,
    }


def print_tables(case: Case, measured: dict[str, Any], stepped: dict[str, dict[str, float]]) -> None:
    tuning = "LoRA" if case.lora else "full tuning"
    console = Console(highlight=False)
    if measured:
        title = f"{case.size}, {tuning}: {case.images} images x {case.captions} captions"
        table = Table("", "caption tokens / s", title=title)
        for name, rate in measured["tokens_per_s"].items():
            table.add_row(name, f"{rate:,.0f}")
        console.print(table)
        skipped = ("tokens_per_s",)
        console.print(
            ", ".join(f"{k} {v:.4g}" for k, v in measured.items() if k not in skipped and v is not None)
        )
    if stepped:
        table = Table(
            "", *STAGES, title=f"{case.size}, {tuning}: seconds of a step, {case.step_images} images"
        )
        for name, stages in stepped.items():
            table.add_row(name, *(f"{stages[stage]:.2f}" for stage in STAGES))
        console.print(table)


def plan(options: argparse.Namespace) -> Case:
    """The case that the command line asks for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(options.size or ("3b" if device == "cuda" else "shapes"), lora=options.lora, device=device)
    if case.size in ("3b", "7b"):
        case = replace(
            case, images=256, max_tokens=250, at_once=128, runs=3, step_images=32, steps=2, warmup=1
        )
        case = replace(case, rounds=1)
    if options.quick:
        case = replace(case, images=4, captions=2, runs=1, step_images=2, steps=1, warmup=1, rounds=1)
    return case


def main() -> None:
    """Measure, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description="vLLM in process against HF generate.")
    parser.add_argument("--size", choices=["shapes", "30m", "3b", "7b"], help="of the policy")
    parser.add_argument("--lora", action="store_true", help="train an adapter, else all weights")
    parser.add_argument("--quick", action="store_true", help="a few captions")
    parser.add_argument("--only", choices=["engines", "steps"], help="one half")
    options = parser.parse_args()
    case = plan(options)
    with tempfile.TemporaryDirectory() as temporary:
        model, data = Path(temporary) / "model", Path(temporary) / "data"
        write_model(case, model)
        dataset(case, data)
        stepped = steps(case, model, data, Path(temporary)) if options.only != "engines" else {}
        measured = engines(case, model, data) if options.only != "steps" else {}
    print_tables(case, measured, stepped)
    device = torch.cuda.get_device_name() if case.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    versions = {name: _version(name) for name in ("torch", "transformers", "vllm", "vllm-cpu")}
    print(
        json.dumps(
            summary(measured, stepped) | {"case": asdict(case), "device": device, "versions": versions}
        )
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

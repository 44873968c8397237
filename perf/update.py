"""One policy update: ours, ours without the shared prefix, and TRL's, on the same weights, captions and loss.

    python perf/update.py              a CPU: two families of about 30M parameters, float32, about 25 minutes
    python perf/update.py --quick      one small case, within a minute; memory is not measured
    python perf/update.py --family qwen3_vl|qwen3_5|...   P 420, G 8 of one family at that size, on a CPU
    python perf/update.py --size 3b    a GPU (the default there), bfloat16, G = 8; 7b, llava7b; --lora

An update is the forward of policy and loss and the backward; captions are given and no optimizer steps. Every
variant makes log-probs and entropies and reports what training reports. The reference is left out (no KL), the
vision tower is frozen everywhere, the prompt is encoded beforehand; image features are made anew in each run. The
image is one (B = 1), captions have uniformly drawn lengths. Weights are random, shared by all variants, and loud
enough for every token to matter.

ours       `balcap.policy.policy.Policy` as training uses it, with ``compile: false``
ours, compiled   with ``compile: true``, which is the default on GPUs; on a CPU in the first case only
..., nothing recomputed   the same without checkpointing, as ``gradient_checkpointing: auto`` decides where it fits, as it
           does here; the peers would not fit without
naive      the same with ``shared_prefix: false``; of a family that cannot share a prefix, ours is that too
TRL        ``GRPOTrainer.training_step`` with its inputs prepared: its own log-probs, loss and backward, with
           ``loss_type="dapo"``, whose denominator is ours (tokens). Checkpointing, dtype and attention are those of
           the others. On a CPU its head computes logits of prompt tokens too; "TRL, captions only" is TRL made to do
           there what it does on CUDA

Before anything is timed, log-probs and gradients must agree in float32: max |difference of log-probs| and
||g - g_naive|| / ||g_naive||, which bounds the difference of the norms, are at most 1e-3. Else there are no ratios.
Runs of the variants alternate. Ratios divide medians: TRL's seconds by ours, but our memory by TRL's.

Memory. CUDA: `torch.cuda.max_memory_allocated`, weights included. CPU: growth of resident memory over a whole
update, gradients included and weights not, in a process of its own whose peak is reset before (Linux).

MFU. `balcap.policy.flops.update_flops` over the device's dense bfloat16 peak; null for devices whose peak is not
written down there.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would spread over several
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch

from balcap.policy.flops import peak_flops
from perf.report import arguments, report, seconds_of
from perf.update_case import SIZES, Case, Work, build, work_of
from perf.update_variants import COMPACT, COMPILED, KEPT, NAIVE, OURS, TRL, variant

warnings.simplefilter("ignore")
THREE = [OURS, NAIVE, TRL]
TOLERANCE = 1e-3
SMALL = {SIZES[size]["family"]: size for size in ("30m", "llava30m", "qwen3_vl30m", "qwen3_5_30m")}
"""About 30M parameters, by family."""


@dataclass
class Result:
    """A case and what its variants needed, by variant.

    Attributes:
        title: of the case, with the prompt's tokens P that it came to.
        logps_error: ours against naive, and TRL's against naive; max absolute.
        gradient_error: likewise, relative, of the whole gradient.
        seconds: median.
        peak_mb: memory, 10^6 bytes, where measured.
        mfu: of ours, by variant; none where the device's peak is not known.
    """

    case: Case
    title: str
    logps_error: dict[str, float]
    gradient_error: dict[str, float]
    seconds: dict[str, float]
    peak_mb: dict[str, float]
    mfu: dict[str, float]

    @property
    def agrees(self) -> bool:
        errors = [*self.logps_error.values(), *self.gradient_error.values()]
        return all(error <= TOLERANCE for error in errors)  # False for NaN

    def ratio(self, over: str, under: str, of: str = "seconds") -> float | None:
        """Of the seconds (or ``peak_mb``) of two variants; None where one is missing or they disagree."""
        values = getattr(self, of)
        return values[over] / values[under] if self.agrees and {over, under} <= values.keys() else None


# ---- time and memory


def run(case: Case, names: Sequence[str], runs: int, memory: bool) -> Result:
    """Check that the variants agree, then time them, one after the other, `runs` times."""
    errors = agreement(case, names)
    gc.collect()  # the model that was checked
    model, processor = build(case)
    work = work_of(case, model, processor)
    variants = {name: variant(name, model, processor, case) for name in names}
    for name in names * (1 if case.device == "cpu" else 2):  # warm-up, and compilation
        _seconds(variants[name], model, work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    print("… timing", file=sys.stderr, flush=True)
    for _, name in itertools.product(range(runs), names):
        seconds[name].append(_seconds(variants[name], model, work))
    medians = {name: median(each) for name, each in seconds.items()}
    measured = [name for name in names if name != COMPACT] if memory else []
    peaks = {name: _peak(case, name, variants[name], model, work) for name in measured}
    prompt = work.prompts.items[0]["input_ids"].shape[1]
    size = sum(p.numel() for p in model.parameters())
    peak = peak_flops(torch.device(case.device))
    flops = variants[OURS].policy.flops(work.rollouts, work.prompts, [0])
    ours = [name for name in (OURS, COMPILED, KEPT) if name in names and peak and flops]
    return Result(
        case,
        f"{SIZES[case.size]['name']} {size / 1e6:.0f}M, P {prompt}, G {case.captions}",
        *errors,
        medians,
        peaks,
        {name: flops / medians[name] / peak for name in ours},
    )


def agreement(case: Case, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of log-probs and gradients against naive, by variant, in float32; on CUDA of four captions."""
    case = replace(case, dtype="float32", captions=min(4 if case.device == "cuda" else 64, case.captions))
    model, processor = build(case)
    work, norm = work_of(case, model, processor), torch.nn.utils.get_total_norm
    logps_error: dict[str, float] = {}
    gradient_error: dict[str, float] = {}
    for name in (NAIVE, *(name for name in names if name != NAIVE)):
        print(f"… {name} in float32", file=sys.stderr, flush=True)
        model.zero_grad()
        logps = variant(name, model, processor, case).update(work).float().cpu()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if name == NAIVE:
            wanted_logps, wanted = logps, gradients
            continue
        logps_error[name] = float((logps - wanted_logps).abs().max())
        differences = [own.sub_(other) for own, other in zip(gradients, wanted, strict=True)]
        gradient_error[name] = float(norm(differences) / norm(wanted))
    return logps_error, gradient_error


def _seconds(variant: Any, model: Any, work: Work) -> float:
    model.zero_grad()
    return seconds_of(lambda: variant.update(work))


def _peak(case: Case, name: str, variant: Any, model: Any, work: Work) -> float:
    """Of memory, in 10^6 bytes."""
    if case.device == "cuda":
        model.zero_grad()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        variant.update(work)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    # Blocks are given back as soon as they are free: what is resident is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth_of_process, (case, name))


def _growth_of_process(case: Case, name: str) -> float:
    """Of resident memory over one update, in 10^6 bytes; to be called in a process of its own."""
    model, processor = build(case)
    chosen = variant(name, model, processor, case)
    few = replace(case, captions=2, shortest=4, longest=8)
    chosen.update(work_of(few, model, processor))  # what is loaded or set up once
    work = work_of(case, model, processor)
    model.zero_grad()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _resident_peak()
    chosen.update(work)
    return (_resident_peak() - before) / 1e6


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---- what is printed


def plan(options: Namespace) -> list[tuple[Case, list[str]]]:
    """Cases, the headline first, and their variants."""
    if options.family is None and torch.cuda.is_available():
        large = Case(options.size, 1300, 8, 200, 300, "cuda", "bfloat16", options.lora, checkpointing=True)
        return [(large, [KEPT, COMPILED, *THREE])]
    size = SMALL[options.family or "qwen2_5_vl"]
    if options.quick:
        return [(Case(size, 200, 4, 20, 40), THREE)]
    if options.family is not None:
        return [(Case(size, 420, 8), THREE)]
    return [
        (Case("30m", 420, 8), [COMPILED, *THREE, COMPACT]),
        (Case("30m", 420, 4), THREE),
        (Case("30m", 420, 16), THREE),
        (Case("30m", 100, 8), THREE),
        (Case("30m", 1200, 8), THREE),
        (Case("llava30m", 420, 8), THREE),
    ]


def main() -> None:
    """Measure, print a table and one line of JSON; the exit status is 1 where variants disagree."""
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=["3b", "7b", "llava7b"], default="3b", help="of the model on CUDA")
    parser.add_argument("--family", choices=SMALL, help="one family alone, on a CPU")
    parser.add_argument("--lora", action="store_true", help="on CUDA: train adapters of rank 64 only")
    options = parser.parse_args()
    results, runs = [], 3 if options.quick else 5
    for case, names in plan(options):
        results.append(run(case, names, runs, memory=not options.quick))
        gc.collect()
    rows = [
        (result.title, name, s, result.ratio(TRL, name), result.ratio(NAIVE, name), result.peak_mb.get(name))
        for result in results
        for name, s in result.seconds.items()
    ]
    columns = ("case", "variant", "median s", "TRL / this", "naive / this", "peak MB")
    headline = results[0]
    figures = {
        "update_ratio_trl": headline.ratio(TRL, OURS),
        "update_ratio_naive": headline.ratio(NAIVE, OURS),
        "memory_ratio_trl": headline.ratio(OURS, TRL, "peak_mb"),
        "mfu": headline.mfu,
        "update_ratio_trl_compiled": headline.ratio(TRL, COMPILED),
        "update_ratio_trl_kept": headline.ratio(TRL, KEPT),
        "update_ratio_trl_captions_only": headline.ratio(COMPACT, OURS),
        "cases": [asdict(result) for result in results],
    }
    report(f"One policy update, {runs} runs each, one image", columns, rows, figures)
    if disagreeing := [result.title for result in results if not result.agrees]:
        sys.exit(f"no ratios, variants differ by more than {TOLERANCE:g}: {'; '.join(disagreeing)}")


if __name__ == "__main__":
    main()

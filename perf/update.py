"""One policy update: ours, ours without the shared prefix, and TRL's, on the same weights, captions and loss.

    python perf/update.py              a CPU: two families of about 30M parameters, float32, about 25 minutes
    python perf/update.py --quick      one small case, within a minute; memory is not measured
    python perf/update.py --size 3b    a GPU (the default there), bfloat16; 7b, llava7b; --lora

An update is the forward of policy and loss and the backward; captions are given and no optimizer steps. Every
variant makes log-probs and entropies and reports what training reports. The reference is left out (no KL), the
vision tower is frozen everywhere, the prompt is encoded beforehand; image features are made anew in each run. The
image is one (B = 1), captions have uniformly drawn lengths. Weights are random, shared by all variants, and loud
enough for every token to matter.

ours       `balcap.policy.policy.Policy` as training uses it
naive      the same with ``shared_prefix: false``
TRL        ``GRPOTrainer.training_step`` with its inputs prepared: its own log-probs, loss and backward, with
           ``loss_type="dapo"``, whose denominator is ours (tokens), and Liger's layers on CUDA where installed.
           Checkpointing, dtype and attention are those of the others. On a CPU its head computes logits of prompt
           tokens too; "TRL, captions only" is TRL made to do there what it does on CUDA
alone      ours with a prompt of one token: what the captions' own tokens cost

Before anything is timed, log-probs and gradients must agree in float32: max |difference of log-probs| and
||g - g_naive|| / ||g_naive||, which bounds the difference of the norms, are at most 1e-3. Else there are no ratios.
Runs of the variants alternate. Ratios divide medians: TRL's seconds by ours, but our memory by TRL's.

Memory. CUDA: `torch.cuda.max_memory_allocated`, weights included. CPU: growth of resident memory over a whole
update, gradients included and weights not, in a process of its own whose peak is reset before.

MFU. `balcap.policy.flops.update_flops` over the device's dense bfloat16 peak; null for devices whose peak is not
written down there.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would spread over several
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from balcap.policy.flops import peak_flops
from perf.report import arguments, device_name, installed, report, rounded, seconds_of, versions
from perf.update_case import SIZES, Case, Work, build, work_of
from perf.update_variants import ALONE, COMPACT, NAIVE, OURS, TRL, agreement, clear, float32, twin, variant

TOLERANCE = 1e-3


@dataclass
class Row:
    """What one variant needed, or why it has no figures.

    Attributes:
        seconds: of every run.
        tokens: forwarded through the language model, padding included.
        peak_mb: memory, 10^6 bytes; None where not measured.
        missing: why nothing was measured.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_mb: float | None = None
    missing: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Result:
    """A case and its rows.

    Attributes:
        prompt: P, image tokens included.
        parameters: of the model.
        own_tokens: caption tokens.
        logps_error: ours against naive, and TRL's against naive; max absolute.
        gradient_error: likewise, relative, of the whole gradient.
        rows: by variant.
        mfu: of ours; None where the device's peak is not known.
    """

    case: Case
    prompt: int
    parameters: int
    own_tokens: int
    logps_error: dict[str, float]
    gradient_error: dict[str, float]
    rows: dict[str, Row]
    mfu: float | None

    @property
    def title(self) -> str:
        return f"{SIZES[self.case.size]['name']} {self.parameters / 1e6:.0f}M, P {self.prompt}, G {self.case.captions}"

    @property
    def agrees(self) -> bool:
        errors = [*self.logps_error.values(), *self.gradient_error.values()]
        return all(error <= TOLERANCE for error in errors)  # False for NaN

    def ratio(self, over: str, under: str, of: str = "median") -> float | None:
        """Of the median seconds (or ``peak_mb``) of two variants; None where one is missing or they disagree."""
        parts = [getattr(self.rows.get(name, Row()), of) for name in (over, under)]
        return rounded(parts[0] / parts[1]) if self.agrees and all(parts) else None


# ---- time and memory


def run(case: Case, names: Sequence[str], runs: int, memory: bool) -> Result:
    """Check that the variants agree, then time them, one after the other, `runs` times."""
    model, processor = build(case)
    work = work_of(case, model, processor)
    rows = {name: Row() for name in names}
    if not installed("trl"):
        rows |= {name: Row(missing="trl is not installed") for name in (TRL, COMPACT) if name in names}
    there = [name for name in names if not rows[name].missing]
    errors = _checked(case, there, model, processor, work)
    variants = {name: variant(name, model, processor, case) for name in there}
    for name in there:
        rows[name].tokens = variants[name].tokens(work)
        for _ in range(1 if case.device == "cpu" else 2):  # warm-up
            rows[name].missing = rows[name].missing or _failure(variants[name], model, work)
    fit = [name for name in there if not rows[name].missing]
    for _, name in itertools.product(range(runs), fit):
        rows[name].seconds.append(_seconds(variants[name], model, work))
    for name in fit if memory else ():
        if name not in (ALONE, COMPACT):
            rows[name].peak_mb = _peak(case, name, variants[name], model, work)
    peak, flops, seconds = (
        peak_flops(torch.device(case.device)),
        variants[OURS].flops(work),
        rows[OURS].median,
    )
    return Result(
        case,
        work.prompts.items[0]["input_ids"].shape[1],
        sum(p.numel() for p in model.parameters()),
        int(work.rollouts.completion_mask.sum()),
        *errors,
        rows,
        rounded(flops / seconds / peak) if peak and flops and seconds else None,
    )


def _checked(
    case: Case, names: Sequence[str], model: Any, processor: Any, work: Work
) -> tuple[dict[str, float], dict[str, float]]:
    """`agreement` in float32, with the attention that can take it; on CUDA of the first four captions."""
    plain = twin(model)
    if case.attention != "sdpa":
        plain.set_attn_implementation("sdpa")
    if case.device == "cuda":
        work = work_of(replace(case, captions=min(4, case.captions)), model, processor)
    with float32(model):
        return agreement({name: variant(name, plain, processor, case) for name in names}, model, work)


def _seconds(variant: Any, model: Any, work: Work) -> float:
    clear(model)
    return seconds_of(lambda: variant.update(work))


def _failure(variant: Any, model: Any, work: Work) -> str:
    """Why an update cannot be run; empty where it can."""
    try:
        _seconds(variant, model, work)
    except torch.OutOfMemoryError:
        failure = "out of memory"
    else:
        return ""
    clear(model)
    gc.collect()
    torch.cuda.empty_cache()
    return failure


def _peak(case: Case, name: str, variant: Any, model: Any, work: Work) -> float | None:
    """Of memory, in 10^6 bytes; None where the system does not tell."""
    if case.device == "cuda":
        clear(model)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        variant.update(work)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Blocks are given back as soon as they are free: what is resident is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth_of_process, (case, name))


def _growth_of_process(case: Case, name: str) -> float:
    """Of resident memory over one update, in 10^6 bytes; to be called in a process of its own."""
    _quiet()
    model, processor = build(case)
    chosen = variant(name, model, processor, case)
    few = replace(case, captions=2, shortest=4, longest=8)
    chosen.update(work_of(few, model, processor))  # what is loaded or set up once
    work = work_of(case, model, processor)
    clear(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _resident_peak()
    chosen.update(work)
    return (_resident_peak() - before) / 1e6


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---- what is printed


def growth(results: Sequence[Result]) -> dict[str, Any] | None:
    """What a caption token adds between the smallest and the largest G of the first result's model and P.

    Returns:
        ``cost_per_token``: seconds that a caption token adds to ours, over those that it adds to `ALONE`;
        ``kb_per_token``: memory that it adds, by variant, 10^3 bytes. None with a single G.
    """
    first = results[0]
    same = [r for r in results if (r.case.size, r.case.prompt) == (first.case.size, first.case.prompt)]
    few, many = (pick(same, key=lambda result: result.case.captions) for pick in (min, max))
    if few is many:
        return None

    def added(name: str, of: str) -> float | None:
        low, high = getattr(few.rows[name], of), getattr(many.rows[name], of)
        return None if None in (low, high) else (high - low) / (many.own_tokens - few.own_tokens)

    kb = {name: added(name, "peak_mb") for name in (OURS, NAIVE, TRL)}
    ours, alone = added(OURS, "median"), added(ALONE, "median")
    return {
        "cost_per_token": rounded(ours / alone) if ours and alone else None,
        "kb_per_token": {name: None if mb is None else rounded(1000 * mb) for name, mb in kb.items()},
    }


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """The last line: the first result is the headline."""
    headline = results[0]
    cases = [
        {"title": result.title, **asdict(result)}
        | {"ratios": {name: [result.ratio(TRL, name), result.ratio(NAIVE, name)] for name in result.rows}}
        for result in results
    ]
    return {
        "update_ratio_trl": headline.ratio(TRL, OURS),
        "update_ratio_naive": headline.ratio(NAIVE, OURS),
        "memory_ratio_trl": headline.ratio(OURS, TRL, "peak_mb"),
        "mfu": headline.mfu,
        "update_ratio_trl_captions_only": headline.ratio(COMPACT, OURS),
        "headline": headline.title,
        "growth": growth(results),
        "device": device_name(headline.case.device),
        "versions": versions("torch", "transformers", "trl", "liger_kernel"),
        "cases": cases,
    }


def plan(options: Namespace) -> list[tuple[Case, list[str]]]:
    """Cases, the headline first, and their variants."""
    three = [OURS, NAIVE, TRL]
    if torch.cuda.is_available():
        attention = "flash_attention_2" if installed("flash_attn") else "sdpa"
        shared: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "attention": attention}
        shared |= {"lora": options.lora, "checkpointing": True, "shortest": 200, "longest": 300}
        prompt = 620 if options.size == "llava7b" else 1300
        sizes = [8] if options.quick else [8, 4, 16]
        return [(Case(options.size, prompt, G, **shared), [*three, ALONE]) for G in sizes]
    if options.quick:
        return [(Case("30m", 200, 4, 20, 40), three)]
    return [
        (Case("30m", 420, 8), [*three, COMPACT, ALONE]),
        (Case("30m", 420, 4), [*three, ALONE]),
        (Case("30m", 420, 16), [*three, ALONE]),
        (Case("30m", 100, 8), three),
        (Case("30m", 1200, 8), three),
        (Case("llava30m", 420, 8), three),
    ]


def _quiet() -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Measure, print a table and one line of JSON; the exit status is 1 where variants disagree."""
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=["3b", "7b", "llava7b"], default="3b", help="of the model on CUDA")
    parser.add_argument("--lora", action="store_true", help="on CUDA: train adapters of rank 64 only")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda and options.size != "3b" and not options.lora:
        parser.error(f"--size {options.size} needs --lora: gradients of all its weights leave no room")
    _quiet()
    results, runs = [], 3 if options.quick else 5
    for case, names in plan(options):
        results.append(run(case, names, runs, memory=cuda or not options.quick))
        gc.collect()
    disagreeing = [result.title for result in results if not result.agrees]
    rows = [
        (
            result.title,
            name,
            row.missing or row.median,
            row.tokens,
            ratio,
            result.ratio(NAIVE, name),
            row.peak_mb,
        )
        for result in results
        for name, row in result.rows.items()
        for ratio in [result.ratio(TRL, name)]
    ]
    columns = ("case", "variant", "median s", "tokens", "TRL / this", "naive / this", "peak MB")
    report(f"One policy update, {runs} runs each, one image", columns, rows, figures(results))
    if disagreeing:
        sys.exit(f"no ratios, variants differ by more than {TOLERANCE:g}: {'; '.join(disagreeing)}")


if __name__ == "__main__":
    main()

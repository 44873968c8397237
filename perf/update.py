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

import argparse
import gc
import importlib.metadata
import itertools
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would spread over several
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from rich.console import Console
from rich.table import Table

from balcap.policy.families import base_of
from balcap.policy.flops import peak_flops, update_flops
from perf.update_case import SIZES, Case, Work, build, work_of
from perf.update_variants import (
    ALONE,
    COMPACT,
    NAIVE,
    OURS,
    TRL,
    agreement,
    clear,
    float32,
    installed,
    twin,
    variant,
)

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
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


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
    rows: dict[str, Row] = field(default_factory=dict)
    mfu: float | None = None

    @property
    def title(self) -> str:
        return f"{SIZES[self.case.size][0]} {self.parameters / 1e6:.0f}M, P {self.prompt}, G {self.case.captions}"

    @property
    def agrees(self) -> bool:
        errors = [*self.logps_error.values(), *self.gradient_error.values()]
        return all(error <= TOLERANCE for error in errors)  # False for NaN

    def ratio(self, slow: str, fast: str) -> float | None:
        """Median seconds of one variant over those of another; None where one is missing or they disagree."""
        there = [self.rows.get(slow, Row()).median, self.rows.get(fast, Row()).median]
        return _round(there[0] / there[1]) if self.agrees and not any(map(math.isnan, there)) else None

    def memory_ratio(self) -> float | None:
        """Our peak over TRL's."""
        mine, theirs = (self.rows.get(name, Row()).peak_mb for name in (OURS, TRL))
        return _round(mine / theirs) if self.agrees and mine and theirs else None


def _round(x: float) -> float:
    return float(f"{x:.4g}")


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
    for _, name in itertools.product(range(runs), there):
        if not rows[name].missing:
            rows[name].seconds.append(_seconds(variants[name], model, work))
    if case.device == "cuda" or memory:
        for name in there:
            if not rows[name].missing and name not in (ALONE, COMPACT):
                rows[name].peak_mb = _peak(case, name, variants[name], model, work)
    mfu = _mfu(case, rows[OURS], model, work)
    return Result(
        case,
        work.prompt,
        sum(p.numel() for p in model.parameters()),
        int(work.rollouts.completion_mask.sum()),
        *errors,
        rows,
        mfu,
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


def _failure(variant: Any, model: Any, work: Work) -> str:
    """Why an update cannot be run; empty where it can."""
    try:
        _seconds(variant, model, work)
    except torch.OutOfMemoryError:
        pass
    else:
        return ""
    clear(model)
    gc.collect()
    torch.cuda.empty_cache()
    return "out of memory"


def _seconds(variant: Any, model: Any, work: Work) -> float:
    clear(model)
    gc.collect()
    _synchronize()
    started = time.perf_counter()
    variant.update(work)
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _mfu(case: Case, row: Row, model: Any, work: Work) -> float | None:
    peak = peak_flops(torch.device(case.device))
    if not peak or not row.seconds:
        return None
    return _round(update_flops(base_of(model), work.layout, work.prompts.items) / row.median / peak)


def _peak(case: Case, name: str, variant: Any, model: Any, work: Work) -> float | None:
    if case.device == "cpu":
        return _resident_peak(case, name)
    clear(model)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    variant.update(work)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def _resident_peak(case: Case, name: str) -> float | None:
    """Growth of a process that runs one update, in 10^6 bytes; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Blocks are given back as soon as they are free: what is resident is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grown, (case, name))


def _grown(case: Case, name: str) -> float:
    _quiet()
    model, processor = build(case)
    chosen = variant(name, model, processor, case)
    few = replace(case, captions=2, shortest=4, longest=8)
    chosen.update(work_of(few, model, processor))  # what is loaded or set up once
    work = work_of(case, model, processor)
    clear(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _status("VmHWM")
    chosen.update(work)
    return (_status("VmHWM") - before) / 1e6


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


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
    tokens = many.own_tokens - few.own_tokens

    def added(name: str) -> float:
        return (many.rows[name].median - few.rows[name].median) / tokens

    kb = {}
    for name in (OURS, NAIVE, TRL):
        low, high = few.rows[name].peak_mb, many.rows[name].peak_mb
        kb[name] = None if low is None or high is None else _round(1000 * (high - low) / tokens)
    cost = added(OURS) / added(ALONE)
    return {"cost_per_token": None if math.isnan(cost) else _round(cost), "kb_per_token": kb}


def print_tables(results: Sequence[Result], grown: dict[str, Any] | None, runs: int) -> None:
    """One row per case and variant, and how cost grows with G."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        title=f"One policy update, {runs} runs each; captions {_lengths(results)} tokens, uniform; B = 1"
    )
    for column in ("case", "variant"):
        table.add_column(column)
    for column in ("median s", "min s", "tokens", "TRL / this", "naive / this", "peak MB"):
        table.add_column(column, justify="right")
    for result in results:
        for i, (name, row) in enumerate(result.rows.items()):
            title = result.title if i == 0 else ""
            if row.missing:
                table.add_row(title, name, row.missing, end_section=i == len(result.rows) - 1)
                continue
            table.add_row(
                title,
                name,
                f"{row.median:.3f}",
                f"{min(row.seconds):.3f}",
                f"{row.tokens:,}",
                _times(result.ratio(TRL, name)),
                _times(result.ratio(NAIVE, name)),
                "-" if row.peak_mb is None else f"{row.peak_mb:,.0f}",
                end_section=i == len(result.rows) - 1,
            )
    console.print(table)
    for result in results:
        errors = [f"{k} {v:.1e}" for k, v in result.logps_error.items()]
        errors += [f"gradient {k} {v:.1e}" for k, v in result.gradient_error.items()]
        console.print(f"{result.title}: against naive in float32: {'; '.join(errors)}", highlight=False)
        if not result.agrees:
            console.print(f"  more than {TOLERANCE:g}: no ratios", style="red")
        if result.mfu is not None:
            console.print(f"  model FLOPs utilisation {result.mfu:.1%}")
    if grown:
        cost, kb = grown["cost_per_token"], grown["kb_per_token"]
        console.print(
            f"A caption token costs {cost} x what it costs without a prompt; it adds kB of memory: {kb}"
        )


def _lengths(results: Sequence[Result]) -> str:
    return ", ".join(sorted({f"{r.case.shortest}-{r.case.longest}" for r in results}))


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def as_json(results: Sequence[Result], grown: dict[str, Any] | None) -> dict[str, Any]:
    """The last line: the first result is the headline."""
    headline = results[0]
    cuda = headline.case.device == "cuda"
    return {
        "update_ratio_trl": headline.ratio(TRL, OURS),
        "update_ratio_naive": headline.ratio(NAIVE, OURS),
        "memory_ratio_trl": headline.memory_ratio(),
        "mfu": headline.mfu,
        "update_ratio_trl_captions_only": headline.ratio(COMPACT, OURS),
        "headline": headline.title,
        "growth": grown,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {name: _version(name) for name in ("torch", "transformers", "trl", "liger_kernel")},
        "cases": [
            {
                "title": result.title,
                **asdict(result),
                "ratios": {
                    name: [result.ratio(TRL, name), result.ratio(NAIVE, name)] for name in result.rows
                },
            }
            for result in results
        ],
    }


def _version(package: str) -> str:
    return importlib.metadata.version(package) if installed(package) else "not installed"


def plan(options: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """Cases, the headline first, and their variants."""
    three = [OURS, NAIVE, TRL]
    if options.device == "cuda":
        attention = "flash_attention_2" if installed("flash_attn") else "sdpa"
        prompt = 620 if options.size == "llava7b" else 1300
        shared: dict[str, Any] = {
            "device": "cuda",
            "dtype": "bfloat16",
            "attention": options.attention or attention,
        }
        shared |= {
            "lora": options.lora,
            "checkpointing": options.checkpointing,
            "shortest": 200,
            "longest": 300,
        }
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
    from transformers.utils import logging as of_transformers

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def main() -> None:
    """Measure, print tables and one line of JSON; the exit status is 1 where variants disagree."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="A policy update, against TRL's.")
    parser.add_argument("--quick", action="store_true", help="one case, 3 runs")
    parser.add_argument("--runs", type=int, help="of each variant after warm-up; 5 unless --quick")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=["3b", "7b", "llava7b"], default="3b", help="of the model on CUDA")
    parser.add_argument("--lora", action="store_true", help="on CUDA: train adapters of rank 64 only")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="on CUDA: of activations"
    )
    parser.add_argument(
        "--attention", help="on CUDA: of transformers; flash_attention_2 where installed, else sdpa"
    )
    options = parser.parse_args()
    if options.device == "cuda" and options.size != "3b" and not options.lora:
        parser.error(f"--size {options.size} needs --lora: gradients of all its weights leave no room")
    runs = options.runs or (3 if options.quick else 5)
    _quiet()
    results = []
    for case, names in plan(options):
        results.append(run(case, names, runs, memory=not options.quick))
        gc.collect()
        print(f"{results[-1].title}: done", file=sys.stderr)
    grown = growth(results)
    print_tables(results, grown, runs)
    print(json.dumps(as_json(results, grown)))
    sys.exit(not all(result.agrees for result in results))


if __name__ == "__main__":
    main()

"""Operators that the host must issue: for one update, and for one pass of the vision tower.

    python perf/operators.py           Qwen2.5-VL-3B's depth, P 1,312, G 8, captions of 200 to 300 tokens; three minutes
    python perf/operators.py --quick   G 2

A GPU that waits for Python is bound by this number and not by arithmetic. It depends on the depth of the model and not
on its width, so the model is narrow and runs on a CPU. Counted are the operators of torch that make new values, forward,
recomputation and backward, and the kernels that ``torch.compile`` makes of several; views are free.

ours, naive, TRL  as in `perf/update.py`; the loss, the optimizer and the encoding of the prompt are left out alike. Ours
                  with ``compile: true``, as ``auto`` has it on a GPU, and with ``compile: false``
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from balcap.policy.families import base_of, family_of
from perf.report import arguments, report
from perf.update_case import Case, build, work_of
from perf.update_variants import COMPILED, NAIVE, OURS, TRL, variant

warnings.simplefilter("ignore")


class CountOperators(TorchDispatchMode):
    """Counts by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """What is compiled may run under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "prim":
            self.counts[str(func.overloadpacket).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def of_update(case: Case, name: str) -> Counter[str]:
    """Operators of one update, the second: the first makes what is kept."""
    model, processor = build(case)
    work = work_of(case, model, processor)
    one = variant(name, model, processor, case)
    torch._inductor.config.cpp.enable_kernel_profile = True  # compiled kernels have names then
    one.update(work)
    model.zero_grad()
    with CountOperators() as counted, profile(activities=[ProfilerActivity.CPU]) as profiled:
        one.update(work)
    fused = Counter("fused" for event in profiled.events() if "_cpp_fused_" in event.name)
    return counted.counts + fused


def of_vision(case: Case) -> Counter[str]:
    """Operators of one pass of the vision tower as the policy makes it."""
    model, processor = build(case)
    work = work_of(case, model, processor)
    policy = variant(OURS, model, processor, case).policy
    base = base_of(policy.model)
    with torch.no_grad(), CountOperators() as counted:
        family_of(base).image_features(base, work.prompts.images([0], policy.device))
    return counted.counts


def full_case() -> Case:
    """As measured on GPUs."""
    return Case("3b-narrow", 1312, 8, shortest=200, longest=300, checkpointing=True)


def quick_case() -> Case:
    """With two captions, which change no number of operators."""
    return replace(full_case(), captions=2, longest=220)


def main() -> None:
    """Count, and print."""
    case = quick_case() if arguments(__doc__).parse_args().quick else full_case()
    counts = {name: of_update(case, name) for name in (COMPILED, OURS, NAIVE, TRL)}
    vision = of_vision(case)
    attention = sum(count for name, count in vision.items() if "scaled_dot_product" in name)
    totals = {name: sum(each.values()) for name, each in counts.items()}
    rows = [
        [f"update, {name}", totals[name], ", ".join(f"{op[:18]} {n}" for op, n in each.most_common(4))]
        for name, each in counts.items()
    ]
    rows.append(["vision pass", sum(vision.values()), f"of attention {attention}"])
    figures = {"update": totals, "vision": sum(vision.values()), "vision_attention": attention}
    report(f"Operators, 36 layers, P 1,312, G {case.captions}", ["", "operators", "of them"], rows, figures)


if __name__ == "__main__":
    main()

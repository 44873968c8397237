"""``python main.py plan``: will a run fit its GPUs, and what to change where it does not, before anything is loaded.

Takes the configs and flags of ``fit``. The model is built without weights, from its ``config.json``; a picture as large as
the processor takes stands for all. `plan_fit.py` has the arithmetic of stages and changes, `plan_setup.py` reads the config;
what an update holds is in `balcap/policy/memory.py`, what sampling holds in `balcap/rollout/memory.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from balcap.commands.plan_fit import (
    MARGIN,
    Change,
    Setup,
    cache_tokens,
    changes,
    combined,
    engine_problem,
    excess,
    longest_forward,
    stages,
    update_of,
)
from balcap.commands.plan_setup import Planned, read_setup
from balcap.module import BalCapModule

NAMES = {
    "weights": "policy: weights",
    "reference": "reference: a frozen copy",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "buckets": "gradients once more, for DDP",
    "casts": "weights once more, in 16 bits",
    "activations": "activations, kept for backward",
    "layer": "activations of a layer, made again",
    "backward": "gradients of activations",
    "head": "logits of the head, its gradient",
    "vision": "a pass of the vision tower",
    "optimizer_step": "temporaries of the optimizer",
    "prompts": "reading prompts",
    "logits": "logits of sampling",
    "KV cache": "keys and values",
    "engine": "vLLM",
}
"""Part -> what it is, in the order of the table."""

GATHERED = {"casts": "weights gathered, gradients not summed yet"}
"""The same, where ranks share the weights."""


def plan_run(module: BalCapModule, data: Any, launch: Any, gpu_gb: float | None, pixels: int | None) -> None:
    """Print the plan.

    Raises:
        PolicyError: the model's config or processor cannot be read.
        UserError: a flag is missing or out of range, or the memory of this architecture is not known.
        SystemExit: the run does not fit.
    """
    planned = read_setup(module, data, launch, gpu_gb, pixels)
    setup, console = planned.setup, Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(stage_table(setup))
    for line in lines(setup):
        console.print(line, markup=False)
    if missing := excess(setup):
        show_changes(planned, console)
    console.print("\nAssumed:")
    for line in planned.assumed:
        console.print(f"  - {line}", markup=False)
    if missing:
        raise SystemExit("This run does not fit")


def stage_table(setup: Setup) -> Table:
    """One row for each part, one column for each stage."""
    found = stages(setup)
    table = Table("GB on each GPU", title="Each stage at its worst moment (estimate)")
    for stage in found:
        table.add_column(stage, justify="right")
    for part, name in (NAMES | (GATHERED if setup.gathers else {})).items():
        if any(parts.get(part) for parts in found.values()):
            table.add_row(name, *(_gb(parts[part]) if parts.get(part) else "" for parts in found.values()))
    table.add_section()
    table.add_row("peak", *(_gb(sum(parts.values())) for parts in found.values()), style="bold")
    return table


def lines(setup: Setup) -> Iterator[str]:
    """What the table does not say."""
    update, costs = update_of(setup), setup.weights.costs
    yield (
        f"A GPU of {setup.device / 2**30:g} GB has {_gb(setup.device)} GB of 10^9 bytes; {_gb(setup.limit)} are counted on, "
        f"{MARGIN:.0%} are left alone: it {'does not fit' if excess(setup) else 'fits'}."
    )
    yield (
        f"update: {update.forwards:,} x {update.images:,} images with {setup.captions:,} captions each in a forward of "
        f"{setup.forward(update.images).tokens:,} tokens; {update.checkpointed} of {costs.layers} layers are checkpointed."
    )
    for checkpointed, how in ((0, "without checkpointing"), (costs.layers, "with all layers checkpointed")):
        images = longest_forward(setup, checkpointed)
        if images:
            tokens = setup.forward(images).tokens
            yield f"A forward may have {tokens:,} tokens, {images:,} images with their captions, {how}."
        else:
            yield f"No image with its captions fits into a forward {how}."
    if problem := engine_problem(setup):
        yield problem
    elif setup.engine == "vllm":
        room, needed = cache_tokens(setup), setup.parallel * setup.work.tokens
        yield (
            f"vLLM: its weights {_gb(setup.weights.engine / setup.parallel)} GB, room for {room:,} tokens; a step needs "
            f"{needed:,}" + (", so captions wait for each other." if room < needed else ".")
        )


def show_changes(planned: Planned, console: Console) -> None:
    """What each change alone makes of the stages, and several together."""
    setup, other = planned.setup, planned.other
    alone, together = changes(setup, other), combined(setup, other)
    table = Table("change", title="What to change: each alone")
    for stage in stages(setup):
        table.add_column(f"{stage}, GB", justify="right")
    table.add_column("saves, GB", justify="right")
    table.add_column("fits")
    for change in alone:
        table.add_row(*_change(setup, change))
    console.print(table if alone else "No setting that saves memory is left to change.")
    if together and len(together) > 1 and all(excess(change.setup) for change in alone):
        fits = not excess(together[-1].setup)
        console.print("Together, " + ("until it fits:" if fits else "which still does not fit:"))
        for before, change in zip([setup, *(one.setup for one in together)], together, strict=False):
            peaks = ", ".join(f"{stage} {peak}" for stage, peak in _peaks(change.setup).items())
            console.print(f"  {change.flags}  saves {_saved(before, change.setup)}: {peaks}", markup=False)


def _change(setup: Setup, change: Change) -> list[str]:
    fits = "no" if excess(change.setup) else "yes"
    return [change.flags, *_peaks(change.setup).values(), _saved(setup, change.setup), fits]


def _peaks(setup: Setup) -> dict[str, str]:
    return {stage: _gb(sum(parts.values())) for stage, parts in stages(setup).items()}


def _saved(before: Setup, after: Setup) -> str:
    """Of the stage that it relieves most."""
    now = stages(after)
    return _gb(max(sum(parts.values()) - sum(now[stage].values()) for stage, parts in stages(before).items()))


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}"

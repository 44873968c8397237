"""``python main.py check``: does the model, on the user's own images, do what training takes for granted?

Takes the configs and flags of ``fit``, loads the policy and the engine as it does, and prints a table. Each check is one
function of a `State`; what one raises is a failed row, and the others go on. Trained weights are changed a little first
(`disturb`): a new adapter does nothing yet, so an engine without it, or an export that lost it, would not be noticed.

`check_policy.py` and `check_engine.py` have the checks; `check_state.py` what they share.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from textwrap import shorten
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from balcap.commands import check_engine, check_policy
from balcap.commands.check_state import EXACT, ROUNDED, Result, Skipped, State
from balcap.commands.estimate_run import read_rows
from balcap.data import CaptionDataModule
from balcap.module import BalCapModule
from balcap.policy import PolicyConfig
from balcap.policy.families import family_of
from balcap.policy.policy import Policy
from balcap.utils.errors import UserError
from balcap.utils.seeding import seeded

CHECKS: dict[str, Callable[[State], Result]] = {
    "what is trained": check_policy.trainable,
    "placeholders": check_policy.placeholders,
    "engine's prompts": check_engine.engine_prompts,
    "bans": check_engine.bans,
    "log-probs": check_engine.log_probs,
    "greedy captions": check_engine.greedy,
    "padding": check_policy.padding,
    "shared prefix": check_policy.shared_prefix,
    "export": check_policy.exported,
}
"""In this order: later ones use the prompts and captions of earlier ones, and the last one closes the engine."""

MOST_TOKENS = 64
"""Of a caption."""


def check_run(trainer: Trainer, module: BalCapModule, data: CaptionDataModule, images: int) -> None:
    """Print the table.

    Raises:
        DataError: the rows cannot be used.
        SystemExit: a check failed.
    """
    if images < 1:
        raise UserError(f"--images {images}: use 1 or more")
    batch = read_rows(data, data.split.train, images)
    if batch is None:
        raise UserError(
            "data: no row can be used; the line above says why: see data.data and data.image_root"
        )
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    engine, sampling = module.pipeline.engine, module.pipeline.sampling
    # Compiling takes longer than all checks, and a cache would remember features of this run.
    config = replace(module.policy_config, compile=False, feature_cache=None)

    def load(config: PolicyConfig) -> Policy:
        policy = Policy.load(config, with_reference=False).eval()
        precision.convert_module(policy)
        return policy.to(device)

    with precision.forward_context(), seeded(device, module.pipeline.seed):
        results = {}
        try:
            policy = load(config)
            disturb(policy)
            exact = config.dtype == "float32" and not config.load_in_4bit and not _rounds(device)
            state = State(
                config,
                policy,
                engine,
                batch,
                replace(sampling, max_tokens=min(MOST_TOKENS, sampling.max_tokens)),
                load,
                EXACT if exact else ROUNDED,
                module.update_settings.mismatch_threshold,
            )
            family = type(family_of(policy.model)).__name__
            results["loading"] = Result(True, f"{config.model}, {config.dtype}, family {family}, on {device}")
        except Exception as error:  # whatever it is, it is what the user wants to know
            results = {"loading": failed(error)}
        else:
            results |= run_checks(state)
            engine.close()
    show(results, Console(width=None if sys.stdout.isatty() else 140, highlight=False))
    count = sum(result.passed is False for result in results.values())
    if count:
        raise SystemExit(f"{count} of {len(results)} checks failed")


def _rounds(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) or torch.get_default_dtype() != torch.float32


def run_checks(state: State) -> dict[str, Result]:
    """All of `CHECKS`, by name."""
    results = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check(state)
        except Skipped as why:
            results[name] = Result(None, str(why))
        except Exception as error:  # a row, and the others go on
            results[name] = failed(error)
    return results


def failed(error: Exception) -> Result:
    """A check that raised this."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Result(False, shorten(text, 600, placeholder=" ..."))


@torch.no_grad()
def disturb(policy: Policy) -> None:
    """Change trained weights a little: matrices by 2 % of their spread, those of zeros (LoRA's B) so that the adapter adds
    a few percent to what its layers give."""
    for weight in policy.model.parameters():
        if weight.requires_grad and weight.dim() > 1:
            spread = float(weight.float().std())
            scale = 0.02 * spread if spread else 0.05 / weight.shape[-1] ** 0.5
            weight.add_(torch.randn_like(weight), alpha=scale)


def show(results: Mapping[str, Result], console: Console) -> None:
    """One row for each check."""
    names = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "skipped"}
    table = Table("check", "result", "found", "way out", show_lines=True)
    for name, result in results.items():
        way_out = result.way_out if result.passed is False else ""
        table.add_row(name, names[result.passed], _plain(result.found), _plain(way_out))
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)

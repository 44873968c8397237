"""``python main.py estimate``: what a run's judge will cost, before anything is paid.

Takes the configs and flags of ``fit``. Sampled rows are judged in a dry run that asks nobody; the mean of what
they use is multiplied by the images that the run judges, and their spread gives the interval. Every assumption
is printed with the flag that changes it.

`estimate_assumptions.py` has the assumptions; `estimate_plan.py` counts the images; `estimate_dry_run.py` is the
dry run; `estimate_tokens.py` counts tokens; `estimate_run.py` puts them together and reports.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from balcap.commands.estimate_assumptions import Assumptions
from balcap.config import column_problems, model_problems, reference_problems

if TYPE_CHECKING:
    from balcap.data import CaptionDataModule
    from balcap.module import BalCapModule

HERE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "plugins": None,
    "profiler": None,
    "logger": False,
}
"""Settings of the trainer that estimates, wherever the run will be."""

ONE_DEVICE: dict[str, Any] = {
    name: HERE[name] for name in ("devices", "num_nodes", "strategy", "profiler", "logger")
}
"""Settings of the trainer that checks, on the kind of device that the run has."""


class BalCapTrainer(Trainer):
    """`Trainer`, which can also say what a ``fit`` will need: of its GPUs and of its judge; and check its model."""

    def check(
        self,
        model: BalCapModule,
        datamodule: CaptionDataModule,
        images: int = 10,
        ckpt_path: str | None = None,
    ) -> None:
        """Check on a few images that model and rollout engine do what training relies on: prompts, bans, log-probs, export.

        Takes the config and flags of ``fit``; needs its device, no judge and no key, and leaves the run folder alone.
        Exits with an error where a check fails.

        Args:
            model: with the policy and the engine.
            datamodule: the rows.
            images: rows of training, drawn at random.
            ckpt_path: must be null; what is checked is ``model.policy.model``.
        """
        from balcap.commands.check import check_run

        try:
            check_run(self, model, datamodule, images)
        except ValueError as error:  # DataError is one
            raise SystemExit(f"Cannot check: {error}") from None

    def plan(
        self,
        model: BalCapModule,
        datamodule: CaptionDataModule,
        launch: Any,
        gpu_gb: float | None = None,
        pixels: int | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Print whether a fit has enough memory on its GPUs, and what to change where it has not; nothing is loaded.

        Takes the config and flags of ``fit``. Needs no GPU, no data and no key: of the model its config and processor
        alone are read. Exits with an error where the run does not fit.

        Args:
            model: with the policy and the engine.
            datamodule: its settings.
            launch: settings of the trainer that would run the fit.
            gpu_gb: memory of each GPU as it is sold, such as 80, 48, 40, 24 or 16; null for that of the GPU that is here.
            pixels: area of the images in pixels; null for the largest that the model's processor makes.
            ckpt_path: taken as ``fit`` takes it; a run that goes on needs as much.
        """
        from balcap.commands.plan import plan_run

        plan_run(model, datamodule, launch, gpu_gb, pixels)

    def estimate(
        self,
        model: BalCapModule,
        datamodule: CaptionDataModule,
        launch: Any,
        ckpt_path: str | None = None,
        **flags: Any,
    ) -> None:
        """Print what the judge of a fit will be asked, and what that costs; nothing is paid or trained.

        Takes the config and flags of ``fit``. Needs no GPU and no key, and leaves the run folder alone.

        Args:
            model: with the judge and the rewards.
            datamodule: the rows.
            launch: settings of the trainer that would run the fit.
            ckpt_path: taken as ``fit`` takes it; the whole run is counted all the same.
            flags: as in `Assumptions`.
        """
        from rich.console import Console

        from balcap.commands.estimate_run import make_estimate

        try:
            estimate = make_estimate(self, model, datamodule, launch, Assumptions(**flags))
        except ValueError as error:  # DataError is one
            raise SystemExit(f"Cannot estimate: {error}") from None
        for line in estimate.settings.endings("take --config configs/judge/gpt-6-luna.yaml instead"):
            print(line, file=sys.stderr, flush=True)
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        estimate.show(console)
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "benchmarks", None):
                from balcap.commands.estimate_benchmarks import show_benchmarks

                times = callback.evaluations(
                    estimate.plan.batches * model.update_settings.updates_per_rollout
                )
                show_benchmarks(
                    callback.benchmarks, model.judge, times, callback.limit, Assumptions(**flags), console
                )


def estimate_problems(module: BalCapModule, data: CaptionDataModule) -> list[str]:
    """What contradicts itself in the config of a fit, but for keys, which only paying needs."""
    if module.judge is None:
        return ["model.judge: there is none, so there is nothing to estimate"]
    problems = [*model_problems(module), *data.problems("fit")]
    problems += column_problems(module, data.settings.columns)
    problems += reference_problems(module, data.settings.require_captions)
    return [text for text in problems if " in the environment" not in text]


def plan_problems(module: BalCapModule) -> list[str]:
    """What contradicts itself in the settings of policy, update and engine; vLLM need not be here."""
    return [text for text in model_problems(module, judges=False) if "vLLM is not installed" not in text]

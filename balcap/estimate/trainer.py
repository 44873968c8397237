"""Lightning's trainer with one more command."""

from __future__ import annotations

import os
import sys
from json import dump
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

    from balcap.data import CaptionDataModule
    from balcap.estimate.options import Launch
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


class BalCapTrainer(Trainer):
    """`Trainer`, which can also say what the judge of a ``fit`` will cost."""

    def estimate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        launch: Launch,
        ckpt_path: str | None = None,
        rows: int = 64,
        ranks: int | None = None,
        sample_policy: bool = False,
        caption_tokens: int | None = None,
        words_per_assertion: float | None = None,
        growth: float | None = None,
        chars_per_token: float | None = None,
        image_tokens: int | None = None,
        reasoning_tokens: int | None = None,
        ledger: str | None = None,
        json: str | None = None,
    ) -> None:
        """Print what the judge of a fit will be asked, and what that costs; nothing is paid or trained.

        Takes the config and flags of ``fit``. Needs no GPU and no key, and leaves the run folder alone.

        Args:
            model: with the judge and the rewards.
            datamodule: the rows.
            launch: how the run would be started.
            ckpt_path: taken as ``fit`` takes it; the whole run is counted all the same.
            rows: images that are sampled, of training and of validation.
            ranks: processes of the run over all machines; null takes them from the trainer's settings.
            sample_policy: load the policy and let it caption the sampled rows, which costs no money; else
                captions as long as the references are assumed.
            caption_tokens: tokens of a caption, instead.
            words_per_assertion: words of a caption for each assertion; null measures them where units of
                references are known, else takes 4.1.
            growth: exponent g in [0, 1]: n captions of an image make ``n ** g`` times the different assertions
                of one. Null takes 0.8, or measures it with `sample_policy` or `ledger`.
            chars_per_token: characters of the messages for each token, and nothing beside them; null for a
                tokenizer.
            image_tokens: tokens of each image; null for the rule of the model.
            reasoning_tokens: per call; null assumes them by the model and its ``reasoning_effort``.
            ledger: ``judge_ledger.sqlite`` of an earlier run with the same judge, whose figures replace
                assumptions.
            json: write the same as JSON to this file; null for none.
        """
        from rich.console import Console

        from balcap.estimate.command import estimate
        from balcap.estimate.options import Options

        options = Options(
            rows=rows,
            ranks=ranks,
            sample_policy=sample_policy,
            caption_tokens=caption_tokens,
            words_per_assertion=words_per_assertion,
            growth=growth,
            chars_per_token=chars_per_token,
            image_tokens=image_tokens,
            reasoning_tokens=reasoning_tokens,
            ledger=ledger,
        )
        if problems := options.problems():
            raise SystemExit("Cannot estimate; change:\n" + "\n".join(f"  - {said}" for said in problems))
        try:
            report = estimate(self, model, datamodule, launch, options)  # type: ignore[arg-type]
        except ValueError as error:  # DataError is one
            raise SystemExit(f"Cannot estimate: {error}") from None
        report.show(Console(width=None if sys.stdout.isatty() else 120, highlight=False))
        if json is not None:
            partial = f"{json}.part"
            with open(partial, "w") as file:
                dump(report.as_json(), file, indent=2)
            os.replace(partial, json)


def estimate_problems(module: BalCapModule, data: CaptionDataModule) -> list[str]:
    """What contradicts itself in the config of a fit, but for keys, which only paying needs."""
    judge = module.judge
    cache, ledger = judge.settings.cache, judge.settings.ledger
    # Checking these files would make them.
    judge.settings.cache = cache if cache is not None and os.path.exists(cache) else None
    judge.settings.ledger = None
    try:
        found = module.problems()
    finally:
        judge.settings.cache, judge.settings.ledger = cache, ledger
    return [said for said in found if " in the environment" not in said] + data.problems("fit")


def launch_of(options: Any) -> Launch:
    """How a fit of this config would be started."""
    from balcap.estimate.options import Launch

    trainer = options.trainer
    accelerator = trainer.accelerator if isinstance(trainer.accelerator, str) else "gpu"
    return Launch(trainer.devices, trainer.num_nodes, accelerator, trainer.max_time, options.ckpt_path)

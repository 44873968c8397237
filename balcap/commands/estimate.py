"""``python main.py estimate``: what a run's judge will cost, before anything is paid.

Takes the configs and flags of ``fit``. Sampled rows are judged in a dry run that asks nobody; the mean of what
they use is multiplied by the images that the run judges, and their spread gives the interval. Every assumption
is printed with the flag that changes it.

`estimate_run.py` samples rows, multiplies and reports; `estimate_dry_run.py` is the dry run; `estimate_tokens.py`
counts tokens.
"""

from __future__ import annotations

import sys
from math import inf
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from balcap.config import model_problems

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

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


_LOWEST = {"rows": 1, "ranks": 1, "words_per_assertion": 0.1, "chars_per_token": 0.1}
"""Lowest values of flags, of the others 0."""


class BalCapTrainer(Trainer):
    """`Trainer`, which can also say what the judge of a ``fit`` will cost."""

    def estimate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        launch: Any,
        ckpt_path: str | None = None,
        rows: int = 32,
        ranks: int | None = None,
        sample_policy: bool = False,
        overlap: float = 0.45,
        words_per_assertion: float = 4.1,
        chars_per_token: float | None = None,
        image_tokens: int | None = None,
        reasoning_tokens: int | None = None,
        json: str | None = None,
    ) -> None:
        """Print what the judge of a fit will be asked, and what that costs; nothing is paid or trained.

        Takes the config and flags of ``fit``. Needs no GPU and no key, and leaves the run folder alone.

        Args:
            model: with the judge and the rewards.
            datamodule: the rows.
            launch: settings of the trainer that would run the fit.
            ckpt_path: taken as ``fit`` takes it; the whole run is counted all the same.
            rows: images that are sampled, of training and of validation.
            ranks: processes of the run over all machines; null takes them from the trainer's settings.
            sample_policy: load the policy and let it caption the sampled rows, which costs no money; else
                captions as long as the references are assumed.
            overlap: share of what they say that all captions of an image have in common, in [0, 1].
            words_per_assertion: words of a caption for each assertion that it makes.
            chars_per_token: characters of the messages for each token, and nothing beside them; null for a
                tokenizer.
            image_tokens: tokens of each image; null for the rule of the model.
            reasoning_tokens: per call; null assumes them by the model and its ``reasoning_effort``.
            json: write the same as JSON to this file; null for none.
        """
        from json import dump

        from rich.console import Console

        from balcap.commands.estimate_run import make_estimate
        from balcap.utils.files import atomic_write

        flags = {
            "rows": rows, "ranks": ranks, "sample_policy": sample_policy, "overlap": overlap,
            "words_per_assertion": words_per_assertion, "chars_per_token": chars_per_token,
            "image_tokens": image_tokens, "reasoning_tokens": reasoning_tokens,
        }  # fmt: skip
        given = [(name, value) for name, value in flags.items() if value is not None]
        wrong = [(name, value) for name, value in given if not _LOWEST.get(name, 0) <= value < inf]
        if wrong or overlap > 1:
            (name, value), *_ = wrong or [("overlap", overlap)]
            raise SystemExit(f"Cannot estimate: --{name} {value} is out of range")
        try:
            estimate = make_estimate(self, model, datamodule, launch, SimpleNamespace(**flags), ckpt_path)  # type: ignore[arg-type]
        except ValueError as error:  # DataError is one
            raise SystemExit(f"Cannot estimate: {error}") from None
        estimate.show(Console(width=None if sys.stdout.isatty() else 120, highlight=False))
        if json is not None:
            with atomic_write(json) as file:
                dump(estimate.as_json(), file, indent=2)


def estimate_problems(module: BalCapModule, data: CaptionDataModule) -> list[str]:
    """What contradicts itself in the config of a fit, but for keys, which only paying needs."""
    if module.judge is None:
        return ["model.judge: there is none, so there is nothing to estimate"]
    problems = [*model_problems(module), *data.problems("fit")]
    return [text for text in problems if " in the environment" not in text]

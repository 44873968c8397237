"""A module that trains by hand on nothing in particular, and a record to log: no model, no judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from balcap.judge import Judgments
from balcap.types import CaptionBatch, Rollouts, StepRecord

NAN = float("nan")


@dataclass(frozen=True)
class Said:
    """What a judge says of an assertion, as far as callbacks look."""

    true: bool
    pointable: bool


@dataclass(frozen=True)
class Rated:
    clarity: float
    fluency: float
    coherency: float


def make_record(advantages: bool = True, number: int = 0) -> StepRecord:
    """A row of one image and one of two, two captions each; the judge failed on the very last one."""
    batch = CaptionBatch(
        sample_ids=["a.png", "b.png"],
        images=[
            (Image.new("RGB", (900, 30), "red"),),
            (Image.new("RGB", (8, 8), "blue"), Image.new("RGB", (9, 8))),
        ],
        image_bytes=[(b"",), (b"", b"")],
        prompts=["Describe | this.", "What is it?"],
        references=["A red bar.", "A blue square."],
    )
    rollouts = Rollouts(
        batch=batch,
        captions=[["A red bar.", "A <b>bar</b> | of hope.\nYes."], ["Blue.", "Green."]],
        token_ids=torch.zeros(2, 2, 3, dtype=torch.long),
        completion_mask=torch.ones(2, 2, 3, dtype=torch.bool),
        sampler_logps=torch.zeros(2, 2, 3),
        truncated=torch.tensor([[False, True], [False, False]]),
        lengths=torch.tensor([[4, 7], [2, 2]]),
        reference_lengths=torch.tensor([4, 5]),
        weights_version=3,
    )
    judgments = Judgments(
        answers={
            "decompose": [[["a red bar"], ["a bar", "hope"]], [["blue"], None]],
            "verify": [
                [[Said(True, True)], [Said(True, False), Said(False, False)]],
                [[Said(True, True)], None],
            ],
            "rate": [[Rated(1.0, 0.5, 0.75), Rated(0.2, 0.2, 0.2)], [Rated(1.0, 1.0, 1.0), None]],
        },
        units=[["red", "bar"], None],
    )
    rewards = torch.tensor([[[1.0, 0.75], [0.5, 0.2]], [[1.0, 1.0], [NAN, NAN]]])
    shaped = rewards.clone()
    shaped[0, 1, 1] = 0.0
    return StepRecord(
        rollouts=rollouts,
        judgments=judgments,
        reward_names=["precision", "linguistic"],
        rewards=rewards,
        shaped=shaped,
        advantages=torch.tensor([[1.0, -1.0], [0.5, 0.0]]) if advantages else None,
        number=number,
    )


class Stream(IterableDataset):
    """Batches of numbers; knows no length."""

    def __iter__(self):
        return iter(torch.arange(1000.0))


class TinyModule(LightningModule):
    """Manual optimization; logs the names that a caption run logs."""

    def __init__(self, with_record: bool = False, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.with_record = with_record
        self.fail_at = fail_at
        self.started = False
        self.noise: list[float] = []

    def on_train_start(self) -> None:
        self.started = True

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if batch_idx == self.fail_at:
            raise RuntimeError("the machine is on fire")
        self.noise.append(torch.rand(()).item())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight - 1).square().sum())
        optimizer.step()
        for name, value in (("precision", 0.25), ("recall", 0.5), ("b_capscore", 0.375)):
            self.log(f"train/{name}", value, batch_size=1)
        return {"records": [make_record(number=batch_idx)]} if self.with_record else {}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        assert self.started, "validation may rely on on_train_start"
        torch.rand(())
        self.log("val/precision", self.weight.detach().squeeze(), batch_size=1)
        return {"records": [make_record(advantages=False, number=batch_idx)]} if self.with_record else {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyData(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(2.0), batch_size=1)


def make_trainer(folder: Any, callbacks: list, **kwargs: Any) -> Trainer:
    """A quiet trainer on the CPU that writes under `folder`."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": 5,
        "val_check_interval": 1000,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(callbacks=callbacks, **{**defaults, **kwargs})

"""The resolved config of a run, in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from balcap.trainer.checkpoint import read_checkpoint
from balcap.utils.files import atomic_write


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` for a fit, ``config.<command>.yaml`` for the other commands. Beside that of a fit,
    ``config.changed.yaml`` has only what is not as by default: what ``fit --changed`` prints.

    A fit that goes on with other settings says which; those before stay as ``config.until-step-<n>.yaml``.

    Args:
        parser: that dumps the config.
        config: of the command.
        checkpoint: that a fit goes on from, or None.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, checkpoint: Path | None = None
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.checkpoint = checkpoint

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else f"config.{TrainerFn(stage).value}.yaml"
        path = Path(trainer.default_root_dir) / name
        text = self.parser.dump(self.config, skip_none=False)
        goes_on = stage == "fit" and self.checkpoint is not None and path.exists()
        before = path.read_text() if goes_on else text
        if changes := changed_settings(before, text):
            assert self.checkpoint is not None
            step = read_checkpoint(self.checkpoint)["global_step"]
            rank_zero_info(f"settings changed at step {step}: {'; '.join(changes)}")
            with atomic_write(path.with_name(f"config.until-step-{step}.yaml")) as file:
                file.write(before)
        with atomic_write(path) as file:
            file.write(text)
        if stage == "fit":
            with atomic_write(path.with_name("config.changed.yaml")) as file:
                file.write(self.parser.dump(self.config, skip_none=False, skip_default=True))


def changed_settings(before: str, now: str) -> list[str]:
    """What differs between two configs in YAML, such as ``trainer.max_steps 2 -> 4``, but for the checkpoint."""
    old, new = dict(_leaves(yaml.safe_load(before))), dict(_leaves(yaml.safe_load(now)))
    names = [name for name in old | new if name not in ("ckpt_path", "resume")]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _leaves(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names; a list of anything but objects is one setting."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from _leaves(value, f"{name}.{key}".lstrip("."))
    elif isinstance(settings, list) and any(isinstance(value, dict) for value in settings):
        for index, value in enumerate(settings):
            yield from _leaves(value, f"{name}[{index}]")
    else:
        yield name, settings

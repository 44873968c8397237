"""What of the policy a checkpoint holds, how it is written, and which one a run goes on from."""

from __future__ import annotations

import os
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from balcap.policy.sharding import is_sharded
from balcap.trainer.sharded_checkpoint import is_folder, read_folder
from balcap.utils.errors import UserError
from balcap.utils.files import atomic_write, remove


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be found, read or written, or is of something else."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whatever ends the process or fills the disk.

    Lightning's own writes in the system's temporary folder and moves: across file systems that is a copy, which a kill
    tears.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """As `TorchCheckpointIO` does, through a file beside `path`.

        Raises:
            CheckpointError: the disk is full, or cannot be written; what was at `path` is still there.
        """
        old = f"{path}.old"
        try:
            if Path(path).is_dir():  # of a run on several ranks, which goes on with one
                remove(old)
                os.replace(path, old)
            with atomic_write(path, "wb") as file:
                torch.save(checkpoint, file)
            remove(old)
            remove(f"{path}.part")
        except (OSError, RuntimeError) as error:  # torch's writer turns some OSErrors into RuntimeErrors
            raise CheckpointError(
                f"{path} cannot be written: {error}. The checkpoints before it are whole"
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """As `TorchCheckpointIO` does; a folder as if it were one file."""
        return read_folder(path) if is_folder(path) else super().load_checkpoint(path, *args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        """A file or a folder."""
        remove(path)


def find_checkpoint(name: str, run_dir: str | Path) -> Path | None:
    """The checkpoint that ``ckpt_path`` means, a file or a folder; its weights are not read.

    Args:
        name: ``last``, the newest readable checkpoint of the run folder, or a path.
        run_dir: the run folder.

    Returns:
        None if `name` is ``last`` and the folder has no checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read; or the run has checkpoints, but none is readable.
    """
    if name != "last":
        read_checkpoint(name)
        return Path(name)
    # Lightning keeps its own, of a SLURM job that was requeued, in the run folder itself.
    # Beside a folder may be its successor, or what it succeeds, when a kill fell between two renames.
    names = ("checkpoints/*.ckpt", "hpc_ckpt_*.ckpt", "checkpoints/*.ckpt.part", "checkpoints/*.ckpt.old")
    there = [path for name in names for path in Path(run_dir).glob(name)]
    problems = []
    for path in sorted(there, key=os.path.getmtime, reverse=True):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                rank_zero_info(f"{problem}; going back to {path}")
            return path
    if problems:
        raise CheckpointError("; ".join(problems))
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this program, its tensors without their data: reads little of it.

    Raises:
        CheckpointError: there is none, it is torn, or it is something else.
    """
    if not (Path(path).is_file() or is_folder(path)):
        raise CheckpointError(f"{path} is no checkpoint; name one, or `last`")
    try:
        checkpoint = load_checkpoint(path, "meta")
    except Exception as error:  # the unpickler may raise anything on what is no checkpoint
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path} is broken, or no checkpoint: {why[:120]}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step", "balcap"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is no checkpoint of a BalCapRL run")
    return checkpoint


def load_checkpoint(path: str | Path, device: str = "cpu") -> dict[str, Any]:
    """All of a checkpoint, of either kind.

    Args:
        path: a file, or the folder that several ranks have written.
        device: ``cpu``, or ``meta`` for tensors without their data.
    """
    if is_folder(path):
        return read_folder(path, device)
    checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True, mmap=True)
    return checkpoint


def optimizer_settings(optimizer: Optimizer, scheduler: Any | None) -> dict[str, Any]:
    """What a config says of an optimizer and a schedule that have not stepped yet, as plain data."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    schedule = None if scheduler is None else {"class": type(scheduler).__name__, **scheduler.state_dict()}
    return deepcopy({"class": type(optimizer).__name__, "groups": groups, "schedule": schedule})


def apply_settings(optimizer: Optimizer, now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Let changed settings of an optimizer count, whose state was loaded with the settings of then.

    Args:
        optimizer: of the run that goes on; its groups are changed.
        now: `optimizer_settings` of this run.
        then: of the run whose state was loaded.

    Returns:
        The changes, such as ``lr 0.1 -> 0.2``.

    Raises:
        CheckpointError: another optimizer, or another schedule: its state would override the new settings.
    """
    for name, key in (("class", "model.optimizer"), ("schedule", "model.scheduler or the learning rate")):
        if now[name] != then[name]:
            raise CheckpointError(
                f"{key}: a run goes on with the one that it began with ({then[name]}, is {now[name]}). Restore it, "
                "or start a new run from the exported weights"
            )
    changes = []
    for group, new, old in zip(optimizer.param_groups, now["groups"], then["groups"], strict=True):
        changed = {name: value for name, value in new.items() if value != old.get(name)}
        group.update(changed)
        changes += [f"{name} {old.get(name)} -> {value}" for name, value in changed.items()]
    return changes


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def name_optimizer_state(checkpoint: dict[str, Any], module: Any, optimizer: Optimizer) -> None:
    """Key the state of the optimizer by names of parameters, in the optimizer's order: so torch and Lightning load it on any
    number of ranks, sharded or whole. Numbers mean different things there.

    Args:
        checkpoint: of Lightning; on ranks that write none it has no state.
        module: a LightningModule, whose parameters are optimized.
        optimizer: whose state it is.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    order = list(chain(*groups))
    numbered = (
        list(names.values()) if is_sharded(module.policy) else order
    )  # Lightning numbers all parameters
    for state in filter(None, checkpoint.get("optimizer_states", [])):
        kept = {
            key if isinstance(key, str) else numbered[key]: value for key, value in state["state"].items()
        }
        state["state"] = {name: kept.get(name, {}) for name in order}
        for saved, own in zip(state["param_groups"], groups, strict=True):
            saved["params"] = own


def check_resumable(path: str | Path, module: nn.Module, fits: bool) -> None:
    """Refuse a checkpoint that a sharded policy cannot go on from, before Lightning loads what fits of it.

    Args:
        path: of the checkpoint.
        module: with the policy.
        fits: whether the optimizer goes on, too.

    Raises:
        CheckpointError: it is of something else; or Lightning cannot spread the state of its optimizer over ranks, because
            it is not keyed by names, or because there is none, as of plain SGD.
    """
    checkpoint = read_checkpoint(path)
    check_trained(checkpoint, module)
    for state in checkpoint.get("optimizer_states", []) if fits else ():
        numbered = any(isinstance(key, int) for key in state["state"])
        if numbered or not any(state["state"].values()):
            raise CheckpointError(
                f"{path}: the state of its optimizer is {'numbered, not named' if numbered else 'empty'}, and cannot be "
                "spread over ranks; go on from it with trainer.strategy: ddp, or start a new run from the exported weights"
            )


def check_trained(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Refuse a checkpoint of something else, which non-strict loading would accept in silence.

    Raises:
        CheckpointError: it holds other tensors than the config trains.
    """
    mine = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    theirs = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    if different := sorted({name for name, _ in mine.items() ^ theirs.items()}):
        raise CheckpointError(
            f"this checkpoint holds {len(theirs)} trained tensors, the config makes {len(mine)}, and "
            f"{len(different)} differ (such as {different[0]}). Were model.policy.lora, "
            "freeze_vision or the base model changed? Resume with the config saved in the run folder"
        )

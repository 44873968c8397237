"""Which checkpoint a run goes on from, and that it is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from balcap.config import ConfigError
from balcap.trainer.checkpoint import AtomicCheckpointIO, CheckpointError, find_checkpoint
from balcap.utils.errors import UserError
from callbacks.checkpoint import RunCheckpoint

STATE = {"state_dict": {"w": torch.arange(4096.0)}, "global_step": 3, "balcap": {}}


def _checkpoints(run: Path, *names: str) -> list[Path]:
    """Files of these names, each newer than the one before."""
    paths = [run / "checkpoints" / name for name in names]
    for age, path in enumerate(paths):
        AtomicCheckpointIO().save_checkpoint(STATE, path)
        os.utime(path, (age + 1, age + 1))
    return paths


def _tear(path: Path, share: float = 0.5) -> None:
    times = path.stat()
    os.truncate(path, int(times.st_size * share))
    os.utime(path, (times.st_atime, times.st_mtime))


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_last_is_the_newest_that_can_be_read(tmp_path: Path, caplog, share: float) -> None:
    assert find_checkpoint("last", tmp_path) is None
    older, step, last = _checkpoints(tmp_path, "step-00000001.ckpt", "step-00000002.ckpt", "last.ckpt")
    assert find_checkpoint("last", tmp_path) == last
    _tear(last, share)
    with caplog.at_level("INFO"):
        assert find_checkpoint("last", tmp_path) == step
    assert f"{last} is broken" in caplog.text
    assert f"going back to {step}" in caplog.text
    _tear(step)
    _tear(older)
    with pytest.raises(CheckpointError, match="is broken"):
        find_checkpoint("last", tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no archive", None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.ckpt"
    if content is None:
        torch.save({"weights": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"some\.ckpt is") as error:
        find_checkpoint(str(path), tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch) -> None:
    (path,) = _checkpoints(tmp_path, "last.ckpt")
    before = path.read_bytes()

    def full(checkpoint: object, file) -> None:
        file.write(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({**STATE, "global_step": 4}, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, "last") for command in ("fit", "validate", "predict")),
        *(("fit", name) for name in ("best", "hpc", "registry", "/no/such.ckpt")),
    ],
)
def test_a_checkpoint_that_is_not_there_is_one_problem(
    fit_arguments, cli, world: Path, command: str, name: str
) -> None:
    options = {"data.predict_from": world / "shapes"} if command == "predict" else {}
    with pytest.raises(ConfigError) as refused:
        cli([*fit_arguments(command, **options), "--ckpt_path", name])
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["ckpt_path"]


def test_a_torn_checkpoint_of_a_run_costs_the_steps_since_the_one_before(
    fit_arguments, cli, tmp_path: Path
) -> None:
    options = {"data.val_size": 0, "model.num_captions": 2, "model.sampling.max_tokens": 4}
    cli([*fit_arguments(**options, **{"trainer.max_steps": 1}), "--resume", "auto"])  # nothing there: starts
    run = tmp_path / "run"
    assert sorted(os.listdir(run / "checkpoints")) == ["last.ckpt", "step-00000001.ckpt"]
    _tear(run / "checkpoints/last.ckpt")
    cli([*fit_arguments(**options, **{"trainer.max_steps": 2}), "--resume", "auto"])
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_checkpoint_io_of_the_user_stays() -> None:
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch import LightningModule, Trainer

    class Own(TorchCheckpointIO):
        pass

    for plugins, expected in (([Own()], Own), (None, AtomicCheckpointIO)):
        trainer = Trainer(plugins=plugins, accelerator="cpu", logger=False, enable_checkpointing=False)
        RunCheckpoint(dirpath="unused").setup(trainer, LightningModule(), "validate")
        assert type(trainer.strategy.checkpoint_io) is expected

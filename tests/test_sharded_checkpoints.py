"""Checkpoints that several ranks write, each its part: which is whole, and that one always is."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from balcap.trainer.checkpoint import AtomicCheckpointIO, CheckpointError, find_checkpoint, load_checkpoint
from balcap.trainer.sharded_checkpoint import replaced
from callbacks.checkpoint import RunCheckpoint

ONE_RANK: Any = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))


def _write(folder: Path, step: int = 3, checkpoint: dict[str, Any] | None = None) -> None:
    """As one rank of Lightning's strategy writes it."""
    rest = {"global_step": step, "balcap": {}} if checkpoint is None else dict(checkpoint)
    weights = rest.pop("state_dict", {"w": torch.arange(4096.0), "v": torch.full((2, 3), float(step))})
    moments = {name: {"exp_avg": value * 2, "step": torch.tensor(2.0)} for name, value in weights.items()}
    optimizer = {"state": moments, "param_groups": [{"params": list(weights), "lr": 0.1}]}
    (saved,) = rest.pop("optimizer_states", [optimizer])
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        dcp.save({"state_dict": weights, "optimizer_0": saved}, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """A run's newest checkpoint, of step 3; the one before it is of step 2."""
    before, last = (tmp_path / "checkpoints" / name for name in ("step-00000002.ckpt", "last.ckpt"))
    for age, (path, step) in enumerate(((before, 2), (last, 3))):
        _write(path, step)
        os.utime(path, (age + 1, age + 1))
    return last


def test_it_reads_as_one_file_would(last: Path) -> None:
    whole = AtomicCheckpointIO().load_checkpoint(last)
    assert whole.keys() == {"state_dict", "optimizer_states", "global_step", "balcap"}
    assert whole["global_step"] == 3
    assert torch.equal(whole["state_dict"]["w"], torch.arange(4096.0))
    (optimizer,) = whole["optimizer_states"]
    assert torch.equal(optimizer["state"]["v"]["exp_avg"], torch.full((2, 3), 6.0))
    assert optimizer["param_groups"] == [{"params": ["w", "v"], "lr": 0.1}]
    shape = load_checkpoint(last, "meta")["state_dict"]["v"]
    assert shape.is_meta
    assert shape.shape == (2, 3)


@pytest.mark.parametrize("part", ["meta.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("share", [None, 0, 0.5])
def test_one_that_lacks_something_is_passed_over(last: Path, caplog, part: str, share: float | None) -> None:
    run, times = last.parent.parent, last.stat()
    assert find_checkpoint("last", run) == last
    file = last / part
    file.unlink() if share is None else os.truncate(file, int(file.stat().st_size * share))
    os.utime(last, (times.st_atime, times.st_mtime))
    with caplog.at_level("INFO"):
        assert find_checkpoint("last", run) == last.parent / "step-00000002.ckpt"
    assert f"{last} is broken" in caplog.text


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_between_two_renames_leaves_one_that_is_whole(
    last: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    shutil.rmtree(last.parent / "step-00000002.ckpt")
    run, done, really = last.parent.parent, [0], os.replace

    def killed(*paths: Path) -> None:
        done[0] += 1
        if done[0] == rename:
            raise SystemExit
        really(*paths)

    def step_found() -> int:
        found = find_checkpoint("last", run)
        assert found is not None
        return load_checkpoint(found)["global_step"]

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(SystemExit), replaced(last, ONE_RANK) as part:
            _write(part, 4)
    assert step_found() == 4
    with pytest.raises(SystemExit), replaced(last, ONE_RANK):
        raise SystemExit  # and again, while the next one is written
    assert step_found() in (3, 4)
    with replaced(last, ONE_RANK) as part:
        _write(part, 5)
    assert step_found() == 5
    assert os.listdir(last.parent) == ["last.ckpt"]


def test_a_file_takes_the_place_of_a_folder_and_a_folder_that_of_a_file(last: Path) -> None:
    state = {"state_dict": {"w": torch.ones(2)}, "global_step": 4, "balcap": {}}
    AtomicCheckpointIO().save_checkpoint(state, last)
    assert load_checkpoint(last)["global_step"] == 4
    _write(last.with_name("last.ckpt.part"), 3)  # what a kill has left
    last.unlink()
    last.mkdir()  # of which a kill has left nothing
    AtomicCheckpointIO().save_checkpoint(state, last)
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "step-00000002.ckpt"]
    with replaced(last, ONE_RANK) as part:
        _write(part, 5)
    assert load_checkpoint(last)["global_step"] == 5
    AtomicCheckpointIO().remove_checkpoint(last)
    assert os.listdir(last.parent) == ["step-00000002.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_that_was_there(last: Path) -> None:
    def save(path: str, weights_only: bool) -> None:
        Path(path).mkdir()
        raise dcp.CheckpointException("save", {1: (OSError(28, "No space left on device"), None)})  # type: ignore[dict-item]

    trainer: Any = SimpleNamespace(**vars(ONE_RANK), save_checkpoint=save)
    trainer.strategy = SimpleNamespace(barrier=lambda: None, _save_distributed_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be written: .*No space left on device"):
        RunCheckpoint()._save_checkpoint(trainer, str(last))
    assert find_checkpoint("last", last.parent.parent) == last
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "step-00000002.ckpt"]


def test_it_is_exported_and_validated_as_one_file_is(
    fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cli(fit_arguments(**{"model.optimizer.init_args.lr": 1e-3, "checkpoint.keep": 0}))
    last = run / "checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)
    last.unlink()
    _write(last, checkpoint=saved)
    for name, given in (("of the run", run), ("by name", last)):
        cli(["export", "--ckpt", str(given), "--out", str(tmp_path / name)])
        found, expected = (
            load_file(path / "model.safetensors") for path in (tmp_path / name, run / "export")
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    cli([*fit_arguments("validate", run_dir=tmp_path / "validated"), "--ckpt_path", str(last)])
    assert (tmp_path / "validated/metrics.csv").is_file()

"""Which checkpoint a run goes on from, and that it is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import yaml

from balcap.config import ConfigError
from balcap.trainer.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    apply_settings,
    find_checkpoint,
    optimizer_settings,
)
from balcap.utils.errors import UserError
from callbacks.checkpoint import RunCheckpoint
from tests.support import metrics

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
    run = tmp_path / "run"
    run.mkdir()  # of a run that was killed before its first checkpoint
    (run / "metrics.csv").write_text("step,val/b_capscore\n0,0.1\n")
    options = {"data.val_size": 2, "model.num_captions": 2, "model.sampling.max_tokens": 4}
    cli([*fit_arguments(**options, **{"trainer.max_steps": 1}), "--resume", "auto"])
    assert sorted(os.listdir(run / "checkpoints")) == ["last.ckpt", "step-00000001.ckpt"]
    _tear(run / "checkpoints/last.ckpt")
    cli([*fit_arguments(**options, **{"trainer.max_steps": 2}), "--resume", "auto"])
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    validated = [row["step"] for row in metrics(run) if row["val/b_capscore"]]
    assert validated == ["0", "1", "2"]


def test_a_fit_ends_with_a_checkpoint_of_its_last_step_and_goes_on_from_there(
    fit_arguments, cli, tmp_path: Path
) -> None:
    settings = {"checkpoint.every_n_train_steps": 2, "trainer.val_check_interval": 3}
    options = {"data.val_size": 2, "model.num_captions": 2, "model.sampling.max_tokens": 4, **settings}
    for run, ends in (("whole", [5]), ("parts", [3, 5])):
        for steps in ends:
            arguments = fit_arguments(**options, **{"trainer.max_steps": steps}, run_dir=tmp_path / run)
            cli([*arguments, "--resume", "auto"])
            last = torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)
            assert last["global_step"] == steps
            assert last["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 0  # it is under way
    whole, parts = (
        [
            {k: v for k, v in row.items() if k.startswith(("step", "train/", "val/"))}
            for row in metrics(tmp_path / run)
        ]
        for run in ("whole", "parts")
    )
    assert parts == whole
    assert [row["step"] for row in parts if row["val/b_capscore"]] == ["0", "3", "5"]


def test_a_checkpoint_io_of_the_user_stays() -> None:
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch import LightningModule, Trainer

    class Own(TorchCheckpointIO):
        pass

    for plugins, expected in (([Own()], Own), (None, AtomicCheckpointIO)):
        trainer = Trainer(plugins=plugins, accelerator="cpu", logger=False, enable_checkpointing=False)
        RunCheckpoint(dirpath="unused").setup(trainer, LightningModule(), "validate")
        assert type(trainer.strategy.checkpoint_io) is expected


def _optimizer(kind: type = torch.optim.AdamW, **options: float) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(2))], **options)


def test_a_changed_setting_of_the_optimizer_counts_after_its_state_is_loaded() -> None:
    then = optimizer_settings(_optimizer(lr=0.1, weight_decay=0.5), None)
    optimizer = _optimizer(lr=0.2, weight_decay=0.5)
    now = optimizer_settings(optimizer, None)
    optimizer.load_state_dict(_optimizer(lr=0.1, weight_decay=0.5).state_dict())
    assert apply_settings(optimizer, now, then) == ["lr 0.1 -> 0.2"]
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert apply_settings(optimizer, now, now) == []


def test_another_optimizer_or_schedule_is_refused() -> None:
    def settings(step_size: int | None, lr: float = 0.1, kind: type = torch.optim.AdamW) -> dict:
        optimizer = _optimizer(kind, lr=lr)
        schedule = step_size and torch.optim.lr_scheduler.StepLR(optimizer, step_size)
        return optimizer_settings(optimizer, schedule)

    optimizer = _optimizer(lr=0.1)
    for then, now in (
        (settings(None), settings(3)),
        (settings(3), settings(None)),
        (settings(3), settings(4)),
        (settings(3, lr=0.1), settings(3, lr=0.2)),
        (settings(None), settings(None, kind=torch.optim.SGD)),
    ):
        with pytest.raises(CheckpointError, match=r"model\.(scheduler|optimizer)"):
            apply_settings(optimizer, now, then)
    assert apply_settings(optimizer, settings(3), settings(3)) == []


def test_a_run_that_goes_on_with_other_settings_says_so_and_does_so(
    fit_arguments, cli, tmp_path: Path, caplog
) -> None:
    options = {"data.val_size": 0, "model.num_captions": 2, "model.sampling.max_tokens": 4}
    cli(fit_arguments(**options, **{"trainer.max_steps": 1}))
    run, lr = tmp_path / "run", "model.optimizer.init_args.lr"
    caplog.set_level("INFO")
    cli([*fit_arguments(**options, **{lr: 1e-6, "model.weights.recall": 0.5}), "--ckpt_path", "last"])
    assert [float(row["train/lr"]) for row in metrics(run)] == pytest.approx([2e-4, 1e-6], rel=1e-4)
    text = caplog.text
    assert "model.optimizer: from here on lr 0.0002 -> 1e-06" in text
    assert "settings changed at step 1:" in text
    assert f"{lr} 0.0002 -> 1e-06" in text
    assert "model.weights.recall 1.0 -> 0.5" in text
    configs = [yaml.safe_load((run / n).read_text()) for n in ("config.until-step-1.yaml", "config.yaml")]
    assert [config["model"]["optimizer"]["init_args"]["lr"] for config in configs] == [2e-4, 1e-6]

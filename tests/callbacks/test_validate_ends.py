"""Validation before the first and after the last update, in the same metrics.csv."""

import csv
import warnings

import pytest
import torch
from callback_fakes import TinyData, TinyModule, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks.validate_ends import ValidateAtEnds

pytestmark = pytest.mark.filterwarnings("ignore")


def run(folder, module=None, ckpt_path=None, name="run", callbacks=(), **kwargs):
    """Trains and returns the (step, val/precision) rows and the steps of the training rows."""
    module = module or TinyModule()
    logger = CSVLogger(folder, name=name)
    trainer = make_trainer(folder, [ValidateAtEnds(), *callbacks], logger=logger, **kwargs)
    try:
        trainer.fit(module, TinyData(), ckpt_path=ckpt_path, weights_only=True)
    finally:
        metrics = f"{logger.log_dir}/metrics.csv"
        with open(metrics) as file:
            rows = list(csv.DictReader(file))
        run.validated = [(int(r["step"]), float(r["val/precision"])) for r in rows if r.get("val/precision")]
        run.trained = [int(r["step"]) for r in rows if r.get("train/precision")]
    return module, trainer


def weight_after(updates: int) -> float:
    return 1 - 0.8**updates  # w <- w + 0.2 (1 - w)


def test_before_the_first_and_after_the_last_update(tmp_path):
    _, trainer = run(tmp_path)
    assert [step for step, _ in run.validated] == [0, 5]
    assert [value for _, value in run.validated] == pytest.approx([0.0, weight_after(5)])
    assert run.trained == [0, 1, 2, 3, 4]
    assert trainer.global_step == 5


def test_not_twice_where_validation_has_just_run(tmp_path):
    # Lightning's own validations, after batches 3 and 6, carry the number of their batch from 0.
    run(tmp_path, max_steps=6, val_check_interval=3)
    assert [step for step, _ in run.validated] == [0, 2, 5]
    assert [value for _, value in run.validated] == pytest.approx([0.0, weight_after(3), weight_after(6)])


def test_a_single_update_has_a_before_and_an_after(tmp_path):
    run(tmp_path, max_steps=1)
    assert run.validated == [(0, 0.0), (1, pytest.approx(weight_after(1)))]


def test_resume_validates_only_at_the_end(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run(tmp_path, max_steps=4, callbacks=[saver], enable_checkpointing=True)
    module, _ = run(tmp_path, ckpt_path=tmp_path / "step=2.ckpt", name="resumed")
    assert [step for step, _ in run.validated] == [5]
    assert module.weight.item() == pytest.approx(weight_after(5))


def test_the_last_validation_reaches_the_checkpoint_callback(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val/precision", mode="max", filename="best-{step}")
    run(tmp_path, callbacks=[best], enable_checkpointing=True)
    assert best.best_model_score == pytest.approx(weight_after(5))


def test_no_last_validation_when_the_run_dies(tmp_path):
    with pytest.raises(RuntimeError, match="on fire"):
        run(tmp_path, TinyModule(fail_at=3))
    assert [step for step, _ in run.validated] == [0]


def test_without_validation_data_nothing_happens(tmp_path):
    run(tmp_path, limit_val_batches=0)
    assert run.validated == []


def test_random_numbers_of_training_do_not_depend_on_it(tmp_path):
    drawn = []
    for callbacks in ([], [ValidateAtEnds()]):
        torch.manual_seed(7)
        module = TinyModule()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_trainer(tmp_path, callbacks).fit(module, TinyData())
        drawn.append(module.noise)
        assert module.training
    assert drawn[0] == drawn[1]

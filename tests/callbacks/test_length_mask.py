"""The schedule of τ."""

from types import SimpleNamespace

import pytest
from jsonargparse import ArgumentParser

from balcap.algorithms import LengthMask
from callbacks.length_mask import Bounds, LengthMaskSchedule


def test_piecewise_linear_and_constant_outside():
    schedule = LengthMaskSchedule([(10, 0.5, 2.0), (20, 0.5, 1.0), (40, 0.7, 1.4)])
    assert schedule.at(0) == (0.5, 2.0)
    assert schedule.at(10) == (0.5, 2.0)
    assert schedule.at(15) == (0.5, 1.5)  # half of the way from 2.0 to 1.0
    assert schedule.at(20) == (0.5, 1.0)
    assert schedule.at(25) == pytest.approx((0.55, 1.1))  # a quarter of the way
    assert schedule.at(40) == schedule.at(10**6) == (0.7, 1.4)


def test_one_entry_is_a_constant():
    assert LengthMaskSchedule([(5, 0.5, 2.0)]).at(0) == (0.5, 2.0)


def test_sets_the_module_from_the_global_step_and_logs():
    logged = {}
    mask = LengthMask()
    module = SimpleNamespace(
        log=lambda name, value, **_: logged.update({name: value}), reward_transforms=[mask]
    )
    schedule = LengthMaskSchedule([{"step": 0, "tau_low": 0.5, "tau_high": 2.0}, (100, 0.5, 1.0)])  # type: ignore[list-item]
    schedule.on_fit_start(None, module)
    schedule.on_train_batch_start(SimpleNamespace(global_step=50), module, None, 0)
    assert (mask.tau_low, mask.tau_high) == (0.5, 1.5)
    assert logged == {"train/tau_low": 0.5, "train/tau_high": 1.5}


def test_a_run_without_a_length_mask_has_nothing_to_schedule():
    with pytest.raises(ValueError, match="LengthMask"):
        LengthMaskSchedule([(5, 0.5, 2.0)]).on_fit_start(None, SimpleNamespace(reward_transforms=[]))


def test_every_problem_is_named_with_its_key():
    with pytest.raises(ValueError, match=r"schedule: needs"):
        LengthMaskSchedule([])
    with pytest.raises(ValueError, match=r"schedule\[1\]\.step") as error:
        LengthMaskSchedule([(10, 2.0, 0.5), (10, -1.0, 1.0), (20, 0.5, float("inf"))])
    for key in ("schedule[0].tau_low", "schedule[1].tau_low", "schedule[2].tau_low"):
        assert key in str(error.value)
    with pytest.raises(ValueError, match="an entry is"):
        LengthMaskSchedule([(1, 2)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "written", ["[[0, 0.5, 2.0], [9, 0.5, 1.5]]", "[{step: 0, tau_low: 0.5, tau_high: 2}, [9, 0.5, 1.5]]"]
)
def test_reads_from_yaml(written):
    parser = ArgumentParser()
    parser.add_class_arguments(LengthMaskSchedule, "mask")
    built = parser.instantiate_classes(parser.parse_args([f"--mask.schedule={written}"])).mask
    assert built.schedule == [Bounds(0, 0.5, 2.0), Bounds(9, 0.5, 1.5)]

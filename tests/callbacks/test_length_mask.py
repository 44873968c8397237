"""The bounds of the length mask over training: the schedule, and the band that follows the captions."""

import math
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser

from balcap.algorithms import LengthMask
from callbacks.length_mask import Bounds, LengthMaskSchedule, TargetBand


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


def ratios(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)  # [1, G]


def test_the_band_starts_where_the_policy_is_and_narrows_to_the_target():
    band = TargetBand(quantile=0.25, rate=0.05, smoothing=0.5)
    band.observe(ratios(0.2, 0.3, 0.4, 0.5, 0.6))  # quartiles are the second and the fourth of five
    assert band.bounds == pytest.approx((0.3, 2.0))  # min(0.3, 0.5), max(0.5, 2.0)
    band.observe(ratios(0.4, 0.5, 0.6, 0.7, 0.8))  # q_low (0.3 + 0.5) / 2 = 0.4: the rate holds it back
    assert band.bounds == pytest.approx((0.35, 2.0))
    band.observe(ratios(0.1, 0.2, 0.3, 0.4, 0.5))  # q_low (0.4 + 0.2) / 2 = 0.3: never outwards
    assert band.quantiles == pytest.approx((0.3, 0.5))
    assert band.bounds == pytest.approx((0.35, 2.0))
    for _ in range(10):
        band.observe(ratios(1.0, 1.0, 1.0))
    assert band.bounds == (0.5, 2.0)  # never past the target


def test_long_captions_bring_the_upper_bound_down():
    band = TargetBand(quantile=0.0, rate=1.0, smoothing=0.0)
    band.observe(ratios(3.0, 4.0))
    assert band.bounds == (0.5, 4.0)
    band.observe(ratios(2.5, 3.5))
    assert band.bounds == (0.5, 3.5)
    band.observe(ratios(0.1, 1.0))  # max(3.5 - 1.0, 1.0, 2.0); 0.1 moves tau_low no more
    assert band.bounds == (0.5, 2.5)


def test_captions_without_a_reference_move_nothing():
    band = TargetBand(quantile=0.0)
    band.observe(ratios(math.nan, math.nan))
    assert band.bounds is None
    band.observe(ratios(math.nan, 0.4))
    assert band.bounds == (0.4, 2.0)
    band.observe(ratios(math.nan))
    assert band.bounds == (0.4, 2.0)


def test_a_band_goes_on_from_its_state():
    steps = torch.rand(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, first, second = TargetBand(), TargetBand(), TargetBand()
    for step in steps:
        whole.observe(step)
    for step in steps[:3]:
        first.observe(step)
    second.load_state_dict(first.state_dict())
    for step in steps[3:]:
        second.observe(step)
    assert second.state_dict() == whole.state_dict()


def test_every_setting_of_a_band_that_is_wrong_is_named():
    with pytest.raises(ValueError, match="TargetBand") as error:
        TargetBand(target_low=2.0, target_high=1.0, quantile=0.5, rate=0.0, smoothing=1.0)
    for key in ("target_low", "quantile", "rate", "smoothing"):
        assert f"TargetBand.{key}" in str(error.value)


def test_a_band_needs_a_mask_of_its_own():
    module = SimpleNamespace(reward_transforms=[LengthMask()])
    with pytest.raises(ValueError, match=r"TargetBand: model\.reward_transforms"):
        TargetBand().on_fit_start(SimpleNamespace(callbacks=[]), SimpleNamespace(reward_transforms=[]))
    trainer = SimpleNamespace(callbacks=[LengthMaskSchedule([(0, 0.5, 2.0)])])
    with pytest.raises(ValueError, match="LengthMaskSchedule both"):
        TargetBand().on_fit_start(trainer, module)

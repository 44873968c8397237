"""How many images a run judges, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from balcap.commands.estimate_plan import Plan, ranks_of, training_batches, validations


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ((10, 25, -1, 1), 25),  # steps alone
        ((10, -1, 3, 1), 30),  # epochs alone
        ((10, 25, 2, 1), 20),  # what comes first
        ((10, 25, None, 4), 7),  # 4 optimizer steps a batch: after 6 batches 24 steps, the 7th is finished
        ((10, 0, -1, 1), 0),
        ((0, 25, -1, 1), 0),  # limit_train_batches: 0
    ],
)
def test_training_ends_as_lightning_ends_it(
    arguments: tuple[int, int, int | None, int], batches: int
) -> None:
    assert training_batches(*arguments) == batches


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((25, 10, 1.0, 1), (0, 10, 20, 25)),  # after each epoch
        ((20, 10, 1.0, 1), (0, 10, 20)),  # the last epoch's is the one at the end
        ((40, 10, 1.0, 2), (0, 20, 40)),
        ((25, 10, 0.25, 1), (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25)),  # int(2.5) = 2
        ((25, 10, 7, 1), (0, 7, 17, 25)),  # within each epoch
        ((25, 10, 7, None), (0, 7, 14, 21, 25)),  # over epochs
        ((1500, 1_000_000, 250, None), (0, 250, 500, 750, 1000, 1250, 1500)),
        ((5, 10, None, 1), (0, 5)),  # by the clock
        ((0, 10, 1.0, 1), (0,)),
    ],
)
def test_validations_come_when_lightning_holds_them(
    arguments: tuple[int, int, int | float | None, int | None], expected: tuple[int, ...]
) -> None:
    assert validations(*arguments) == expected


@pytest.mark.parametrize(("batches", "first", "later"), [(5, 20, 10), (3, 18, 0), (0, 0, 0)])
def test_images_are_judged_for_the_first_time_or_again(batches: int, first: int, later: int) -> None:
    plan = Plan(batches, images_per_batch=6, train_rows=20, validations=(0, 3, 5), val_images=4)
    assert plan.visits() == (first, later)
    assert plan.val_visits() == (4, 8)


@pytest.mark.parametrize(
    ("devices", "nodes", "accelerator", "visible", "expected"),
    [
        (8, 2, "gpu", 0, 16),
        ([0, 3], 1, "gpu", 0, 2),
        ("0,3,5", 1, "gpu", 0, 3),
        ("4", 1, "gpu", 0, 4),
        (-1, 1, "gpu", 8, 8),
        ("-1", 2, "gpu", 0, 2),
        ("auto", 1, "gpu", 0, 1),
        ("auto", 1, "cpu", 8, 1),
        (3, 1, "cpu", 8, 3),
    ],
)
def test_processes_are_counted_from_the_config(
    devices: int | str | Sequence[int], nodes: int, accelerator: str, visible: int, expected: int
) -> None:
    assert ranks_of(devices, nodes, accelerator, visible) == expected

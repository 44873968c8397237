"""How many images a run judges, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from balcap.estimate.plan import Plan, ranks_of, training_batches, val_images, validations, visits
from hypothesis import given
from hypothesis import strategies as st


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


def test_images_are_seen_round_after_round() -> None:
    assert visits(25, 10) == [10, 10, 5]
    assert visits(20, 10) == [10, 10]
    assert visits(7, 10) == [7]
    assert visits(0, 10) == []


@given(images=st.integers(0, 500), rows=st.integers(1, 100))
def test_visits_add_up_and_never_grow(images: int, rows: int) -> None:
    counts = visits(images, rows)
    assert sum(counts) == images
    assert counts == sorted(counts, reverse=True)
    assert all(0 < count <= rows for count in counts)


def test_a_plan_counts_all_ranks() -> None:
    plan = Plan(batches=5, images_per_batch=6, train_rows=20, validations=(0, 5), val_images=4)
    assert plan.images == 30
    assert plan.visits() == [20, 10]


@pytest.mark.parametrize(
    ("rows", "ranks", "size", "limit", "images"),
    [
        (10, 1, 4, 1.0, 10),
        (10, 1, 4, 1, 4),  # three batches of 4, 3 and 3 images, the first of them
        (10, 1, 4, 0.5, 4),  # int(1.5) = 1 batch
        (3, 2, 1, 1.0, 2),  # 2 images and 1 would be two batches and one: the third image is left out
        (10, 2, 4, 1.0, 10),
        (10, 2, 3, 1, 6),
    ],
)
def test_validation_images_are_dealt_out_like_those_of_the_data_module(
    rows: int, ranks: int, size: int, limit: int | float, images: int
) -> None:
    assert val_images(range(rows), ranks, size, limit) == images


@pytest.mark.parametrize(
    ("devices", "nodes", "accelerator", "visible", "expected"),
    [
        (8, 2, "gpu", 0, (16, True)),
        ([0, 3], 1, "gpu", 0, (2, True)),
        ("0,3,5", 1, "gpu", 0, (3, True)),
        ("4", 1, "gpu", 0, (4, True)),
        (-1, 1, "gpu", 8, (8, False)),
        ("-1", 2, "gpu", 0, (2, False)),
        ("auto", 1, "gpu", 0, (1, False)),
        ("auto", 1, "cpu", 8, (1, True)),
        (3, 1, "cpu", 8, (3, True)),
    ],
)
def test_processes_are_counted_from_the_config(
    devices: int | str | Sequence[int], nodes: int, accelerator: str, visible: int, expected: tuple[int, bool]
) -> None:
    assert ranks_of(devices, nodes, accelerator, visible) == expected

"""Rows without a caption, where `data.require_captions` is false."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcap.config import ConfigError
from balcap.data.order import uncaptioned_once
from tests.support import ROOT, metrics

OVERLAY = ["--config", str(ROOT / "configs/methods/reference_free.yaml")]


def test_each_image_once_with_a_caption_where_one_has_it():
    ids = ["a", "b", "a", "b", "c", "c", "", ""]
    causes = [
        "no_caption",
        "no_caption",
        "",
        "no_caption",
        "no_caption",
        "not_utf8",
        "no_image_field",
        "no_image_field",
    ]
    kept = uncaptioned_once(np.arange(8), ids, causes)
    assert kept.tolist() == [1, 2, 4, 5, 6, 7]  # other bad rows stay, to be listed


def test_rows_without_a_caption_are_trained_on_and_validated(make_images, make_data, row) -> None:
    names = make_images(12)
    rows = [{"image": name} for name in names[:8]] + [row(name, "A dot.") for name in names[8:]]
    rows += [{"image": names[9]}, {"image": names[0]}]
    data = make_data(rows, require_captions=False, val_size=3)
    split = data.split
    assert sorted(np.concatenate([split.train, split.val, split.spare]).tolist()) == list(range(12))
    batches = [*data.val_dataloader(), *islice(data.train_dataloader(), 2)]
    references = {
        i: reference for b in batches for i, reference in zip(b.sample_ids, b.references, strict=True)
    }
    assert set(references.values()) == {"", "A dot."}
    assert all(bool(reference) == (name in names[8:]) for name, reference in references.items())
    assert data.bad_row_counts() == {}
    assert [r for r in make_data(rows, val_size=0).split.train if r < 8] == list(
        range(8)
    )  # bad, and listed as such


def test_rewards_that_need_references_are_refused(fit_arguments: Any, cli: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        cli(fit_arguments(data__require_captions=False))
    (problem,) = refused.value.problems
    assert problem.startswith("data.require_captions: the reward recall needs references")


def test_images_alone_train_a_policy(world: Path, fit_arguments: Any, cli: Any, tmp_path: Path) -> None:
    rows = json.loads((world / "shapes.json").read_text())
    (tmp_path / "images.json").write_text(json.dumps([{"image": row["image"]} for row in rows]))
    options = {"data.data": tmp_path / "images.json", "data.val_size": 2, "export.enabled": False}
    arguments = fit_arguments(**options)
    cli([*arguments[:3], *OVERLAY, *arguments[3:]])
    steps = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert len(steps) == 2
    for step in steps:
        assert 0 < float(step["train/pooled_recall"]) <= 1
        assert math.isnan(float(step["train/length_ratio"]))
        assert float(step["train/length_masked"]) == float(step["judge/failed"]) == 0
        assert float(step["train/grad_norm"]) > 0
    assert "train/b_capscore" not in steps[0]


def test_an_estimate_needs_words(world: Path, fit_arguments: Any, cli: Any, tmp_path: Path) -> None:
    rows = json.loads((world / "shapes.json").read_text())
    (tmp_path / "images.json").write_text(json.dumps([{"image": row["image"]} for row in rows]))
    command, *arguments = fit_arguments(
        "estimate", **{"data.data": tmp_path / "images.json", "trainer.max_steps": 1}
    )
    with pytest.raises(SystemExit, match="no row that was drawn has a caption"):
        cli([command, *arguments[:2], *OVERLAY, *arguments[2:], "--rows", "3", "--chars_per_token", "4"])

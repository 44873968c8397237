"""Images that the model's processor refuses, after they were read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balcap.policy.prompts import PromptEncoder
from tests.support import metrics


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of images that the processor refuses."""
    refused: set[str] = set()
    check = PromptEncoder._check

    def refuse(self: PromptEncoder, sample_id: str, item: dict[str, Any]) -> None:
        if sample_id in refused:
            raise IndexError("odd image")
        check(self, sample_id, item)

    monkeypatch.setattr(PromptEncoder, "_check", refuse)
    return refused


def test_a_refused_image_is_a_bad_row_and_the_run_goes_on(
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    refusing: set[str],
    world: Path,
    tmp_path: Path,
) -> None:
    rows = json.loads((world / "shapes.json").read_text())[:6]
    (tmp_path / "six.json").write_text(json.dumps(rows))
    refusing.add(rows[2]["image"])
    options = {"data.data": tmp_path / "six.json", "data.val_size": 0, "data.batch_size": 3}
    cli(fit_arguments(**options, **{"trainer.max_steps": 3}))  # all images are met
    listed = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["image"], row["cause"]) for row in listed] == [
        (2, rows[2]["image"], "refused_by_processor")
    ]
    assert "IndexError: odd image" in listed[0]["detail"]
    assert len([row for row in metrics(tmp_path / "run") if row["train/loss"]]) == 3
    predict = {
        "data.data": None,
        "data.predict_from": tmp_path / "six.json",
        "run_dir": tmp_path / "captions",
    }
    cli(fit_arguments("predict", **{**options, **predict}))
    lines = [json.loads(line) for line in (tmp_path / "captions/captions.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [row["image"] for i, row in enumerate(rows) if i != 2]


def test_a_model_that_refuses_everything_ends_the_run(
    fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], refusing: set[str], world: Path
) -> None:
    refusing.update(row["image"] for row in json.loads((world / "shapes.json").read_text()))
    with pytest.raises(SystemExit, match=r"refuses all rows of a batch, such as .*IndexError: odd image"):
        cli(fit_arguments())


def test_greedy_captions_are_the_same_whatever_the_seed(
    fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], world: Path, tmp_path: Path
) -> None:
    written = []
    for seed, temperature in ((0, None), (1, None), (0, 1.0), (1, 1.0)):
        run = tmp_path / f"{seed}-{temperature}"
        options: dict[str, Any] = {"data.data": None, "data.predict_from": world / "shapes"}
        options |= {"trainer.limit_predict_batches": 1, "seed_everything": seed, "run_dir": run}
        cli(fit_arguments("predict", **options, **{"model.predict_temperature": temperature}))
        written.append((run / "captions.jsonl").read_text())
    assert written[0] == written[1]
    assert len(set(written)) == 3

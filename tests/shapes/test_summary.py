"""What a run changed, as the demo prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from balcap.trainer.loggers import RunCSVLogger
from examples.shapes.summary import TITLES, main, markdown, validations


def _run(folder: Path, before: float, after: float) -> Path:
    logger = RunCSVLogger(str(folder))
    for step, value in ((0, before), (5, 0.0), (9, after)):
        logger.log_metrics({f"val/{name}": value for name in TITLES}, step=step)
    logger.save()
    return folder


def test_first_and_last_validation_count(tmp_path: Path) -> None:
    first, last = validations(_run(tmp_path / "a", 0.25, 0.75))
    assert first["recall"] == 0.25
    assert last["b_capscore"] == 0.75


def test_the_table_has_every_seed_and_the_mean_change(tmp_path: Path) -> None:
    table = markdown([_run(tmp_path / "seed-0", 0.2, 0.5), _run(tmp_path / "seed-1", 0.2, 0.7)]).splitlines()
    assert table[2].startswith("| seed-0 | 0.200 → 0.500 |")
    assert len(table) == 5
    # changes 0.3 and 0.5: mean 0.4, standard deviation 0.2 / sqrt(2) = 0.141
    assert "**+0.400 ± 0.141**" in table[4]


def test_a_run_without_two_validations_is_refused(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({f"val/{name}": 0.5 for name in TITLES}, step=0)
    logger.save()
    with pytest.raises(ValueError, match="compares two"):
        validations(tmp_path)


def test_the_demo_prints_captions_before_and_after(fit_arguments, cli, tmp_path: Path, capsys) -> None:
    cli(fit_arguments(**{"trainer.max_steps": 1}))
    capsys.readouterr()
    main([tmp_path / "run"])
    printed = capsys.readouterr().out
    for word in ("reference", "before", "after", "b-CapScore", "curves.png", "export"):
        assert word in printed

"""lmms-eval's results: read, compared, flagged; and what is said where it is not there."""

from __future__ import annotations

import json
import math
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balcap.commands.general import TaskScore, gap, main, read_results, usable
from balcap.utils.errors import UserError

PROGRAM = """
import json, sys
from pathlib import Path
if "-c" in sys.argv:
    sys.exit(0)
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
out = Path(value("--output_path")) / "m"
out.mkdir(parents=True)
good = "tuned" not in value("--model_args")
results = {}
for task in value("--tasks").split(","):
    scores = [float(i % 4 != 0 or good and i % 8 != 0) for i in range(400)]
    results[task] = {"alias": task, "anls,none": sum(scores) / 400, "anls_stderr,none": "N/A"}
    lines = [json.dumps({"doc_id": i, "anls": score}) for i, score in enumerate(scores)]
    (out / f"2026_samples_{task}.jsonl").write_text("\\n".join(lines))
(out / "2026_results.json").write_text(json.dumps({"results": results}))
with open(Path(value("--output_path")).parents[1] / "runs.txt", "a") as file:
    file.write(" ".join(sys.argv) + "\\n")
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A stand-in for the interpreter of lmms-eval's environment, which writes results as lmms-eval does."""
    (tmp_path / "program.py").write_text(PROGRAM)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "program.py"} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_regression_is_flagged_and_nothing_runs_twice(python: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "general"
    arguments = ["--model", "org/tuned", "--base", "org/base", "--out", str(out), "--python", python]
    arguments += ["--tasks", "[docvqa_val, infovqa_val]", "--limit", "400"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "Regressions beyond noise: docvqa_val, infovqa_val" in printed
    rows = json.loads((out / "general.json").read_text())
    # 300 of 400 right against 350 of 400
    assert [row["difference"] for row in rows] == pytest.approx([-0.125] * 2)
    assert all(row["low"] < -0.125 < row["high"] < 0 and row["n"] == 400 for row in rows)
    runs = (out / "runs.txt").read_text().splitlines()
    assert len(runs) == 2
    assert "--model qwen2_5_vl --model_args pretrained=org/tuned --tasks docvqa_val,infovqa_val" in runs[0]
    assert "--log_samples --limit 400" in runs[0]
    main(arguments)
    assert len((out / "runs.txt").read_text().splitlines()) == 2
    main([*arguments, "--arguments", "[--apply_chat_template]"])
    assert len((out / "runs.txt").read_text().splitlines()) == 4, "other arguments are other results"


def test_weights_that_were_replaced_run_anew(python: str, tmp_path: Path) -> None:
    model, out = tmp_path / "tuned", tmp_path / "general"
    model.mkdir()
    for content in ("one", "another"):
        (model / "model.safetensors").write_text(content)
        main(["--model", str(model), "--out", str(out), "--python", python, "--tasks", "[docvqa_val]"])
    assert len((out / "runs.txt").read_text().splitlines()) == 2


def test_two_adapters_are_merged_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = []

    def export(arguments: list[str]) -> None:
        merged.append(arguments[1])
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")

    monkeypatch.setattr("balcap.commands.export.main", export)
    folders = []
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "adapter_config.json").exists():
            (tmp_path / name / "adapter_config.json").write_text("{}")
        folders.append(usable(str(tmp_path / name), tmp_path / "out"))
    assert folders[0] == folders[2] != folders[1]
    assert merged == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_an_environment_without_lmms_eval_is_named() -> None:
    with pytest.raises(SystemExit, match=r"python: /no/such/python cannot import lmms_eval .*pip install"):
        _main("--python", "/no/such/python")
    with pytest.raises(SystemExit, match=r"No module named 'lmms_eval'"):
        _main("--python", sys.executable)


def _main(*arguments: str) -> None:
    from main import main as run

    run(["general", "--model", "org/m", *arguments])


def test_scores_without_samples_have_their_standard_errors() -> None:
    own, base = TaskScore("acc", 0.5, 0.03), TaskScore("acc", 0.6, 0.04)
    score = gap(own, base)
    assert score.value == pytest.approx(-0.1)
    assert score.high == pytest.approx(-0.1 + 1.959964 * 0.05)
    assert math.isnan(gap(TaskScore("acc", 0.5, None), base).low)


def test_samples_count_only_where_their_mean_is_the_score() -> None:
    draw = np.random.default_rng(0)
    samples = {str(i): float(x) for i, x in enumerate(draw.integers(0, 2, 100))}
    mean = sum(samples.values()) / 100
    percent = TaskScore("acc", 100 * mean, None, samples)
    assert gap(percent, percent).n == 100
    assert gap(TaskScore("acc", mean, None, samples), TaskScore("acc", mean, None, samples)).n == 100
    odd = TaskScore("f1", 0.123, None, samples)
    assert math.isnan(gap(odd, odd).low)


def _results(folder: Path, own: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "1_results.json").write_text(json.dumps({"results": own}))


def test_the_score_is_the_one_of_the_task_else_the_first(tmp_path: Path) -> None:
    _results(
        tmp_path,
        {"mmstar": {"coarse,none": 0.1, "average,none": 0.5}, "other": {"alias": "x", "acc,none": 0.3}},
    )
    found = read_results(tmp_path)
    assert {task: (score.metric, score.value) for task, score in found.items()} == {
        "mmstar": ("average", 0.5),
        "other": ("acc", 0.3),
    }
    with pytest.raises(UserError, match=r"no \*_results\.json"):
        read_results(tmp_path / "none")


def test_a_run_folder_stands_for_its_export(tmp_path: Path) -> None:
    export = tmp_path / "run/export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert usable(str(tmp_path / "run"), tmp_path) == str(export)
    assert usable("org/model", tmp_path) == "org/model"

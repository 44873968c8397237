"""Whole runs of ``main.py test`` and of the callback, on the embedded world's twins of the benchmarks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from balcap.benchmarks import CaptionQA, DCScore
from balcap.config import ConfigError
from balcap.policy.prompts import PromptEncoder
from examples.shapes.benchmarks import write_benchmarks
from examples.shapes.oracle import answer
from tests.judge_server import JudgeServer
from tests.support import ROOT, metrics

NAMES = {"dcscore", "captionqa", "caparena", "prism", "b_capscore"}
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five benchmarks, with 24 pictures."""
    return write_benchmarks(tmp_path_factory.mktemp("twins"), images=24)


@pytest.fixture
def benchmark_arguments(fit_arguments, twins: Path, tmp_path: Path) -> Arguments:
    """Arguments of a ``test`` that takes seconds."""

    def arguments(command: str = "test", names: tuple[str, ...] = (), **options: object) -> list[str]:
        kinds = {
            "DCScore": "dcscore.jsonl",
            "CaptionQA": "captionqa.json",
            "CapArena": "caparena.json",
            "Prism": "prism.json",
            "BCapScore": "shapes.json",
        }
        shared = {"image_root": str(twins), "sampling": {"temperature": 0.0, "max_tokens": 24}}
        own = {"DCScore": {"trials": 3}}
        entries = [
            {
                "class_path": f"balcap.benchmarks.{kind}",
                "init_args": {"data": str(twins / file), **shared, **own.get(kind, {})},
            }
            for kind, file in kinds.items()
            if not names or kind in names
        ]
        chosen = {"benchmark_eval.benchmarks": json.dumps(entries), "benchmark_eval.batch_size": 8}
        return fit_arguments(command, **chosen, **{"trainer.devices": 1}, **options)

    return arguments


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "benchmarks.json").read_text())


def run_command(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def test_a_test_scores_all_five_and_says_how(
    benchmark_arguments: Arguments, cli, tmp_path: Path, capsys
) -> None:
    cli(benchmark_arguments())
    found = results(tmp_path / "run")
    assert found.keys() >= NAMES
    for name in NAMES:
        entry = found[name]
        assert entry["low"] <= entry["score"] <= entry["high"]
        assert (entry["n"], entry["failed"], entry["judge"]) == (24, 0, "shapes/oracle")
        assert entry["prompt_version"]
        assert not entry["comparable"]
    assert {
        "captionqa/questions",
        "captionqa/few",
        "caparena/careful",
        "dcscore/recall_relevant",
    } <= found.keys()
    captions = (tmp_path / "run/benchmarks/policy/prism/captions.jsonl").read_text().splitlines()
    assert len(captions) == 24
    assert json.loads(captions[0]).keys() == {"image", "caption"}
    folder = tmp_path / "run/benchmarks/policy"
    lines = [json.loads(line) for line in (folder / "dcscore/dcscore.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert all(line.keys() == {"image_path", "caption", "oracle_caption"} for line in lines)
    assert all(
        len(json.loads((folder / f"{name}/{name}.json").read_text())) == 24
        for name in ("captionqa", "caparena")
    )
    printed = capsys.readouterr().out
    assert "not comparable: officially gpt-4o-2024-05-13 judges" in printed
    assert "benchmarks.json" in printed.splitlines()[-1]


def test_captioners_are_compared_on_the_same_images(
    benchmark_arguments: Arguments, cli, tmp_path: Path, capsys
) -> None:
    models = json.dumps({"base": str(ROOT / "assets/shapes-base")})
    cli(benchmark_arguments(names=("CaptionQA",), **{"benchmark_eval.models": models}))
    comparison = json.loads((tmp_path / "run/benchmarks/comparison.json").read_text())
    assert comparison["models"]["policy"] == comparison["models"]["base"]
    (gap,) = comparison["differences"]
    assert (gap["difference"], gap["low"], gap["high"], gap["n"]) == (0.0, 0.0, 0.0, 24)
    assert "policy - base, captionqa: +0.0" in capsys.readouterr().out


def test_captions_of_other_weights_are_never_taken(
    benchmark_arguments: Arguments, cli, folders, tmp_path: Path
) -> None:
    cli(benchmark_arguments(names=("Prism",)))
    other = benchmark_arguments(names=("Prism",), **{"model.policy.model": folders["qwen"]})
    with pytest.raises(SystemExit, match=r"another model\.policy\.model.*--run_dir"):
        cli(other)


def test_weights_that_were_replaced_are_others(benchmark_arguments: Arguments, cli, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets/shapes-base", model)
    arguments = benchmark_arguments(names=("Prism",), **{"model.policy.model": model})
    cli(arguments)
    cli(arguments)
    os.utime(model / "model.safetensors", ns=(1, 1))
    with pytest.raises(SystemExit, match=r"another weights.*--run_dir"):
        cli(arguments)


def test_other_questions_or_pictures_are_other_captions(
    benchmark_arguments: Arguments, cli, twins: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "twins"
    shutil.copytree(twins, copy)
    arguments = [arg.replace(str(twins), str(copy)) for arg in benchmark_arguments(names=("Prism",))]
    cli(arguments)
    elsewhere = [arg.replace(f'"image_root": "{copy}"', f'"image_root": "{twins}"') for arg in arguments]
    with pytest.raises(SystemExit, match="another image_root"):
        cli(elsewhere)
    (copy / "prism.json").write_text((copy / "prism.json").read_text() + " ")
    with pytest.raises(SystemExit, match="another data"):
        cli(arguments)


def test_names_of_captioners_are_names(benchmark_arguments: Arguments, cli, tmp_path: Path) -> None:
    models = json.dumps({"policy": "a/b", "../out": "a/b", "fine": str(tmp_path / "none")})
    with pytest.raises(ConfigError) as refused:
        cli(benchmark_arguments(names=("Prism",), **{"benchmark_eval.models": models}))
    keys = sorted(problem.split(":")[0] for problem in refused.value.problems)
    assert keys == ["benchmark_eval.models", "benchmark_eval.models", "benchmark_eval.models.fine"]


def test_a_monitor_that_is_never_known_is_refused(benchmark_arguments: Arguments, cli) -> None:
    options = {"trainer.max_steps": 2, "checkpoint.monitor": "bench/dcscor"}
    with pytest.raises(ConfigError, match=r"never known; set benchmark_eval\.every_n_updates"):
        cli(benchmark_arguments("fit", **options))
    with pytest.raises(ConfigError, match=r"no benchmark gives bench/dcscor; there are dcscore"):
        cli(
            benchmark_arguments("fit", names=("DCScore",), **options, **{"benchmark_eval.every_n_updates": 1})
        )


def test_no_score_is_no_success(benchmark_arguments: Arguments, cli, tmp_path: Path) -> None:
    server = JudgeServer(answer)
    server.always = "500"
    try:
        judge = {"model": "openai/gpt-4o-mini", "retries": 0, "max_failed_share": 1.0, "cache": None}
        judge["params"] = {"api_base": server.url}
        arguments = [
            a for a in benchmark_arguments(names=("Prism",)) if not a.startswith("--model.judge.cache")
        ]
        with pytest.raises(SystemExit, match="prism of policy has no score: 96 judgments are missing"):
            cli([*arguments, f"--model.judge={json.dumps(judge)}"])
    finally:
        server.close()
    assert results(tmp_path / "run")["prism"]["score"] is None


def test_an_evaluation_of_a_fit_never_takes_old_captions(
    benchmark_arguments: Arguments, cli, tmp_path: Path
) -> None:
    folder = tmp_path / "run/benchmarks/step-00000002/captionqa"
    options = {"trainer.max_steps": 2, "benchmark_eval.every_n_updates": 2, "benchmark_eval.at_ends": False}
    folder.mkdir(parents=True)
    (folder / "captions.settings.json").write_text("{}")
    lines = ('{"image": "few_0000", "caption": "OLD"}', '{"image": "many_0000", "caption": "OLD"}')
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    cli(benchmark_arguments("fit", names=("CaptionQA",), **options))
    assert "OLD" not in (folder / "captions.jsonl").read_text()


@pytest.mark.slow
def test_a_test_that_is_killed_again_and_again_goes_on(
    benchmark_arguments: Arguments, cli, tmp_path: Path
) -> None:
    cli(benchmark_arguments(run_dir=tmp_path / "whole", **{"model.judge.cache": tmp_path / "whole.sqlite"}))
    draw, kills = random.Random(0), 0
    for _ in range(int(os.environ.get("BALCAP_KILLS", "2"))):
        process = run_command(benchmark_arguments())
        time.sleep(draw.uniform(4, 14))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    finished(run_command(benchmark_arguments()))
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    for path in (tmp_path / "run/benchmarks/policy").glob("*/captions.jsonl"):
        images = [json.loads(line)["image"] for line in path.read_text().splitlines()]
        assert len(images) == len(set(images)) == 24, path
    stored = sqlite3.connect(tmp_path / "judge.sqlite").execute("SELECT count(*) FROM answers").fetchone()
    whole = sqlite3.connect(tmp_path / "whole.sqlite").execute("SELECT count(*) FROM answers").fetchone()
    assert stored == whole
    before = _calls(tmp_path / "run")
    cli(benchmark_arguments())
    assert _calls(tmp_path / "run") == before, "everything is in the cache"


def _calls(run: Path) -> int:
    return sqlite3.connect(run / "judge_ledger.sqlite").execute("SELECT count(*) FROM calls").fetchone()[0]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(benchmark_arguments: Arguments, cli, tmp_path: Path) -> None:
    sampled = {"model.judge.cache": "null"}
    one = benchmark_arguments(run_dir=tmp_path / "one", **sampled)
    two = benchmark_arguments(run_dir=tmp_path / "two", **sampled)
    two[two.index("--trainer.devices=1")] = "--trainer.devices=2"
    both = [
        [arg.replace('"temperature": 0.0', '"temperature": 1.0') for arg in arguments]  # drawn, not decided
        for arguments in (one, [*two, "--trainer.strategy=ddp"])
    ]
    for arguments in both:
        finished(run_command(arguments))
    assert results(tmp_path / "two") == results(tmp_path / "one")
    files = sorted(path.name for path in (tmp_path / "two/benchmarks/policy/prism").glob("captions*.jsonl"))
    assert files == ["captions.jsonl", "captions.rank1.jsonl"]


def test_judgments_that_fail_are_missing_and_no_zero(
    benchmark_arguments: Arguments, cli, tmp_path: Path
) -> None:
    cli(benchmark_arguments(run_dir=tmp_path / "whole"))
    server = JudgeServer(answer, fault_share=0.3, faults=("500", "truncated", "refusal"), seed=1)
    try:
        judge = {"model": "openai/gpt-4o-mini", "retries": 0, "max_failed_share": 1.0, "cache": None}
        judge["params"] = {"api_base": server.url, "api_key": "os.environ/NO_KEY"}
        os.environ["NO_KEY"] = "x"
        arguments = [a for a in benchmark_arguments() if not a.startswith("--model.judge.cache")]
        cli([*arguments, f"--model.judge={json.dumps(judge)}"])
    finally:
        server.close()
    found, whole = results(tmp_path / "run"), results(tmp_path / "whole")
    for name in NAMES:
        assert found[name]["failed"] > 0, name
        assert 0 < found[name]["n"] <= whole[name]["n"]
    read = Counter[str]()
    for name in NAMES:
        rows, all_rows = (
            {
                row["image"]: row
                for row in map(
                    json.loads, (run / f"benchmarks/policy/{name}/judged.jsonl").read_text().splitlines()
                )
            }
            for run in (tmp_path / "run", tmp_path / "whole")
        )
        for image, row in rows.items():
            for key in ("score", "points"):
                if name in ("dcscore", "caparena") and key in row:  # fewer trials, or what there is
                    read[name] += 1
                elif key in row:
                    mine, theirs = (
                        one[key] if isinstance(one[key], list) else [one[key]]
                        for one in (row, all_rows[image])
                    )
                    assert all(a is None or a == b for a, b in zip(mine, theirs, strict=True))
                    read[name] += 1
    assert read.keys() == NAMES


def test_a_fit_evaluates_and_keeps_the_best_checkpoint(
    benchmark_arguments: Arguments, cli, tmp_path: Path
) -> None:
    options = {
        "trainer.max_steps": 3,
        "benchmark_eval.every_n_updates": 2,
        "benchmark_eval.limit": 8,
        "checkpoint.monitor": "bench/captionqa",
    }
    cli(benchmark_arguments("fit", names=("CaptionQA", "DCScore"), **options))
    rows = [row for row in metrics(tmp_path / "run") if row.get("bench/captionqa")]
    assert [int(row["step"]) for row in rows] == [0, 2, 3]
    for row in rows:
        assert (
            float(row["bench/captionqa_low"])
            <= float(row["bench/captionqa"])
            <= float(row["bench/captionqa_high"])
        )
        assert float(row["bench/dcscore/failed"]) == 0
    kept = [path.name for path in (tmp_path / "run/checkpoints").glob("step-*.ckpt")]
    assert kept == ["step-00000002.ckpt"]
    folders = sorted(path.name for path in (tmp_path / "run/benchmarks").iterdir())
    assert folders == ["step-00000000", "step-00000002", "step-00000003"]
    without = benchmark_arguments(
        "fit", names=("CaptionQA",), run_dir=tmp_path / "without", **{"trainer.max_steps": 3}
    )
    cli(without)
    ours, theirs = (
        [row["train/loss"] for row in metrics(tmp_path / run) if row.get("train/loss")]
        for run in ("run", "without")
    )
    assert ours == theirs, "training is the same with and without benchmarks"
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["callbacks"]["BenchmarkEval"] == {"done_step": 2}


def test_images_that_the_processor_refuses_are_left_out(
    benchmark_arguments: Arguments, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PromptEncoder.encode

    def refuses(self: PromptEncoder, batch: Any) -> Any:
        if any(i.endswith("000003.png") for i in batch.sample_ids if i.startswith("shapes/077")):
            raise ValueError("no such picture")
        return encode(self, batch)

    monkeypatch.setattr(PromptEncoder, "encode", refuses)
    options = {"trainer.max_steps": 1, "benchmark_eval.every_n_updates": 1, "benchmark_eval.at_ends": False}
    cli(benchmark_arguments("fit", names=("DCScore",), **options))
    folder = tmp_path / "run/benchmarks/step-00000001/dcscore"
    assert len((folder / "captions.jsonl").read_text().splitlines()) == 23
    cli(benchmark_arguments(names=("DCScore",), run_dir=tmp_path / "test"))
    entry = results(tmp_path / "test")["dcscore"]
    assert (entry["n"], entry["left_out"]) == (23, {"refused_by_processor": 1})


def test_a_checkpoint_is_tested_as_it_is(benchmark_arguments: Arguments, cli, tmp_path: Path) -> None:
    cli(
        benchmark_arguments(
            "fit", names=("Prism",), **{"trainer.max_steps": 2, "model.optimizer.init_args.lr": 0.01}
        )
    )
    cli([*benchmark_arguments(names=("Prism",)), "--ckpt_path", "last"])
    cli(
        benchmark_arguments(
            names=("Prism",), run_dir=tmp_path / "export", **{"model.policy.model": tmp_path / "run/export"}
        )
    )
    captions = [
        (tmp_path / run / "benchmarks/policy/prism/captions.jsonl").read_text() for run in ("run", "export")
    ]
    assert captions[0] == captions[1]


def test_an_estimate_says_what_benchmarks_cost(benchmark_arguments: Arguments, cli, capsys) -> None:
    options = {"trainer.max_steps": 4, "benchmark_eval.every_n_updates": 2}
    cli(benchmark_arguments("estimate", **options))
    printed = capsys.readouterr().out
    table = printed[printed.index("one run of each benchmark") :]
    for name, calls in (
        ("prism", 96),
        ("caparena", 24),
        ("dcscore", 24 * 7),
    ):  # 4 questions an image; 1 + 3 + 3
        (line,) = [line for line in table.splitlines() if f" {name} " in line]
        assert f" {calls} " in line, line
    assert "Within the fit they run 3 times" in table


def test_what_cannot_work_is_one_list(benchmark_arguments: Arguments, cli, tmp_path: Path) -> None:
    arguments = benchmark_arguments(names=("DCScore",), **{"benchmark_eval.limit": 0})
    place = next(i for i, a in enumerate(arguments) if a.startswith("--benchmark_eval.benchmarks="))
    entry = {
        "class_path": "balcap.benchmarks.DCScore",
        "init_args": {
            "data": "no/such.jsonl",
            "image_root": "/no/such",
            "official": True,
            "trials": 0,
            "limit": 0,
        },
    }
    arguments[place] = f"--benchmark_eval.benchmarks={json.dumps([entry, entry])}"
    with pytest.raises(ConfigError) as refused:
        cli(arguments)
    keys = [problem.split(":")[0] for problem in refused.value.problems]
    first = "benchmark_eval.benchmarks[0].init_args"
    unofficial = {
        "class_path": "balcap.benchmarks.Prism",
        "init_args": {"data": str(tmp_path), "official": True},
    }
    wrong_code = {**entry, "init_args": {**entry["init_args"], "code": "/no/such.py"}}
    arguments[place] = f"--benchmark_eval.benchmarks={json.dumps([wrong_code, unofficial])}"
    with pytest.raises(ConfigError, match=r"code: /no/such\.py cannot be read") as also:
        cli(arguments)
    assert any("prism has no official judge" in problem for problem in also.value.problems)
    for key in ("limit", "code", "data", "image_root", "trials"):
        assert f"{first}.{key}" in keys
    assert "benchmark_eval.limit" in keys
    assert any("two of the name dcscore" in problem for problem in refused.value.problems)
    with pytest.raises(ConfigError, match=r"benchmark_eval\.benchmarks: there is none"):
        cli([*benchmark_arguments(), "--benchmark_eval.benchmarks=null"])


@pytest.mark.parametrize(
    ("kind", "content", "why"),
    [
        (DCScore, '{"image_name": "a.png"}\n', "row 0: it has no image_name and oracle_facts"),
        (DCScore, "[1, 2", "cannot be read"),
        (CaptionQA, '[{"images": ["a.png"]}]', "row 0: it has no id"),
        (CaptionQA, '[{"id": "nat_1", "images": ["a.png", "b.png"]}]', "row 0: it has 2 images"),
        (CaptionQA, "[]", "holds no image"),
        (CaptionQA, '[{"id": "nat_1", "images": ["a.png"]}]', "1 no_question_with_a_right_choice"),
        (CaptionQA, '[{"id": "nat_1", "images": ["a.png"], "questions": ["what"]}]', "is not as expected"),
        (DCScore, '{"image_name": 7, "oracle_facts": []}\n', "names an image 7"),
        (DCScore, '{"image_name": "a", "oracle_facts": []}\n' * 2, "has two rows for a"),
        (DCScore, '{"image_name": "a", "oracle_facts": []}\n{\n', "line 2"),
    ],
)
def test_files_that_are_not_as_expected(kind: Any, content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / ("data.jsonl" if kind is DCScore else "data.json")
    path.write_text(content)
    with pytest.raises(ValueError, match=why):
        kind(data=str(path), image_root=str(tmp_path)).images()

"""Whole runs on awkward input: bad rows, another judge, a judge that fails, gradients that are not finite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from balcap.config import ConfigError
from examples.shapes.oracle import answer
from tests.judge.judge_fakes import JudgeServer
from tests.support import ROOT, metrics


def _spoil(world: Path, out: Path) -> set[str]:
    """A copy of the world with eleven kinds of bad rows among its rows; returns their causes."""
    shutil.copytree(world, out)
    rows = json.loads((out / "shapes.json").read_text())
    good = (out / rows[0]["image"]).read_bytes()
    folder = out / "shapes"
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "folder.png").mkdir()
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    for name in ("no-caption", "no-placeholder", "odd"):
        (folder / f"{name}.png").write_bytes(good)
    (out.parent / "outside.png").write_bytes(good)
    ask, say = {"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A red circle."}
    bad = [
        {"id": "1", "image": "shapes/missing.png", "conversations": [ask, say]},
        {"id": "2", "image": "shapes/cut.png", "conversations": [ask, say]},
        {"id": "3", "image": "shapes/text.png", "conversations": [ask, say]},
        {"id": "4", "image": "shapes/bomb.png", "conversations": [ask, say]},
        {"id": "5", "image": "shapes/no-caption.png", "conversations": [ask, {"from": "gpt", "value": "  "}]},
        {"id": "6", "image": "shapes/long.png", "conversations": [{**ask, "value": "What?" * 3000}, say]},
        {"id": "7", "image": "../outside.png", "conversations": [ask, say]},
        {"id": "8", "image": ["shapes/one.png", "shapes/two.png"], "conversations": [ask, say]},
        {"id": "9", "conversations": [ask, say]},
        {"id": "10", "image": "shapes/folder.png", "conversations": [ask, say]},
        {"id": "11", "image": "shapes/odd.png", "conversations": "neither list nor text"},
        {
            "id": "12",
            "image": "shapes/latin.png",
            "conversations": [ask, {"from": "gpt", "value": "caf\ufffd"}],
        },
    ]
    mixed = [row for pair in zip(rows, bad, strict=False) for row in pair] + rows[len(bad) :]
    text = json.dumps(mixed, ensure_ascii=False).encode().replace("\ufffd".encode(), b"\xe9")
    (out / "shapes.json").write_bytes(text)
    return {
        "missing_file", "truncated_image", "not_an_image", "decompression_bomb", "no_caption", "text_too_long",
        "outside_image_root", "placeholder_mismatch", "no_image_field", "unreadable_file", "malformed_row", "not_utf8",
    }  # fmt: skip


def test_bad_rows_are_listed_with_their_cause_and_cost_nothing_else(
    fit_arguments, cli, world: Path, tmp_path: Path
) -> None:
    causes = _spoil(world, tmp_path / "spoilt")
    options = {
        "data.data": tmp_path / "spoilt/shapes.json",
        "data.image_root": tmp_path / "spoilt",
        "data.batch_size": 14,
        "trainer.max_steps": 5,  # more than one round through all rows
        "data.max_bad_share": 0.5,
        "model.num_captions": 2,
        "model.sampling.max_tokens": 6,
    }
    cli(fit_arguments(**options))
    listed = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert {row["cause"] for row in listed} == causes
    assert len(listed) == len(causes)
    assert len([row for row in metrics(tmp_path / "run") if row["train/loss"]]) == 5


def test_another_judge_is_one_more_config(fit_arguments, cli, tmp_path: Path) -> None:
    server = JudgeServer(answer)
    try:
        overlay = str(ROOT / "configs/judge/local-vllm.yaml")
        args = fit_arguments(**{"model.judge.params.api_base": server.url, "trainer.max_steps": 1})
        cli([*args[:3], "--config", overlay, *args[3:]])
    finally:
        server.close()
    (row,) = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert server.calls > 10
    assert {body["model"] for body in server.requests} == {"Qwen/Qwen2.5-VL-72B-Instruct"}
    assert float(row["judge/failed"]) == 0
    assert 0 <= float(row["train/precision"]) <= 1


def test_a_judge_that_is_down_makes_rewards_missing_and_moves_nothing(
    fit_arguments, cli, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys
) -> None:
    server = JudgeServer(answer)
    server.always = "400"
    try:
        overlay = str(ROOT / "configs/judge/local-vllm.yaml")
        args = fit_arguments(
            **{
                "model.judge.params.api_base": server.url,
                "model.judge.max_failed_share": 1.0,  # go on whatever happens
                "trainer.max_steps": 1,
                "model.kl_coef": 0,
            }
        )
        cli([*args[:3], "--config", overlay, *args[3:]])
    finally:
        server.close()
    (row,) = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert row["train/precision"] == row["train/linguistic"] == "nan"
    assert float(row["judge/failed"]) > 0
    assert float(row["train/grad_norm"]) == 0
    assert "step 1: judgments missing: " in caplog.text
    assert "of 6 captions" in caplog.text
    assert "validation at step 0: judgments missing: " in caplog.text
    validated = [
        float(row["val/judge_failed"]) for row in metrics(tmp_path / "run") if row["val/judge_failed"]
    ]
    assert len(validated) == 2
    assert min(validated) > 0
    *_, attention, results = capsys.readouterr().out.splitlines()
    assert attention.startswith("Attention: 100% of the rewards of this run are missing")
    assert results.startswith(f"Results in {tmp_path / 'run'}: checkpoints/last.ckpt, export, curves.png")


def test_updates_that_are_not_finite_are_skipped_and_then_end_the_run(
    fit_arguments, cli, monkeypatch, tmp_path: Path
) -> None:
    import balcap.trainer.update as room

    real = room.policy_loss
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        part = real(*args, **kwargs)
        return type(part)(part.loss * torch.nan, part.tokens, part.clipped, part.kl)

    monkeypatch.setattr(room, "policy_loss", poisoned)
    with pytest.raises(SystemExit, match=r"model\.optimizer"):
        cli(fit_arguments(**{"trainer.max_steps": 9, "model.max_skipped_updates": 2}))
    assert len(calls) == 3
    rows = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert [float(row["train/skipped_updates"]) for row in rows] == [1, 2]


def _photographs(folder: Path) -> list[str]:
    """Real photographs as people have them; returns the names of those that can be captioned."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    camera = Image.fromarray(data.camera())
    rotated = Image.Exif()
    rotated[0x0112] = 6
    china.save(folder / "photo.jpg")
    china.save(folder / "rotated.jpg", exif=rotated)
    flower.save(folder / "photo.webp")
    flower.convert("P").save(folder / "photo.gif")
    flower.convert("P").save(folder / "palette.png")
    china.convert("CMYK").save(folder / "cmyk.jpg")
    camera.save(folder / "grey.png")
    alpha = china.convert("RGBA")
    alpha.putalpha(camera.resize(china.size))
    alpha.save(folder / "alpha.png")
    Image.fromarray(np.asarray(camera).astype(np.uint16) * 257).save(folder / "sixteen-bit.png")
    china.resize((1200, 30)).save(folder / "wide.png")
    china.resize((1, 1)).save(folder / "tiny.png")
    return sorted(path.name for path in folder.iterdir())


def test_predict_reads_photographs_as_people_have_them(
    fit_arguments, cli, folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    names = _photographs(tmp_path / "photos")
    whole = (tmp_path / "photos/photo.jpg").read_bytes()
    (tmp_path / "photos/broken.jpg").write_bytes(whole[: len(whole) // 2])
    options = {
        "data.predict_from": tmp_path / "photos",
        "data.data": None,
        "data.image_root": None,
        "model.policy.model": folders[family],
        "model.sampling.max_tokens": 4,
    }
    cli(fit_arguments("predict", **options))
    rows = [json.loads(line) for line in (tmp_path / "run/captions.jsonl").read_text().splitlines()]
    assert sorted(row["image"] for row in rows) == names
    bad = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert [(row["image"], row["cause"]) for row in bad] == [("broken.jpg", "truncated_image")]


def test_predict_goes_on_where_it_stopped(fit_arguments, cli, world: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, path in enumerate(sorted((world / "shapes").iterdir())[:4]):
        shutil.copy(path, photos / f"{i}.png")
    args = fit_arguments(
        "predict",
        **{"data.predict_from": photos, "data.data": None, "data.image_root": None, "data.val_batch_size": 1},
    )
    out = tmp_path / "run/captions.jsonl"
    cli(args)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["image"] for row in rows) == ["0.png", "1.png", "2.png", "3.png"]
    assert all(set(row) == {"image", "prompt", "caption", "truncated"} for row in rows)

    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:20])  # killed in the middle of the third line
    cli(args)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.dumps(row) for row in again[:2]] == [json.dumps(row) for row in rows[:2]]
    assert sorted(row["image"] for row in again) == sorted(row["image"] for row in rows)
    with pytest.raises(ConfigError) as refused:
        cli([*args, "--model.sampling.max_tokens", "7", "--model.policy.dtype", "bfloat16"])
    keys = [problem.split(":")[0] for problem in refused.value.problems]
    assert keys == ["model.policy.dtype", "model.sampling.max_tokens"]


@pytest.mark.parametrize(
    ("advantage", "transforms"),
    [
        ("balcap.algorithms.GRPO", "[balcap.algorithms.LinearLengthPenalty]"),
        ("balcap.algorithms.CGDPO", "[]"),
        ("balcap.algorithms.GRPO", None),
    ],
)
def test_the_ablations_of_the_paper_are_settings(
    fit_arguments, cli, tmp_path: Path, advantage: str, transforms: str | None
) -> None:
    options = {"model.advantage": advantage, "model.reward_transforms": transforms, "trainer.max_steps": 3}
    scheduler = {"model.scheduler": "torch.optim.lr_scheduler.StepLR", "model.scheduler.step_size": 1}
    cli(fit_arguments(**options, **scheduler, **{"model.scheduler.gamma": 0.5}))
    rows = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert all(float(row["train/grad_norm"]) > 0 for row in rows)
    assert [float(row["train/lr"]) for row in rows] == pytest.approx(
        [1e-4, 5e-5, 2.5e-5]
    )  # after each update
    table = pq.read_table(sorted((tmp_path / "run/rollouts").glob("train-*"))[0]).to_pydict()
    same = table["reward/linguistic"] == table["shaped/linguistic"]
    assert same == (transforms == "[]")
    assert any(table["advantage"])


def test_the_length_schedule_moves_the_mask(fit_arguments, cli, tmp_path: Path) -> None:
    points = "[[0, 0.1, 9.0], [2, 0.3, 5.0]]"
    schedule = f"{{class_path: callbacks.length_mask.LengthMaskSchedule, init_args: {{schedule: {points}}}}}"
    cli([*fit_arguments(**{"trainer.max_steps": 3}), f"--trainer.callbacks+={schedule}"])
    rows = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert [float(row["train/tau_low"]) for row in rows] == pytest.approx([0.1, 0.2, 0.3])
    assert [float(row["train/tau_high"]) for row in rows] == pytest.approx([9.0, 7.0, 5.0])

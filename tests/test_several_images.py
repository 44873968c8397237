"""Rows of several images, from the file to the update: as the model alone sees them, as the judge does, and by the
command line."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch

from balcap.data.datamodule import CaptionDataModule
from balcap.judge import Judge
from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from balcap.policy.prompts import PlaceholderMismatch
from balcap.rewards import Linguistic, Precision, RewardSuite
from balcap.rollout import HFGenerate, Sampling
from balcap.types import CaptionBatch
from tests.judge_replies import image_urls, task_of
from tests.judge_server import JudgeServer
from tests.support import metrics
from tests.tiny_families import gemma3
from tests.tiny_models import picture, rollouts_of

SIZES = [(64, 64), (150, 60), (70, 200), (60, 60), (112, 84), (56, 140)]
NAMES = [f"{i}.png" for i in range(len(SIZES))]
ROWS: list[tuple[Any, str]] = [
    (NAMES[0], "<image>\nWhat is this?"),
    (NAMES[1:3], "Is <image> older than <image>?"),
    (NAMES[3:6], "Compare them."),
]
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
BY_HAND = {
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n",
        QWEN,
    ),
    "gemma3": ("<s>USER: {}\nASSISTANT: ", "<start_of_image>"),
}
"""What the chat templates write, and what they write for an image."""


def turns(question: str) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "A red circle."}]
    return {"conversations": said}


@pytest.fixture
def batch(tmp_path: Path) -> CaptionBatch:
    """Rows of one, two and three images, as the data module reads them."""
    for i, size in enumerate(SIZES):
        picture(*size, seed=i).save(tmp_path / NAMES[i])
    rows = [{"image": images} | turns(question) for images, question in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = {"data": str(tmp_path / "rows.json"), "image_root": str(tmp_path), "run_dir": str(tmp_path)}
    data = CaptionDataModule(**files, batch_size=3, val_size=0, num_workers=0, cache_dir=str(tmp_path))
    (read,) = data.train_dataloader()
    return read.select(sorted(range(3), key=lambda row: len(read.images[row])))


@pytest.fixture(params=BY_HAND)
def policy(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Policy:
    """One that shares prefixes, and one of one sequence per caption."""
    folder = folders["qwen"] if request.param == "qwen" else gemma3(tmp_path / "gemma3")
    shared = request.param == "qwen"
    return Policy.load(PolicyConfig(str(folder), dtype="float32", shared_prefix=shared), False).eval()


def test_prompts_and_log_probs_are_those_of_the_model_alone(policy: Policy, batch: CaptionBatch) -> None:
    template, image = BY_HAND["qwen" if policy.shared_prefix else "gemma3"]
    texts = [f"{image}What is this?", f"Is {image} older than {image}?", f"{image * 3}Compare them."]
    rollouts = rollouts_of(batch, [[3, 1], [7, 2], [4, 6]], range(60, 300))
    prompts = policy.encode(batch)
    logps, _ = policy.logps(rollouts, prompts, [0, 1, 2])
    for b, text in enumerate(texts):
        inputs = policy.encoder.processor(
            text=[template.format(text)],
            images=list(batch.images[b]),
            return_tensors="pt",
            add_special_tokens=False,
        )
        assert torch.equal(inputs["input_ids"], prompts.items[b]["input_ids"])
        for g, n in enumerate(rollouts.lengths[b].tolist()):
            ids, width = rollouts.token_ids[b, g, :n], inputs["input_ids"].shape[1]
            whole = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], ids[None]], 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            for key in {"mm_token_type_ids", "token_type_ids"} & set(whole):
                whole[key] = torch.cat([whole[key], whole[key].new_zeros(1, n)], 1)
            with torch.no_grad():
                expected = policy.model(**whole).logits[0, width - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(
                logps[b, g, :n], expected.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5
            )


def test_sampling_draws_from_what_is_trained(policy: Policy, batch: CaptionBatch) -> None:
    engine, prompts = HFGenerate(), policy.encode(batch)
    engine.attach(policy)
    rollouts = engine.generate(batch, prompts, 2, Sampling(max_tokens=6))
    logps, _ = policy.logps(rollouts, prompts, [0, 1, 2])
    torch.testing.assert_close(rollouts.sampler_logps, logps, atol=2e-5, rtol=1e-5)


def test_pixel_limits_hold_for_each_image(folders: dict[str, Path], batch: CaptionBatch) -> None:
    config = PolicyConfig(str(folders["qwen"]), dtype="float32", min_pixels=56**2, max_pixels=56**2)
    prompts = Policy.load(config, False).encode(batch)
    for item, images in zip(prompts.items, batch.images, strict=True):
        areas = (item["image_grid_thw"].prod(-1) * 14**2).tolist()
        assert len(areas) == len(images)
        assert max(areas) <= 56**2


def test_a_family_of_one_image_refuses_the_row_and_says_what_to_do(
    policy: Policy, batch: CaptionBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(policy.encoder.family), "several_images", False)
    assert len(policy.encode(batch.select([0])).items) == 1
    wanted = r"sample '1\.png // 2\.png' has 2 images, a prompt of \w+ takes one: .*data\.data.*model\.policy\.model"
    with pytest.raises(PlaceholderMismatch, match=wanted):
        policy.encode(batch)


def test_the_judge_sees_all_images_of_a_row_in_order(
    batch: CaptionBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "dummy")
    server = JudgeServer()
    judge = Judge("openai/gpt-4o-mini", params={"api_base": server.url}, cache=None)
    rollouts = rollouts_of(batch, [[1, 1]] * 3, range(60, 300))
    rollouts.captions[:] = [["A cat.", "A dog."]] * 3
    try:
        judgments = RewardSuite([Precision(), Linguistic()]).gather(judge, rollouts)
    finally:
        judge.close()
        server.close()
    assert not judgments.failures
    asked = [body["messages"] for body in server.requests if task_of(body["messages"]) == "verify"]
    assert len(asked) == 3
    shown = {tuple(base64.b64decode(url["url"].partition(",")[2]) for url in image_urls(m)): m for m in asked}
    assert set(shown) == set(batch.image_bytes)
    kinds = [part["type"] for part in shown[batch.image_bytes[0]][1]["content"]]
    assert kinds == ["image_url", "text"], "of one image as ever"
    (*parts, question) = shown[batch.image_bytes[1]][1]["content"]
    assert [part.get("text", "") for part in parts[:4]] == ["Image 1:", "", "Image 2:", ""]
    assert parts[4]["text"].startswith("All 2 images belong together")
    assert question["text"].startswith("<assertions>")


def test_rows_of_two_images_train_and_those_that_cannot_be_are_reported(
    fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], world: Path, tmp_path: Path
) -> None:
    rows = json.loads((world / "shapes.json").read_text())
    names = [row["image"] for row in rows[:24]]
    pairs = [
        {**rows[i], "image": [names[i], names[i + 1]]} | turns("<image> or <image>?") for i in range(0, 24, 2)
    ]
    bad = [{"image": [names[0], names[1]]} | turns("<image>\nWhat is it?")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs + bad))
    options = {
        "data.data": tmp_path / "pairs.json",
        "data.val_size": 2,
        "data.batch_size": 5,
        "data.max_bad_share": 0.5,
    }
    options |= {"rollout_log.every_n_steps": 1, "data.num_workers": 0}
    cli(fit_arguments(**options))
    steps = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert len(steps) == 2
    assert all(float(row["train/grad_norm"]) > 0 and float(row["judge/failed"]) == 0 for row in steps)
    table = ds.dataset(tmp_path / "run/rollouts").to_table()
    assert set(table["sample_id"].to_pylist()) <= {" // ".join(pair["image"]) for pair in pairs}
    assert set(table["prompt"].to_pylist()) == {"<image> or <image>?"}
    (line,) = (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()
    assert {**json.loads(line), "detail": ""} == {
        "row": 12, "image": " // ".join(names[:2]), "cause": "placeholder_mismatch", "detail": "",
    }  # fmt: skip
    assert json.loads(line)["detail"] == "2 images, but 1 <image> in the question"

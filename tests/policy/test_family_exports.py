"""LoRA on every architecture: a run that was continued is the run that was not, and its export is what it trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from balcap.policy.families import family_of
from tests.short_captions import TRAINED_ON_IT
from tests.support import metrics
from tests.tiny_families import WORKING

TRAINED = ("train/loss", "train/grad_norm", "train/entropy")


def _run(run: Path) -> dict[int, list[float]]:
    return {
        int(row["step"]): [float(row[name]) for name in TRAINED]
        for row in metrics(run)
        if row.get("train/loss")
    }


@pytest.mark.parametrize("name", WORKING)
def test_a_continued_adapter_is_exported_as_it_was_trained(
    name: str,
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    folder_of: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    options = TRAINED_ON_IT | {
        "model.policy.model": folder_of(name),
        "model.policy.lora": "{r: 2, alpha: 64}",
        "model.optimizer.init_args.lr": 0.01,
        "trainer.limit_val_batches": 0,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cli(fit_arguments(**options, run_dir=whole))
    cli(fit_arguments(**options | {"trainer.max_steps": 1}, run_dir=parts))
    cli([*fit_arguments(**options, run_dir=parts), "--ckpt_path", "last"])
    assert _run(parts) == _run(whole)
    assert sorted(_run(whole)) == [1, 2]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(sorted((world / "shapes").iterdir())[:3]):
        (pictures / f"{number}.png").write_bytes(picture.read_bytes())
    export = {"model.policy.model": parts / "export", "model.policy.lora": None}
    source = {"data.predict_from": pictures, "data.data": None}
    cli(fit_arguments("predict", **options | export, **source, run_dir=tmp_path / "captions"))
    lines = (tmp_path / "captions/captions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert len(said) == 3
    assert any(row["caption"] for row in said)

    base = AutoModelForImageTextToText.from_pretrained(folder_of(name), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, parts / "export")
    processor = AutoProcessor.from_pretrained(parts / "export")
    banned = family_of(base).placeholder_ids(base.config, processor.tokenizer)
    for row in said:
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        bos = {"add_special_tokens": False} if text.startswith("<s>") else {}
        image = Image.open(pictures / row["image"]).convert("RGB")
        inputs = processor(text=[text], images=[image], return_tensors="pt", **bos)
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=banned)
        caption = written[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(caption, skip_special_tokens=True).strip() == row["caption"]

"""What a QLoRA run exports says in transformers, in peft and in vLLM what it said in the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from tests.support import ROOT
from tests.wide_heads import write_wide_base

TOKENS = 24
VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
model, adapter, prompt, tokens, *images = sys.argv[1:]
more = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt={"image": 1}, **more)
asked = [{"prompt": prompt, "multi_modal_data": {"image": Image.open(path).convert("RGB")}} for path in images]
said = llm.generate(
    asked, SamplingParams(temperature=0, max_tokens=int(tokens)),
    lora_request=LoRARequest("export", 1, adapter) if adapter else None,
)
print("SAID", json.dumps([one.outputs[0].text.strip() for one in said]))
"""


def _in_vllm(model: Path, adapter: Path | None, prompt: str, images: list[Path]) -> list[str]:
    command = [sys.executable, "-c", VLLM, str(model), str(adapter or ""), prompt, str(TOKENS)]
    done = subprocess.run([*command, *map(str, images)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("SAID"))
    return json.loads(line.removeprefix("SAID"))


def _in_transformers(model: Any, processor: Any, prompt: str, images: list[Path]) -> list[str]:
    said = []
    for path in images:
        inputs = processor(text=[prompt], images=[Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            tokens = model.eval().generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        said.append(processor.decode(new, skip_special_tokens=True).strip())
    return said


def test_an_exported_qlora_run_says_the_same_everywhere(
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    world: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    base, run, merged, pictures = (tmp_path / name for name in ("base", "run", "merged", "pictures"))
    write_wide_base(base)  # vLLM has no attention on a CPU for heads of 40 dimensions
    policy = {
        "model.policy.model": base,
        "model.policy.dtype": "float32",
        "model.policy.lora": "{r: 4, alpha: 8, target_modules: [q_proj, v_proj, down_proj]}",
        "model.policy.load_in_4bit": True,
        "model.sampling.max_tokens": TOKENS,
    }
    cli(fit_arguments(**policy, **{"model.optimizer.init_args.lr": 5e-3, "trainer.max_steps": 3}))
    cli(["export", "--ckpt", str(run), "--out", str(merged), "--merge"])

    pictures.mkdir()
    images = []
    for path in sorted((world / "shapes").iterdir())[:16]:
        images.append(pictures / path.name)
        images[-1].write_bytes(path.read_bytes())

    def by_the_trainer(name: str, **how: Any) -> list[str]:
        out = {"data.predict_from": pictures, "data.data": None, "run_dir": tmp_path / name}
        last = run / "checkpoints/last.ckpt"
        cli([*fit_arguments("predict", **policy | how | out), "--ckpt_path", str(last)])
        lines = (tmp_path / name / "captions.jsonl").read_text().splitlines()
        rows = {row["image"]: row for row in map(json.loads, lines)}
        prompts.update(row["prompt"] for row in rows.values())
        return [rows[path.name]["caption"].strip() for path in images]

    prompts: set[str] = set()
    four = by_the_trainer("four")
    sixteen = by_the_trainer("sixteen", **{"model.policy.load_in_4bit": False})
    (question,) = prompts
    processor = AutoProcessor.from_pretrained(run / "export")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    in_4_bits = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantised
    )
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert len(set(four)) > 8
    untrained = _in_transformers(whole, processor, prompt, images)
    assert sum(map(str.__ne__, untrained, sixteen)) > 4, "the adapter matters"
    # The same weights say the same, wherever they are loaded.
    adapted = PeftModel.from_pretrained(in_4_bits, run / "export")
    for layer in adapted.modules():  # bitsandbytes' packing for CPUs wants other widths than these
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    assert _in_transformers(adapted, processor, prompt, images) == four
    assert (
        _in_transformers(PeftModel.from_pretrained(whole, run / "export"), processor, prompt, images)
        == sixteen
    )
    reloaded = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    assert _in_transformers(reloaded, processor, prompt, images) == sixteen
    assert _in_vllm(merged, None, prompt, images) == sixteen
    assert _in_vllm(base, run / "export", prompt, images) == sixteen
    # Four bits are other weights: most captions survive the change.
    same = sum(map(str.__eq__, four, sixteen))
    print(f"captions alike with the base in 4 and in 16 bits: {same} of {len(images)}")
    assert 0 < same < len(images)

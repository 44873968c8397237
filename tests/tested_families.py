"""What is tested of which architecture. The tests take their names from here, and so does the table of docs/models.md.

python -m tests.tested_families    writes the table
"""

from __future__ import annotations

from pathlib import Path

from tests.tiny_families import WORKING

SHARED = (
    "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v", "gemma3",
    "gemma3_crops", "internvl", "internvl_qwen3", "internvl_qwen3_moe", "smolvlm", "idefics3", "llava_onevision",
    "llava_next", "llava", "pixtral", "mistral3",
)  # fmt: skip
"""Names of `tests.tiny_families` that share a prefix (tests/policy/test_shared_families.py)."""

ONE_IMAGE = ("llava_next", "llava_onevision")
"""Those that take one image in a prompt."""

SEVERAL = tuple(name for name in SHARED if name not in ONE_IMAGE)

IN_VLLM = (
    "qwen2_vl", "qwen3_vl", "pixtral", "mistral3", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl",
    "internvl_qwen3",
)  # fmt: skip
"""Those whose prompts and log-probs in vLLM are the trainer's (tests/rollout/with_vllm/test_vllm_families.py)."""

OTHERWISE_IN_VLLM = {
    "qwen2_5_vl": "equal",
    "llava": "equal",
    "qwen3_vl_moe": "prompts equal; its experts on CPUs round more",
    "internvl_qwen3_moe": "prompts equal; its experts on CPUs round more",
    "qwen3_5": "prompts equal; bfloat16 alone",
    "gemma3": "prompts equal; its attention for CPUs differs",
}

ROWS = {
    "Qwen2.5-VL": ("qwen2_5_vl", "all linear layers"),
    "Qwen2-VL": ("qwen2_vl", "all linear layers"),
    "Qwen3-VL": ("qwen3_vl", "all linear layers"),
    "Qwen3-VL, mixture of experts": ("qwen3_vl_moe", "attention"),
    "Qwen3.5, Qwen3.6": ("qwen3_5", "all linear layers"),
    "the same, mixture of experts": ("qwen3_5_moe", "all linear layers, of the shared expert too"),
    "GLM-4.1V": ("glm4v", "all linear layers"),
    "GLM-4.5V": ("glm4v_moe", "attention"),
    "GLM-4.6V": ("glm46v", "all linear layers"),
    "Gemma 3": ("gemma3", "all linear layers"),
    "InternVL3": ("internvl", "all linear layers"),
    "InternVL3.5": ("internvl_qwen3", "all linear layers"),
    "InternVL3.5, mixture of experts": ("internvl_qwen3_moe", "attention"),
    "SmolVLM, SmolVLM2": ("smolvlm", "all linear layers"),
    "Idefics3": ("idefics3", "all linear layers"),
    "LLaVA-OneVision": ("llava_onevision", "all linear layers"),
    "LLaVA-NeXT": ("llava_next", "all linear layers"),
    "LLaVA-1.5": ("llava", "all linear layers"),
    "Pixtral": ("pixtral", "all linear layers"),
    "Mistral Small 3, Ministral 3": ("mistral3", "all linear layers"),
    "LFM2-VL": ("lfm2_vl", "all linear layers"),
}
"""Row of the table -> name, and what LoRA adapts where no layers are named."""

DOCUMENT = Path(__file__).parents[1] / "docs/models.md"


def table() -> str:
    """In Markdown."""
    head = ("Models", "`model_type`", "Shared prefix", "Several images", "LoRA adapts", "vLLM on a CPU")
    lines = [head, ("---",) * len(head)]
    for models, (name, adapted) in ROWS.items():
        assert name in WORKING
        shared = "equal" if name in SHARED else "no: one sequence per caption"
        several = "no" if name in ONE_IMAGE else "yes" if name in SEVERAL else "not tested"
        vllm = "equal" if name in IN_VLLM else OTHERWISE_IN_VLLM.get(name, "not run")
        kind = name.removesuffix("_qwen3_moe").removesuffix("_qwen3")
        kind = "llava" if kind == "pixtral" else kind
        lines.append((models, f"`{kind}`", shared, several, adapted, vllm))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def written(document: str) -> str:
    """The document with today's table in place of its own."""
    before, rest = document.split("<!-- table -->\n", 1)
    _, after = rest.split("<!-- end of table -->", 1)
    return f"{before}<!-- table -->\n\n{table()}\n\n<!-- end of table -->{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))

"""What the tiny models of `tests.tiny_families` and `tests.tiny_mrope` are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.tiny_models import loud, tiny_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
ENDS = ("<s>", "</s>", "<pad>", "<unk>")
SIGLIP = SHAPE | {"image_size": 56, "patch_size": 14}


def chat_template(image: str) -> str:
    """One for all families that differ only in the token of an image."""
    return (
        "<s>{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}"
        + image
        + "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )


def text_config(tokenizer: Any, **special: Any) -> dict[str, Any]:
    base = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer) + 8}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return base | ids | {"max_position_embeddings": 2048, "rope_parameters": ROPE} | special


def plain_tokenizer(*special: str, **roles: str) -> Any:
    return tiny_tokenizer(
        (*ENDS, *special), "<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **roles
    )


def save(path: Path, processor: Any, config: Any) -> Path:
    from transformers import AutoModelForImageTextToText

    processor.save_pretrained(path)
    model = loud(AutoModelForImageTextToText.from_config(config))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(path)
    turn_experts(path)
    return path


def turn_experts(folder: Path) -> None:
    """Experts of Qwen3-VL as the files on the hub have them; transformers writes a model of its own making otherwise."""
    if "Qwen3VLMoe" not in (folder / "config.json").read_text():
        return
    weights = load_file(folder / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if "mlp.experts" in k else v for k, v in weights.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})

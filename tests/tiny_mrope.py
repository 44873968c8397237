"""Tiny, randomly initialised models whose positions have three dimensions (M-RoPE): Qwen's and GLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_models import QWEN_SPECIAL, QWEN_TEMPLATE, tiny_tokenizer
from tests.tiny_parts import EXPERTS, ROPE, save, text_config


def _qwen(path: Path, model_type: str, vision: dict[str, Any], text: dict[str, Any], patch: int) -> Path:
    from transformers import AutoConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = tiny_tokenizer(QWEN_SPECIAL, None, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    pixels = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
    sizes = {"size": pixels, "patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen2VLProcessor if model_type == "qwen2_vl" else Qwen3VLProcessor
    common = {
        "depth": 2,
        "num_heads": 4,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = AutoConfig.for_model(
        model_type,
        text_config=text_config(tokenizer) | text,
        vision_config=common | vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    made = processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
    )
    return save(path, made, config)


def qwen2_vl(path: Path) -> Path:
    rope = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
    return _qwen(path, "qwen2_vl", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, rope, 14)


QWEN3_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
QWEN3_ROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}}


def qwen3_vl(path: Path) -> Path:
    """Features of two vision layers go into the first two layers of three: what comes behind the last would not matter."""
    return _qwen(path, "qwen3_vl", QWEN3_VISION, QWEN3_ROPE | {"num_hidden_layers": 3}, 16)


def qwen3_vl_moe(path: Path) -> Path:
    text = QWEN3_ROPE | EXPERTS | {"num_hidden_layers": 3}
    return _qwen(path, "qwen3_vl_moe", QWEN3_VISION, text, 16)


def _qwen3_5(path: Path, model_type: str, **special: Any) -> Path:
    vision = {key: value for key, value in QWEN3_VISION.items() if key != "deepstack_visual_indexes"}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text = {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_value_heads": 4,
    }
    rope = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}}
    return _qwen(path, model_type, vision, rope | linear | text | special, 16)


def qwen3_5(path: Path) -> Path:
    """Three layers in four are gated delta nets."""
    return _qwen3_5(path, "qwen3_5")


def qwen3_5_moe(path: Path) -> Path:
    """With an expert beside the others that all tokens see."""
    return _qwen3_5(path, "qwen3_5_moe", shared_expert_intermediate_size=32, **EXPERTS)


GLM_SPECIAL = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
)  # fmt: skip
GLM_TEMPLATE = (  # GLM-4.1V's own, without its branches for tools, thoughts and videos
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GLM_ROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}


def _glm(path: Path, model_type: str, version: str, text: dict[str, Any]) -> Path:
    """Images of 56x56 to 112x112 pixels become 4 to 16 tokens; for their processor an image has two frames."""
    import transformers as hf
    from transformers import AutoConfig

    tokenizer = tiny_tokenizer(GLM_SPECIAL, None, eos_token="<|user|>", pad_token="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids
    sizes = {"size": {"shortest_edge": 2 * 56**2, "longest_edge": 2 * 112**2}, "patch_size": 14}
    processor = getattr(hf, f"{version}Processor")(
        image_processor=getattr(hf, f"{version}ImageProcessor")(**sizes),
        tokenizer=tokenizer,
        video_processor=getattr(hf, f"{version}VideoProcessor")(**sizes),
        chat_template=GLM_TEMPLATE,
    )
    vision = {"depth": 2, "num_heads": 4, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    config = AutoConfig.for_model(
        model_type,
        text_config=text_config(tokenizer, num_attention_heads=2, num_key_value_heads=1, head_dim=16) | text,
        vision_config=vision | {"patch_size": 14, "image_size": 112},
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    return save(path, processor, config)


def glm4v(path: Path) -> Path:
    return _glm(path, "glm4v", "Glm4v", GLM_ROPE)


def glm4v_moe(path: Path) -> Path:
    """The first layer is dense; beside the experts that are chosen, one that is not."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _glm(path, "glm4v_moe", "Glm4v", GLM_ROPE | experts)


def glm46v(path: Path) -> Path:
    return _glm(path, "glm46v", "Glm46V", GLM_ROPE)

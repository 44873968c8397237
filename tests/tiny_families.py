"""Tiny, randomly initialised models of many architectures, beside those in `tests.tiny_models`.

Only what makes an architecture special is spelled out: how it cuts images into tokens, and its attention.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_models import QWEN_SPECIAL, QWEN_TEMPLATE, loud, tiny_idefics3, tiny_llava, tiny_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
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


def _text(tokenizer: Any, **special: Any) -> dict[str, Any]:
    base = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer) + 8}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return base | ids | {"max_position_embeddings": 2048, "rope_parameters": ROPE} | special


def _plain_tokenizer(*special: str, **roles: str) -> Any:
    return tiny_tokenizer(
        (*ENDS, *special), "<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **roles
    )


def _save(path: Path, processor: Any, config: Any) -> Path:
    from transformers import AutoModelForImageTextToText

    processor.save_pretrained(path)
    model = loud(AutoModelForImageTextToText.from_config(config))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(path)
    return path


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
        text_config=_text(tokenizer) | text,
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
    return _save(path, made, config)


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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


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
        text_config=_text(tokenizer, num_attention_heads=2, num_key_value_heads=1, head_dim=16) | text,
        vision_config=vision | {"patch_size": 14, "image_size": 112},
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    return _save(path, processor, config)


def glm4v(path: Path) -> Path:
    return _glm(path, "glm4v", "Glm4v", GLM_ROPE)


def glm4v_moe(path: Path) -> Path:
    """The first layer is dense; beside the experts that are chosen, one that is not."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _glm(path, "glm4v_moe", "Glm4v", GLM_ROPE | experts)


def glm46v(path: Path) -> Path:
    return _glm(path, "glm46v", "Glm46V", GLM_ROPE)


def qwen3_5(path: Path) -> Path:
    """Three layers in four are gated delta nets."""
    return _qwen3_5(path, "qwen3_5")


def qwen3_5_moe(path: Path) -> Path:
    """With an expert beside the others that all tokens see."""
    return _qwen3_5(path, "qwen3_5_moe", shared_expert_intermediate_size=32, **EXPERTS)


def _gemma3(path: Path, window: int, **crops: Any) -> Path:
    """Layers in turn with a sliding window; the tokens of an image see each other in both directions."""
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    tokenizer = _plain_tokenizer(
        "<start_of_image>", "<end_of_image>", "<image_soft_token>",
        extra_special_tokens={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
        **crops,
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=size), tokenizer, chat_template("<start_of_image>"), image_seq_length=4
    )
    rope = {"sliding_attention": ROPE, "full_attention": ROPE | {"rope_theta": 1000.0}}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    text = _text(tokenizer, rope_parameters=rope, query_pre_attn_scalar=8, **layers)
    ids = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=text,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        tie_word_embeddings=False,
    )
    return _save(path, processor, config)


def gemma3(path: Path) -> Path:
    return _gemma3(path, 16)


def gemma3_crops(path: Path) -> Path:
    """Images that are not square are seen whole and in crops, each of more tokens than the window. Of what is on disk only
    the tokenizer's settings reach the processor's crops."""
    crops = {"pan_and_scan_min_crop_size": 32, "pan_and_scan_max_num_crops": 4}
    return _gemma3(path, 3, do_pan_and_scan=True, pan_and_scan_min_ratio_to_activate=1.2, **crops)


def smolvlm(path: Path) -> Path:
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = _plain_tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
        extra_special_tokens={
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
    )  # fmt: skip
    edges = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**edges),
        tokenizer,
        SmolVLMVideoProcessor(**edges),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    config = SmolVLMConfig(
        vision_config=SHAPE | {"image_size": 28, "patch_size": 7},
        text_config=_text(tokenizer) | {"model_type": "llama"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return _save(path, processor, config)


def _llava_like(path: Path, kind: str) -> Path:
    """Tiles of 56x56 pixels beside a small picture of the whole image."""
    import transformers as hf
    from transformers import AutoConfig

    tokenizer = _plain_tokenizer("<image>", "<video>", padding_side="left")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    square = {"height": 56, "width": 56}
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_grid_pinpoints": pinpoints}
    processor: Any
    if kind == "llava_next":
        image_processor = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        processor = hf.LlavaNextProcessor(
            image_processor, tokenizer, 14, "default", chat_template("<image>"), num_additional_image_tokens=1
        )
        vision = {"model_type": "clip_vision_model", "projection_dim": 32} | SIGLIP | {"num_hidden_layers": 3}
        text = {"model_type": "llama"}
    else:
        pinpoints.append([224, 224])  # 16 tiles, whose features are scaled down to those of nine
        image_processor = hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints)
        processor = hf.LlavaOnevisionProcessor(
            image_processor,
            tokenizer,
            hf.LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=chat_template("<image>"),
        )
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | SIGLIP
        text = {"model_type": "qwen2"}
        ids["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    config = AutoConfig.for_model(
        kind, vision_config=vision, text_config=_text(tokenizer) | text, tie_word_embeddings=False, **ids
    )
    return _save(path, processor, config)


def llava_next(path: Path) -> Path:
    return _llava_like(path, "llava_next")


def llava_onevision(path: Path) -> Path:
    return _llava_like(path, "llava_onevision")


def _pixtral_like(path: Path, kind: str) -> Path:
    """Images of any size, a token for the end of each row of patches."""
    import transformers as hf
    from transformers import AutoConfig

    tokenizer = _plain_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    merge = 2 if kind == "mistral3" else 1
    image_processor = hf.PixtralImageProcessor(
        size={"longest_edge": 112}, patch_size={"height": 14 * merge, "width": 14 * merge}
    )
    processor = hf.PixtralProcessor(
        image_processor, tokenizer, 14, merge, chat_template("[IMG]"), "[IMG]", "[IMG_BREAK]", "[IMG_END]"
    )
    vision = {
        "model_type": "pixtral",
        "head_dim": 8,
        "image_size": 112,
        "patch_size": 14,
        "rope_theta": 100.0,
    }
    special = {"spatial_merge_size": 2} if kind == "mistral3" else {"vision_feature_select_strategy": "full"}
    config = AutoConfig.for_model(
        kind,
        vision_config=SHAPE | vision,
        text_config=_text(tokenizer) | {"model_type": "mistral", "sliding_window": None},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **special,
    )
    return _save(path, processor, config)


def pixtral(path: Path) -> Path:
    """LLaVA's code with Pixtral's tower."""
    return _pixtral_like(path, "llava")


def mistral3(path: Path) -> Path:
    return _pixtral_like(path, "mistral3")


def _internvl(path: Path, text: dict[str, Any]) -> Path:
    """One to four tiles of 28x28 pixels, and one of the whole image."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    special = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _plain_tokenizer(*special.values(), extra_special_tokens=special)
    size = {"height": 28, "width": 28}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    config = InternVLConfig(
        vision_config=SHAPE | {"image_size": [28, 28], "patch_size": [7, 7]},
        text_config=_text(tokenizer) | text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return _save(path, processor, config)


def internvl(path: Path) -> Path:
    return _internvl(path, {"model_type": "qwen2"})


def internvl_qwen3(path: Path) -> Path:
    """InternVL3.5."""
    return _internvl(path, {"model_type": "qwen3"})


def internvl_qwen3_moe(path: Path) -> Path:
    return _internvl(path, {"model_type": "qwen3_moe"} | EXPERTS)


def lfm2_vl(path: Path) -> Path:
    """Layers with short convolutions beside attention; patches of NaFlex images, padded."""
    from transformers import Lfm2VlConfig, Lfm2VlImageProcessor, Lfm2VlProcessor

    special = {
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }  # fmt: skip
    tokenizer = _plain_tokenizer(*special.values(), extra_special_tokens=special)
    image_processor = Lfm2VlImageProcessor(
        do_image_splitting=False,
        min_image_tokens=4,
        max_image_tokens=16,
        encoder_patch_size=14,
        max_num_patches=64,
    )
    processor = Lfm2VlProcessor(image_processor, tokenizer, chat_template("<image>"))
    text = _text(
        tokenizer, layer_types=["conv", "full_attention"], block_ff_dim=64, block_auto_adjust_ff_dim=False
    )
    config = Lfm2VlConfig(
        vision_config=SHAPE | {"patch_size": 14, "num_patches": 64, "vision_use_head": False},
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return _save(path, processor, config)


def paligemma(path: Path) -> Path:
    """Has no chat template, and its prompt sees itself in both directions."""
    from transformers import PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = _plain_tokenizer("<image>")
    image_processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": 32, "vision_use_head": False},
        text_config=_text(tokenizer) | {"model_type": "gemma"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return _save(path, processor, config)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "glm46v": glm46v,
    "gemma3": gemma3,
    "gemma3_crops": gemma3_crops,
    "smolvlm": smolvlm,
    "idefics3": tiny_idefics3,
    "llava": tiny_llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "internvl": internvl,
    "internvl_qwen3": internvl_qwen3,
    "internvl_qwen3_moe": internvl_qwen3_moe,
    "lfm2_vl": lfm2_vl,
    "paligemma": paligemma,
}
"""Name -> writes a model of that architecture into a folder and returns the folder."""

WORKING = tuple(name for name in FAMILIES if name != "paligemma")
"""Those that a policy can be: the other has no chat template."""

"""Tiny, randomly initialised captioners of three architectures, as the folders that the hub would deliver.

Their weights are large enough that a shifted position, a missing image or a wrong pad changes log-probs
by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from balcap.types import CaptionBatch, Rollouts

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 0123456789 times!",
    "A red circle lies to the left of a small blue square on a grey background.",
    "Describe the image. What is this? Please describe everything that you can see in detail.",
    "USER: ASSISTANT: system user assistant You are a helpful assistant.",
] * 20

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

QWEN_TEMPLATE = (  # Qwen2.5-VL's own, without its branches for tools and videos
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAVA_SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

LLAVA_TEMPLATE = (  # LLaVA-1.5's own: USER: <image>\n{question} ASSISTANT:
    "{% for message in messages %}{{ message['role'].upper() + ': '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

PLAIN_IMAGE = {
    "gemma3": "<start_of_image>",
    "gemma3_crops": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>",
    "internvl_qwen3": "<IMG_CONTEXT>",
    "internvl_qwen3_moe": "<IMG_CONTEXT>",
    "pixtral": "[IMG]",
    "mistral3": "[IMG]",
} | dict.fromkeys(("smolvlm", "llava_next", "llava_onevision", "lfm2_vl"), "<image>")
"""The token of an image in the families whose prompts `chat_template` writes."""

IDEFICS3_SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
)

IDEFICS3_TEMPLATE = (  # Idefics3's own, for one turn
    "<s>{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tiny_tokenizer(special: Sequence[str], bos: str | None, **roles: str) -> Any:
    """Byte-level BPE of 320 words; with a `bos`, every text begins with it, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        roles["bos_token"] = bos
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special), model_max_length=2048, **roles
    )


def loud(model: Any) -> Any:
    """Weights of about 1/sqrt(fan in), so that every part of the input matters to every logit; states of delta nets last for
    tens of tokens."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("A_log"):
            parameter.data.copy_(torch.linspace(0.02, 0.2, len(parameter)).log())
    model.lm_head.weight.data.mul_(2)
    return model


def tiny_qwen(path: Path) -> Path:
    """A Qwen2.5-VL whose images of 56x56 to 112x112 pixels become 4 to 16 tokens."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = tiny_tokenizer(QWEN_SPECIAL, None, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    pixels = {"shortest_edge": 56**2, "longest_edge": 112**2}
    sizes = {"size": pixels, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(path)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer) + 8,  # the hub's models have more rows than words, too
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = loud(Qwen2_5_VLForConditionalGeneration(config))
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(path)
    return path


def tiny_llava(path: Path) -> Path:
    """A LLaVA-1.5 whose images, cropped to 56x56 pixels, become 16 tokens."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tiny_tokenizer(
        LLAVA_SPECIAL, "<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in LLAVA_SPECIAL}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shape, num_hidden_layers=3, image_size=56, patch_size=14, projection_dim=32
        ),
        text_config=LlamaConfig(
            **shape,
            num_hidden_layers=2,
            vocab_size=len(tokenizer) + 8,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ),
        image_token_index=ids["<image>"],
        image_seq_length=16,
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    model = loud(LlavaForConditionalGeneration(config))
    model.generation_config.bos_token_id = ids["<s>"]
    model.generation_config.eos_token_id = ids["</s>"]
    model.generation_config.pad_token_id = ids["<pad>"]
    model.save_pretrained(path)
    return path


def tiny_idefics3(path: Path) -> Path:
    """An Idefics3, which this project does not know: tiles of 28x28 pixels, 4 tokens each, up to 4 a side and one of
    the whole image, so that images differ in their number of tiles."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokenizer = tiny_tokenizer(IDEFICS3_SPECIAL, "<s>", eos_token="<end_of_utterance>", pad_token="<pad>")
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 28})
    Idefics3Processor(
        image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE
    ).save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Idefics3Config(
        vision_config=shape | {"image_size": 28, "patch_size": 7},
        text_config=shape
        | {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer) + 8,
            "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    model = loud(Idefics3ForConditionalGeneration(config))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    return path


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random colours: unlike fine noise, they survive resizing."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)


def batch_of(
    images: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[str] | None = None
) -> CaptionBatch:
    """A batch of one image a row as the data module makes it; samples are called img0.png, img1.png, ..."""
    return batch_of_rows([(image,) for image in images], prompts, references)


def batch_of_rows(
    images: Sequence[tuple[Image.Image, ...]], prompts: Sequence[str], references: Sequence[str] | None = None
) -> CaptionBatch:
    """The same of rows of any number of images."""
    n = len(images)
    return CaptionBatch(
        sample_ids=[f"img{i}.png" for i in range(n)],
        images=images,
        image_bytes=[(b"",) * len(row) for row in images],
        prompts=prompts,
        references=references or ["A red circle."] * n,
    )


def several_images() -> CaptionBatch:
    """Rows of one, two and three images of different sizes; those of the second stand within its text."""
    sizes = [(64, 64), (150, 60), (70, 200), (60, 60), (112, 84), (56, 140)]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    prompts = ["What is this?", "Is <image> older than <image>, and why?", "Compare them."]
    return batch_of_rows([(images[0],), tuple(images[1:3]), tuple(images[3:])], prompts)


def mixed_batch() -> CaptionBatch:
    """Three images of different sizes and aspect, prompts of different lengths."""
    sizes = [(64, 64), (150, 60), (70, 200)]
    prompts = ["What is this?", "Describe the image in detail, please: what lies where?", "Go"]
    return batch_of([picture(w, h, seed=i) for i, (w, h) in enumerate(sizes)], prompts)


def rollouts_of(
    batch: CaptionBatch, lengths: Sequence[Sequence[int]], words: Iterable[int], seed: int = 0
) -> Rollouts:
    """Captions [B, G] of these token counts, drawn from `words`; what stands in the padding is junk."""
    B, G, T = len(lengths), len(lengths[0]), max(map(max, lengths))
    pool = torch.tensor(list(words))
    token_ids = pool[torch.randint(len(pool), (B, G, T), generator=torch.Generator().manual_seed(seed))]
    mask = torch.arange(T) < torch.tensor(lengths)[..., None]
    return Rollouts(
        batch=batch,
        captions=[[""] * G for _ in range(B)],
        token_ids=token_ids,
        completion_mask=mask,
        sampler_logps=torch.zeros(B, G, T),
        truncated=torch.zeros(B, G, dtype=torch.bool),
        lengths=mask.sum(-1),
        reference_lengths=torch.ones(B, dtype=torch.long),
    )


def prompt_by_hand(family: str, question: str) -> str:
    """What the hub's templates write, spelled out."""
    if family == "llava":
        return f"USER: <image>\n{question} ASSISTANT:"
    if family == "idefics3":
        return f"User:<image>{question}<end_of_utterance>\nAssistant:"
    if family.startswith("glm"):
        return f"[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>{question}<|assistant|>\n"
    if family in PLAIN_IMAGE:
        return f"<s>USER: {PLAIN_IMAGE[family]}{question}\nASSISTANT: "
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def own_logits(
    family: str, model: Any, processor: Any, image: Image.Image, question: str, ids: Tensor
) -> Tensor:
    """Logits [T, V] from which HF itself would draw the T tokens `ids`: one example, no padding."""
    text = prompt_by_hand(family, question)
    # Llama's tokenizers put one in front, some templates have it already.
    bos = {"add_special_tokens": False} if text.startswith("<s>") else {}
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt", **bos))
    width = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], inputs[key].new_zeros(1, len(ids))], 1)
    return model(**inputs).logits[0, width - 1 : -1]


class Alone:
    """The model as HF loads it, one example at a time."""

    def __init__(self, family: str, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.family = family
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def logps(self, rollouts: Rollouts, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies), each [B, G, T], 0 where masked."""
        logps, entropies = torch.zeros(rollouts.token_ids.shape), torch.zeros(rollouts.token_ids.shape)
        batch = rollouts.batch
        for b, lengths in enumerate(rollouts.lengths.tolist()):
            for g, n in enumerate(lengths):
                ids = rollouts.token_ids[b, g, :n]
                logits = own_logits(
                    self.family, self.model, self.processor, batch.images[b][0], batch.prompts[b], ids
                )
                all_logps = (logits / temperature).log_softmax(-1)
                logps[b, g, :n] = all_logps.gather(1, ids[:, None])[:, 0]
                entropies[b, g, :n] = torch.distributions.Categorical(logits=all_logps).entropy()
        return logps, entropies

"""CLIPScore on a tiny CLIP model: no judge, one forward for the captions of an image."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from balcap.judge import Judgments
from balcap.rewards import CLIPScore
from tests.tiny_models import mixed_batch, rollouts_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = len(vocabulary)
    text = {**small, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    return folder


def test_scores_are_the_cosines_of_features_and_need_no_judge(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    rollouts = rollouts_of(mixed_batch(), [[3, 1], [7, 2], [4, 6]], range(20, 300))
    captions = [["a cat", "a long caption of a dog " * 30], ["mats", "x"], ["red", "blue"]]
    rollouts = replace(rollouts, captions=captions)
    reward = CLIPScore(str(clip))
    assert reward.needs == ()
    scores = reward(rollouts, Judgments({}, [None] * 3))
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for b, (image,) in enumerate(rollouts.batch.images):
        for g, caption in enumerate(captions[b]):
            inputs = processor(text=[caption], images=image, return_tensors="pt", truncation=True)
            with torch.no_grad():
                out = model(**inputs)
            cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
            torch.testing.assert_close(scores[b, g], cosine.clamp(min=0)[0], atol=1e-5, rtol=1e-4)
    assert reward.compute().item() == pytest.approx(scores.mean().item())
    assert (scores > 0).any()
    assert len({round(s, 6) for s in scores.flatten().tolist()}) > 2
    copy.deepcopy(reward)  # validation has a copy of its own
    images = [image for (image,) in rollouts.batch.images]
    both = replace(rollouts.batch.select([0]), images=[(images[0], images[1])])
    singly = replace(rollouts, batch=rollouts.batch.select([0, 1]), captions=[captions[0]] * 2)
    mean = reward(singly, Judgments({}, [None] * 2)).mean(0)
    together = reward(replace(rollouts, batch=both, captions=captions[:1]), Judgments({}, [None]))
    torch.testing.assert_close(together, mean[None], atol=1e-6, rtol=1e-5)

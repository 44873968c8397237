"""Tokens of images, texts and reasoning: providers' own examples, and figures from bills."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.commands.estimate_tokens import area, reasoning_tokens, rule_for, text_counter

GOLDENS = [
    # 640 x 480: 2 x 1 tiles of 512; 2833 + 2 * 5667 = 14167
    ("openai/gpt-4o-mini", 640, 480, None, 14167),
    ("openai/gpt-4o-mini", 640, 480, "low", 2833),
    ("openai/gpt-4o-mini", 168, 168, None, 2833 + 5667),
    # 1024 x 1024 -> shorter side 768 -> 2 x 2 tiles; 85 + 4 * 170 = 765
    ("openai/gpt-4o", 1024, 1024, "high", 765),
    # 2048 x 4096 -> 1024 x 2048 -> 768 x 1536 -> 2 x 3 tiles; 85 + 6 * 170 = 1105
    ("openai/gpt-4o-2024-08-06", 2048, 4096, None, 1105),
    ("azure/gpt-4.1", 4096, 8192, "low", 85),
    # 640 x 480: 70 + 2 * 140
    ("openai/gpt-5", 640, 480, None, 350),
    ("openai/gpt-5.1", 640, 480, None, 350),
    # 640 x 480: 20 x 15 = 300 patches of 32; 300 * 1.2 = 360
    ("openai/gpt-5-mini", 640, 480, None, 360),
    ("openai/gpt-5-mini", 640, 480, "low", 360),
    # on bills: 512 x 512 -> 16 x 16 patches * 1.2 = 307.2; 2048 x 768 is at the limit of 1536 patches
    ("openai/gpt-5-mini", 512, 512, None, 308),
    ("openai/gpt-5-mini", 2048, 768, None, 1844),
    ("openai/gpt-5.4-mini", 4000, 4000, None, 1536 * 1.2),
    ("openai/gpt-5-nano", 640, 480, None, 450),
    # OpenAI's example: 1800 x 2400 -> 1056 x 1408 -> 33 x 44 = 1452 patches, which count here as the limit of 1536
    ("openai/gpt-4.1-mini", 1800, 2400, None, 1536 * 1.62),
    ("openai/gpt-4.1-nano", 1024, 1024, None, 1024 * 2.46),
    # on bills: 256 x 256 -> 64 * 1.2; 3840 x 2160 -> 120 x 68 * 1.2
    ("openai/gpt-6-luna", 256, 256, None, 77),
    ("openai/gpt-5.5", 3840, 2160, None, 9792),
    ("openai/gpt-5.4", 640, 480, None, 360),
    # 644 x 476 of 28 = 23 x 17, and the two marks around it
    ("hosted_vllm/Qwen/Qwen2.5-VL-72B-Instruct", 640, 480, None, 23 * 17 + 2),
    ("hosted_vllm/Qwen/Qwen2.5-VL-72B-Instruct", 20, 20, None, 4 + 2),
    ("hosted_vllm/Qwen/Qwen3-VL-8B-Instruct", 640, 480, None, 20 * 15 + 2),
    ("gemini/gemini-2.5-flash", 300, 300, None, 258),
    ("gemini/gemini-2.5-flash", 1600, 900, None, 3 * 2 * 258),
    ("vertex_ai/gemini-3-pro-preview", 640, 480, None, 1120),
    # 1092 x 1092 / 750 = 1589.95
    ("anthropic/claude-sonnet-4-5", 1092, 1092, None, 1590),
    ("anthropic/claude-sonnet-4-5", 4000, 3000, None, 1600),
]


@pytest.mark.parametrize(("model", "width", "height", "detail", "tokens"), GOLDENS)
def test_an_image_costs_what_its_provider_says(
    model: str, width: int, height: int, detail: str | None, tokens: float
) -> None:
    rule = rule_for(model)
    assert rule is not None
    assert rule(width, height, detail) == pytest.approx(tokens, abs=1)


def test_a_model_without_a_rule_is_counted_by_area() -> None:
    assert rule_for("somebody/their-model") is None
    assert area(750, 100, None) == 100


@given(
    model=st.sampled_from(sorted({golden[0] for golden in GOLDENS})),
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
)
def test_no_image_is_free_or_without_measure(model: str, width: int, height: int) -> None:
    rule = rule_for(model)
    assert rule is not None
    tokens = rule(width, height, None)
    assert 1 <= tokens <= 50_000
    # Lying or standing makes no difference.
    assert rule(height, width, None) == tokens


@pytest.mark.parametrize(
    ("model", "params", "tokens"),
    [
        ("openai/gpt-4o-mini", {}, 0),
        ("openai/gpt-5-mini", {}, 800),
        ("openai/gpt-5-mini", {"reasoning_effort": "minimal"}, 0),
        ("openai/gpt-5.4", {}, 0),
        ("openai/gpt-5", {"reasoning_effort": {"effort": "high"}}, 2500),
        ("anthropic/claude-sonnet-4-5", {}, 0),
        ("anthropic/claude-sonnet-4-5", {"thinking": {"type": "enabled", "budget_tokens": 500}}, 800),
        ("anthropic/claude-sonnet-4-5", {"thinking": {"type": "disabled"}}, 0),
        ("gemini/gemini-2.5-flash", {}, 800),
    ],
)
def test_reasoning_is_assumed_by_model_and_parameters(
    model: str, params: dict[str, Any], tokens: int
) -> None:
    assert reasoning_tokens(model, params) == tokens


def test_texts_are_counted_by_characters_or_by_a_tokenizer() -> None:
    assert text_counter(4.0)("123456789") == 2
    assert text_counter(None)("The dog is brown.") == 5

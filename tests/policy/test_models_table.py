"""docs/models.md says what is tested, and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.policy import Policy
from tests.tested_families import DOCUMENT, IN_VLLM, ONE_IMAGE, ROWS, SHARED, written
from tests.tiny_families import WORKING

SHOWN = dict(ROWS.values())


def test_the_table_is_todays() -> None:
    text = DOCUMENT.read_text()
    assert text == written(text), "python -m tests.tested_families"
    assert {*SHARED, *IN_VLLM} <= {*WORKING}
    assert {*WORKING} - {*SHOWN} == {"gemma3_crops"}  # Gemma 3 once more


@pytest.mark.parametrize("name", SHOWN)
def test_a_row_is_what_the_model_does(name: str, folder_of: Callable[[str], Path]) -> None:
    config = PolicyConfig(str(folder_of(name)), dtype="float32", lora=LoraSettings(r=2))
    policy = Policy.load(config, with_reference=False)
    assert policy.shared_prefix == (name in SHARED)
    assert policy.encoder.family.several_images == (name not in ONE_IMAGE)
    adapted = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in adapted)
    assert any("mlp" in n or "feed_forward" in n for n in adapted) == (SHOWN[name] != "attention")

"""``check`` with vLLM in the trainer's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.commands.check import CHECKS
from balcap.policy import LoraSettings
from balcap.rollout import VLLMInProcess
from tests.commands.test_check import failures, run_checks, state_of

SMALL = {"size": {"shortest_edge": 56**2, "longest_edge": 56**2}}


@pytest.mark.parametrize(
    ("options", "found"), [({}, set()), ({"mm_processor_kwargs": SMALL}, {"engine's prompts"})]
)
def test_vllm_passes_and_other_image_limits_are_found(
    options: dict[str, Any], found: set[str], folders: dict[str, Path]
) -> None:
    engine = VLLMInProcess(enforce_eager=True, options=options)
    results = run_checks(state_of(folders["qwen"], engine, lora=LoraSettings(r=8, alpha=16)))
    engine.close()
    assert list(results) == list(CHECKS)
    assert failures(results) == found, results
    if found:
        assert "model.policy.max_pixels" in results["engine's prompts"].found
    else:
        assert "equal one by one" in results["engine's prompts"].found

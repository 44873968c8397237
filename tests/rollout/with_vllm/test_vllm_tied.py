"""A head that shares the embedding's weight, as that of Qwen2.5-VL-3B: the embedded base policy has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not installed: make test-vllm")

from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy
from tests.rollout.with_vllm.support import Shared, draw, own_logps, update
from tests.wide_heads import write_wide_base


@pytest.fixture
def tied(tmp_path: Path) -> Policy:
    write_wide_base(tmp_path)
    policy = Policy.load(PolicyConfig(str(tmp_path), dtype="float32"), with_reference=False)
    assert policy.model.config.tie_word_embeddings
    return policy


def test_a_tied_head_follows_its_embedding(tied: Policy, shared: Shared) -> None:
    engine = shared.get(tied)
    for version in (1, 2):
        update(tied, seed=version)
        engine.sync(tied, version)
        rollouts = draw(engine, tied, 4, max_tokens=12)
        assert rollouts.weights_version == version
        torch.testing.assert_close(rollouts.sampler_logps, own_logps(tied, rollouts), atol=2e-3, rtol=0)
    shared.close()

"""`perf/rollout.py`: what large sizes measure, and that captions of other weights are not timed."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from perf.rollout import LIMIT, Case, mismatch, plan


def test_large_sizes_measure_what_they_say():
    case = plan(Namespace(size="3b", quick=False))
    assert (case.images, case.captions, case.max_tokens) == (256, 8, 250)
    assert case.pixels == 1024 * 28**2
    assert plan(Namespace(size="shapes", quick=False)).pixels is None


def test_captions_of_other_weights_are_beyond_the_limit(tmp_path: Path):
    from balcap.policy import PolicyConfig
    from balcap.policy.policy import Policy
    from balcap.rollout import Sampling
    from balcap.rollout.hf import HFGenerate
    from tests.tiny_models import mixed_batch, tiny_qwen

    tiny_qwen(tmp_path)
    policy = Policy.load(PolicyConfig(str(tmp_path), dtype="float32"), with_reference=False)
    engine, batch = HFGenerate(), mixed_batch()
    engine.attach(policy)
    torch.manual_seed(0)
    rollouts = engine.generate(batch, policy.encode(batch), 2, Sampling(max_tokens=8))
    case = Case("shapes")
    assert mismatch(case, policy, rollouts) < LIMIT
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    assert mismatch(case, policy, rollouts) > LIMIT

"""What `perf/update.py` measures on."""

from __future__ import annotations

import pytest

from perf.update import SMALL, plan
from perf.update_case import Case, build, work_of


@pytest.mark.parametrize("family", SMALL)
def test_a_small_model_of_each_family(family: str) -> None:
    case = Case(SMALL[family], 420, 8)
    assert case.family == family
    model, processor = build(case)
    assert model.config.model_type == family
    assert 29e6 < sum(parameter.numel() for parameter in model.parameters()) < 33e6
    work = work_of(case, model, processor)
    assert work.prompts.items[0]["input_ids"].shape[1] == pytest.approx(420, abs=15)
    assert work.rollouts.token_ids.shape[:2] == (1, 8)


def test_one_family_alone_is_one_case() -> None:
    from argparse import Namespace

    ((case, names),) = plan(Namespace(family="qwen3_5", quick=False))
    assert (case.family, case.captions, case.device) == ("qwen3_5", 8, "cpu")
    assert names == ["ours", "naive", "TRL"]

"""Operators that the host issues for an update: more of them than today fail here."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from perf.operators import of_update, of_vision, quick_case
from perf.update_variants import COMPILED, OURS

MOST = {COMPILED: 3452, OURS: 8895, "vision": 1117, "attention of vision": 60}
"""Of Qwen2.5-VL-3B's depth, two captions; a change that lowers one may lower it here."""


@pytest.mark.slow
def test_no_more_operators_than_today() -> None:
    pytest.importorskip("trl")
    case = quick_case()
    torch._dynamo.reset()
    counters.clear()
    found = {name: of_update(case, name).total() for name in (COMPILED, OURS)}
    assert counters["stats"]["unique_graphs"] == 2, "one of all layers, one of the head"
    vision = of_vision(case)
    found["vision"] = vision.total()
    found["attention of vision"] = sum(n for name, n in vision.items() if "scaled_dot_product" in name)
    assert {name: count for name, count in found.items() if count > 1.05 * MOST[name]} == {}
    assert found[COMPILED] > 36, "of each layer something is seen"

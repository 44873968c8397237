"""The optimizer's state in a checkpoint: by names, whoever numbered it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from balcap.trainer.checkpoint import name_optimizer_state


class Trained(torch.nn.Module):
    """A frozen weight, and two that are trained in another order than they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(2)) for name in "abc"})
        self.policy["a"].requires_grad_(False)


@pytest.mark.parametrize("sharded", [False, True])
def test_state_goes_to_the_weights_it_is_of(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    monkeypatch.setattr("balcap.trainer.checkpoint.is_sharded", lambda policy: sharded)
    module = Trained()
    optimizer = torch.optim.SGD([module.policy["c"], module.policy["b"]], lr=1.0)
    # c, b are numbers 0, 1 of the optimizer; a, b, c are numbers 0, 1, 2 of the module, sorted in the group
    c, b = (2, 1) if sharded else (0, 1)
    params: list[Any] = sorted([c, b])
    checkpoint = {
        "optimizer_states": [
            {"state": {c: {"kept": "c"}, b: {"kept": "b"}}, "param_groups": [{"params": params}]}
        ]
    }
    name_optimizer_state(checkpoint, module, optimizer)
    (state,) = checkpoint["optimizer_states"]
    assert state["state"] == {"policy.c": {"kept": "c"}, "policy.b": {"kept": "b"}}
    assert state["param_groups"] == [{"params": ["policy.c", "policy.b"]}]


def test_an_optimizer_that_keeps_nothing_and_ranks_that_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("balcap.trainer.checkpoint.is_sharded", lambda policy: True)
    module = Trained()
    optimizer = torch.optim.SGD([module.policy["b"], module.policy["c"]], lr=1.0)
    named = ["policy.b", "policy.c"]  # Lightning leaves names where there is no state
    checkpoint = {"optimizer_states": [{"state": {}, "param_groups": [{"params": named}]}]}
    name_optimizer_state(checkpoint, module, optimizer)
    assert checkpoint["optimizer_states"] == [
        {"state": {"policy.b": {}, "policy.c": {}}, "param_groups": [{"params": named}]}
    ]
    empty: dict[str, Any] = {"optimizer_states": [{}]}
    name_optimizer_state(empty, module, optimizer)
    assert empty == {"optimizer_states": [{}]}

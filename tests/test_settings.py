"""Every number of every setting: what cannot be meant is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch

from balcap.algorithms import CGDPO, GRPO, LengthMask, LinearLengthPenalty
from balcap.config import model_problems
from balcap.data.settings import DataSettings
from balcap.judge.images import ImagePolicy
from balcap.judge.settings import JudgeSettings
from balcap.module import BalCapModule
from balcap.policy import LoraSettings, PolicyConfig
from balcap.rewards import Reward
from balcap.rollout import HFGenerate, Sampling, VLLMInProcess, VLLMServer
from balcap.trainer.update import UpdateSettings
from callbacks.checkpoint import RunCheckpoint
from callbacks.progress import CaptionProgressBar
from callbacks.rollout_log import RolloutLog
from callbacks.trace import ChromeTrace
from tests.support import ROOT


class Brevity(Reward):
    name = "brevity"

    def score(self, rollouts: Any, judgments: Any) -> torch.Tensor:
        raise NotImplementedError


def _module(**settings: Any) -> BalCapModule:
    options: dict[str, Any] = {
        "policy": PolicyConfig(str(ROOT / "assets/shapes-base")),
        "rewards": [Brevity()],
    }
    return BalCapModule(**{**options, "weights": {"brevity": 1.0}, "reward_transforms": [], **settings})


SUBJECTS: list[tuple[type, dict[str, Any], Callable[[Any], Any]]] = [
    (UpdateSettings, {}, lambda one: one.problems()),
    (Sampling, {}, lambda one: one.problems()),
    (LoraSettings, {}, lambda one: one.problems()),
    (PolicyConfig, {"model": str(ROOT / "assets/shapes-base")}, lambda one: one.problems()),
    (DataSettings, {"predict_from": str(ROOT)}, lambda one: one.problems("predict")),
    (JudgeSettings, {"model": "openai/gpt-4o-mini", "params": {"api_base": "http://localhost"}},
     lambda one: one.problems()),
    (ImagePolicy, {}, lambda one: JudgeSettings("openai/gpt-4o-mini", images=one).problems()),
    (BalCapModule, {}, model_problems),
    (CGDPO, {}, lambda one: one.problems()),
    (GRPO, {}, lambda one: one.problems()),
    (LengthMask, {}, lambda one: one.problems(["linguistic"])),
    (LinearLengthPenalty, {}, lambda one: one.problems(["linguistic"])),
    (HFGenerate, {}, lambda one: []),
    (VLLMInProcess, {}, lambda one: []),
    (VLLMServer, {"urls": ["http://localhost"]}, lambda one: []),
    (RunCheckpoint, {}, lambda one: one.problems()),
    (RolloutLog, {}, lambda one: one.problems()),
    (CaptionProgressBar, {}, lambda one: one.problems()),
    (ChromeTrace, {}, lambda one: one.problems()),
]  # fmt: skip

MEANT = {
    "UpdateSettings": {"kl_coef": [0], "mismatch_threshold": [0], "max_skipped_updates": [0]},
    "LoraSettings": {"dropout": [0]},
    "DataSettings": {"val_size": [0], "num_workers": [0], "seed": [0]},
    "JudgeSettings": {
        "retries": [0], "timeout_s": [math.inf], "deadline_s": [math.inf], "budget_usd": [math.inf]
    },
    "BalCapModule": {"seed": [0, -1], "predict_temperature": [0]},
    "LengthMask": {"tau_low": [0], "tau_high": [math.inf]},
    "LinearLengthPenalty": {"slope": [0]},
    "VLLMInProcess": {"deadline_s": [math.inf]},
    "VLLMServer": {"deadline_s": [math.inf], "start_timeout_s": [math.inf]},
    "RunCheckpoint": {"keep": [0, -1]},
    "RolloutLog": {"max_images": [0]},
    "CaptionProgressBar": {"refresh_rate": [0], "plain_every_s": [0, math.inf]},
    "ChromeTrace": {"steps": [0]},
}  # fmt: skip
"""Of NaN, the infinities, -1 and 0: what is meant by someone who writes it. Everything else is refused."""


def _numbers() -> Iterator[Any]:
    for kind, options, problems in SUBJECTS:
        hints = get_type_hints(kind.__init__)
        for name, parameter in signature(kind).parameters.items():
            hint = hints.get(name)
            kinds = [k for k in (int, float) if k in (hint, *get_args(hint))]
            if kinds and get_origin(hint) is not dict and parameter.kind != Parameter.VAR_KEYWORD:
                bad = [math.nan, math.inf, -math.inf, -1.0, 0.0] if float in kinds else [-1, 0]
                for value in bad:
                    yield pytest.param(
                        kind, options, problems, name, value, id=f"{kind.__name__}.{name}={value}"
                    )


@pytest.mark.parametrize(("kind", "options", "problems", "name", "value"), _numbers())
def test_a_number_that_cannot_be_meant_is_refused(
    kind: type, options: dict[str, Any], problems: Callable[[Any], Any], name: str, value: float
) -> None:
    make = _module if kind is BalCapModule else kind
    try:
        found = list(problems(make(**{**options, name: value})))
    except ValueError as error:
        found = [str(error)]
    if value in MEANT.get(kind.__name__, {}).get(name, []):
        assert not [problem for problem in found if name in problem]
    else:
        assert [problem for problem in found if name in problem], found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_weight_is_a_number_that_is_not_negative(value: float) -> None:
    assert [p for p in model_problems(_module(weights={"brevity": value})) if "model.weights.brevity" in p]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_a_learning_rate_is_above_0(value: float) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=value)

    (problem,) = model_problems(_module(optimizer=optimizer))
    assert problem.startswith("model.optimizer")
    assert "lr" in problem or "learning rate" in problem


def test_a_schedule_that_cannot_be_made_is_refused() -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=-1)

    (problem,) = model_problems(_module(scheduler=schedule))
    assert problem.startswith("model.scheduler: ")


def test_vllm_that_is_not_installed_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("balcap.config.find_spec", lambda name: None)
    (problem,) = model_problems(_module(engine=VLLMInProcess()))
    assert problem.startswith("model.engine: ")

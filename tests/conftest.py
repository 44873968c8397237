"""Fixtures that several test folders share: a small embedded world on disk, and the command line in process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import ROOT
from tests.tiny_models import tiny_llava, tiny_qwen

if TYPE_CHECKING:
    from balcap.policy.policy import Policy

# How long an example takes, or is in the making, proves nothing on a machine that others use as well.
settings.register_profile("shared machines", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machines")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no price table from the network


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: at the end no process waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws weights or tokens draws the same ones in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``shapes.json`` and 60 pictures."""
    from examples.shapes.dataset import write_dataset

    out = tmp_path_factory.mktemp("world")
    write_dataset(out, images=60, seed=7)
    return out


@pytest.fixture
def fit_arguments(world: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a fit on the small world that takes seconds."""

    def arguments(command: str = "fit", **options: object) -> list[str]:
        defaults: dict[str, object] = {
            "run_dir": tmp_path / "run",
            "data.data": world / "shapes.json",
            "data.image_root": world,
            "data.cache_dir": tmp_path / "cache",
            "data.batch_size": 2,
            "data.val_size": 4,
            "data.val_batch_size": 4,
            "model.num_captions": 3,
            "model.sampling.max_tokens": 24,
            "model.policy.model": ROOT / "assets/shapes-base",
            "model.judge.cache": tmp_path / "judge.sqlite",
            "checkpoint.every_n_train_steps": 1,
            "report.enabled": False,  # five megabytes a run
            "trainer.max_steps": 2,
        }
        if command != "fit":
            del defaults["trainer.max_steps"]
        pairs = {**defaults, **{key.replace("__", "."): value for key, value in options.items()}}
        flags = [f"--{key}={value}" for key, value in pairs.items() if value is not None]
        return [command, "--config", str(ROOT / "configs/shapes.yaml"), *flags]

    return arguments


@pytest.fixture
def cli() -> Callable[[list[str]], None]:
    """``main(args)`` without the remark that arguments came from Python."""
    from main import main

    def run(args: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(args)

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"qwen": tiny_qwen(root / "qwen"), "llava": tiny_llava(root / "llava")}


@pytest.fixture(params=["qwen", "llava"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def load(folders: dict[str, Path], family: str) -> Callable[..., Policy]:
    """`load(with_reference=False, **config)`: the family's policy in float32."""

    from balcap.policy import PolicyConfig
    from balcap.policy.policy import Policy

    def load(with_reference: bool = False, **config: Any) -> Policy:
        settings = {"dtype": "float32"} | config
        return Policy.load(PolicyConfig(model=str(folders[family]), **settings), with_reference)

    return load

"""The tiny models are written once; a test loads its own copy, which takes milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import tiny_llava, tiny_qwen

from balcap.policy import PolicyConfig
from balcap.policy.policy import Policy


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

    def load(with_reference: bool = False, **config: Any) -> Policy:
        settings = {"dtype": "float32"} | config
        return Policy.load(PolicyConfig(model=str(folders[family]), **settings), with_reference)

    return load

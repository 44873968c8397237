"""Fixtures for vLLM in process.

The folder must not be called ``vllm``: pytest puts its parent on the path, where others would find it as the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rollout.with_vllm.support import Shared, wide
from tests.tiny_models import tiny_llava, tiny_qwen

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"qwen": wide(tiny_qwen(root / "qwen")), "llava": wide(tiny_llava(root / "llava"))}


@pytest.fixture(scope="module", params=["qwen", "llava"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    """`shared.get(policy, **init_args)`: an engine with this policy's weights."""
    engines = Shared()
    yield engines
    engines.close()

"""Which captioner it is: what captions of it depend on, so that those of another are never taken for its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from balcap.policy.config import PolicyConfig
from balcap.utils.files import file_state

_WEIGHTS = ("*.safetensors", "*.bin")


def identity(config: PolicyConfig, checkpoint: Path | None) -> dict[str, Any]:
    """Settings of the policy by their full names, and which weights they load, as JSON.

    Files count by size and time: reading them would take as long as loading them.

    Args:
        config: of the policy.
        checkpoint: whose weights are loaded into it; None for none.
    """
    folder = Path(config.model).expanduser()
    settings = asdict(config) | {"model": str(folder.resolve()) if folder.is_dir() else config.model}
    del settings["feature_cache"]  # captions are the same with and without
    return {
        **{f"model.policy.{name}": value for name, value in settings.items()},
        "weights": weights_state(folder),
        "ckpt_path": checkpoint and [str(checkpoint.resolve()), *file_state(checkpoint)],
    }


def weights_state(folder: str | Path) -> list[list[Any]]:
    """Of the files of weights in a folder, adapters' too; empty for a hub id."""
    folder = Path(folder).expanduser()
    return [file_state(path) for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]

"""Image features of a frozen vision tower on disk: the same in every epoch, every run, and on every rank.

A folder is all of it: what is read again soon, the operating system keeps in memory by itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from balcap.policy.config import PolicyError
from balcap.policy.families import ImageFeatures, base_of, family_of
from balcap.utils.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


class FeatureCache:
    """One file for the images of each row, ``<first two digits of its key>/<key>.safetensors``; several processes may share
    a folder.

    Args:
        folder: of the files; made when the first is written.
        model: whose tower makes the features; frozen.
        processor: that prepares its images.
    """

    def __init__(self, folder: str | Path, model: Any, processor: Any) -> None:
        self.folder = Path(folder).expanduser()
        self._model, self._processor = model, processor

    def key(self, images: Sequence[Image.Image], device: torch.device) -> str:
        """SHA-256 of all that the features of a row's images depend on: their pixels, how they are prepared, what
        computes."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        digest = hashlib.sha256(f"{self._tower} {autocast}".encode())
        for image in images:
            pixels = image.convert("RGB")
            digest.update(f" {pixels.size}".encode())
            digest.update(pixels.tobytes())
        return digest.hexdigest()

    def get(self, key: str, device: torch.device) -> ImageFeatures | None:
        """Features that were kept under a key, bit for bit; None where there are none, or their file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
            embeds = tensors.pop("embeds")
            extra = [tensors[f"extra.{i}"] for i in range(len(tensors))]
        except (SafetensorError, KeyError) as error:
            log.warning("%s is damaged (%s); it is made anew", path, error)
            return None
        return ImageFeatures(embeds.to(device), tuple(tensor.to(device) for tensor in extra))

    def put(self, key: str, features: ImageFeatures) -> None:
        """Keep features under a key.

        Raises:
            PolicyError: the folder cannot be written.
        """
        from safetensors.torch import save

        tensors = {"embeds": features.embeds} | {f"extra.{i}": one for i, one in enumerate(features.extra)}
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        try:
            with atomic_write(self._path(key), "wb") as file:
                file.write(data)
        except OSError as error:
            raise PolicyError(
                f"model.policy.feature_cache: {self.folder} cannot be written: {error}; make room, name another folder, or "
                "leave it null"
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    @cached_property
    def _tower(self) -> str:
        """SHA-256 of the processor's settings, the model's, and all weights that are not language.

        The weights are read, once for a run: a folder's files or a hub's name would not say that two towers are the same,
        as those of a model and of all that is tuned from it are.
        """
        import transformers

        model = base_of(self._model)
        family, config = family_of(model), model.config.to_dict()
        about = {
            "family": type(family).__name__,
            "model": {name: value for name, value in config.items() if not name.startswith("_")},
            "attention": model.config._attn_implementation,
            "processor": self._processor.image_processor.to_dict(),
            "transformers": transformers.__version__,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        language = family.language_prefixes(model)
        for name, weight in model.state_dict().items():
            if not name.startswith(language):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

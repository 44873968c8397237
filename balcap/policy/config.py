"""What a YAML says of the policy. Importing this loads nothing heavy."""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from balcap.utils.errors import UserError
from balcap.utils.run_folder import write_problem


class PolicyError(UserError, ValueError):
    """The policy cannot be loaded, or would not be trained as the config says."""


@dataclass
class LoraSettings:
    """A low-rank adapter on the policy (peft); the reference is then the policy with the adapter off.

    Args:
        r: rank, >= 1.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: in [0, 1). Above 0 the first update's importance ratio is no longer exactly 1.
        target_modules: names of the linear layers to adapt, or one regular expression over full names; null for
            those that the model's family usually adapts: all but the output head. Each name must match something.
            Layers of a frozen vision tower are left out whatever their name. Fused experts are no linear layers.
    """

    target_modules: str | list[str] | None = None
    r: int = 64
    alpha: int = 128
    dropout: float = 0.0

    def problems(self) -> Sequence[str]:
        """What cannot be, each with the key to change."""
        targets, problems = self.target_modules, []
        if targets is not None and not targets:
            problems.append("target_modules: LoRA has nothing to adapt; name linear layers, or leave it null")
        elif isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                problems.append(f"target_modules: {targets!r} is no regular expression: {error}")
        if self.r < 1:
            problems.append(f"r: {self.r} is no rank; use 1 or more")
        if self.alpha < 1:
            problems.append(f"alpha: {self.alpha} would scale the adapter away; use 1 or more")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: {self.dropout} is outside [0, 1)")
        return problems


@dataclass
class PolicyConfig:
    """The captioner that is trained.

    Args:
        model: HF hub id or folder of an image-text-to-text model (Qwen2.5-VL, LLaVA-1.5, ...); or folder of a LoRA
            adapter, such as a run's export: its base is loaded, and a fit trains the adapter on.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; float16 for validate and predict alone, since gradients underflow in it. Full tuning
            with small learning rates wants float32 weights together with `trainer.precision: bf16-mixed`: bfloat16
            weights round such updates away.
        lora: adapter to train instead of the weights; null tunes fully.
        load_in_4bit: base weights in NF4 with double quantisation (bitsandbytes); needs `lora`.
        freeze_vision: train the language model only. The tower and its projector stay as they are.
        gradient_checkpointing: recompute activations in backward: slower, far less memory. ``auto``: of as few layers
            as it takes for an update to fit the CUDA device; none on other devices.
        shared_prefix: forward each image and prompt once for its G captions, exactly; false forwards them with
            every caption, as do models that cannot take it.
        compile: make few large kernels of an update's decoder layers and head with ``torch.compile``, exactly; the first
            update takes about a minute longer. "auto" does so on GPUs, where updates wait for Python otherwise. Needs
            `shared_prefix`; a policy that is sharded over ranks is not compiled.
        feature_cache: folder that keeps what a frozen vision tower makes of each image, for later epochs and runs; ranks
            may share it, and it only grows. Needs `freeze_vision` and `shared_prefix`. null keeps nothing.
        attn_implementation: of transformers ("sdpa", "flash_attention_2", "eager"); null lets it choose.
        family: import path of a class of `balcap.policy.families.Family`, for an architecture that the package has no file
            for, or to take the place of one; null for those of the package.
        min_pixels: smallest image area in pixels that the processor scales to (Qwen-VL; GLM-V counts each pixel twice,
            as of two frames); null: the model's own.
        max_pixels: largest image area, likewise. Fewer pixels are fewer image tokens.
    """

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    lora: LoraSettings | None = None
    load_in_4bit: bool = False
    freeze_vision: bool = True
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    shared_prefix: bool = True
    compile: bool | Literal["auto"] = "auto"
    feature_cache: str | None = None
    attn_implementation: str | None = None
    family: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What peft keeps of the adapter (``adapter_config.json``) where `model` is the folder of one."""
        path = Path(self.model).expanduser()
        if (path / "config.json").is_file() or not (path / "adapter_config.json").is_file():
            return None
        return json.loads((path / "adapter_config.json").read_text())

    @property
    def base(self) -> PolicyConfig:
        """The same with the base of the adapter as its model; itself where `model` is no adapter."""
        if (adapter := self.adapter) is None:
            return self
        revision = self.revision or adapter.get("revision")
        return replace(self, model=adapter["base_model_name_or_path"], revision=revision)

    def problems(self) -> Sequence[str]:
        """What contradicts itself, each with the key to change; nothing is loaded."""
        problems: list[str] = []
        try:
            problems += self._adapter_problems(self.adapter or {})
            model = self.base.model
        except (ValueError, KeyError):
            problems.append(f"model: {self.model}/adapter_config.json cannot be read")
            model = self.model
        path = Path(model).expanduser()
        local = model.startswith((".", "/", "~")) or len(path.parts) > 2 or path.is_dir()
        if local and not (path / "config.json").is_file():
            whose = "" if model == self.model else f", the base of the adapter {self.model},"
            problems.append(f"model: {path}{whose} is no folder of an HF model (it has no config.json)")
        if self.lora is not None:
            problems += [f"lora.{problem}" for problem in self.lora.problems()]
        elif self.load_in_4bit and not problems and self.adapter is None:
            problems.append("load_in_4bit: 4-bit weights cannot be trained; set model.policy.lora as well")
        problems += self._feature_cache_problems()
        problems += self._family_problems()
        for name in ("min_pixels", "max_pixels"):
            area = getattr(self, name)
            if area is not None and area < 1:
                problems.append(f"{name}: {area} is no area in pixels; use 1 or more, or null")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            problems.append(
                f"min_pixels: {self.min_pixels} is above model.policy.max_pixels: {self.max_pixels}"
            )
        return [f"model.policy.{problem}" for problem in problems]

    def _family_problems(self) -> Sequence[str]:
        if self.family is None:
            return []
        try:
            if pkgutil.resolve_name(self.family).model_types:
                return []
            error: Exception | str = "it sets no model_types"
        except (ImportError, AttributeError, ValueError) as why:
            error = why
        return [f"family: {self.family} is no class of balcap.policy.families.Family that loads: {error}"]

    def _feature_cache_problems(self) -> Sequence[str]:
        if self.feature_cache is None:
            return []
        problems = []
        if not self.freeze_vision:
            problems.append(
                "feature_cache: a tower that is trained makes other features after each update; set "
                "model.policy.freeze_vision: true, or leave it null"
            )
        if not self.shared_prefix:
            problems.append(
                "feature_cache: separate sequences run the tower themselves; set model.policy.shared_prefix: true, or "
                "leave it null"
            )
        if why := write_problem(Path(self.feature_cache).expanduser()):
            problems.append(f"feature_cache: {self.feature_cache} cannot be made or written: {why}")
        return problems

    def _adapter_problems(self, adapter: dict[str, Any]) -> Sequence[str]:
        """What of an adapter that is there is not as the config says."""
        if adapter.get("peft_type", "LORA") != "LORA":
            return [
                f"model: {self.model} is an adapter of the kind {adapter['peft_type']}; only LoRA is supported"
            ]
        if not adapter or self.lora is None:
            return []
        there = (("r", "r"), ("alpha", "lora_alpha"))
        return [
            f"lora.{mine}: {getattr(self.lora, mine)} is not that of the adapter {self.model}, {adapter.get(its)}; "
            "use that, or leave lora null"
            for mine, its in there
            if getattr(self.lora, mine) != adapter.get(its)
        ]

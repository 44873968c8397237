"""Weights, adapters, and what is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from balcap.policy.checkpointing import prepare_checkpointing
from balcap.policy.config import LoraSettings, PolicyConfig, PolicyError
from balcap.policy.families import family_of, load_family

REFERENCE = "reference"
"""Name of the frozen adapter that a run's policy is compared with, where the run continues an adapter."""


@contextmanager
def _explained(config: PolicyConfig) -> Iterator[None]:
    """What transformers raises while it loads (no such model, a package that is missing, an attention that the model
    does not have), as a PolicyError."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, PolicyError):
            raise
        what = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        if "trust_remote_code" in str(error):
            what = "it brings Python code of its own, which is never run; use a model that transformers itself has"
        raise PolicyError(f"model.policy.model: {config.model} cannot be loaded: {what}") from error


def load_processor(config: PolicyConfig) -> Any:
    """The model's own processor, with the image area limits of the config.

    Raises:
        PolicyError: there is none, it has no chat template, or it does not scale images to an area.
    """
    from transformers import AutoProcessor

    with _explained(config):
        processor = AutoProcessor.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=False
        )
    if not hasattr(processor, "image_processor"):
        raise PolicyError(
            f"model.policy.model: {config.model} has no image processor; a policy is an image-text-to-text model"
        )
    if not getattr(processor, "chat_template", None):
        raise PolicyError(
            f"model.policy.model: {config.model} has no chat template, so nobody knows how its prompts are written; "
            "use a version that was tuned to follow instructions, or put chat_template.jinja beside its weights"
        )
    # These are Qwen2.5-VL's names; both are areas.
    edges = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    limits = {edge: area for edge, area in edges.items() if area}
    if not limits:
        return processor
    own = processor.image_processor.size
    if not edges.keys() <= dict(own).keys():
        raise PolicyError(
            f"model.policy.min_pixels, model.policy.max_pixels: the image processor of {config.model} does not "
            f"scale to an area (its size is {dict(own)}); leave both null"
        )
    size = dict(own) | limits
    if size["shortest_edge"] > size["longest_edge"]:
        raise PolicyError(
            f"model.policy.min_pixels: {size['shortest_edge']} is above model.policy.max_pixels: "
            f"{size['longest_edge']}; where one is null, it is the model's own"
        )
    processor.image_processor.size = type(own)(**size)
    return processor


def load_model(config: PolicyConfig) -> Any:
    """The weights as they are on disk or hub, frozen parts not yet marked."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    own = None if config.family is None else load_family(config.family)
    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "revision": config.revision, "trust_remote_code": False}
    options["attn_implementation"] = config.attn_implementation  # None: transformers chooses
    if config.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    with _explained(config):
        model = AutoModelForImageTextToText.from_pretrained(config.model, **options)
        if getattr(
            model, "peft_config", None
        ):  # transformers loads the base of an adapter by itself, and hides it
            raise ValueError(
                f"it is an adapter on the hub; download it (hf download {config.model} --local-dir FOLDER) "
                "and set model.policy.model: FOLDER"
            )
    if config.load_in_4bit:
        _leave_unpacked(model)
    _write_experts_as_read(model)
    _check_family(model, own, config)
    return model


def _write_experts_as_read(model: Any) -> None:
    """Experts of Qwen3-VL lie transposed in the files on the hub. transformers turns them as it loads, and not back as it
    saves, which other programs cannot load."""
    from transformers.core_model_loading import Transpose

    for conversion in getattr(model, "_weight_conversions", None) or ():
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Transpose):
                operation.check_dims = False  # a look at the model's own shape, which is what it turns from


def _leave_unpacked(model: Any) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes packs weights at their first use in inference; packed weights pass no
    gradient on, and an update comes after sampling."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def empty_model(config: PolicyConfig) -> Any:
    """As `load_model` on the meta device, where weights have a size and no numbers: ``config.json`` alone is read. None of
    them is in 4 bits.

    Raises:
        PolicyError: there is no such model, or the hub cannot be reached and nothing of it is here.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    own = None if config.family is None else load_family(config.family)
    with _explained(config), torch.device("meta"):
        settings = AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_config(
            settings, dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation
        )
    _check_family(model, own, config)
    return model


def _check_family(model: Any, own: Any, config: PolicyConfig) -> None:
    """PolicyError where the class that the config names is for other models."""
    if own is not None and family_of(model) is not own:
        raise PolicyError(
            f"model.policy.family: {config.family} is for {', '.join(own.model_types)}, {config.model} is a "
            f"{model.config.model_type}; leave it null, or add that to its model_types"
        )


def load_adapter(model: Any, config: PolicyConfig, with_reference: bool = False) -> Any:
    """A PeftModel of the base model `model` with the adapter that `config` names, to be trained on.

    Args:
        model: of `load_model`, for ``config.base``.
        config: its `model` is the folder of the adapter.
        with_reference: load it a second time, frozen, for `as_reference`.

    Raises:
        PolicyError: it does not fit the model.
    """
    from peft import PeftModel

    with _explained(config), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # such an adapter would do nothing
        try:
            adapted = PeftModel.from_pretrained(model, config.model, is_trainable=True)
            if with_reference:
                adapted.load_adapter(config.model, REFERENCE)
                for module in adapted.modules():
                    if REFERENCE in (dropouts := getattr(module, "lora_dropout", {})):
                        dropouts[REFERENCE] = torch.nn.Identity()  # it would make the reference noisy
                adapted.set_adapter("default")
            return adapted
        except (UserWarning, RuntimeError) as error:
            raise ValueError(f"it is no adapter of {config.base.model}: {str(error)[:200]}") from error


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """`model`, a PeftModel, as the policy that the run started from: with the adapter that it continues, or with none."""
    own, flags = model.active_adapter, [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        if REFERENCE in model.peft_config:
            model.set_adapter(REFERENCE)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        model.set_adapter(own)
        for weight, flag in flags:  # peft makes all of an adapter trainable that it turns on
            weight.requires_grad_(flag)


def prepare(model: Any, config: PolicyConfig, with_reference: bool = False) -> Any:
    """Freeze, adapt and set up checkpointing; returns the model to train (a PeftModel with LoRA).

    Args:
        model: of `load_model`.
        config: that names an adapter to go on with, or how to make one, or neither.
        with_reference: see `load_adapter`.

    Raises:
        PolicyError: LoRA targets that match nothing, or a language model that would not be trained.
    """
    base, family = model, family_of(model)
    language = family.language_prefixes(base)
    if config.adapter is not None:
        model = load_adapter(model, config, with_reference)
    if config.freeze_vision:
        for name, parameter in base.named_parameters():
            if not name.startswith(language):
                parameter.requires_grad_(False)
    if config.adapter is None and config.lora is not None:
        layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        if config.freeze_vision:
            layers = [name for name in layers if f"{name}.".startswith(language)]
        model = _adapt(model, config.lora, layers, family.lora_targets(model, layers), config.revision)
    check_language_is_trained(family.language_model(base))
    prepare_checkpointing(model, config.gradient_checkpointing)
    return model


def _adapt(
    model: Any, lora: LoraSettings, layers: list[str], default: list[str], revision: str | None
) -> Any:
    """A PeftModel with adapters on those of `layers` (full names of what may be trained) that are wanted.

    Raises:
        PolicyError: peft adapts others. Of some mixtures of experts it takes names of linear layers for experts.
    """
    from peft import LoraConfig, get_peft_model

    chosen = default if lora.target_modules is None else _matching(lora.target_modules, layers)
    names = "|".join(map(re.escape, chosen))  # full names, as one expression: exact, and serialisable
    options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    options["revision"] = revision  # of the base, for whoever loads the adapter
    try:
        adapted = get_peft_model(model, LoraConfig(target_modules=f"(?:{names})", bias="none", **options))
        tuner: Any = adapted.base_model
        found = {*tuner.targeted_module_names, *tuner.targeted_parameter_names}
        if others := sorted(found ^ set(chosen)):
            raise ValueError(f"{others[0]} and {len(others) - 1} others differ")
    except ValueError as error:
        raise PolicyError(
            f"model.policy.lora.target_modules: peft cannot adapt just those layers of a {model.config.model_type} "
            f"({error}); name layers of attention, as q_proj"
        ) from error
    return adapted


def _matching(wanted: str | list[str], layers: list[str]) -> list[str]:
    """The layers that an expression matches, or that end in one of some names. PolicyError where one matches none."""
    patterns = {wanted: wanted} if isinstance(wanted, str) else {w: rf"(.*\.)?{re.escape(w)}" for w in wanted}
    matches = {w: [name for name in layers if re.fullmatch(pattern, name)] for w, pattern in patterns.items()}
    idle = [w for w, names in matches.items() if not names]
    if idle:
        endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise PolicyError(
            f"model.policy.lora.target_modules: {', '.join(map(repr, idle))} matches no linear layer of the model "
            f"that may be trained; those end in {', '.join(endings)}"
        )
    return [name for name in layers if any(name in names for names in matches.values())]


def check_language_is_trained(language_model: Any) -> None:
    """PolicyError where only the head or the vision tower would be: such a run learns next to nothing, silently."""
    linear = (m for m in language_model.modules() if isinstance(m, torch.nn.Linear))
    if not any(parameter.requires_grad for module in linear for parameter in module.parameters()):
        raise PolicyError(
            "model.policy.lora.target_modules, model.policy.freeze_vision: no linear layer of the language model "
            f"({type(language_model).__name__}) would be trained; leave target_modules null for all of them, or name some"
        )

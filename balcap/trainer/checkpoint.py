"""What of the policy a checkpoint holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from balcap.utils.errors import UserError


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep_trained(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Leave out what is frozen: it is in the base model, where it came from."""
    trained = trained_names(module)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def check_trained(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Refuse a checkpoint of something else, which non-strict loading would accept in silence.

    Raises:
        UserError: it holds other tensors than the config trains.
    """
    trained, there = trained_names(module), set(checkpoint["state_dict"])
    if trained != there:
        raise UserError(
            f"this checkpoint holds {len(there)} trained tensors, the config makes {len(trained)}, and "
            f"{len(trained ^ there)} differ (such as {sorted(trained ^ there)[0]}). Were model.policy.lora, "
            "freeze_vision or the base model changed? Resume with the config saved in the run folder"
        )

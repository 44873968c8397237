"""The trained policy as a folder that transformers or peft loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from balcap.judge import BudgetSpent
from balcap.utils.files import replaced_folder

if TYPE_CHECKING:
    from balcap.policy.policy import Policy


class ExportPolicy(Callback):
    """At the end of a fit, write weights (or the adapter) and processor in Hugging Face's format.

    A fit whose budget is spent has ended too.

    Full tuning: ``AutoModelForImageTextToText.from_pretrained(folder)``. LoRA: the adapter alone, for
    ``peft.PeftModel.from_pretrained(base, folder)``. All weights are safetensors.

    Args:
        enabled: whether to export.
        dirpath: set from the run folder.
    """

    def __init__(self, enabled: bool = True, dirpath: str | None = None) -> None:
        self.enabled, self.dirpath = enabled, dirpath

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A spent budget ends the fit as planned, too."""
        if isinstance(exception, BudgetSpent) and trainer.state.fn == "fit" and trainer.global_step > 0:
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "export")
        module: Any = pl_module
        state = module.policy.whole_state()  # of all ranks
        if trainer.is_global_zero:
            export(module.policy, folder, state)


def export(policy: Policy, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write what a fit exports of this policy; an older `folder` is replaced.

    Args:
        policy: of the fit.
        folder: where it goes.
        state: of a sharded policy, its `whole_state`.
    """
    for adapter in getattr(policy.model, "peft_config", {}).values():  # it is read from anywhere
        base = Path(adapter.base_model_name_or_path or "")
        adapter.base_model_name_or_path = str(base.resolve()) if base.is_dir() else str(base)
    with replaced_folder(folder) as new:
        policy.save_pretrained(new, state_dict=state)
        policy.encoder.processor.save_pretrained(new)

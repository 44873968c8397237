"""Who makes the update that `perf/update.py` measures."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from balcap.algorithms import loss_normalizer, policy_loss
from balcap.policy.policy import Policy
from balcap.policy.prompts import PromptEncoder
from perf.update_case import QUESTION, Case, Work

OURS, COMPILED, NAIVE, TRL, COMPACT = "ours", "ours, compiled", "naive", "TRL", "TRL, captions only"
KEPT = "ours, compiled, nothing recomputed"


def twin(model: Any) -> Any:
    """A model of its own, to be patched at will, on the very same weights."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class Ours:
    """As in `balcap.trainer.update`, one micro-batch: log-probs and entropies, loss, backward.

    Args:
        model: the model of all variants.
        processor: its own.
        case: the settings.
        name: of the variant.
    """

    def __init__(self, model: Any, processor: Any, case: Case, name: str) -> None:
        model, self.case = twin(model), case
        if name == KEPT:
            model.gradient_checkpointing_disable()
        encoder = PromptEncoder(processor, model.config)
        compiled = name in (COMPILED, KEPT)
        self.policy = Policy(model, encoder, shared_prefix=name != NAIVE, compile=compiled)
        self.policy.model.train()

    def update(self, work: Work) -> Tensor:
        """One update, its gradients left on the weights; log-probs ``[1, G, T]``.

        Each update is a step: the image features that training keeps for a whole step are made anew.
        """
        work.prompts.features.clear()
        with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.autocast):
            logps, _ = self.policy.logps(work.rollouts, work.prompts, [0], entropy=True)
        advantages, mask = (x.to(logps.device) for x in (work.advantages, work.rollouts.completion_mask))
        normalizer = loss_normalizer(work.rollouts.completion_mask, "token_mean")
        policy_loss(logps, logps.detach(), advantages, mask, normalizer=normalizer).loss.backward()
        return logps.detach()


class Trl:
    """GRPOTrainer's own training step on prepared inputs.

    Args:
        model: the model of all variants.
        processor: its own.
        case: the settings.
        compact: give the captions' positions alone to the head, as TRL does on CUDA.
    """

    def __init__(self, model: Any, processor: Any, case: Case, compact: bool = False) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.compact, self.device = compact, case.device
        self.folder = tempfile.TemporaryDirectory()
        config = GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=case.device == "cpu",
            bf16=case.autocast,
            gradient_checkpointing=False,  # the model has it or has it not, as ours
            per_device_train_batch_size=case.captions,
            num_generations=case.captions,
            max_completion_length=case.longest,
            loss_type="dapo",
            beta=0.0,
            report_to=[],
        )
        self.trainer: Any = GRPOTrainer(
            twin(model),
            reward_funcs=lambda completions, **_: [None] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": QUESTION}]),
            processing_class=processor,
        )
        self.trainer._prepare_inputs = lambda inputs: inputs  # generation and rewards are done
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self.logps_of = self.trainer._get_per_token_logps_and_entropies
        self.trainer._get_per_token_logps_and_entropies = self._keep_logps
        self.inputs = functools.cache(self._inputs)

    def _inputs(self, work: Work) -> dict[str, Any]:
        """What `GRPOTrainer._generate_and_score_completions` would return: one row per caption."""
        G, mask = work.rollouts.num_captions, work.rollouts.completion_mask.flatten(0, 1)
        prompt = work.prompts.inputs([0], G, self.device)
        completion = work.rollouts.token_ids.flatten(0, 1).masked_fill(~mask, work.prompts.pad_token_id)
        if "mm_token_type_ids" in prompt:
            kinds = prompt["mm_token_type_ids"]
            prompt["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(mask.shape)], 1)
        return {
            "prompt_ids": prompt.pop("input_ids"),
            "prompt_mask": prompt.pop("attention_mask"),
            "completion_ids": completion.to(self.device),
            "completion_mask": mask.long().to(self.device),
            "advantages": work.advantages.flatten().to(self.device),
            "num_items_in_batch": mask.sum().to(self.device),
            "num_images": [1] * G,
            **prompt,
        }

    def _keep_logps(self, *args: Any, **kwargs: Any) -> Any:
        found = self.logps_of(*args, **kwargs)
        self.logps = found[0].detach()
        return found

    def update(self, work: Work) -> Tensor:
        """One update, its gradients left on the weights; log-probs ``[1, G, T]``, 0 where masked."""
        head = mock.patch(
            "trl.trainer.utils._use_triton", return_value=True
        )  # the kernels have another switch
        with head if self.compact else nullcontext():
            self.trainer.training_step(self.trainer.model, dict(self.inputs(work)), None)
        mask = work.rollouts.completion_mask.to(self.logps.device)
        return self.logps.view(mask.shape).masked_fill(~mask, 0)


def variant(name: str, model: Any, processor: Any, case: Case) -> Any:
    """The variant of this name, on a twin of the model."""
    if name in (TRL, COMPACT):
        return Trl(model, processor, case, compact=name == COMPACT)
    return Ours(model, processor, case, name)

"""Who makes the update that `perf/update.py` measures, and whether they agree."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import tempfile
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from balcap.algorithms import loss_normalizer, policy_loss
from balcap.policy.families import ImageFeatures
from balcap.policy.policy import Policy
from balcap.policy.prompts import PromptEncoder, Prompts
from perf.report import installed
from perf.update_case import QUESTION, Case, Work

OURS, NAIVE, TRL, COMPACT, ALONE = "ours", "naive", "TRL", "TRL, captions only", "alone"


def twin(model: Any) -> Any:
    """A model of its own, to be patched at will, on the very same weights."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class Ours:
    """As in `balcap.trainer.update`, one micro-batch: log-probs and entropies, loss, backward."""

    def __init__(self, model: Any, processor: Any, shared_prefix: bool) -> None:
        model = twin(model)
        self.policy = Policy(model, PromptEncoder(processor, model.config), shared_prefix=shared_prefix)
        self.policy.model.train()
        assert self.policy.shared_prefix == shared_prefix, "this model cannot share a prefix"

    def prompts(self, work: Work) -> Prompts:
        """Without image features, which training keeps for a whole step: here each update is a step."""
        work.prompts.features.clear()
        return work.prompts

    def logps(self, work: Work) -> Tensor:
        """Log-probs ``[1, G, T]``, and entropies that nobody asked for."""
        return self.policy.logps(work.rollouts, self.prompts(work), [0], entropy=True)[0]

    def update(self, work: Work) -> None:
        """One update, its gradients left on the weights."""
        logps = self.logps(work)
        advantages, mask = (x.to(logps.device) for x in (work.advantages, work.rollouts.completion_mask))
        normalizer = loss_normalizer(work.rollouts.completion_mask, "token_mean")
        policy_loss(logps, logps.detach(), advantages, mask, normalizer=normalizer).loss.backward()

    def flops(self, work: Work) -> float | None:
        """Model FLOPs of one update; None for an architecture whose FLOPs are not known."""
        return self.policy.flops(work.rollouts, self.prompts(work), [0])


class Alone(Ours):
    """The captions without their prompt, of which the last token is left: it predicts their first."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor, True)

    def prompts(self, work: Work) -> Prompts:
        """One token and the features of no image."""
        width = self.policy.model.config.get_text_config().hidden_size
        last = {"input_ids": work.prompts.items[0]["input_ids"][:, -1:]}
        features = {0: ImageFeatures(torch.zeros(0, width, device=self.policy.device))}
        return Prompts([last], work.prompts.pad_token_id, features=features)


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
            bf16=False,  # no autocast: the weights have the dtype, as ours do
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
        self.model = self.trainer.model.train()
        if case.device == "cuda" and installed("liger_kernel"):
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.model, {"fused_linear_cross_entropy": False})  # the form that TRL takes
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

    def logps(self, work: Work) -> Tensor:
        """Log-probs ``[1, G, T]``, 0 where masked."""
        given = dict(self.inputs(work))
        del given["advantages"], given["num_items_in_batch"]
        ids = torch.cat([given.pop("prompt_ids"), given["completion_ids"]], 1)
        seen = torch.cat([given.pop("prompt_mask"), given.pop("completion_mask")], 1)
        keep = given.pop("completion_ids").shape[1]
        with self._head():
            logps = self.trainer._get_per_token_logps_and_entropies(self.model, ids, seen, keep, **given)[0]
        mask = work.rollouts.completion_mask.to(logps.device)
        return logps.view(mask.shape).masked_fill(~mask, 0)

    def update(self, work: Work) -> None:
        """One update, its gradients left on the weights."""
        with self._head():
            self.trainer.training_step(self.model, dict(self.inputs(work)), None)

    def _head(self) -> AbstractContextManager[Any]:
        """Which positions go through the head; TRL's kernels have a switch of their own."""
        patched = mock.patch("trl.trainer.utils._use_triton", return_value=True)
        return patched if self.compact else nullcontext()


def variant(name: str, model: Any, processor: Any, case: Case) -> Any:
    """The variant of this name, on a twin of the model."""
    if name in (OURS, NAIVE):
        return Ours(model, processor, shared_prefix=name == OURS)
    if name == ALONE:
        return Alone(model, processor)
    return Trl(model, processor, case, compact=name == COMPACT)


def agreement(variants: dict[str, Any], model: Any, work: Work) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of log-probs and gradients of ours and TRL's, each against naive, by variant."""

    def measured(name: str) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            logps = variants[name].logps(work).float().cpu()
        clear(model)
        variants[name].update(work)
        gradients = [p.grad.cpu() for p in model.parameters() if p.requires_grad and p.grad is not None]
        clear(model)
        return logps, gradients

    wanted_logps, wanted = measured(NAIVE)
    size = sum(float(gradient.double().square().sum()) for gradient in wanted)
    errors, gradient_errors = {}, {}
    for name in (OURS, TRL, COMPACT):
        if name in variants:
            logps, gradients = measured(name)
            errors[name] = float((logps - wanted_logps).abs().max())
            squares = ((g - w).double().square().sum() for g, w in zip(gradients, wanted, strict=True))
            gradient_errors[name] = math.sqrt(float(sum(squares)) / size)
    return errors, gradient_errors


def clear(model: Any) -> None:
    """No gradients."""
    for parameter in model.parameters():
        parameter.grad = None

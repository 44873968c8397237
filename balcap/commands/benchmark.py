"""``python main.py test --config …``: benchmarks of the policy, of a checkpoint, and of other captioners beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader, IterableDataset

from balcap.policy.identity import identity
from callbacks.benchmark_eval import POLICY

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from balcap.benchmarks.runner import BenchmarkRun
    from balcap.module import BalCapModule
    from balcap.policy import PolicyConfig
    from callbacks.benchmark_eval import BenchmarkEval


class _Runs(IterableDataset):
    """Benchmarks as the batches of a test loop: every rank gets all of them, and they share the images themselves."""

    def __init__(self, runs: Sequence[BenchmarkRun]) -> None:
        self.runs = runs

    def __iter__(self) -> Iterator[BenchmarkRun]:
        return iter(self.runs)


def run_test(
    trainer: Trainer, module: BalCapModule, evaluation: BenchmarkEval, checkpoint: Path | None
) -> None:
    """Run all benchmarks for all captioners, one captioner at a time, and write the table.

    Args:
        trainer: whose test loop it is.
        module: with the policy; others take its place.
        evaluation: says which benchmarks and captioners.
        checkpoint: of the policy's weights; None for the model as it is.
    """
    results = {}
    others = {name: with_model(module, model) for name, model in evaluation.models.items()}
    for name, own in {POLICY: module, **others}.items():
        weights = checkpoint if own is module else None
        runs = evaluation.runs(own, name, identity(own.policy_config, weights))
        loader = DataLoader(_Runs(runs), batch_size=None)
        path = weights and str(weights)
        trainer.test(own, loader, ckpt_path=path, verbose=False, weights_only=True)
        results[name] = own.benchmark_results
        del own.policy  # the next one needs its memory
        if trainer.is_global_zero:
            evaluation.write(results)
    if trainer.is_global_zero:
        evaluation.show(results)


def config_of(config: PolicyConfig, model: str) -> PolicyConfig:
    """Of another captioner, with the same precision."""
    return replace(config, model=model, revision=None, lora=None, min_pixels=None, max_pixels=None)


def with_model(module: BalCapModule, model: str) -> BalCapModule:
    """A module without weights yet, for another captioner with the same engine, precision and judge."""
    other = copy.deepcopy(module)
    other.policy_config = config_of(module.policy_config, model)
    other.judge = other.pipeline.judge = module.judge
    return other

"""One of two processes that take the same updates three ways: all data in this process, DDP, and FSDP2.

python -m tests.sharded_ranks WORK RANK    WORK/cases.json says which; what differs is in WORK/rank<RANK>.json
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from balcap.algorithms import cgdpo
from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.policy import Policy
from balcap.policy.sharding import Sharding, whole
from balcap.rollout.vllm.weights import trained_weights
from balcap.trainer.update import (
    OptimizerLoop,
    UpdateSettings,
    micro_batches,
    rows_with_nonzero_advantage,
    update,
)
from balcap.types import Rollouts
from tests.tiny_models import mixed_batch, rollouts_of

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("qwen", {}),
    "tower": ("qwen", {"freeze_vision": False}),
    "checkpointed": ("qwen", {"gradient_checkpointing": True, "freeze_vision": False}),
    "lora": ("qwen", {"lora": LoraSettings(r=4)}),
    "lora of tower and head": (
        "qwen",
        {"lora": LoraSettings(["q_proj", "down_proj", "lm_head", "qkv"], r=4), "freeze_vision": False},
    ),
    "tied": ("tied", {}),
    "tied lora": ("tied", {"lora": LoraSettings(r=4)}),
    "tied but for its weights": ("tied but for its weights", {}),
    "separate": ("qwen", {"shared_prefix": False}),
    "separate lora": ("qwen", {"shared_prefix": False, "lora": LoraSettings(r=4)}),
    "experts": ("experts", {}),
    "experts lora": ("experts", {"lora": LoraSettings(r=4)}),
    "llava": ("llava", {}),
    "llava tower": ("llava", {"freeze_vision": False}),
}
"""Kind of policy -> name of its folder, settings."""


def gather(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


@dataclass
class Way:
    """A policy with its optimizer, and how its processes work together."""

    policy: Policy
    ddp: Any = None
    alone: bool = False
    start: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]

    def loop(self) -> OptimizerLoop:
        def backward(loss: Tensor) -> None:
            if self.ddp is not None:
                prepare_for_backward(self.ddp, loss)
            loss.backward()

        def clip(norm: float) -> None:
            torch.nn.utils.clip_grad_norm_(self.trained, norm)

        with torch.no_grad():
            for weight, start in zip(self.trained, self.start, strict=True):
                weight.copy_(start)
        return OptimizerLoop(
            torch.optim.SGD(self.trained, lr=0.2),
            None,
            backward,
            clip,
            nullcontext if self.ddp is None else self.ddp.no_sync,
            (lambda tensor: tensor) if self.alone else gather,
            1 if self.alone else dist.get_world_size(),
        )

    def weights(self) -> list[Tensor]:
        return [whole(p.detach()).clone() for p in self.trained]


def ways(folder: Path, settings: dict[str, Any]) -> dict[str, Way]:
    config = PolicyConfig(str(folder), dtype="float32", **settings)
    sharding = Sharding(init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(0)  # adapters begin at random
    alone, each = Policy.load(config, True), Policy.load(config, True)
    each.load_state_dict(alone.state_dict())
    torch.manual_seed(0)
    sharded = Policy.load(config, True, sharding)
    ddp = torch.nn.parallel.DistributedDataParallel(each, find_unused_parameters=True)
    found = {"one": Way(alone, alone=True), "DDP": Way(each, ddp), "FSDP2": Way(sharded)}
    for own, other in zip(found["one"].start, found["FSDP2"].weights(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    return found


def rollouts_and_rewards(case: dict[str, Any]) -> tuple[Rollouts, Tensor]:
    batch = mixed_batch().select([(case["seed"] + row * row) % 3 for row in range(len(case["lengths"]))])
    return rollouts_of(batch, case["lengths"], range(20, 300), case["seed"]), torch.tensor(case["rewards"])


def differences(case: dict[str, Any], found: dict[str, Way]) -> list[str]:
    """What the ways do not agree on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rollouts, rewards = rollouts_and_rewards(case)
    mine = range(rank * len(rollouts) // world, (rank + 1) * len(rollouts) // world)
    settings, weights = UpdateSettings(**case["settings"]), torch.ones(rewards.shape[-1])
    results = {}
    for name, way in found.items():
        rows = range(len(rollouts)) if way.alone else mine
        own = rollouts.select(rows)
        advantages = cgdpo(rewards[rows], weights, all_gather=None if way.alone else gather)
        if case["bad_row"] in rows:
            advantages[rows.index(case["bad_row"])] = torch.inf
        prompts, loop = way.policy.encode(own.batch), way.loop()
        tally = update(way.policy, settings, own, prompts, advantages, loop)
        results[name] = tally.means(None if way.alone else gather), way.weights(), loop.skipped
    (numbers, one, skipped), problems = results["one"], []
    if case["bad_row"] is not None and skipped != settings.updates_per_rollout:
        problems.append(f"{skipped} updates were skipped")
    for name in ("DDP", "FSDP2"):
        its, other, its_skipped = results[name]
        distance = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
        if not distance < 5e-6 or its_skipped != skipped:
            problems.append(
                f"{name}: weights differ by {distance}, {its_skipped} skipped instead of {skipped}"
            )
        for key in ("loss", "kl", "grad_norm", "entropy", "clip_fraction"):
            a, b = (torch.tensor(values.get(key, 0.0)) for values in (numbers, its))
            if case["bad_row"] is None and not torch.isclose(a, b, rtol=1e-3, atol=2e-5):
                if key in ("entropy", "clip_fraction") and "kl" not in numbers:
                    continue  # of what was forwarded: a rank without advantages forwards one image
                problems.append(f"{name}: {key} {b} instead of {a}")
    return problems


def handed_on_differs(found: dict[str, Way], work: Path) -> list[str]:
    """Whether an engine or an export gets other weights from the parts than from the whole."""
    alone, sharded, problems = found["one"].policy, found["FSDP2"].policy, []
    pairs = [(list(trained_weights(alone)), list(trained_weights(sharded)))]
    state = sharded.whole_state()
    if dist.get_rank() == 0:
        alone.save_pretrained(work / "alone")
        sharded.save_pretrained(work / "sharded", state_dict=state)
        files = [path.name for path in (work / "alone").glob("*.safetensors")]
        if {path.name for path in (work / "sharded").iterdir()} != {
            path.name for path in (work / "alone").iterdir()
        }:
            problems.append("an export has other files")
        for name in ("config.json", "generation_config.json"):
            if (
                not sharded.has_adapter
                and (work / "alone" / name).read_text() != (work / "sharded" / name).read_text()
            ):
                problems.append(f"an export has another {name}")
        for name in files:
            own, other = (load_file(work / folder / name) for folder in ("alone", "sharded"))
            if sharded.has_adapter:  # peft adds the frozen weights of a head that has an adapter
                own = {key: tensor for key, tensor in own.items() if "lora" in key}
            pairs.append((sorted(own.items()), sorted(other.items())))
        for folder in ("alone", "sharded"):
            shutil.rmtree(work / folder)
    for own, other in pairs:
        if [name for name, _ in own] != [name for name, _ in other]:
            problems.append("other names")
        elif not all(
            torch.allclose(a, b, rtol=0, atol=5e-6) for (_, a), (_, b) in zip(own, other, strict=True)
        ):
            problems.append("other weights")
    return problems


def passes_differ(case: dict[str, Any], way: Way) -> bool:
    """Whether ranks have more or fewer micro-batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rollouts, rewards = rollouts_and_rewards(case)
    advantages = cgdpo(rewards, torch.ones(rewards.shape[-1]))
    mine = range(rank * len(rollouts) // world, (rank + 1) * len(rollouts) // world)
    own, settings = rollouts.select(mine), UpdateSettings(**case["settings"])
    rows = rows_with_nonzero_advantage(advantages[mine], settings.kl_coef)
    count = len(list(micro_batches(way.policy, settings, own, way.policy.encode(own.batch), rows)))
    return bool(gather(torch.tensor(count)).unique().numel() > 1)


def main(work: Path, rank: int) -> None:
    """Go through all cases; a collective that one rank misses ends the process after two minutes."""
    dist.init_process_group("gloo", f"file://{work}/store", timedelta(seconds=120), rank=rank, world_size=2)
    logging.disable(logging.WARNING)
    given = json.loads((work / "cases.json").read_text())
    report: dict[str, Any] = {"problems": [], "cases": 0, "ragged": 0, "moved": 0}
    made: dict[str, dict[str, Way]] = {}
    for case in given["cases"]:
        kind = case["kind"]
        if kind not in made:
            folder, settings = KINDS[kind]
            made[kind] = ways(Path(given["folders"][folder]), settings)
        report["problems"] += [f"{problem}: {case}" for problem in differences(case, made[kind])]
        moved = max(
            float((a - b).abs().max())
            for a, b in zip(made[kind]["one"].weights(), made[kind]["one"].start, strict=True)
        )
        report["cases"] += 1
        print(report["cases"], kind, len(report["problems"]), flush=True)
        report["moved"] += moved > 1e-3
        report["ragged"] += passes_differ(case, made[kind]["one"])
    for kind, found in made.items():
        report["problems"] += [f"{kind}: {problem}" for problem in handed_on_differs(found, work)]
    (work / f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""The YAML that ``init`` writes: values of the config of that hardware in ``configs/``, and why each is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"

ESTIMATE = "an estimate: not run on such a GPU"


@dataclass(frozen=True)
class Hardware:
    """What a run has to fit.

    Attributes:
        config: file in ``configs/`` whose values are taken.
        what: in words.
        needs: what to install.
        comments: setting -> why it is so here, where that is not as everywhere.
        changed: setting -> value that is not that of the file.
    """

    config: str
    what: str
    needs: str = 'pip install -e ".[vllm]" to sample with vLLM, which is far faster'
    comments: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)


HARDWARE = {
    "cpu": Hardware(
        "shapes",
        "no GPU: the embedded world, or another tiny model; trains all weights of the language model",
        "nothing else",
        {
            "trainer.max_time": "days:hours:minutes:seconds; a slow machine makes fewer steps",
            "model.optimizer.init_args.lr": "for two million weights; seven billion take a tenth",
            "data.batch_size": "images of a step",
        },
        {"data.batch_size": 8},
    ),
    "16gb": Hardware(
        "qwen7b_qlora_16gb",
        "one GPU of 16 GB: QLoRA, sampled on the policy itself; Qwen2.5-VL-7B peaked at 10.4 GB (on an H100)",
        'pip install -e ".[qlora]"',
        {"data.batch_size": "images of a step; 2 were within 10.4 GB (measured, Qwen2.5-VL-7B)"},
    ),
    "24gb": Hardware(
        "qwen7b_qlora",
        "one GPU of 24 GB: QLoRA, vLLM beside it; by arithmetic for Qwen2.5-VL-7B, an estimate",
        'pip install -e ".[qlora,vllm]" vllm-bnb-plugin',
    ),
    "48gb": Hardware(
        "qwen3b",
        "one GPU of 48 GB: LoRA, vLLM beside it, four captions an image; for models of 3B or 4B, an estimate",
        comments={
            "model.num_captions": f"of each image, compared with each other; 8 want 80 GB ({ESTIMATE})"
        },
        changed={"model.num_captions": 4},
    ),
    "80gb": Hardware(
        "qwen3vl-4b", "one GPU of 80 GB: LoRA, vLLM beside it; for models of up to about 4B, an estimate"
    ),
    "8x80gb": Hardware(
        "qwen3vl-8b",
        "8 GPUs of 80 GB: LoRA, data-parallel, a vLLM on each; for models of 7B to 9B, an estimate",
    ),
}
"""Name -> what it is. Updates of Qwen2.5-VL 3B (14.7 GB) and 7B with LoRA (19.6 GB) were measured on an H100, see
docs/performance.md; whole steps beside vLLM were not."""

COMMENTS = {
    "trainer.devices": "GPUs of this machine; -1 takes all",
    "trainer.max_steps": "optimizer steps, one for each batch; estimate says what they cost",
    "trainer.val_check_interval": "steps between two validations, which are judged too",
    "trainer.check_val_every_n_epoch": "counts steps, not epochs",
    "model.policy.dtype": "on CPUs a step is faster than in bfloat16 (measured on the demo)",
    "model.policy.load_in_4bit": "the base in NF4: a quarter of the memory of bfloat16",
    "model.policy.lora": "an adapter on all linear layers of the language model but the head",
    "model.policy.gradient_checkpointing": "activations are recomputed: slower, and far less memory",
    "model.policy.max_pixels": "of an image; an image token takes 28 x 28 (Qwen2.5-VL) or 32 x 32 of them (Qwen3-VL)",
    "model.weights": "how much each reward counts; one of weight 0 is judged and logged all the same",
    "model.engine.init_args.max_sequences": "sampled at once without vLLM: their caches must fit beside the weights",
    "model.engine.init_args.gpu_memory_utilization": "of the GPU, for vLLM's weights and keys",
    "model.engine.init_args.max_model_len": "prompt and caption together, in tokens; null is the model's own limit",
    "model.num_captions": "of each image, compared with each other",
    "model.sampling.max_tokens": "of a caption; train/truncated shows how many run into it",
    "model.kl_coef": "how strongly the policy is kept near where it began",
    "model.micro_batch_size": "images, with all their captions, per forward pass",
    "model.optimizer.init_args.lr": "for LoRA; the paper does not publish its own",
    "data.name": "configuration of the data set on the hub",
    "data.image_root": "image paths of the rows start here; nothing outside is read",
    "data.batch_size": f"images of a step, on each GPU ({ESTIMATE})",
    "data.val_size": "images held out",
    "data.num_workers": "processes that read images; 0: the trainer's own",
}
"""Setting -> why, or what it is."""

ENGINES = {
    "balcap.rollout.vllm_or_hf": "vLLM beside the policy where it is installed, else the policy itself, far slower",
    "balcap.rollout.HFGenerate": "on the policy itself: nothing else lies on the device",
}

FLOW = ("model.policy.lora", "model.weights")
"""Groups that stand in one line."""


def judges() -> list[str]:
    """Names of the overlays."""
    return sorted(path.stem for path in CONFIGS.glob("judge/*.yaml"))


def config_text(answers: Mapping[str, Any], out: str, command: str, budget_problem: str | None = None) -> str:
    """The whole file.

    Args:
        answers: ``model``, ``data``, ``image_root``, ``judge``, ``hardware``; ``budget`` in US dollars, or None.
        out: its name, for the commands in its header.
        command: that makes it again.
        budget_problem: why the budget is only a comment, or None.
    """
    hardware = HARDWARE[answers["hardware"]]
    content = yaml.safe_load((CONFIGS / f"{hardware.config}.yaml").read_text(encoding="utf-8"))
    content.pop("benchmark_eval", None)
    model, data = content["model"], content["data"]
    model["policy"] |= {"model": answers["model"]}
    if (lora := model["policy"].get("lora")) is not None:
        lora.pop("target_modules", None)  # null: those that the model's family usually adapts
    if not takes_pixels(answers["model"]):
        model["policy"].pop("max_pixels", None)
    model["judge"] = judge_lines(answers["judge"], answers["budget"], budget_problem)
    if data.pop("name", None) and answers["data"] == "Lin-Chen/ShareGPT4V":
        data = {"data": answers["data"], "name": "ShareGPT4V"} | data
    content["data"] = data | {"data": answers["data"], "image_root": answers["image_root"]}
    for name, value in hardware.changed.items():
        group, key = name.split(".")
        content[group][key] = value
    content = {"run_dir": f"runs/{Path(out).stem}"} | {k: v for k, v in content.items() if k != "run_dir"}
    engine = ENGINES.get(model.get("engine", {}).get("class_path"), "")
    comments = {**COMMENTS, "model.engine.class_path": engine, **hardware.comments}
    file = shlex.quote(out)
    header = [
        f"# {answers['model']} on {answers['data']}; written by",
        f"# {command}",
        "#",
        f"#   hardware  {hardware.what}",
        f"#   needs     {hardware.needs}",
        f"#   from      configs/{hardware.config}.yaml",
        f"#   check     python main.py check --config {file}",
        f"#   cost      python main.py estimate --config {file}",
        f"#   command   python main.py fit --config {file}",
    ]
    return "\n".join([*header, *_lines(content, comments)]) + "\n"


def judge_lines(judge: str, budget: float | None, budget_problem: str | None) -> list[str]:
    """The settings of a judge, with the comments of its overlay, each line without the indentation of ``model.judge``."""
    path = CONFIGS / "judge" / f"{judge}.yaml"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        about = text.partition("\n#\n")[0].splitlines()
        settings = text.partition("\n  judge:\n")[2].splitlines()
        lines = [*about, *(line.removeprefix("    ") for line in settings)]
    else:
        lines = [
            f"model: {scalar(judge)}",
            "params: {max_tokens: 8192}   # reasoning of a model that reasons counts too",
        ]
    if budget is not None:
        why = "US dollars: the run ends there, with a checkpoint; raise it and --ckpt_path last goes on"
        line = f"budget_usd: {budget:g}   # {why}"
        lines += [line] if budget_problem is None else [f"# {budget_problem}", f"# {line}"]
    return lines


def takes_pixels(model: str) -> bool:
    """Whether the processor of a model can be told the largest area of an image, by the name of the model or its kind."""
    file = Path(model).expanduser() / "config.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type", "") if file.is_file() else model
    return re.search(r"qwen|glm", kind, re.IGNORECASE) is not None


def scalar(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()


def _lines(content: Mapping[str, Any], comments: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in content.items():
        name = f"{prefix}{key}"
        comment = f"   # {comments[name]}" if comments.get(name) else ""
        if name == "model.judge":
            yield f"{indent}judge:"
            yield from (f"{indent}  {line}".rstrip() for line in value)
        elif name == "model.rewards":
            yield f"{indent}rewards:"
            yield from (f"{indent}  - {scalar(reward)}" for reward in value)
        elif isinstance(value, dict) and name not in FLOW:
            yield f"{indent}{key}:"
            yield from _lines(value, comments, f"{name}.")
        else:
            yield f"{indent}{key}: {scalar(value)}{comment}"

"""The plan: against what GPUs measured, what it proposes to change, and the command line without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from balcap.commands.plan_fit import (
    Setup,
    Weights,
    cache_tokens,
    changes,
    combined,
    engine_problem,
    excess,
    longest_forward,
    stages,
    update_of,
)
from balcap.commands.plan_setup import optimizer_costs
from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.memory import OptimizerCosts, update_costs
from balcap.policy.policy import Policy
from balcap.policy.sharded_memory import costs_of_rank
from balcap.rollout.memory import VLLM_REST, Work, kv_bytes, on_the_policy, vllm_weights
from callbacks.export import export
from tests.policy.test_memory import of_size
from tests.support import ROOT
from tests.tiny_families import FAMILIES

GB = 2**30
SIZES = yaml.safe_load((ROOT / "perf/models.yaml").read_text())


@cache
def weights(size: str, rank: int | None, in_4bit: bool = False, autocast: bool = True, **how: Any) -> Weights:
    model = of_size(size, LoraSettings(r=rank) if rank else None)
    costs = update_costs(model, autocast=autocast, load_in_4bit=in_4bit, **how)
    assert costs is not None
    engine = vllm_weights(model, "bitsandbytes" if in_4bit else None)
    assert engine is not None
    return Weights(costs, engine, kv_bytes(model))


def setup(own: Weights, gb: float = 80, **how: Any) -> Setup:
    """As `configs/qwen3b.yaml`, 16 images of 1280 tokens, 8 captions."""
    usual: dict[str, Any] = {
        "images": 16, "val_images": 0, "captions": 8, "val_captions": 1, "prompt": 1312, "image_tokens": 1280,
        "longest": 512, "pixels": 1_003_520, "has_adapter": True,
    }  # fmt: skip
    return Setup(own, int(gb * GB), **(usual | how))


def peaks(of: Setup) -> dict[str, float]:
    return {stage: sum(parts.values()) / 1e9 for stage, parts in stages(of).items()}


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_of_qlora_takes_what_a_gpu_measured() -> None:
    """10.4 GB, one H100, 2026-11-26: configs/qwen7b_qlora_16gb.yaml of then, sampled with HF generate, not compiled."""
    run = setup(
        weights("7b", 32, in_4bit=True), 16, images=2, captions=6, prompt=670, image_tokens=640, longest=320,
        checkpointing=True, micro_batch=1, max_sequences=16, shared_prompts=False,
    )  # fmt: skip
    assert max(peaks(run).values()) == pytest.approx(10.4, rel=0.15)
    assert not excess(run)


def test_sampling_on_the_policy_by_hand() -> None:
    costs, kv = weights("7b", 32).costs, 2 * 28 * 4 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert kv == weights("7b", 32).kv == 57_344
    work = Work(images=16, captions=8, prompt=1312, image_tokens=1280, longest=512)
    parts = on_the_policy(costs, kv, work, max_sequences=64, shared_prompts=True)
    # 64 captions end with all their tokens, in one layer twice for a moment, and choose among 152,064 tokens.
    assert parts == pytest.approx({"KV cache": 64 * 1824 * kv * 29 / 28, "logits": 18 * 64 * 152064})
    repeated = on_the_policy(costs, kv, work, max_sequences=64, shared_prompts=False)
    assert repeated == {"vision": 64 * 1280 * int(costs.vision_pass)}, "each caption's image is read"
    few = on_the_policy(costs, kv, work, max_sequences=4, shared_prompts=True)
    assert few["vision"] == 4 * 1280 * int(costs.vision_pass), "fewer than an image's captions: HF generate"


def test_an_engine_beside_the_policy() -> None:
    own = weights("7b", 64)
    awake = setup(own, engine="vllm", max_model_len=4096)
    share = int(0.4 * 80 * GB)
    assert own.engine == pytest.approx(2 * 8.292e9, rel=1e-3), "the base in 16 bits"
    assert stages(awake)["rollout"]["engine"] == share
    assert stages(awake)["update"]["engine"] == int(VLLM_REST)
    assert stages(replace(awake, sleeps=False))["update"]["engine"] == share
    assert cache_tokens(awake) == int((share - own.engine - VLLM_REST) / 57_344)
    assert not engine_problem(awake)
    assert "max_model_len" in engine_problem(replace(awake, max_model_len=10**6))
    small = replace(awake, share=0.2)
    assert "a prompt and its caption are 1,824" in engine_problem(small)
    assert excess(small) == (4096 - cache_tokens(small)) * 57_344
    assert stages(setup(own, engine="elsewhere"))["rollout"].keys() == {
        "weights", "reference", "optimizer", "gradients",
    }  # fmt: skip


@pytest.mark.parametrize(("quantization", "bytes_of_a_weight"), [("fp8", 1), ("bitsandbytes", 0.5625)])
def test_weights_of_a_quantised_engine(quantization: str, bytes_of_a_weight: float) -> None:
    model = of_size("7b", LoraSettings())
    whole, quantised = vllm_weights(model, None), vllm_weights(model, quantization)
    assert whole is not None
    linear = 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)  # q and o, k and v, the MLP
    assert quantised == whole - (2 - bytes_of_a_weight) * linear
    assert vllm_weights(model, "some") is None


def test_an_update_goes_as_auto_would() -> None:
    own = weights("7b", 64)
    kept = update_of(setup(own))
    assert (kept.images, kept.forwards, kept.checkpointed) == (1, 16, 0)
    assert longest_forward(setup(own), 0) == 1
    again = update_of(setup(own, 40))
    assert again.images == 1
    assert 0 < again.checkpointed < 28
    assert longest_forward(setup(own, 40), 0) == 0 < longest_forward(setup(own, 40), 28)
    many = setup(own, checkpointing=True, images=32)
    together = update_of(many)
    assert together.checkpointed == 28
    assert 1 < together.images == longest_forward(many, 28) < 32
    assert update_of(setup(own, checkpointing=True, max_tokens=12_000)).images == 2  # of 5,400 tokens each
    assert update_of(setup(own, checkpointing=True, micro_batch=3)).images == 3
    assert update_of(setup(own, checkpointing=False)).checkpointed == 0
    ddp = stages(setup(own, buckets=True))
    assert all(parts["buckets"] == own.costs.gradients for parts in ddp.values())


def test_ranks_that_share_the_weights_hold_parts_of_them() -> None:
    model = of_size("7b", None)
    whole = update_costs(model, autocast=True, with_reference=True)
    assert whole is not None
    part = costs_of_rank(whole, model, 8, autocast=True)
    size = next(model.parameters()).element_size()
    tower = size * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert part.weights == pytest.approx(tower + (whole.weights - tower) / 8, abs=1)
    for name in ("reference", "gradients", "optimizer", "optimizer_step"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name) / 8, abs=1)
    tables = 2 * 152_064 * 3584 + 3584  # embedding and head, the last norm
    layer = 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 3584 + 2 * 512 + 2 * 3584  # matrices, biases, norms
    # In 16 bits: tables and two layers, gradients of the tables; those of the tables once more, and in float32.
    assert part.casts == 2 * tables + 2 * 2 * layer + 2 * tables + (2 + 4) * tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optimizer", "wanted"),
    [
        (torch.optim.AdamW, (2, 1)),
        (lambda weights: torch.optim.AdamW(weights, fused=True), (2, 0)),
        (torch.optim.SGD, (0, 1)),
        (lambda weights: torch.optim.SGD(weights, momentum=0.9), (1, 1)),
    ],
    ids=["AdamW", "fused", "SGD", "momentum"],
)
def test_any_optimizer(optimizer: Any, wanted: tuple[int, int], dtype: torch.dtype) -> None:
    found = optimizer_costs(optimizer, torch.nn.Linear(2, 2, dtype=dtype))[1]
    assert found == pytest.approx(OptimizerCosts(*wanted), abs=1e-3)


def test_an_optimizer_of_eight_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    name, found = optimizer_costs(bitsandbytes.optim.AdamW8bit, torch.nn.Linear(2, 2))
    assert name == "AdamW8bit"
    assert found.state == pytest.approx(2 * (1 + 4 / 256) / 4, rel=0.01), "of float32, with a scale for 256"
    assert found.temporaries == 0


# ── what to change ───────────────────────────────────────────────────────────────────────────────────


def nothing(in_4bit: bool) -> None:
    """There is no other policy."""


def test_what_fits_needs_no_change() -> None:
    run = setup(weights("3b", 64))
    assert not excess(run)
    assert changes(run, nothing) == combined(run, nothing) == []


def test_each_change_alone_saves_what_it_says() -> None:
    own, adapter = weights("3b", None, with_reference=True, autocast=False), weights("3b", 64)
    run = setup(own, 48, checkpointing=False, max_tokens=None, has_adapter=False)
    other: Callable[[bool], Weights] = {False: adapter, True: weights("3b", 64, in_4bit=True)}.__getitem__
    found = {change.flags.split(" ")[0].rsplit(".", 1)[-1]: change for change in changes(run, other)}
    assert list(found) == [
        "gradient_checkpointing", "max_tokens_per_forward", "num_captions", "max_pixels", "r",
    ]  # fmt: skip
    assert peaks(found["gradient_checkpointing"].setup) == peaks(replace(run, checkpointing=True))
    tokens = found["max_tokens_per_forward"].setup
    assert tokens.max_tokens == setup(own).forward(update_of(tokens).images).tokens
    # The largest that is enough: with one image more it is not.
    larger = replace(tokens, max_tokens=setup(own).forward(update_of(tokens).images + 1).tokens)
    assert excess(tokens) < excess(larger)
    fewer = found["max_pixels"].setup
    assert fewer.image_tokens * 784 == fewer.pixels
    assert run.prompt - fewer.prompt == run.image_tokens - fewer.image_tokens
    assert found["r"].setup.has_adapter


def test_changes_together_until_it_fits() -> None:
    """24 GB: neither the engine's share nor the update fits, and no change alone helps both."""
    run = setup(weights("7b", 64), 24, engine="vllm", share=0.5, sleeps=False, max_model_len=32768)
    other: Callable[[bool], Weights | None] = {False: None, True: weights("7b", 64, in_4bit=True)}.__getitem__
    assert all(excess(change.setup) for change in changes(run, other))
    made = combined(run, other)
    assert [change.flags for change in made] == [
        "--model.policy.load_in_4bit true", "--model.engine.init_args.sleep true",
    ], "no other is needed"  # fmt: skip
    assert excess(made[0].setup)
    assert not excess(made[1].setup)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def sized(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a model of this size in perf/models.yaml: its config and a tiny processor, without weights."""

    @cache
    def folder(size: str) -> Path:
        out = tmp_path_factory.mktemp(size)
        like = SIZES[size]["family"]
        tiny = folders["qwen"] if like == "qwen2_5_vl" else FAMILIES[like](tmp_path_factory.mktemp(like))
        for file in tiny.iterdir():
            if file.suffix != ".safetensors":
                (out / file.name).write_bytes(file.read_bytes())
        config = json.loads((out / "config.json").read_text())
        for name in ("layer_types", "num_local_experts"):  # as many as the tiny one has
            config["text_config"].pop(name, None)
        for part in ("text", "vision"):
            config[f"{part}_config"] |= SIZES[size][part]
        config["tie_word_embeddings"] = SIZES[size]["text"].get("tie_word_embeddings", False)
        (out / "config.json").write_text(json.dumps(config))
        return out

    return folder


Plan = Callable[..., str]


@pytest.fixture
def plan(run: Callable[[str, list[str]], None], capsys: pytest.CaptureFixture[str]) -> Plan:
    """What the command prints, and its error."""

    def planned(config: str, *flags: str) -> str:
        try:
            run("plan", ["--config", str(ROOT / f"configs/{config}.yaml"), *flags])
        except SystemExit as error:
            print(error)
        return capsys.readouterr().out

    return planned


def read(config: str) -> str:
    return (ROOT / f"configs/{config}.yaml").read_text()


@pytest.mark.parametrize(
    ("config", "size", "gb", "fits"),
    [
        ("qwen3b", "3b", 80, True),
        ("qwen7b", "7b", 80, True),
        ("qwen7b_qlora", "7b", 24, True),
        ("qwen7b_qlora_16gb", "7b", 16, True),
        ("qwen7b", "7b", 16, False),
        ("qwen7b_full_fsdp2", "7b", 80, True),
        ("qwen3vl_30b_a3b_lora", "30b-a3b", 80, True),
    ],
)
def test_the_configs_fit_what_they_are_for(
    config: str, size: str, gb: int, fits: bool, plan: Plan, sized: Callable[[str], Path]
) -> None:
    said = plan(config, "--model.policy.model", str(sized(size)), "--gpu_gb", str(gb))
    assert ("left alone: it fits" in said) == fits
    assert ("This run does not fit" in said) == (not fits)
    assert ("What to change" in said) == (not fits)
    assert len(re.findall(r"\d+\.\d", next(line for line in said.splitlines() if "peak" in line))) == 3
    assert ("which fit refuses, since no rank holds all of it" in said) == ("ModelParallel" in read(config))
    tokens = 640 if "qlora" in config else 1280
    assert f"{tokens:,} of them the largest image's" in said, "by max_pixels"


def test_a_mixture_of_experts_lies_in_parts_on_all_ranks_and_so_does_its_engine(
    plan: Plan, sized: Callable[[str], Path]
) -> None:
    flags = ["--model.policy.model", str(sized("30b-a3b")), "--gpu_gb", "80"]
    engine = ["--config", str(ROOT / "configs/engine/vllm.yaml"), "--model.engine.tensor_parallel_size", "8"]
    said = plan("qwen3vl_30b_a3b_lora", *flags, *engine)
    assert re.search(r"policy: weights\W+8\.7", said)  # an eighth of 62.1 GB, and the tower
    assert "vLLM: its weights 7.8 GB" in said


def test_the_way_out_is_a_command_that_fits(plan: Plan, sized: Callable[[str], Path]) -> None:
    """What the plan of a run that does not fit proposes last, in vLLM's case too, which need not be installed."""
    flags = ["--model.policy.model", str(sized("7b")), "--gpu_gb", "24"]
    flags += ["--config", str(ROOT / "configs/engine/vllm.yaml")]
    said = plan("qwen7b", *flags)
    assert "vLLM does not start: 0.4 of the GPU hold its weights and 0 tokens" in said
    change = next(line for line in said.splitlines() if "load_in_4bit true" in line)
    assert "yes" in change
    assert "it fits" in plan("qwen7b", *flags, "--model.policy.load_in_4bit", "true")


def test_a_tiny_model_and_an_adapter_on_it(plan: Plan, folders: dict[str, Path], tmp_path: Path) -> None:
    tiny = ["--model.policy.model", str(folders["qwen"]), "--gpu_gb", "1"]
    all_pixels = plan("shapes", *tiny)
    assert "1 x 8 images with 8 captions each in a forward of" in all_pixels
    fewer = plan("shapes", *tiny, "--pixels", "3136", "--model.supervised", "true", "--model.kl_coef", "0")
    of_image = [int(re.search(r"(\d+) of them the largest", said)[1]) for said in (all_pixels, fewer)]  # type: ignore[index]
    assert of_image[0] > of_image[1]
    assert "rollout" not in fewer.partition("peak")[0], "references are learned"
    export(
        Policy.load(PolicyConfig(str(folders["qwen"]), lora=LoraSettings(r=4)), False), tmp_path / "adapter"
    )
    said = plan("shapes", "--model.policy.model", str(tmp_path / "adapter"), "--gpu_gb", "1")
    assert "it fits" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu_gb", "-1"], "--gpu_gb -1: use a number above 0"),
        (["--gpu_gb", "1", "--pixels", "0"], "--pixels 0: an image has 1 or more"),
        (["--gpu_gb", "1", "--model.num_captions", "1"], "model.num_captions: a group of 1"),
    ],
)
def test_what_is_wrong_is_said(flags: list[str], says: str, plan: Plan, folders: dict[str, Path]) -> None:
    assert says in plan("shapes", "--model.policy.model", str(folders["qwen"]), *flags)


def test_without_a_gpu_its_size_must_be_said(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--gpu_gb: there is no GPU here; say how much memory the run's have: 80 (H100" in plan("shapes")


def test_a_hub_that_cannot_be_reached(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = plan("shapes", "--model.policy.model", "nobody/no-such-captioner", "--gpu_gb", "80")
    assert "model.policy.model: nobody/no-such-captioner cannot be loaded" in said


def test_an_unknown_architecture_is_refused(plan: Plan, tmp_path: Path) -> None:
    folder = FAMILIES["glm4v_moe"](tmp_path)
    said = plan("shapes", "--model.policy.model", str(folder), "--gpu_gb", "80")
    assert "is not known (experts" in said

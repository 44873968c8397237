"""The command line: what it imports, what it refuses, and that every config parses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import main
from balcap.cli import BalCapCLI, ConfigError
from tests.support import ROOT, metrics

CONFIGS = sorted(p for p in ROOT.glob("configs/*.yaml") if not p.stem.startswith(("recaption", "annotate")))
SCALED = (
    "{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: 16-mixed, device: cpu}}"
)
OVERLAYS = sorted(ROOT.glob("configs/judge/*.yaml"))
JUDGED = [(config, None) for config in CONFIGS] + [
    (ROOT / f"configs/{name}.yaml", overlay) for name in ("shapes", "qwen7b") for overlay in OVERLAYS
]
"""Each config with its own judge, and each overlay, which replaces the whole judge, on two of them."""


def _imported(*command: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(("command", "lightning"), [(["--help"], False), (["fit", "--help"], True)])
def test_help_imports_nothing_heavy(command: list[str], lightning: bool) -> None:
    names = _imported("main.py", *command)
    assert ("lightning.pytorch.cli" in names) == lightning
    assert not names & {"transformers", "scipy", "litellm", "vllm", "peft", "datasets"}


def test_own_rewards_can_use_torchmetrics() -> None:
    """Of boxes, of images, and of sources that scipy assigns: nothing is lost by the light import."""
    use = "import balcap.cli, torch, torchmetrics.detection as boxes, torchmetrics.functional as F; "
    use += "boxes.IntersectionOverUnion(); from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity; "
    use += "F.audio.permutation_invariant_training(*torch.randn(2, 2, 3, 9), F.audio.signal_noise_ratio)"
    subprocess.run([sys.executable, "-c", use], cwd=ROOT, check=True, capture_output=True)


def test_import_balcap_is_instant() -> None:
    assert not _imported("-c", "import balcap") & {"torch", "lightning", "transformers", "numpy"}


class ParsedCLI(BalCapCLI):
    """Everything up to the command itself."""

    def _run_subcommand(self, subcommand: str) -> None:
        return


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "overlay"), JUDGED, ids=lambda p: p.stem if p else "own judge")
def test_every_config_instantiates_without_weights(
    config: Path, overlay: Path | None, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-test")
    local = ["--data.image_root", str(world), "--run_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    local += ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.precision", "32-true"]
    if config.stem == "shapes":
        local += ["--data.data", str(world / "shapes.json")]
    configs = ["--config", str(config), *(["--config", str(overlay)] if overlay else [])]
    cli = ParsedCLI(args=["fit", *configs, *local])
    wanted = yaml.safe_load((overlay or config).read_text())["model"]["judge"]["model"]
    assert cli.model.judge.settings.model == wanted
    assert cli.model.policy_config.model == yaml.safe_load(config.read_text())["model"]["policy"]["model"]
    assert cli.datamodule.settings.batch_size >= 1
    assert not hasattr(cli.model, "policy")


def test_configs_repeat_no_default() -> None:
    from inspect import signature

    from balcap.module import BalCapModule
    from balcap.trainer.update import UpdateSettings

    parameters = signature(BalCapModule).parameters | signature(UpdateSettings).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    for config in CONFIGS:
        model = yaml.safe_load(config.read_text())["model"]
        assert not [k for k, v in model.items() if not isinstance(v, (dict, list)) and defaults[k] == v], (
            config
        )


def test_all_problems_are_reported_together_each_with_its_key(fit_arguments, cli, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    args = fit_arguments(
        **{
            "model.num_captions": 1,
            "model.reward_transforms": "[{class_path: balcap.algorithms.LengthMask, init_args: {tau_low: 3}}]",
            "model.weights": "{precision: 0, recall: 0, linguistic: 0}",
            "model.policy.lora": "{target_modules: []}",
            "model.judge.model": "openai/gpt-4o-mini",
            "data.image_root": "/no/such/folder",
            "model.clip_eps_low": 1.5,
            "model.kl_coef": -1,
        }
    )
    with pytest.raises(ConfigError) as refused:
        cli(args)
    for key in (
        "model.num_captions",
        "tau_low: 3",
        "model.weights",
        "model.policy.lora.target_modules",
        "OPENAI_API_KEY",
        "data.image_root",
        "model.clip_eps_low",
        "model.kl_coef",
    ):
        assert key in str(refused.value), key
    assert len(refused.value.problems) == 8


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"model.judge.model": "nowhere/model"}, "model.judge.model"),
        ({"model.weights": "{precision: 1, beauty: 1}"}, "model.weights.beauty"),
        ({"model.weights": "{precision: -1, recall: 1}"}, "model.weights.precision"),
        (
            {
                "model.reward_transforms": "[{class_path: balcap.algorithms.LinearLengthPenalty,"
                " init_args: {reward: beauty}}]"
            },
            "model.reward_transforms",
        ),
        ({"model.judge": "null"}, "model.judge"),
        ({"model.sampling.temperature": 0}, "model.sampling.temperature"),
        ({"model.policy.load_in_4bit": "true"}, "model.policy.load_in_4bit"),
        ({"model.policy.model": "./nowhere/at/all"}, "model.policy.model"),
        ({"model.micro_batch_size": 0}, "model.micro_batch_size"),
        ({"model.max_grad_norm": 0}, "model.max_grad_norm"),
        ({"model.clip_eps_high": 0}, "model.clip_eps_high"),
        ({"data.batch_size": 0}, "data.batch_size"),
        ({"trainer.max_steps": -1}, "trainer.max_steps"),
        ({"ckpt_path": "/no/such.ckpt"}, "ckpt_path"),
        ({"trainer.max_steps": 0}, "trainer.max_steps"),
        ({"trainer.limit_train_batches": 0}, "trainer.limit_train_batches"),
        ({"trainer.val_check_interval": 0}, "trainer.val_check_interval"),
        ({"trainer.accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches"),
        ({"trainer.gradient_clip_val": 1.0}, "trainer.gradient_clip_val"),
        ({"trainer.precision": "16-true"}, "trainer.precision"),
        ({"trainer.plugins": SCALED}, "trainer.precision"),  # what 16-mixed makes on a GPU
        ({"model.policy.dtype": "float16"}, "model.policy.dtype"),
        ({"trainer.accelerator": "gpu"}, "trainer:"),
    ],
)
def test_a_contradiction_names_its_key(fit_arguments, cli, options: dict, key: str) -> None:
    if key == "trainer:" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError) as refused:
        cli(fit_arguments(**options))
    assert [p for p in refused.value.problems if p.startswith(key)], refused.value.problems


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.num_captoins", "3"], "Is it model.num_captions?"),
        (
            ["--model.num_caption", "3"],
            "Is it model.num_captions?",
        ),  # the beginning of a name is not the name
        (["--run_dri=x"], "Is it run_dir?"),
        (["--config", "{model: {sampling: {max_tokns: 3}}}"], "Is it model.sampling.max_tokens?"),
        (["--model.num_captions", "many"], "model.num_captions"),
        (
            ["--model.advantage=balcap.algorithms.GRPO", "--model.advantage.eps=0"],
            "advantage.init_args.eps: 0.0",
        ),
    ],
)
def test_a_mistake_is_said_first_and_without_all_settings(
    fit_arguments, cli, capfd, flags: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        cli([*fit_arguments(), *flags])
    text = str(refused.value) + capfd.readouterr().err
    assert expected in text
    assert len(text.splitlines()) < 12
    if refused.value.code == 2:
        assert text.splitlines()[0].startswith("2Error: ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"model.rewards": "[]"}, "model.rewards"),
        (
            {"model.engine": "{class_path: balcap.rollout.HFGenerate, init_args: {max_sequences: 0}}"},
            "model.engine",
        ),
        ({"checkpoint.every_n_train_steps": 0, "trace.steps": -1}, "checkpoint.every_n_train_steps"),
        ({"model.optimizer.lr": "-1"}, "model.optimizer"),
    ],
)
def test_what_a_class_refuses_is_a_problem_of_the_config(fit_arguments, cli, options: dict, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        cli(fit_arguments(**options))
    assert [p for p in refused.value.problems if p.startswith(key)], refused.value.problems


def test_a_fit_writes_its_run_folder_and_refuses_to_write_over_it(fit_arguments, cli, tmp_path: Path) -> None:
    cli(fit_arguments())
    run = tmp_path / "run"
    rows = metrics(run)
    train = [row for row in rows if row["train/loss"]]
    assert [row["step"] for row in rows if row["val/b_capscore"]] == ["0", "2"]
    assert len(train) == 2
    for name in (
        "precision",
        "recall",
        "linguistic",
        "b_capscore",
        "length_ratio",
        "caption_tokens",
        "length_masked",
    ):
        assert all(float(row[f"train/{name}"]) >= 0 for row in train), name
        assert any(row[f"val/{name}"] for row in rows), name
    for name in (
        "loss",
        "kl",
        "clip_fraction",
        "entropy",
        "grad_norm",
        "reward_std/recall",
        "zero_variance/recall",
    ):
        assert all(row[f"train/{name}"] for row in train), name
    for name in ("judge/failed", "judge/cost_usd", "judge/cache_hits", "time/rollout_s", "time/step_s"):
        assert all(row[name] for row in train), name
    assert {"config.yaml", "curves.png", "export", "checkpoints", "rollouts", "tensorboard"} <= {
        p.name for p in run.iterdir()
    }
    changed = yaml.safe_load((run / "config.changed.yaml").read_text())
    assert changed["run_dir"] == str(run)
    assert changed["model"]["num_captions"] == 3
    assert not {"seed", "lag"} & changed["model"].keys()
    assert changed["checkpoint"] == {"every_n_train_steps": 1}
    assert not {"rollout_log", "export", "captions"} & changed.keys()  # their paths are linked
    assert list((run / "tensorboard").glob("events*"))
    with pytest.raises(ConfigError, match="--ckpt_path last"):
        cli(fit_arguments())

    from transformers import AutoModelForImageTextToText

    exported = AutoModelForImageTextToText.from_pretrained(run / "export")
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(exported.get_parameter(name), saved[f"policy.model.{name}"])
    assert not [key for key in saved if ".visual." in key]  # frozen weights are in the base, not here


def test_a_lora_run_exports_an_adapter_that_peft_loads(fit_arguments, cli, tmp_path: Path) -> None:
    lora = "{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"
    cli(fit_arguments(**{"model.policy.lora": lora, "trainer.max_steps": 1}))
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(ROOT / "assets/shapes-base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "run/export")
    grown = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert grown
    assert any(bool(p.abs().sum() > 0) for p in grown)
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in key for key in saved)


def test_an_interval_of_validation_beyond_the_epoch_is_refused_before_weights_are_loaded(
    fit_arguments, cli, monkeypatch
) -> None:
    monkeypatch.setattr("balcap.policy.policy.Policy.load", None)
    with pytest.raises(
        SystemExit, match=r"trainer\.val_check_interval: an epoch has 27 batches, fewer than 28"
    ):
        cli(fit_arguments(**{"trainer.val_check_interval": 28}))


def test_validate_adds_to_a_run_under_the_step_of_its_checkpoint(
    fit_arguments, cli, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    options = {"model.num_captions": 2, "model.sampling.max_tokens": 6}
    cli(fit_arguments(**options))
    before, config = metrics(run), (run / "config.yaml").read_text()
    files = {path: path.read_bytes() for path in (run / "rollouts").glob("*.parquet")}
    cli([*fit_arguments("validate", **options), "--ckpt_path", "last"])
    *kept, row = metrics(run)
    assert kept == before
    assert row["step"] == "2"
    assert row["val/b_capscore"] == kept[-1]["val/b_capscore"]  # the same weights, images and draws
    assert row["val/judge_failed"] == "0.0"
    assert (run / "config.yaml").read_text() == config
    assert (run / "config.validate.yaml").is_file()
    assert all(path.read_bytes() == content for path, content in files.items())
    assert (run / "rollouts/validate-00000002-rank0-000000.parquet").is_file()
    out = capsys.readouterr().out
    assert out.count("validation at step 2") == 2
    assert out.splitlines()[-1].startswith(f"Results in {run}: ")


def test_validate_scores_held_out_images(fit_arguments, cli, tmp_path: Path) -> None:
    cli(fit_arguments("validate"))
    (row,) = metrics(tmp_path / "run")
    assert 0 <= float(row["val/b_capscore"]) <= 1
    assert 0 < float(row["val/linguistic"]) <= 1


def test_metrics_csv_is_written_beside_the_loggers_that_a_config_names(fit_arguments, cli, tmp_path) -> None:
    config = tmp_path / "loggers.yaml"
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "other")},
    }
    config.write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    command, *options = fit_arguments("validate")
    cli([command, *options[:2], "--config", str(config), *options[2:]])
    (mine,) = metrics(tmp_path / "run")
    (other,) = metrics(next((tmp_path / "other").rglob("metrics.csv")).parent)
    assert mine["val/b_capscore"] == other["val/b_capscore"] != ""
    assert not (tmp_path / "run/tensorboard").exists()


def test_a_run_without_loggers_is_possible(fit_arguments, cli, tmp_path) -> None:
    cli([*fit_arguments("validate"), "--trainer.logger=false"])
    assert not (tmp_path / "run/metrics.csv").exists()
    assert list((tmp_path / "run/rollouts").glob("validate-*.parquet"))


@pytest.mark.parametrize(
    ("load", "set_by_user", "expected"),
    [
        (0.1, {}, {"GOMP_SPINCOUNT": "20000"}),
        (9.0, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (9.0, {"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        (0.1, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_idle_threads_give_way(monkeypatch, load, set_by_user, expected):
    monkeypatch.setattr(os, "environ", dict(set_by_user))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    main.share_cores()
    assert os.environ == expected

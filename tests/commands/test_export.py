"""A checkpoint becomes a folder that transformers and peft load, with the weights that were trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from balcap.config import ConfigError

Cli = Callable[[list[str]], None]
LORA = "{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() != set()
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def _export(cli: Cli, ckpt: Path, out: Path, *more: str) -> Path:
    cli(["export", "--ckpt", str(ckpt), "--out", str(out), *more])
    return out


def test_any_checkpoint_of_a_full_fit_is_exported(
    fit_arguments: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cli(fit_arguments(**{"checkpoint.keep": -1, "model.optimizer.init_args.lr": 1e-3}))
    ends = load_file(run / "export/model.safetensors")
    _same(load_file(_export(cli, run, tmp_path / "newest") / "model.safetensors"), ends)
    assert sorted(path.name for path in (tmp_path / "newest").iterdir()) == sorted(
        path.name for path in (run / "export").iterdir()
    )
    first = min((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert torch.load(first, weights_only=True)["global_step"] == 1
    begins = AutoModelForImageTextToText.from_pretrained(_export(cli, first, tmp_path / "first", "--merge"))
    saved = torch.load(first, weights_only=True)["state_dict"]
    found = {name: begins.get_parameter(name.removeprefix("policy.model.")).detach() for name in saved}
    _same(found, saved)
    later = AutoModelForImageTextToText.from_pretrained(run / "export").state_dict()
    assert any(not torch.equal(later[name], weight) for name, weight in begins.state_dict().items())


def test_an_adapter_of_four_bits_is_exported_and_merged_into_16_bit_weights(
    fit_arguments: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = tmp_path / "run"
    adapter = {"model.policy.lora": LORA, "model.policy.load_in_4bit": True, "model.policy.dtype": "bfloat16"}
    cli(fit_arguments(**adapter, **{"model.optimizer.init_args.lr": 1e-2, "export.enabled": False}))
    assert not (run / "export").exists()
    own = load_file(_export(cli, run, tmp_path / "adapter") / "adapter_model.safetensors")
    (saved,) = (
        torch.load(path, weights_only=True)["state_dict"] for path in run.glob("checkpoints/last.ckpt")
    )
    trained = {name.removeprefix("policy.model.").replace(".default", ""): w for name, w in saved.items()}
    _same(own, trained)

    merged = AutoModelForImageTextToText.from_pretrained(_export(cli, run, tmp_path / "merged", "--merge"))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    base = AutoModelForImageTextToText.from_pretrained(settings["base_model_name_or_path"], dtype="bfloat16")
    name = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (own[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = base.get_parameter(f"{name}.weight").float() + 2.0 * b @ a
    found = merged.get_parameter(f"{name}.weight").float()
    assert (b @ a).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)


def test_what_cannot_be_exported_is_refused_with_the_way_out(
    fit_arguments: Callable[..., list[str]], cli: Cli, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    cli(fit_arguments(**{"model.policy.lora": LORA, "trainer.max_steps": 1, "export.enabled": False}))
    last = run / "checkpoints/last.ckpt"
    (tmp_path / "empty").mkdir()
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(last.read_bytes())
    for arguments, problem in (
        ([], "ckpt: name a checkpoint"),
        (["--ckpt", str(last), "--model.policy.model", str(run)], "ckpt: name a checkpoint"),
        (["--ckpt", str(tmp_path / "empty")], "ckpt: there is no checkpoint in"),
        (["--ckpt", str(moved)], "ckpt: there is no "),
    ):
        with pytest.raises(ConfigError) as refused:
            cli(["export", "--out", str(out), *arguments])
        assert refused.value.problems[0].startswith(problem), arguments
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("r: 4", "r: 8"))
    with pytest.raises(SystemExit, match="and 16 differ"):
        _export(cli, last, out)
    with pytest.raises(SystemExit, match="is no checkpoint; name one"):
        _export(cli, run / "checkpoints/other.ckpt", out)
    assert not out.exists()

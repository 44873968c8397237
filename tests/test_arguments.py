"""What a command line says of a config: what in it is not as by default, and where it is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from balcap.cli import BalCapCLI
from tests.support import ROOT

CONFIGS = sorted(path for path in ROOT.glob("configs/*.yaml") if not path.stem.startswith("recaption"))
OVERLAYS = sorted([*ROOT.glob("configs/judge/*.yaml"), *ROOT.glob("configs/engine/*.yaml")])
SHAPES = str(ROOT / "configs/shapes.yaml")


class Parsed(BalCapCLI):
    """Reads a config, and stops there."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture
def printed(cli, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """What a command prints that ends with status 0."""

    def run(args: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(args)
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def parser() -> Any:
    """That of ``fit``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Parsed(["fit", "--config", SHAPES])._subcommand_parsers["fit"]


def resolved(parser: Any, *configs: Path) -> Any:
    """All settings; where they are from is not among them."""
    return parser.parse_args([word for path in configs for word in ("--config", str(path))]).clone(
        with_meta=False
    )


@pytest.mark.parametrize(
    "configs", [*((p,) for p in CONFIGS), *((CONFIGS[0], p) for p in OVERLAYS)], ids=lambda ps: ps[-1].stem
)
def test_what_changed_is_the_same_config(configs: tuple[Path, ...], parser: Any, tmp_path: Path) -> None:
    config = resolved(parser, *configs)
    text = parser.dump(config, skip_unset=False, skip_default=True)
    (tmp_path / "changed.yaml").write_text(text)
    again = resolved(parser, tmp_path / "changed.yaml")
    for one in (config, again):
        one.pop("config")
    assert again == config
    content = yaml.safe_load(text)
    assert not {"seed", "run_dir"} & {*content["model"], *content["data"]}  # they are linked
    assert "ledger" not in content["model"]["judge"]["init_args"]
    assert "dropout" not in (content["model"]["policy"].get("lora") or {})
    assert content["model"]["rewards"][0] == {"class_path": "balcap.rewards.Precision"}


@pytest.mark.parametrize("command", ["fit", "check", "estimate", "validate", "predict", "test"])
def test_changed_prints_it_for_every_subcommand(command: str, printed) -> None:
    text = printed([command, "--config", SHAPES, "--changed", "--data.batch_size", "3"])
    assert yaml.safe_load(text)["data"]["batch_size"] == 3
    assert "lag" not in yaml.safe_load(text)["model"]


def test_changed_goes_with_print_config_in_any_order(printed) -> None:
    config = ["--config", SHAPES]
    first = printed(["fit", "--changed", *config, "--print_config"])
    assert printed(["fit", "--print_config", *config, "--changed"]) == first
    assert len(printed(["fit", *config, "--print_config"])) > 2 * len(first)
    recaption = ["recaption", "--config", str(ROOT / "configs/recaption.yaml"), "--changed"]
    assert "retries" not in printed(recaption)

"""Command lines whose errors name the key in full, its nearest neighbour, the file, and what to type next."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from balcap.utils.settings_tree import (
    Unknown,
    class_parser,
    help_flags,
    nearest,
    unknown_settings,
    without_defaults,
)


class SettingsFile(ActionConfigFile):
    """``--config``: a YAML file, or YAML, whose keys all mean something."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        is_file = os.path.isfile(values)
        if not is_file and values.endswith((".yaml", ".yml")):
            there = [
                str(path)
                for path in (*Path(values).parent.glob("*.y*ml"), *Path("configs").glob("**/*.yaml"))
            ]
            near = difflib.get_close_matches(values, there, n=1)
            parser.error(f"{values}: no such file{f'. Is it {near[0]}?' if near else ''}")
        try:
            content = yaml.safe_load(Path(values).read_text(encoding="utf-8") if is_file else values)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            parser.error(f"{values if is_file else '--config'} is no YAML: {error}")
        where = f"{values}: " if is_file else ""
        if isinstance(content, dict):
            self.prepare(content, namespace)
            if unknown := unknown_settings(parser, content, namespace):
                parser.refuse(unknown, where)
        try:
            super().__call__(parser, namespace, values, option_string)
        except (TypeError, ValueError) as error:
            parser.error(f"{where}{error}")

    def prepare(self, content: dict[str, Any], namespace: Any) -> None:
        """Change `namespace`, into which `content` will be merged."""


class Parser(ArgumentParser):
    """A parser whose errors are about the mistake, not about all settings; the beginning of a name is not the name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def add_class_arguments(self, *args: Any, **options: Any) -> list[str]:
        """As jsonargparse does; parameters without a type, of classes of others, may be anything."""
        return super().add_class_arguments(*args, **{"fail_untyped": False} | options)

    def dump(self, config: Any, *args: Any, skip_default: bool = False, **options: Any) -> str:
        """As jsonargparse does; with `skip_default` also without defaults in lists and in what may be null."""
        text = super().dump(config, *args, skip_default=skip_default, **options)
        if not skip_default:
            return text
        return yaml.safe_dump(without_defaults(self, yaml.safe_load(text) or {}), sort_keys=False)

    def refuse(self, unknown: Sequence[Unknown], where: str = "") -> NoReturn:
        """Exit with a line for each key that nothing has."""
        lines = "\n".join(f"{'' if number else 'Error: '}{where}{key}" for number, key in enumerate(unknown))
        raise self._ended(lines, unknown[0].flags)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a class within the config: the parser around it says where
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        if unknown := parser._unknown_flag(message):
            parser.refuse([unknown])
        names = [action.dest for action in parser._actions]
        near = [
            f"Is it {found}?"
            for name in re.findall(r"(?:--|option ')([\w.]+)", message, re.IGNORECASE)
            if name not in names and (found := nearest(name, names))
        ]
        for module, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message)[:1]:
            near += [
                f"Is it {module}.{found}?"
                for found in difflib.get_close_matches(name, dir(sys.modules[module]), 1)
            ]
        raise parser._ended(f"Error: {'. '.join([message.rstrip('. '), *near])}")

    def _unknown_flag(self, message: str) -> Unknown | None:
        """The flag of a class that jsonargparse means where it gives its last word alone."""
        option = re.search(r"Option '(\w+)' is not accepted", message)
        owner = re.search(r"class_path[ =]'([\w.]+)'", message)
        inner = class_parser(owner[1]) if owner else None
        words = (word.removeprefix("--").partition("=")[0] for word in getattr(self, "args", ()))
        name = next((word for word in words if option and word.endswith(f".{option[1]}")), None)
        if name is None or inner is None or owner is None:
            return None
        start = name.rpartition(".")[0]
        known = [f"{start}.{action.dest}" for action in inner._actions if action.dest != "help"]
        return Unknown(name, known, help_flags(f"--{start.partition('.init_args')[0]}.help", owner[1]))

    def _ended(self, text: str, flags: str = "--help") -> SystemExit:
        print(text, file=sys.stderr)
        print(f"Next: python {self.prog.replace(' [options]', '')} {flags}", file=sys.stderr)
        return SystemExit(2)

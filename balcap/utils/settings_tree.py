"""Which settings a config may hold, at any depth: those that it misspells, and those that are as they are by default.

jsonargparse checks values by type. Here the same types say which names there are, so that an error can name a key in full
with its nearest neighbour, also among ``init_args`` of a class and in lists.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import pkgutil
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class Unknown:
    """A key that means nothing.

    Attributes:
        name: in full, such as ``model.policy.lora.rank``.
        known: names that could stand there, in full.
        flags: that show them, to be put behind a command, such as ``--model.policy.lora.help``.
    """

    name: str
    known: Collection[str]
    flags: str

    def __str__(self) -> str:
        """What to write instead, where something is near; else all that there is, unless it is much."""
        text = f"there is no setting {self.name}"
        if found := nearest(self.name, self.known):
            return f"{text}. Is it {found}?"
        names = sorted(name.rpartition(".")[2] for name in self.known)
        return f"{text}; there are {', '.join(names)}" if 0 < len(names) <= 12 else text


def nearest(name: str, known: Collection[str]) -> str | None:
    """The one of `known` that was meant: of the same last word elsewhere, spelled alike, longer or shorter."""
    parent, _, last = name.rpartition(".")
    elsewhere = [other for other in known if other.rpartition(".")[2] == last]
    beside = {end: other for other in known for above, _, end in [other.rpartition(".")] if above == parent}
    if elsewhere and (len(elsewhere) == 1 or not parent or not beside):  # many settings are called "enabled"
        return difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.0)[0]
    if not beside:  # the mistake is further left
        return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)
    longer = [end for end in beside if last.startswith(end) or end.startswith(last)]
    found = difflib.get_close_matches(last, beside, n=1, cutoff=0.7) or longer
    return beside[found[0]] if found else None


def unknown_settings(
    parser: ArgumentParser, content: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> list[Unknown]:
    """Keys of a config that nothing has.

    Args:
        parser: whose config it is.
        content: as YAML has it, nested.
        before: what it is merged into: says of which class settings are whose ``class_path`` is not there.
    """
    return list(_unknown(parser, content, before or {}, "", ""))


def _unknown(
    parser: ArgumentParser, content: Mapping[str, Any], before: Any, prefix: str, flags: str, path: str = ""
) -> Iterator[Unknown]:
    """`prefix` is that of the keys in the config, `path` that of the parser's own names."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for key, value in content.items():
        name, own = f"{prefix}{key}", f"{path}{key}"
        inner = before.get(key) if isinstance(before, Mapping) or hasattr(before, "get") else None
        if hint := getattr(actions.get(own), "_typehint", None):
            yield from _unknown_within(hint, value, inner, name, flags or f"--{name}.help")
        elif any(dest.startswith(f"{own}.") for dest in actions):
            if isinstance(value, dict):
                yield from _unknown(parser, value, inner, f"{name}.", flags, f"{own}.")
        elif own not in actions:
            start = prefix.removesuffix(path)
            yield Unknown(name, [f"{start}{dest}" for dest in actions], flags or "--help")


def _unknown_within(hint: Any, value: Any, before: Any, name: str, flags: str) -> Iterator[Unknown]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            for of_item in _elements(hint, list):
                yield from _unknown_within(of_item, item, None, f"{name}[{number}]", flags)
    elif isinstance(value, dict):
        for of_item in _elements(hint, dict):
            for key, item in value.items():
                yield from _unknown_within(of_item, item, None, f"{name}.{key}", flags)
        class_path = value.get("class_path") or (hasattr(before, "get") and before.get("class_path"))
        parser = class_parser(class_path or _concrete(hint))
        if parser is None:
            return
        if class_path:
            flags = help_flags(flags, class_path)
        if "init_args" in value or "class_path" in value:
            for key in value.keys() - CLASS_KEYS:
                yield Unknown(f"{name}.{key}", [f"{name}.{known}" for known in CLASS_KEYS], flags)
            value, name = value.get("init_args") or {}, f"{name}.init_args"
            before = before.get("init_args") if hasattr(before, "get") else None
        yield from _unknown(parser, value, before, f"{name}.", flags)


def help_flags(flag: str, class_path: str) -> str:
    """What shows the settings of a class at `flag`, such as ``--model.engine.help``; functions have no such help."""
    is_class = inspect.isclass(pkgutil.resolve_name(class_path))
    return f"{flag.partition(' ')[0]} {class_path}" if is_class else "--help"


def without_defaults(parser: ArgumentParser, content: dict[str, Any]) -> dict[str, Any]:
    """`content` without what is as by default where jsonargparse leaves it: in lists, and in settings that may be null."""
    return _pruned(parser, content, "")


def _pruned(parser: ArgumentParser, content: dict[str, Any], path: str) -> dict[str, Any]:
    actions = {action.dest: action for action in parser._actions}
    pruned = {}
    for key, value in content.items():
        own = f"{path}{key}"
        if hint := getattr(actions.get(own), "_typehint", None):
            pruned[key] = _pruned_within(hint, value, replaces=actions[own].default is None)
        else:
            pruned[key] = _pruned(parser, value, f"{own}.") if isinstance(value, dict) else value
    return pruned


def _pruned_within(hint: Any, value: Any, replaces: bool) -> Any:
    """`replaces`: nothing of another default shows through where a key is left out."""
    if isinstance(value, list):
        for of_item in _elements(hint, list):
            return [_pruned_within(of_item, item, True) for item in value]
    if not isinstance(value, dict):
        return value
    for of_item in _elements(hint, dict):
        return {key: _pruned_within(of_item, item, True) for key, item in value.items()}
    parser = class_parser(value.get("class_path") or _concrete(hint))
    if parser is None or not replaces:
        return value
    is_class = "class_path" in value
    arguments = (value.get("init_args") or {}) if is_class else value
    defaults = _defaults(parser)
    kept = _pruned(parser, _minus(parser, arguments, defaults, ""), "")
    if not is_class:
        return kept
    others = {key: item for key, item in value.items() if key != "init_args"}
    return others | ({"init_args": kept} if kept else {})


def _minus(parser: ArgumentParser, content: Any, defaults: Any, path: str) -> dict[str, Any]:
    """What of `content` differs from `defaults`; a setting with a type of its own is taken or left as a whole."""
    typed = {action.dest for action in parser._actions if hasattr(action, "_typehint")}
    kept = {}
    for key, item in content.items():
        default = defaults.get(key) if key in defaults else ...
        if item != default:
            is_group = isinstance(item, dict) and isinstance(default, dict) and f"{path}{key}" not in typed
            kept[key] = _minus(parser, item, default, f"{path}{key}.") if is_group else item
    return kept


def _defaults(parser: ArgumentParser) -> dict[str, Any]:
    defaults = parser.get_defaults(skip_validation=True)
    return yaml.safe_load(parser.dump(defaults, skip_unset=False, skip_validation=True)) or {}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _elements(hint: Any, kind: type) -> list[Any]:
    """Types of what a list, or a dictionary of free keys, holds."""
    return [
        get_args(option)[-1] for option in _options(hint) if get_origin(option) is kind and get_args(option)
    ]


def _concrete(hint: Any) -> type | None:
    """The class whose settings these are where none is named."""
    classes = (
        option
        for option in _options(hint)
        if inspect.isclass(option)
        and option.__module__ not in ("builtins", "typing")  # Any may hold any keys
    )
    return next((option for option in classes if not inspect.isabstract(option)), None)


@functools.cache
def class_parser(made_by: Any) -> ArgumentParser | None:
    """The arguments of a class or function, or of the one at an import path; None where there is none."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        made_by = pkgutil.resolve_name(made_by) if isinstance(made_by, str) else made_by
        add = parser.add_class_arguments if inspect.isclass(made_by) else parser.add_function_arguments
        add(made_by, fail_untyped=False)
    except Exception:  # whatever importing it raises; who makes the object will say so
        return None
    return parser

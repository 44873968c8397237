"""``python main.py init``: a config for your model, images, judge, GPU and budget, by five questions.

What is given by a flag is not asked. Without a terminal nothing is: what is missing takes its default, which is said.
`init_config.py` has the hardware and writes the file.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from balcap.commands.init_config import CONFIGS, HARDWARE, config_text, judges
from balcap.data.settings import folder_problems, source_problems
from balcap.policy.config import PolicyConfig
from balcap.utils.arguments import Parser
from balcap.utils.errors import UserError
from balcap.utils.files import atomic_write

FIRST_ROWS = 20
"""Rows whose images are looked for."""

FILES = (".json", ".jsonl")

SHAREGPT4V, SHAPES = "Lin-Chen/ShareGPT4V", "data/shapes/shapes.json"

FREE = ("oracle", "local-vllm")
"""Judges without a bill."""

QUESTIONS = {
    "hardware": f"Hardware ({', '.join(HARDWARE)})",
    "model": "Model (hub id, or a folder)",
    "data": "Images with captions (a JSON file, or a hub id)",
    "image_root": "Folder that the image paths start from",
    "judge": f"Judge ({', '.join(judges())}, or a model string of litellm)",
    "budget": "Budget of the judge in US dollars (none for no limit)",
}
"""What is asked, in this order: later defaults depend on earlier answers."""


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments.

    Raises:
        UserError: a flag has a value that cannot be, or the file is there.
    """
    options = _parser().parse_args(args)
    out = Path(options.out)
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file, such as {out / 'my.yaml'}")
    if out.exists() and not options.force:
        raise UserError(f"--out: {out} is there already; name another file, or add --force to replace it")
    given = {name: getattr(options, name) for name in QUESTIONS if getattr(options, name) is not None}
    answers: dict[str, Any] = {}
    for name in QUESTIONS:
        answers[name] = _answer(name, given, answers)
        if name == "image_root":
            print(_about_rows(answers["data"], answers["image_root"]))
    command = ["python", "main.py", "init"]
    for name, value in answers.items():
        command += [f"--{name}", "none" if value is None else f"{value:g}" if name == "budget" else value]
    problem = _budget_problem(answers["judge"]) if answers["budget"] is not None else None
    if problem:
        print(f"budget: {problem}")
    text = config_text(answers, str(out), shlex.join([*command, "--out", str(out)]), problem)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(text)
    print(f"{out}: {HARDWARE[answers['hardware']].what}")
    print("Next, what your model does on your images, what the judge will cost, and the run:")
    for following in ("check", "estimate", "fit"):
        print(f"  python main.py {following} --config {shlex.quote(str(out))}")


def _parser() -> Parser:
    hardware = "; ".join(f"{name}: {one.what}" for name, one in HARDWARE.items())
    parser = Parser(
        prog="main.py init",
        description="Write a commented config. Asks for what no flag says, where there is a terminal.",
    )
    for name, question in QUESTIONS.items():
        about = f"{question}: {hardware}." if name == "hardware" else f"{question}."
        parser.add_argument(f"--{name}", type=str | None, default=None, help=about.replace("%", "%%"))
    parser.add_argument("--out", type=str, default="my.yaml", help="The file to write.")
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")
    return parser


def _answer(name: str, given: dict[str, str], answers: dict[str, Any]) -> Any:
    """From the flag, else the terminal, else the default."""
    check, default = CHECKS[name], _default(name, answers)
    # Not checked: a default may be a folder that is yet to be filled.
    untouched = None if default == "none" else float(default) if name == "budget" else default
    if name in given:
        value, problem = check(given[name], answers)
        if problem:
            raise UserError(f"--{name}: {problem}")
        return value
    if not sys.stdin.isatty():
        print(f"{name}: {default} (the default; --{name} changes it)")
        return untouched
    if name == "image_root" and Path(default).expanduser().is_dir():
        return default  # `_about_rows` says whether the images are there
    while True:
        try:
            text = input(f"{QUESTIONS[name]} [{default}]: ").strip()
        except (EOFError, KeyboardInterrupt):
            raise UserError(f"{name}: no answer; give it as --{name}") from None
        value, problem = check(text, answers) if text else (untouched, None)
        if not problem:
            return value
        print(f"  {problem}")


def _default(name: str, answers: dict[str, Any]) -> str:
    tiny = answers.get("hardware") == "cpu"
    if name == "image_root":
        data = Path(answers["data"]).expanduser()
        return str(data.parent) if data.suffix in FILES else "data/sharegpt4v"
    if name == "budget":
        return "none" if answers["judge"] in FREE else "20"
    return {
        "hardware": "80gb",
        "model": "assets/shapes-base" if tiny else "Qwen/Qwen3-VL-4B-Instruct",
        "data": SHAPES if tiny else SHAREGPT4V,
        "judge": "oracle" if tiny else "gpt-6-luna",
    }[name]


def _hardware(text: str, answers: dict[str, Any]) -> tuple[Any, str | None]:
    name = text.lower()
    return name, None if name in HARDWARE else f"{text!r} is none of {', '.join(HARDWARE)}"


def _model(text: str, answers: dict[str, Any]) -> tuple[Any, str | None]:
    problem = next(iter(PolicyConfig(text).problems()), None)
    if problem is None and "/" not in text and not Path(text).expanduser().is_dir():
        problem = f"{text!r} is no folder, and no hub id (owner/name)"
    return text, problem and problem.removeprefix("model.policy.model: ")


def _data(text: str, answers: dict[str, Any]) -> tuple[Any, str | None]:
    problem = next(iter(source_problems(text)), None)
    return text, problem and problem.removeprefix("data.data: ")


def _image_root(text: str, answers: dict[str, Any]) -> tuple[Any, str | None]:
    problem = next(iter(folder_problems(text, None, None)), None)
    return text, problem and problem.removeprefix("data.image_root: ")


def _judge(text: str, answers: dict[str, Any]) -> tuple[Any, str | None]:
    if text in judges():
        return text, None
    from balcap.judge.models import provider_of  # imports litellm

    if "/" in text and provider_of(text) is not None:
        return text, None
    return (
        text,
        f"{text!r} is none of {', '.join(judges())}, and litellm knows no provider of it (<provider>/<model>)",
    )


def _budget(text: str, answers: dict[str, Any]) -> tuple[Any, str | None]:
    if text.lower() == "none":
        return None, None
    try:
        value = float(text.removeprefix("$"))
    except ValueError:
        value = math.nan
    return value, None if 0 < value < math.inf else f"{text!r} is no number of dollars above 0, nor none"


CHECKS: dict[str, Callable[[str, dict[str, Any]], tuple[Any, str | None]]] = {
    "hardware": _hardware,
    "model": _model,
    "data": _data,
    "image_root": _image_root,
    "judge": _judge,
    "budget": _budget,
}
"""Question -> the answer as it is taken, and what is wrong with it."""


def _budget_problem(judge: str) -> str | None:
    """Why this judge cannot have a budget yet."""
    if (CONFIGS / "judge" / f"{judge}.yaml").is_file():
        return None
    from balcap.judge.models import listed_price

    if listed_price(judge) is not None:
        return None
    return f"needs the price of {judge} first: prices: {{{judge}: {{input: <US$ per 1M tokens>, output: <...>}}}}"


def _about_rows(data: str, image_root: str) -> str:
    """How many rows a file has, and whether the images of the first ones are there.

    Raises:
        DataError: it cannot be read.
        UserError: none of the first rows has its images.
    """
    path = Path(data).expanduser()
    if path.suffix in FILES and not path.is_file():
        return f"data: there is no {data} yet" + ("; make demo draws it" if data == SHAPES else "")
    if not path.is_file():
        return f"data: {data} is read from the hub when it is first used; put its images below {image_root}"
    from balcap.data.images import BadImage
    from balcap.data.json_files import parse_rows
    from balcap.data.layouts import image_paths
    from balcap.data.reader import ImageFolder
    from balcap.data.table import flat_rows

    rows = flat_rows(parse_rows(path))
    first = list(itertools.islice(rows, FIRST_ROWS))
    count = len(first) + sum(1 for _ in rows)
    good, folder, why = [row for row in first if not row["problem"]], ImageFolder(image_root), ""
    for row in first:
        why = why or (f"; row {row['row']}: {row['detail']}" if row["problem"] else "")
    found = 0
    for row in good:
        try:
            found += all(map(folder.locate, image_paths(row["sample_id"])))
        except BadImage as bad:
            why = why or f"; {bad.detail}"
    about = f"data: {count} rows; of the first {len(first)}, {len(good)} can be read and {found} have their images{why}"
    if first and not found:
        raise UserError(f"--image_root: {image_root}: {about}")
    return about

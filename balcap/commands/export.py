"""``python main.py export --model.policy.model ADAPTER --out FOLDER --merge``: an adapter and its base as one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from balcap.policy import PolicyConfig
from balcap.utils.files import replaced_folder
from balcap.utils.run_folder import write_problem


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments.

    Raises:
        ConfigError: what cannot be.
        PolicyError: what cannot be loaded.
    """
    from balcap.utils.arguments import Parser

    parser = Parser(prog="main.py export", description="Write the model that an adapter and its base make.")
    parser.add_class_arguments(PolicyConfig, "model.policy")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model; must not be there yet.")
    parser.add_argument("--merge", action="store_true", help="Add the adapter to the weights of its base.")
    values = parser.instantiate(parser.parse_args(args))
    # 4-bit weights would be rounded once more; the adapter is added to the real ones.
    config = replace(values.model.policy, load_in_4bit=False)
    problems = list(config.problems())
    if config.adapter is None:
        problems.append(f"model.policy.model: {config.model} is no folder of an adapter")
    if not values.merge:
        problems.append(
            "merge: the adapter itself is in a run's export already; say --merge for the whole model"
        )
    if Path(values.out).exists() or write_problem(values.out):
        problems.append(f"out: {values.out} is there already, or cannot be written; name another folder")
    if problems:
        from balcap.cli import ConfigError  # imports Lightning

        raise ConfigError(problems)
    from balcap.policy.loading import load_adapter, load_model, load_processor

    model, processor = load_adapter(load_model(config.base), config), load_processor(config)
    with replaced_folder(values.out) as folder:
        model.merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{values.out}: {config.base.model} with {config.model}, {config.dtype}", flush=True)

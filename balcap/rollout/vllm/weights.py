"""The trainer's end of a weight sync: which weights travel, and how they reach vLLM servers.

Adapters travel as files in a folder that trainer and servers share. The trained weights of a full policy do so too,
or from GPU to GPU through vLLM's own NCCL transfer. The workers' end is `balcap.rollout.vllm.worker`.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.client import Server, all_of, free_port
from balcap.utils.loop import BackgroundLoop
from balcap.utils.redact import redact

if TYPE_CHECKING:
    from balcap.policy.policy import Policy

_KEY = "model.engine.init_args"


def trained_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a fully tuned policy, one by one, under the names of its checkpoint on disk.

    transformers 5 renames weights as it loads them; loaders of other projects expect the names on disk. Of weights
    that are tied only one is named. Tensors are the parameters' own storage: read them, and change nothing.
    """
    from transformers.core_model_loading import revert_weight_conversion

    trained = {
        name: parameter.detach()
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad
    }
    yield from revert_weight_conversion(policy.model, trained).items()


def save_weights(policy: Policy, folder: Path) -> None:
    """Write what is trained into a new folder: the adapter as peft saves it, or ``model.safetensors``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    if policy.has_adapter:
        # Embeddings are never adapted here; to find that out by itself, peft would ask the hub.
        policy.model.save_pretrained(folder, save_embedding_layers=False)
    else:
        weights = {name: tensor.contiguous() for name, tensor in trained_weights(policy)}
        save_file(weights, folder / "model.safetensors")


class FolderTransfer:
    """Weights as files: the trainer writes them, all servers read them, the trainer removes them.

    Args:
        servers: to load them.
        root: a folder that trainer and servers share, under the same path.
    """

    def __init__(self, servers: Sequence[Server], root: Path) -> None:
        self.servers, self.root = servers, root

    async def push(self, policy: Policy, version: str) -> None:
        """Return when every worker has loaded the weights.

        Raises:
            EngineFailed: a server cannot read or use them, or is gone.
        """
        folder = self.root / version
        method = "balcap_load_adapter" if policy.has_adapter else "balcap_load_folder"
        try:
            save_weights(policy, folder)
            await all_of(s.rpc(method, folder=str(folder), version=version) for s in self.servers)
        except OSError as error:
            raise EngineFailed(f"{_KEY}.weights_folder: weights cannot be written: {error}") from None
        except EngineFailed as error:
            if "no such file" not in str(error).lower():
                raise
            raise EngineFailed(
                f"{error}. Servers on other hosts, or in containers, need a folder that they and the trainer see "
                f"under the same path: {_KEY}.weights_folder"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Weights:
    """A policy's trained weights as a ``WeightSource`` of vLLM."""

    policy: Policy

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return trained_weights(self.policy)


class NCCLTransfer:
    """Weights from GPU to GPU, by vLLM's own transfer engine. Needs vLLM in the trainer's environment, too.

    vLLM drives it by the methods of a ``VLLMWeightSyncClient``, which are called in a thread of their own.

    Args:
        servers: their ``workers`` counted; started with ``--weight-transfer-config '{"backend": "nccl"}'``.
        loop: that requests to them run on.
        address: of this machine, as the servers reach it.
    """

    def __init__(self, servers: Sequence[Server], loop: BackgroundLoop, address: str) -> None:
        self.servers, self.loop, self.address = servers, loop, address
        self._engine: Any = None
        self._version = ""
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def push(self, policy: Policy, version: str, deadline_s: float) -> None:
        """Return when every worker has loaded the weights.

        A broadcast that misses a member never ends. It is therefore left behind in its thread as soon as a server
        reports an error, or the time is up; the run cannot go on with these servers.

        Raises:
            EngineFailed: a server is gone or refuses, the group cannot be made, or the time is up.
        """
        self._version, self._ended = version, queue.SimpleQueue()
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
        threading.Thread(target=self._send, args=(policy,), name="balcap-weights", daemon=True).start()
        try:
            error = self._ended.get(timeout=deadline_s)
        except queue.Empty:
            error = TimeoutError(f"nothing arrived within {_KEY}.deadline_s: {deadline_s:g} s")
        if error is None:
            return
        self._engine = None
        if isinstance(error, EngineFailed):
            raise error
        raise EngineFailed(
            f"weights did not reach the vLLM servers {', '.join(s.name for s in self.servers)} by NCCL: "
            f"{redact(str(error))}. The servers must reach this machine at {self.address}, on any port: set "
            f"{_KEY}.group_host to another address. NCCL needs a GPU for each member and the same vLLM on both sides: "
            f"{_KEY}.transfer_backend: folder does without"
        ) from error

    def _send(self, policy: Policy) -> None:
        ended = self._ended
        try:
            if policy.device.type == "cuda":
                torch.cuda.set_device(policy.device)
                # a broadcast that hangs must not hold up the stream that the checkpoint is written from
                torch.cuda.set_stream(torch.cuda.Stream())
            if self._engine is None:
                self._engine = self._join(policy)
            self._engine.send_weights()
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    def _join(self, policy: Policy) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        size = 1 + sum(server.workers for server in self.servers)
        info = NCCLTrainerInitInfo(self.address, free_port(), size, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=_Weights(policy))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first, calls = init_info["rank_offset"], []
        for server in self.servers:
            own = json.dumps(init_info | {"rank_offset": first})
            calls.append(server.rpc("balcap_join", init_info=own))
            first += server.workers
        self._run(all_of(calls))

    def start_weight_update(self) -> None:
        """`update_weights` does it."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = json.dumps(update_info)
        calls = [s.rpc("balcap_receive", update_info=info, version=self._version) for s in self.servers]
        self._run(all_of(calls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """`update_weights` has done it."""

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self.loop.run(work)
        except BaseException as error:
            self._ended.put(
                error
            )  # vLLM's own thread would find out after the broadcast, which may never end
            raise

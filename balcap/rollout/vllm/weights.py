"""The trainer's end of a weight sync: which weights travel, and how they reach vLLM servers.

Adapters travel as files in a folder that trainer and servers share. The trained weights of a full policy do so too,
or from GPU to GPU through vLLM's own NCCL transfer. The workers' end is `balcap.rollout.vllm.worker`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcap.rollout.base import KEY, EngineFailed
from balcap.rollout.vllm.client import Server, all_of
from balcap.utils.loop import process_loop
from balcap.utils.redact import redact

if TYPE_CHECKING:
    from balcap.policy.policy import Policy


def trained_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a fully tuned policy, one by one, under the names of its checkpoint on disk.

    transformers 5 renames weights as it loads them; loaders of other projects expect the names on disk. Of weights
    that are tied only one is named. Tensors are the parameters' own storage: read them, and change nothing.
    """
    from transformers.core_model_loading import revert_weight_conversion

    trained = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    yield from revert_weight_conversion(policy.model, trained).items()


@contextmanager
def weight_files(policy: Policy, root: str | None) -> Iterator[str]:
    """A folder with what is trained, for as long as the context lasts: the adapter as peft saves it, or else
    ``model.safetensors``.

    Args:
        root: the folder to make it in; None: the system's for temporary files.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="balcap-", dir=root, ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # servers may run under another name
        if policy.has_adapter:
            # Embeddings are never adapted here; to find that out by itself, peft would ask the hub.
            policy.save_pretrained(folder, save_embedding_layers=False)
        else:
            weights = {name: tensor.contiguous() for name, tensor in trained_weights(policy)}
            save_file(weights, f"{folder}/model.safetensors")
        yield folder


async def push_files(servers: Sequence[Server], policy: Policy, version: str, root: str | None) -> None:
    """Weights as files, which all servers read; return when every worker has loaded them.

    Raises:
        EngineFailed: they cannot be written, or a server cannot read or use them, or is gone.
    """
    method = "balcap_load_adapter" if policy.has_adapter else "balcap_load_folder"
    try:
        with weight_files(policy, root) as folder:
            await all_of(server.rpc(method, folder=folder, version=version) for server in servers)
    except OSError as error:
        raise EngineFailed(f"{KEY}.weights_folder: weights cannot be written: {error}") from None
    except EngineFailed as error:
        if not re.search("no such file|no adapter found|permission denied", str(error), re.IGNORECASE):
            raise
        raise EngineFailed(
            f"{error}. Servers on other hosts, or in containers, need a folder that they and the trainer see under "
            f"the same path: {KEY}.weights_folder"
        ) from None


class NCCLTransfer:
    """Weights of full tuning from GPU to GPU, by vLLM's own transfer. Needs vLLM in the trainer's environment, too.

    vLLM's engine takes it for its ``VLLMWeightSyncClient`` and its ``WeightSource``; it runs in a thread of its own.

    Args:
        servers: started with ``--weight-transfer-config '{"backend": "nccl"}'``.
        address: of this machine, as the servers reach it; None for the one that vLLM finds (VLLM_HOST_IP).
    """

    def __init__(self, servers: Sequence[Server], address: str | None) -> None:
        self.servers, self.address = servers, address
        self._engine: Any = None

    async def push(self, policy: Policy, version: str) -> None:
        """Return when every worker has loaded the weights.

        A broadcast that misses a member never ends. It is therefore left behind in its thread as soon as a server
        reports an error, or the caller gives up; the run cannot go on with these servers.

        Raises:
            EngineFailed: a server is gone or refuses, or the group cannot be made.
        """
        self._policy, self._version, self._outcome = policy, version, Future[None]()
        threading.Thread(target=self._send, name="balcap-weights", daemon=True).start()
        try:
            await asyncio.wrap_future(self._outcome)
        except EngineFailed:
            raise
        except Exception as error:
            raise EngineFailed(
                f"weights did not reach the vLLM servers by NCCL: {redact(str(error))}. They must reach this machine "
                f"at {self.address}, on any port: set {KEY}.group_host to another address. NCCL needs a GPU for each "
                f"member and the same vLLM on both sides: {KEY}.transfer_backend: folder does without"
            ) from error

    def _send(self) -> None:
        try:
            if self._policy.device.type == "cuda":
                torch.cuda.set_device(self._policy.device)
                torch.cuda.synchronize()
                # a broadcast that hangs must not hold up the stream that the checkpoint is written from
                torch.cuda.set_stream(torch.cuda.Stream())
            self._engine = self._engine or self._join()
            self._engine.send_weights()
            self._end(None)
        except BaseException as error:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """What `push` waits for; the first call counts."""
        if not self._outcome.done():
            self._outcome.set_exception(error)

    def _join(self) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        self.address = self.address or get_ip()
        size = 1 + sum(server.about["workers"] for server in self.servers)
        info = NCCLTrainerInitInfo(self.address, get_open_port(), size, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=self)

    # what vLLM calls

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return trained_weights(self._policy)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first, calls = init_info["rank_offset"], []
        for server in self.servers:
            own = json.dumps(init_info | {"rank_offset": first})
            calls.append(server.rpc("balcap_join", init_info=own))
            first += server.about["workers"]
        self._run(calls)

    def start_weight_update(self) -> None:
        """`update_weights` does it."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = json.dumps(update_info)
        self._run([s.rpc("balcap_receive", update_info=info, version=self._version) for s in self.servers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """`update_weights` has done it."""

    def _run(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> None:
        try:
            process_loop().run(all_of(calls))
        except BaseException as error:
            self._end(error)  # vLLM's engine would find out after the broadcast, which may never end
            raise

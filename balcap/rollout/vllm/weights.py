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
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcap.policy.sharding import whole
from balcap.rollout.base import KEY, EngineFailed
from balcap.rollout.vllm.client import Server, all_of
from balcap.utils.loop import process_loop
from balcap.utils.redact import redact

if TYPE_CHECKING:
    from balcap.policy.policy import Policy


def trained_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a policy, one by one, under the names of its checkpoint on disk; of an adapter the model's.

    transformers 5 renames weights as it loads them; loaders of other projects expect the names on disk. Of weights
    that are tied only one is named. Tensors are the parameters' own storage, but for those that lie otherwise on disk: read
    them, and change nothing.

    Those of a sharded policy are whole copies, gathered when it is their turn: all ranks must go through all of them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    trained = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    if policy.has_adapter:
        yield from ((name, whole(tensor)) for name, tensor in trained.items())
        return
    # What is turned or joined is a copy: one layer's at a time.
    for _, names in groupby(trained, key=_layer_of):
        part = revert_weight_conversion(policy.model, {name: trained[name] for name in names})
        yield from ((name, whole(tensor)) for name, tensor in part.items())


def _layer_of(name: str) -> str:
    found = re.match(r".*?\.(?:layers|blocks)\.\d+\.", name)
    return found[0] if found else ""


@contextmanager
def all_taken(weights: Iterator[tuple[str, Tensor]]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """`weights`; those that a failure leaves over are gathered at the end, since other ranks wait for it."""
    try:
        yield weights
    finally:
        deque(weights, maxlen=0)


@contextmanager
def weight_files(policy: Policy, root: str | None, keep: bool = True) -> Iterator[str]:
    """A folder with what is trained, for as long as the context lasts: the adapter as peft saves it, or else
    ``model-*.safetensors``, each of `PART_BYTES` at most. A collective where the policy is sharded.

    Args:
        policy: whose weights.
        root: the folder to make it in; None: the system's for temporary files.
        keep: False on a rank that takes part, and needs no files: its folder is "".
    """
    if not keep:
        deque(trained_weights(policy), maxlen=0)
        yield ""
        return
    with (
        all_taken(trained_weights(policy)) as weights,
        tempfile.TemporaryDirectory(prefix="balcap-", dir=root, ignore_cleanup_errors=True) as folder,
    ):
        os.chmod(folder, 0o755)  # servers may run under another name
        if policy.has_adapter:
            # Embeddings are never adapted here; to find that out by itself, peft would ask the hub.
            policy.save_pretrained(folder, save_embedding_layers=False, state_dict=dict(weights))
        else:
            _save_parts(weights, folder)
        yield folder


PART_BYTES = 4 * 2**30
"""Of a file of weights: so much lies in the host's memory at once."""


def _save_parts(weights: Iterator[tuple[str, Tensor]], folder: str) -> None:
    from safetensors.torch import save_file

    part: dict[str, Tensor] = {}
    number = size = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > PART_BYTES:
            save_file(part, f"{folder}/model-{number:05}.safetensors")
            part, number, size = {}, number + 1, 0
        part[name], size = tensor.cpu().contiguous(), size + tensor.nbytes
    save_file(part, f"{folder}/model-{number:05}.safetensors")


async def push_files(servers: Sequence[Server], folder: str, has_adapter: bool, version: str) -> None:
    """Let all servers read `weight_files`; return when every worker has loaded them.

    Raises:
        EngineFailed: a server cannot read or use them, or is gone.
    """
    method = "balcap_load_adapter" if has_adapter else "balcap_load_folder"
    try:
        await all_of(server.rpc(method, folder=folder, version=version) for server in servers)
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

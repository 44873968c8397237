"""Weights from the trainer to the workers of vLLM servers, through a process group of their own.

What is sent is announced over HTTP (`announce`); the tensors follow as a few large broadcasts (`Group.send`), which the
workers receive (`RemoteWeightSync`). Rank 0 of the group is the trainer; gloo carries CPU tensors, NCCL CUDA's.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from balcap.rollout.vllm_worker import NEVER_SYNCED, WeightSync

log = logging.getLogger(__name__)

Backend = Literal["nccl", "gloo"]

BUCKET_BYTES = 256 * 2**20
JOIN_TIMEOUT_S = 120.0
_ALIGNMENT = 16  # bytes; views of any dtype begin at multiples


# ── what travels ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Parcel:
    """A tensor under its name, and the dtype that it travels in."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.tensor.numel()


Bucket = list[Parcel]


def buckets(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, limit: int = BUCKET_BYTES
) -> list[Bucket]:
    """Weights in their order, cut into buckets of at most `limit` bytes; a larger tensor has one of its own.

    Args:
        weights: names and tensors, which are not copied.
        dtype: what receivers compute with: wider floats are rounded to it here instead of there.
        limit: bytes.
    """
    out: list[Bucket] = []
    filled = 0
    for name, tensor in weights:
        narrower = dtype is not None and tensor.is_floating_point() and dtype.itemsize < tensor.itemsize
        parcel = Parcel(name, tensor, dtype if narrower and dtype is not None else tensor.dtype)
        size = _padded(parcel.nbytes)
        if not out or filled + size > limit:
            out.append([])
            filled = 0
        out[-1].append(parcel)
        filled += size
    return out


def announce(parts: Sequence[Bucket]) -> list[list[list[Any]]]:
    """What a receiver must know: for every bucket ``[name, dtype, shape]`` of its tensors, as JSON can carry it."""
    return [
        [[p.name, str(p.dtype).removeprefix("torch."), list(p.tensor.shape)] for p in part] for part in parts
    ]


def packed(part: Bucket, device: torch.device) -> Tensor:
    """The bytes of a bucket, one after the other, each beginning at a multiple of 16: ``[bytes]`` uint8."""
    out = torch.empty(sum(_padded(p.nbytes) for p in part), dtype=torch.uint8, device=device)
    at = 0
    for parcel in part:
        room = out[at : at + parcel.nbytes].view(parcel.dtype).view(parcel.tensor.shape)
        room.copy_(parcel.tensor)
        at += _padded(parcel.nbytes)
    return out


def unpacked(data: Tensor, slots: Sequence[Sequence[Any]]) -> list[tuple[str, Tensor]]:
    """Names and tensors of `packed`, as views of `data`."""
    out, at = [], 0
    for name, dtype, shape in slots:
        kind = getattr(torch, dtype)
        size = kind.itemsize * torch.Size(shape).numel()
        out.append((name, data[at : at + size].view(kind).view(shape)))
        at += _padded(size)
    return out


def size_of(slots: Sequence[Sequence[Any]]) -> int:
    """Bytes of the packed bucket that these slots announce."""
    return sum(_padded(getattr(torch, d).itemsize * torch.Size(shape).numel()) for _, d, shape in slots)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# ── the group ────────────────────────────────────────────────────────────────────────────────────────


class TransferBroken(RuntimeError):
    """Another member of the group is the reason that nothing arrived."""


class Group:
    """The trainer and all workers of all servers. Apart from torch's default group, which belongs to Lightning or vLLM.

    Args:
        backend: ``gloo`` or ``nccl``.
        store: where members find each other.
        rank: 0 is the trainer.
        size: workers + 1.
        device: of the tensors: the member's GPU with NCCL, else the CPU.
        timeout_s: longest broadcast.
        address: of this member's network interface (gloo).
    """

    def __init__(
        self,
        backend: Backend,
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        address: str,
    ) -> None:
        import torch.distributed as dist

        self.device = device if backend == "nccl" else torch.device("cpu")
        self.store = store  # the trainer's end serves the others
        self._timeout = timedelta(seconds=timeout_s)
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo  # options of its own carry the network interface
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=address)]
            options._timeout = timedelta(seconds=JOIN_TIMEOUT_S)
            self._group = gloo(store, rank, size, options)

    def broadcast(self, tensor: Tensor) -> Any:
        """Start sending (rank 0) or receiving `tensor`; returns a work with ``is_completed`` and ``wait``."""
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = self._timeout
        return self._group.broadcast([tensor], options)

    def send(self, parts: Sequence[Bucket]) -> Iterator[Any]:
        """Broadcast one bucket after the other, each when it is asked for: the previous work must be complete."""
        for part in parts:
            yield self.broadcast(packed(part, self.device))

    def receive(self, announced: Sequence[Sequence[Sequence[Any]]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that `send` sends, as they come.

        Raises:
            TransferBroken: another member left, or the time is up.
        """
        for slots in announced:
            data = torch.empty(size_of(slots), dtype=torch.uint8, device=self.device)
            try:
                self.broadcast(data).wait()
            except RuntimeError as error:
                raise TransferBroken(str(error)) from None
            yield from unpacked(data, slots)

    def leave(self) -> None:
        """Drop out, also in the middle of a broadcast: the other members notice at once."""
        group, self._group = self._group, None
        if group is None:
            return
        if self.device.type == "cuda":
            group.abort()
        # gloo closes its connections when nothing refers to it any more, and first waits for what is under way.
        threading.Thread(target=[group].clear, name="balcap-group", daemon=True).start()


def open_store(host: str, port: int, serve: bool) -> Any:
    """The key-value store through which members find each other; the trainer serves it (port 0: any)."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    return TCPStore(host, port, is_master=serve, timeout=timeout, wait_for_workers=False)


def address_towards(host: str, port: int) -> str:
    """The IP address by which this machine reaches `host`. Nothing is sent.

    Raises:
        OSError: there is no such host, or no way to it.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


# ── the worker's side ────────────────────────────────────────────────────────────────────────────────


class RemoteWeightSync(WeightSync):
    """Extension of a vLLM worker that takes weights from a trainer elsewhere.

    Start the server with ``--worker-extension-cls balcap.rollout.transfer.RemoteWeightSync``. Arguments of methods are
    JSON texts, which is what ``/collective_rpc`` passes on; each returns a dict, with what went wrong under ``error``.
    """

    _balcap_group: Group | None = None
    _balcap_run: str | None = None

    def balcap_about(self) -> dict[str, Any]:
        """What this worker runs, and whose weights: ``run`` is the trainer's, None before it joined."""
        worker: Any = self
        config = worker.vllm_config
        lora = config.lora_config
        dtype = config.model_config.dtype if lora is None else lora.lora_dtype
        return {
            "model": config.model_config.model,
            "revision": config.model_config.revision,
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.device(worker.device).type,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "mm_processor_kwargs": config.model_config.multimodal_config.mm_processor_kwargs,
            "max_model_len": config.model_config.max_model_len,
            "max_lora_rank": None if lora is None else lora.max_lora_rank,
            "workers": config.parallel_config.world_size,
            "data_parallel": config.parallel_config.data_parallel_size,
            "run": self._balcap_run,
            "version": self._balcap_version,
        }

    def balcap_join(self, request: str) -> dict[str, Any]:
        """Join the group of a trainer, leaving any other."""
        return _told(lambda: self._balcap_join(**json.loads(request)))

    def balcap_receive(self, request: str) -> dict[str, Any]:
        """Take what the trainer sends from now on, to the end, even if it cannot be used."""
        return _told(lambda: self._balcap_receive(**json.loads(request)))

    def _balcap_join(
        self, run: str, backend: Backend, host: str, port: int, first_rank: int, size: int, timeout_s: float
    ) -> dict[str, Any]:
        worker: Any = self
        if self._balcap_group is not None:
            self._balcap_group.leave()
        self._balcap_group, self._balcap_run, self._balcap_version = None, None, NEVER_SYNCED
        store = open_store(host, port, serve=False)
        rank = first_rank + worker.rank
        device, address = torch.device(worker.device), address_towards(host, port)
        group = Group(backend, store, rank, size, device, timeout_s, address)
        for _ in group.receive(announce(HELLO)):
            pass
        self._balcap_group, self._balcap_run = group, run
        return {"run": run}

    def _balcap_receive(
        self, run: str, version: int, announced: list[list[list[Any]]], adapter: dict[str, Any] | None
    ) -> dict[str, Any]:
        if self._balcap_group is None or run != self._balcap_run:
            raise RuntimeError(
                "it has been started anew, or has joined another run: a server belongs to one run at a time"
            )
        incoming = self._balcap_group.receive(announced)
        try:
            if adapter is not None:
                self.balcap_adapter(adapter, dict(incoming), version)
            else:
                self.balcap_load(incoming, version)
        finally:
            for _ in incoming:  # the trainer is told of an error by the answer, not left waiting
                pass
        return {"version": self.balcap_version()}


HELLO = buckets([("hello", torch.zeros(1))])
"""Sent once when all have joined: a group that cannot carry this is found out before weights move."""


def _told(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, or its error as data: of exceptions vLLM's executors pass on only a part."""
    try:
        return work()
    except Exception as error:
        log.exception("weights from the trainer")
        return {"error": f"{type(error).__name__}: {error}", "kind": type(error).__name__}

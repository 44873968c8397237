"""vLLM servers for tests: real ones in processes of their own, and one that only speaks like one."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from balcap.rollout.vllm.worker import WeightSync
from tests.rollout.with_vllm.support import LIMIT
from tests.support import ROOT

SCALED = {"shortest_edge": 56**2, "longest_edge": 112**2}  # by the tiny Qwen2.5-VL
LORA = {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "r": 4}
LORA_PIXELS = 84**2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ── real servers ─────────────────────────────────────────────────────────────────────────────────────


class VLLMProcess:
    """``main.py serve`` for a tiny model, in a process group of its own."""

    def __init__(self, model: Path, log: Path, lora: bool = False, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        options = [f"--model.policy.model={model}", "--model.policy.dtype=float32"]
        if lora:
            options += [f"--model.policy.lora={json.dumps(LORA)}", f"--model.policy.max_pixels={LORA_PIXELS}"]
        flags = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "32"]
        flags += ["--limit-mm-per-prompt", json.dumps(LIMIT)]
        flags += ["--kv-cache-memory-bytes", str(64 * 2**20)]
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}  # at least a GiB
        command = [sys.executable, "main.py", "serve", "--config", "configs/shapes.yaml", *options]
        self.process = subprocess.Popen(
            [*command, f"--port={self.port}", "--", *flags],
            cwd=ROOT,
            env=environment | {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> VLLMProcess:
        """Until it can sample."""
        give_up = time.monotonic() + 400
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-5000:]}")

    def kill(self) -> None:
        """At once, with all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Pool:
    """Servers of the tiny Qwen2.5-VL that tests share; one that a test killed is replaced when it is asked for.

    Servers for an adapter scale images to less than the model's own limit.
    """

    def __init__(self, model: Path, logs: Path) -> None:
        self._model, self._logs, self._started = model, logs, 0
        self._servers: dict[str, list[VLLMProcess]] = {"full": [], "lora": []}

    def get(self, kind: str, count: int = 1) -> list[VLLMProcess]:
        """`count` servers to tune fully (``full``) or for an adapter (``lora``), ready to sample."""
        self.begin(kind, count)
        return [server.wait() for server in self._servers[kind][:count]]

    def begin(self, kind: str, count: int) -> None:
        """Start what is missing, without waiting."""
        alive = [server for server in self._servers[kind] if server.process.poll() is None]
        while len(alive) < count:
            log = self._logs / f"{self._started}.log"
            alive.append(VLLMProcess(self._model, log, lora=kind == "lora"))
            self._started += 1
        self._servers[kind] = alive

    def close(self) -> None:
        for server in [*self._servers["full"], *self._servers["lora"]]:
            server.kill()


_POOLS: dict[Path, Pool] = {}  # pytest makes a fixture anew for each file that imports it


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Pool]:
    """Two servers for full tuning and one for an adapter start together: most of it is waiting."""
    model = folders["qwen"]
    if model not in _POOLS:
        _POOLS[model] = Pool(model, tmp_path_factory.mktemp("servers"))
        _POOLS[model].begin("full", 2)
        _POOLS[model].begin("lora", 1)
    yield _POOLS[model]
    _POOLS[model].close()


# ── a server that only speaks like one ───────────────────────────────────────────────────────────────


class FakeWorker(WeightSync):
    """A worker without a model: it keeps what it is sent.

    Attributes:
        weights: of the last load, by name.
        adapter: config and tensors of the adapter last loaded.
        fails: message of the error that the next load raises.
        group: what it was asked to join, and the tensors that others broadcast to it (NCCL).
    """

    def __init__(self, model: str, workers: int = 1) -> None:
        self.device = torch.device("cpu")
        self.weights: dict[str, torch.Tensor] = {}
        self.adapter: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None
        self.fails: str | None = None
        self.group: dict[str, Any] = {}
        self.incoming: queue.SimpleQueue[tuple[str, torch.Tensor]] = queue.SimpleQueue()
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                model=model,
                revision=None,
                quantization=None,
                logprobs_mode="raw_logprobs",
                max_model_len=2048,
                multimodal_config=SimpleNamespace(
                    mm_processor_kwargs={"size": SCALED}, get_limit_per_prompt=lambda modality: 1
                ),
            ),
            lora_config=None,
            parallel_config=SimpleNamespace(world_size=workers, data_parallel_size=1),
        )

    def balcap_load(self, weights: Any, version: int | str) -> None:
        self._fail_if_asked()
        self.weights = {name: tensor.clone() for name, tensor in weights}
        self._balcap_version = version

    def balcap_load_adapter(self, folder: str, version: int | str) -> None:
        self._fail_if_asked()
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        self.adapter = config, load_file(f"{folder}/adapter_model.safetensors")
        self._balcap_version = version

    def _fail_if_asked(self) -> None:
        self._balcap_version = None
        if self.fails is not None:
            raise KeyError(self.fails)

    # what vLLM's own worker does for a transfer by NCCL

    def shutdown_weight_transfer_engine(self) -> None: ...

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.group = init_info

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._fail_if_asked()
        for name, dtype, shape in zip(
            *(update_info[k] for k in ("names", "dtype_names", "shapes")), strict=True
        ):
            sent, tensor = self.incoming.get(timeout=10)
            assert (sent, str(tensor.dtype), list(tensor.shape)) == (name, f"torch.{dtype}", shape)
            self.weights[name] = tensor.clone()

    def finish_weight_update(self) -> None: ...


class FakeServer:
    """Speaks vLLM's endpoints on loopback. Every caption is "tokens"; prompts are as the test says.

    Attributes:
        replies: path -> status and body to answer with instead.
        hangs: paths that are never answered.
        drops: paths on which the connection breaks.
        delay_s: before captions.
        most_at_once: requests for captions under way together, so far.
        seen: bodies of the requests, by path.
        prompt_ids: question -> prompt ids that it reports.
    """

    def __init__(self, model: str, workers: int = 1, tokens: tuple[int, ...] = (20, 21, 3)) -> None:
        self.workers = [FakeWorker(model, workers) for _ in range(workers)]
        self.model, self.tokens = model, tokens
        self.replies: dict[str, tuple[int, Any]] = {}
        self.hangs: set[str] = set()
        self.drops: set[str] = set()
        self.delay_s = 0.0
        self.most_at_once = self._at_once = 0
        self.seen: dict[str, list[Any]] = {}
        self.headers: list[dict[str, str]] = []
        self.prompt_ids: dict[str, list[int]] = {}
        self.adapters: list[str] = []
        self.open = threading.Event()
        self._engine = threading.Lock()  # which takes one call after the other
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake._answer(self)

            def do_POST(self) -> None:
                fake._answer(self)

            def log_message(self, *args: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("content-length") or 0)
        body = json.loads(request.rfile.read(length)) if length else None
        self.headers.append(dict(request.headers))
        self.seen.setdefault(request.path, []).append(body)
        if request.path in self.hangs:
            self.open.wait()
            return
        if request.path in self.drops:
            return
        if request.path == "/v1/chat/completions":
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            time.sleep(self.delay_s)
            self._at_once -= 1
        try:
            status, reply = self.replies.get(request.path) or (200, self._reply(request.path, body))
        except Exception as error:  # as vLLM does
            status, reply = 500, {"error": {"message": f"Call to collective_rpc method failed: {error}"}}
        data = json.dumps(reply).encode() if reply is not None else b""
        try:
            request.send_response(status)
            request.send_header("content-type", "application/json" if data else "text/plain")
            request.send_header("content-length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
        except OSError:
            pass  # the client gave up

    def _reply(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            adapters = [{"id": name, "parent": self.model} for name in self.adapters]
            return {"data": [{"id": self.model, "parent": None}, *adapters]}
        if path == "/collective_rpc":
            method, arguments = body["method"], body["kwargs"]
            with self._engine:
                return {"results": [getattr(worker, method)(**arguments) for worker in self.workers]}
        if path == "/v1/load_lora_adapter":
            self.adapters.append(body["lora_name"])
        if path == "/v1/chat/completions":
            question = body["messages"][0]["content"][1]["text"]
            content = [{"token": f"token_id:{t}", "logprob": -0.5} for t in self.tokens]
            choice = {
                "token_ids": list(self.tokens),
                "logprobs": {"content": content},
                "finish_reason": "stop",
            }
            choices = [choice | {"index": i} for i in range(body["n"])]
            return {"prompt_token_ids": self.prompt_ids.get(question, []), "choices": choices}
        return None

"""One vLLM server over HTTP, and what its refusals mean for the person who started it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from balcap.rollout.base import EngineFailed
from balcap.utils.redact import redact

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

KEY = "model.engine.init_args"
START = "python main.py serve --config <the run's config>"
EXTENSION = "balcap.rollout.vllm.worker.WeightSync"
"""Class that vLLM mixes into its workers."""

ADAPTER = "balcap"
"""Name under which requests ask for the adapter."""

_POLL_S = 1.0
_CONNECT_S = 20.0
_RESET_S = 30.0
_CHAT = "/v1/chat/completions"


class Server:
    """A vLLM server (``vllm serve``).

    All methods raise EngineFailed, which names the url, where the server is gone or refuses.

    Args:
        url: such as ``http://host:8000``.
        key: what ``--api-key`` of the server asks for; appears in no message.

    Attributes:
        name: the url without credentials, for messages.
        busy: requests for captions that are under way.
        workers: processes that hold its model.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        self.url = urlunsplit(parts)
        self.name = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.host, self.port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self.busy = 0
        self.workers = 0
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http: httpx.AsyncClient | None = None

    async def wait_until_up(self, timeout_s: float) -> None:
        """Return when the server is ready to sample."""
        import httpx

        give_up = time.monotonic() + timeout_s
        while True:
            try:
                reply = await self._client().get("/health", timeout=_CONNECT_S)
                if reply.status_code == 200:
                    return
                reason = f"it answers HTTP {reply.status_code}"
            except httpx.TransportError as error:
                reason = _describe(error)
            if time.monotonic() >= give_up:
                raise EngineFailed(
                    f"no vLLM server is up at {self.name} after {timeout_s:g} s ({reason}). Start it with: {START}; or "
                    f"change {KEY}.urls. A server that takes longer to load: "
                    f"{KEY}.start_timeout_s"
                )
            await asyncio.sleep(min(_POLL_S, max(0.0, give_up - time.monotonic())))

    async def models(self) -> list[dict[str, Any]]:
        """Models and adapters that the server knows, as ``/v1/models`` lists them."""
        models: list[dict[str, Any]] = (await self._ask("GET", "/v1/models"))["data"]
        return models

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for captions."""
        self.busy += 1
        try:
            answer: dict[str, Any] = await self._ask("POST", _CHAT, body)
        finally:
            self.busy -= 1
        return answer

    async def rpc(self, method: str, **arguments: str) -> list[Any]:
        """Run a method of the worker extension in every worker; their results."""
        body = {"method": method, "kwargs": arguments}
        results: list[Any] = (await self._ask("POST", "/collective_rpc", body))["results"]
        return results

    async def add_adapter(self) -> None:
        """Make the adapter known to the server by name. The workers hold it already: nothing is read from a path."""
        if ADAPTER not in [model["id"] for model in await self.models()]:
            # Any path will do: an adapter that is loaded is not looked for.
            await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": "in-memory"})

    async def reset_caches(self) -> None:
        """Forget what older weights computed: keys and values of prefixes, and images through the vision tower."""
        give_up = time.monotonic() + _RESET_S
        # A reset fails while blocks are in use. vLLM 0.22 does not say so; 0.32 does, and another try is worth it.
        while not ((await self._ask("POST", "/reset_prefix_cache")) or {}).get("success", True):
            if time.monotonic() > give_up:
                raise EngineFailed(
                    f"the vLLM server {self.name} cannot reset its prefix cache: it still works on requests. Does "
                    "something else use it? A run needs its servers for itself"
                )
            await asyncio.sleep(0.1)
        await self._ask("POST", "/reset_mm_cache")
        await self._ask("POST", "/reset_encoder_cache")

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    def _client(self) -> httpx.AsyncClient:
        import httpx

        if self._http is None:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
                # A connection for each request: one that is kept may close as the next request enters it.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                trust_env=False,  # engines are not behind the proxy that leads to the internet
            )
        return self._http

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        import httpx

        try:
            reply = await self._client().request(method, path, json=body)
        except httpx.TransportError as error:
            raise EngineFailed(
                f"the vLLM server {self.name} is gone ({_describe(error)}); its own log says why. Start it again "
                f"with: {START}"
            ) from None
        if reply.status_code >= 400:
            what = f"{path} ({body['method']})" if path == "/collective_rpc" and body else path
            said = f"the vLLM server {self.name} answers {what} with HTTP {reply.status_code}: {_message(reply.text)}"
            advice = _advice(path, body or {}, reply.status_code)
            raise EngineFailed(f"{said}. {advice}, or start it with: {START}" if advice else said)
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.json() if is_json else None


def _advice(path: str, body: dict[str, Any], status: int) -> str:
    """What a refusal means."""
    if status == 401:
        return f"Name the environment variable with its key in {KEY}.api_key_env"
    if path == "/v1/load_lora_adapter":
        if status == 404:
            return "Set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        return "Start it with no --lora-modules of your own: the run's adapter must be the only one"
    if path == _CHAT:
        lost = status == 404 and body["model"] == ADAPTER
        return "If it was started with --api-server-count, leave that out" if lost else ""
    if status == 404:
        return "Set VLLM_SERVER_DEV_MODE=1 in its environment"
    if body.get("method") == "balcap_about":
        return f"Start it with --worker-extension-cls {EXTENSION}"
    return ""


def _describe(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".rstrip(": "))


def _message(text: str) -> str:
    """The message in the body of an error; bodies differ between endpoints and versions."""
    try:
        body = json.loads(text)
    except ValueError:
        return redact(text)
    while isinstance(body, dict) and (
        inner := body.get("error") or body.get("message") or body.get("detail")
    ):
        body = inner
    return redact(body if isinstance(body, str) else json.dumps(body))


# ── several servers ──────────────────────────────────────────────────────────────────────────────────


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first error cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def address_towards(host: str, port: int) -> str:
    """The IP address by which this machine reaches `host`. Nothing is sent.

    Raises:
        OSError: there is no such host, or no way to it.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

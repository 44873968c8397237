"""One vLLM server over HTTP, and what its refusals mean for the person who started it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx

from balcap.rollout.base import KEY, EngineFailed
from balcap.utils.redact import redact

T = TypeVar("T")

START = "python main.py serve --config <the run's config>"
EXTENSION = "balcap.rollout.vllm.worker.WeightSync"
"""Class that vLLM mixes into its workers."""

ADAPTER = "balcap"
"""Name under which requests ask for the adapter."""

_POLL_S = 1.0
_CONNECT_S = 20.0
_RESET_S = 30.0
CHAT, RPC = "/v1/chat/completions", "/collective_rpc"


class Server:
    """A vLLM server (``vllm serve``).

    All methods raise EngineFailed, which names the url, where the server is gone or refuses.

    Args:
        url: such as ``http://host:8000``.
        key: what ``--api-key`` of the server asks for; appears in no message.

    Attributes:
        name: the url without credentials, for messages.
        about: what its workers run (`balcap.rollout.vllm.worker.WeightSync.balcap_about`), once it was asked.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        self.url = urlunsplit(parts)
        self.name = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.about: dict[str, Any] = {}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            # A connection for each request: one that is kept may close as the next request enters it.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # engines are not behind the proxy that leads to the internet
        )

    async def wait_until_up(self, timeout_s: float) -> None:
        """Return when the server is ready to sample."""
        reason = "no answer"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        reply = await self._http.get("/health")
                        if reply.status_code == 200:
                            return
                        reason = f"it answers HTTP {reply.status_code}"
                    except httpx.TransportError as error:
                        reason = _describe(error)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise EngineFailed(
                f"no vLLM server is up at {self.name} after {timeout_s:g} s ({reason}). Start it with: {START}; or "
                f"change {KEY}.urls. A server that takes longer to load: {KEY}.start_timeout_s"
            ) from None

    async def models(self) -> list[dict[str, Any]]:
        """Models and adapters that the server knows, as ``/v1/models`` lists them."""
        return list((await self.ask("/v1/models"))["data"])

    async def rpc(self, method: str, **arguments: str) -> list[Any]:
        """Run a method of the worker extension in every worker; their results."""
        return list((await self.ask(RPC, {"method": method, "kwargs": arguments}))["results"])

    async def add_adapter(self) -> None:
        """Make the adapter known to the server by name. The workers hold it already: nothing is read from a path."""
        if ADAPTER not in [model["id"] for model in await self.models()]:
            # Any path will do: an adapter that is loaded is not looked for.
            await self.ask("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": "in-memory"})

    async def reset_caches(self) -> None:
        """Forget what older weights computed: keys and values of prefixes, and images through the vision tower."""
        give_up = time.monotonic() + _RESET_S
        # A reset fails while blocks are in use. vLLM 0.22 does not say so; 0.32 does, and another try is worth it.
        while not ((await self.ask("/reset_prefix_cache", {})) or {}).get("success", True):
            if time.monotonic() > give_up:
                raise EngineFailed(
                    f"the vLLM server {self.name} cannot reset its prefix cache: it still works on requests. Does "
                    "something else use it? A run needs its servers for itself"
                )
            await asyncio.sleep(0.1)
        await self.ask("/reset_mm_cache", {})
        await self.ask("/reset_encoder_cache", {})

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, None where that is no JSON; without `body` by GET, else by POST."""
        try:
            reply = await self._http.request("GET" if body is None else "POST", path, json=body)
        except httpx.TransportError as error:
            raise EngineFailed(
                f"the vLLM server {self.name} is gone ({_describe(error)}); its own log says why. Start it again "
                f"with: {START}"
            ) from None
        if reply.status_code >= 400:
            what = f"{path} ({body['method']})" if path == RPC and body else path
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
    if path == CHAT:
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

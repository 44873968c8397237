"""One vLLM server over HTTP: what is asked of it, and what its refusals mean for the person who started it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from balcap.rollout.base import EngineFailed
from balcap.utils.redact import redact

if TYPE_CHECKING:
    import httpx

START = "python main.py serve --config <the run's config>"
ADAPTER = "balcap"
"""Name under which requests ask for the adapter."""

_POLL_S = 1.0
_CONNECT_S = 20.0
_RESET_S = 30.0


class WorkerFailed(EngineFailed):
    """A method of the worker extension says that it could not do its work.

    Args:
        message: as of any EngineFailed.
        kind: name of the worker's exception.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


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
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                reply = await self._client().get("/health", timeout=_CONNECT_S)
                if reply.status_code == 200:
                    return
                last = f"it answers HTTP {reply.status_code}"
            except self._errors() as error:
                last = _words(error)
            if time.monotonic() >= give_up:
                raise EngineFailed(
                    f"no vLLM server is up at {self.name} after {timeout_s:g} s ({last}). Start it with: {START}; or "
                    "change model.engine.init_args.urls. A server that takes longer to load: "
                    "model.engine.init_args.start_timeout_s"
                )
            await asyncio.sleep(min(_POLL_S, max(0.0, give_up - time.monotonic())))

    async def models(self) -> list[dict[str, Any]]:
        """Models and adapters that the server knows, as ``/v1/models`` lists them."""
        found: list[dict[str, Any]] = (await self._ask("GET", "/v1/models"))["data"]
        return found

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of ``/v1/chat/completions``."""
        self.busy += 1
        try:
            answer: dict[str, Any] = await self._ask("POST", "/v1/chat/completions", body)
        finally:
            self.busy -= 1
        return answer

    async def rpc(self, method: str, request: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Run a method of the worker extension in every worker; their results."""
        body: dict[str, Any] = {"method": method}
        if request is not None:
            body["kwargs"] = {"request": json.dumps(request)}
        results: list[dict[str, Any]] = (await self._ask("POST", "/collective_rpc", body))["results"]
        for result in results:
            if error := result.get("error"):
                said = f"the vLLM server {self.name} could not run {method}: {redact(error)}"
                raise WorkerFailed(said, result["kind"])
        return results

    async def add_adapter(self) -> None:
        """Make the adapter known to the server by name. The workers hold it already: nothing is read from a path."""
        if ADAPTER not in [model["id"] for model in await self.models()]:
            # Any path will do: an adapter that is loaded is not looked for.
            await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": "in-memory"})

    async def reset_caches(self) -> None:
        """Forget what older weights computed: keys and values of prefixes, and images through the vision tower."""
        give_up = time.monotonic() + _RESET_S
        # A reset fails while blocks are in use. vLLM 0.22 does not tell; 0.32 does, and another try is worth it.
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

    @staticmethod
    def _errors() -> tuple[type[Exception], ...]:
        import httpx

        return (httpx.TransportError,)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            reply = await self._client().request(method, path, json=body)
        except self._errors() as error:
            raise EngineFailed(
                f"the vLLM server {self.name} is gone ({_words(error)}); its own log says why. Start it again "
                f"with: {START}"
            ) from None
        if reply.status_code >= 400:
            raise EngineFailed(self._refused(path, body, reply.status_code, _their_words(reply.text)))
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.json() if is_json else None

    def _refused(self, path: str, body: dict[str, Any] | None, status: int, words: str) -> str:
        """What a refusal means."""
        way_out = ""
        if path == "/v1/load_lora_adapter" and status == 404:
            way_out = "set VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        elif path == "/v1/load_lora_adapter":
            way_out = "start it with no --lora-modules of your own: the run's adapter must be the only one"
        elif status == 404 and path != "/v1/chat/completions":
            way_out = "set VLLM_SERVER_DEV_MODE=1 in its environment"
        elif path == "/collective_rpc" and body and body["method"] == "balcap_about":
            way_out = "start it with --worker-extension-cls balcap.rollout.transfer.RemoteWeightSync"
        elif status == 401:
            way_out = "name the environment variable with its key in model.engine.init_args.api_key_env"
        elif path == "/v1/chat/completions" and body and body["model"] == ADAPTER and status == 404:
            way_out = "if it was started with --api-server-count, leave that out"
        said = f"the vLLM server {self.name} answers {path} with HTTP {status}: {words}"
        return f"{said}. {way_out[0].upper()}{way_out[1:]}, or start it with: {START}" if way_out else said


def _words(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".rstrip(": "))


def _their_words(text: str) -> str:
    """The message in the body of an error; bodies differ between endpoints and versions."""
    try:
        found = json.loads(text)
    except ValueError:
        return redact(text)
    while isinstance(found, dict) and (
        inner := found.get("error") or found.get("message") or found.get("detail")
    ):
        found = inner
    return redact(found if isinstance(found, str) else json.dumps(found))

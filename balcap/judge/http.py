"""The HTTP client that judges are asked with: it reads no more than an answer can be, and repairs what is no answer."""

from __future__ import annotations

import json
import zlib
from contextvars import ContextVar
from typing import Any

import httpx

MAX_BYTES = 4_000_000
"""Of an answer, decompressed: ten times the longest that is parsed."""

ANSWERS: ContextVar[list[int]] = ContextVar("ANSWERS", default=[])  # noqa: B039  each call sets its own
"""Status of the responses that this call has got so far."""


class AnswerTooLarge(httpx.DecodingError):
    """The body is larger than `MAX_BYTES`."""


class _Transport(httpx.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = "gzip"
        response = await super().handle_async_request(request)
        body, unzip = bytearray(), zlib.decompressobj(wbits=47)  # gzip or deflate
        zipped = response.headers.get("content-encoding", "identity") != "identity"
        try:
            async for chunk in response.stream:  # type: ignore[union-attr]
                body += unzip.decompress(chunk, MAX_BYTES + 1) if zipped else chunk
                if len(body) > MAX_BYTES:
                    raise AnswerTooLarge(f"it is larger than {MAX_BYTES / 1e6:g} MB")
        except zlib.error as error:
            raise httpx.DecodingError(f"content-encoding: {error}") from error
        finally:
            await response.aclose()
        ANSWERS.get().append(response.status_code)
        dropped = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(k, v) for k, v in response.headers.multi_items() if k not in dropped]
        return httpx.Response(response.status_code, headers=headers, content=without_bad_usage(bytes(body)))


def without_bad_usage(body: bytes) -> bytes:
    """A JSON answer without its ``usage`` where that holds no counts: litellm would refuse the whole answer."""
    try:
        answer = json.loads(body)
        usage = answer["usage"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body
    if isinstance(usage, dict):
        details = usage.get("prompt_tokens_details")
        details = details if isinstance(details, dict) else {}
        given = (
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
            details.get("cached_tokens") or 0,
        )
        counts: list[Any] = list(given)
        if all(type(count) is int and count >= 0 for count in counts) and counts[2] <= counts[0]:
            return body
    return json.dumps({key: value for key, value in answer.items() if key != "usage"}).encode()


def new_session() -> httpx.AsyncClient:
    """For litellm, which uses it for all OpenAI-compatible servers; how many calls are under way is the judge's matter."""
    return httpx.AsyncClient(
        transport=_Transport(limits=httpx.Limits(max_connections=None), http2=False),
        timeout=None,
        follow_redirects=True,
    )

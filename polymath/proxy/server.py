"""One server that speaks OpenAI's API: one try of one request, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies

import orjson

from polymath.errors import UpstreamFailed
from polymath.experts import Deployment, ExpertSettings
from polymath.proxy.circuit_breaker import CircuitBreaker
from polymath.proxy.event_stream import read_events
from polymath.proxy.failures import Failure, Failures, TryFailed

if TYPE_CHECKING:
    import httpx

    from polymath.proxy.plain_http import PlainTransport

__all__ = ["Server"]

CONNECT_SECONDS = 5.0
CONNECTIONS = 1000
KEPT_ALIVE = 100
LARGEST_REPLY = 32 * 1024 * 1024
"""Bytes of a whole answer."""
LARGEST_EVENT = 1024 * 1024
"""Bytes of one event of a stream."""
LARGEST_ERROR = 64 * 1024
"""Bytes read of an error body."""
DRAIN_SECONDS = 0.1
"""The last bytes of a stream come with its end; a server that is slower loses the connection."""


class Server:
    """One deployment of an upstream.

    Args:
        expert: its name, for messages.

    Attributes:
        model: what the server calls the model.
        outstanding: requests that are being answered.
    """

    def __init__(self, expert: str, settings: ExpertSettings, deployment: Deployment) -> None:
        self.api_base = deployment.api_base.rstrip("/")
        self.model = deployment.model or str(settings.model)
        self.breaker = CircuitBreaker()
        self.outstanding = 0
        self._timeout = settings.timeout
        self._headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
        secrets = list(self._headers.values())
        if deployment.api_key is not None:
            key = deployment.api_key.get_secret_value()
            self._headers["authorization"] = f"Bearer {key}"
            secrets.append(key)
        self._failures = Failures(expert, secrets, settings.timeout)
        self._client: httpx.AsyncClient | None = None
        self._plain: PlainTransport | None = None

    async def whole(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The JSON object that answers a request.

        Raises:
            TryFailed: there is none.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        async with self._sent(method, path, body, deadline) as response:
            async with asyncio.timeout_at(deadline):
                data = await _limited(response, LARGEST_REPLY)
            if data is None:
                raise self._failures.broken(f"sent a reply of more than {LARGEST_REPLY} bytes")
            self._check_type(response, "json")
            return self._object(data)

    async def events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON objects of a stream, up to `[DONE]`.

        Raises:
            TryFailed: the stream does not begin, or breaks.
        """
        clock = asyncio.get_running_loop().time
        async with self._sent("POST", path, body, clock() + self._timeout) as response:
            self._check_type(response, "event-stream")
            events = read_events(response.aiter_bytes(), LARGEST_EVENT)
            while True:
                async with asyncio.timeout(self._timeout):
                    data = await anext(events, None)
                if data is None:
                    raise self._failures.broken("ended the stream in the middle of an answer")
                if data == b"[DONE]":
                    await _drain(events)
                    return
                yield self._object(data)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    @asynccontextmanager
    async def _sent(
        self, method: str, path: str, body: Mapping[str, Any] | None, deadline: float
    ) -> AsyncIterator[httpx.Response]:
        """A response that begins well; whatever goes wrong with it becomes a TryFailed."""
        import httpx

        response: httpx.Response | None = None
        self.outstanding += 1
        self.breaker.start()
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._send(method, path, body)
                if not response.is_success:
                    raise self._failures.refused(
                        response.status_code, response.headers, await _readable(response)
                    )
            yield response
        except TryFailed as failed:
            self._judge(failed.failure)
            raise
        except UpstreamFailed as error:
            self._judge("broken")
            raise TryFailed(error, "broken") from error
        except (TimeoutError, httpx.TimeoutException, httpx.HTTPError) as error:
            failure: Failure = "unreachable" if response is None else "broken"
            self._judge(failure)
            raise self._failures.interrupted(error, failure) from error
        except BaseException:  # the client went away, which says nothing of the server
            self.breaker.forget()
            raise
        else:
            self.breaker.succeed()
        finally:
            self.outstanding -= 1
            if response is not None:
                await response.aclose()

    def _judge(self, failure: Failure) -> None:
        if failure == "refused":
            self.breaker.succeed()
        elif failure == "busy":
            self.breaker.forget()
        else:
            self.breaker.fail()

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        if self._client is None:
            self._client = self._new_client()
        content = None if body is None else orjson.dumps({**body, "model": self.model})
        request = self._client.build_request(
            method,
            f"{self.api_base}{path}",
            content=content,
            headers={"content-type": "application/json"} if content else None,
        )
        if self._plain is not None:  # what a client does around it is nothing that is wanted here
            return await self._plain.handle_async_request(request)
        return await self._client.send(request, stream=True)

    def _new_client(self) -> httpx.AsyncClient:
        import httpx

        from polymath.proxy.plain_http import PlainTransport

        base = httpx.URL(self.api_base)
        if base.scheme == "http" and not base.userinfo and not getproxies():
            self._plain = PlainTransport(CONNECTIONS, KEPT_ALIVE)
        return httpx.AsyncClient(
            transport=self._plain,
            http2=self._plain is None,
            headers=self._headers,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # clients share it
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=KEPT_ALIVE),
        )

    def _check_type(self, response: httpx.Response, wanted: str) -> None:
        found = self._failures.shown(response.headers.get("content-type", ""))
        if wanted not in found:
            raise self._failures.broken(f"sent {found or 'no content type'!r} in place of {wanted}")

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise self._failures.broken("sent what is not JSON") from None
        if not isinstance(value, dict):
            raise self._failures.broken("sent JSON that is no object")
        if "error" in value and "choices" not in value:
            detail = value["error"]
            message = detail.get("message") if isinstance(detail, dict) else detail
            raise self._failures.broken(f"failed: {self._failures.shown(str(message))}")
        return value


async def _drain(events: AsyncIterator[bytes]) -> None:
    """Read what follows the end of a stream, so that its connection can be used again."""
    import httpx

    with suppress(TimeoutError, httpx.HTTPError, UpstreamFailed):
        async with asyncio.timeout(DRAIN_SECONDS):
            await anext(events, None)


async def _limited(response: httpx.Response, most: int) -> bytes | None:
    """The body; None if it has more bytes."""
    data = bytearray()
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > most:
            return None
    return bytes(data)


async def _readable(response: httpx.Response) -> bytes | None:
    """The body of an error; None if it is too large or breaks off, as its status is known."""
    import httpx

    try:
        return await _limited(response, LARGEST_ERROR)
    except httpx.HTTPError:
        return None

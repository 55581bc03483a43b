"""One server that speaks OpenAI's API: one try of one request, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Literal

import orjson

from polymath.errors import (
    Overloaded,
    PolymathError,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
)
from polymath.experts import Deployment, ExpertSettings
from polymath.proxy.circuit_breaker import CircuitBreaker
from polymath.proxy.event_stream import read_events
from polymath.proxy.retry import seconds_to_wait

if TYPE_CHECKING:
    import httpx

__all__ = ["Failure", "Server", "TryFailed"]

CONNECT_SECONDS = 5.0
CONNECTIONS = 1000
KEPT_ALIVE = 100
LARGEST_REPLY = 32 * 1024 * 1024
"""Bytes of a whole answer."""
LARGEST_EVENT = 1024 * 1024
"""Bytes of one event of a stream."""
LARGEST_ERROR = 64 * 1024
"""Bytes read of an error body."""
LONGEST_MESSAGE = 500
"""Characters of an upstream's own error message that a client is shown."""

BUSY = frozenset({408, 409, 429})
"""Another try may do better, as in OpenAI's clients; so it may from 500 on."""
OUR_KEY = frozenset({401, 403, 407})
"""The upstream does not let this gateway in, which is no fault of the client."""

DRAIN_SECONDS = 0.1
"""The last bytes of a stream come with its end; a server that is slower loses the connection."""

Failure = Literal["unreachable", "busy", "broken", "refused"]


class TryFailed(Exception):
    """One try failed.

    Attributes:
        error: for the client, if it was the last try.
        failure: `unreachable`, before the answer began, and `busy` are worth another try; `broken`,
            when it had begun, is not, and `refused` is the request's own fault.
        retry_after: seconds that the upstream wants to be left alone, if it said so.
    """

    def __init__(
        self, error: PolymathError, failure: Failure, retry_after: float | None = None
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.failure = failure
        self.retry_after = retry_after


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
        self._expert = expert
        self._timeout = settings.timeout
        self._headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
        self._secrets = list(self._headers.values())
        if deployment.api_key is not None:
            key = deployment.api_key.get_secret_value()
            self._headers["authorization"] = f"Bearer {key}"
            self._secrets.append(key)
        self._client: httpx.AsyncClient | None = None

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
                raise self._broken(f"sent a reply of more than {LARGEST_REPLY} bytes")
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
                    raise self._broken("ended the stream in the middle of an answer")
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
                    raise await self._refusal(response)
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
            raise self._interrupted(error, failure) from error
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
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                http2=True,
                headers=self._headers,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # clients share it
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=httpx.Limits(
                    max_connections=CONNECTIONS, max_keepalive_connections=KEPT_ALIVE
                ),
            )
        content = None if body is None else orjson.dumps({**body, "model": self.model})
        request = self._client.build_request(
            method,
            f"{self.api_base}{path}",
            content=content,
            headers={"content-type": "application/json"} if content else None,
        )
        return await self._client.send(request, stream=True)

    async def _refusal(self, response: httpx.Response) -> TryFailed:
        """What an error status means to the client."""
        status = response.status_code
        error = _error_object(await _readable(response))
        message = self._shown(str(error.get("message") or f"HTTP status {status}"))
        said = f"The upstream of {self._expert} answered {status}: {message}"
        if status == 429:
            wait = seconds_to_wait(response.headers)
            busy = Overloaded(said, retry_after=max(1, round(wait or 1)))
            return TryFailed(busy, "busy", wait)
        if status in BUSY or status >= 500:
            failure: Failure = "busy" if status in BUSY else "unreachable"
            return TryFailed(UpstreamFailed(said), failure, seconds_to_wait(response.headers))
        if status in OUR_KEY:
            mend = "check its api_key and headers in the config"
            return TryFailed(
                UpstreamFailed(f"The upstream of {self._expert} answered {status}; {mend}."),
                "refused",
            )
        if status < 400:
            return TryFailed(UpstreamFailed(f"{said}; check its api_base."), "refused")
        kind, code, param = (
            error.get(key) and self._shown(str(error[key])) for key in ("type", "code", "param")
        )
        return TryFailed(
            UpstreamRefused(
                message,
                status,
                code or "upstream_refused",
                type=kind or UpstreamRefused.type,
                param=param or None,
            ),
            "refused",
        )

    def _check_type(self, response: httpx.Response, wanted: str) -> None:
        found = self._shown(response.headers.get("content-type", ""))
        if wanted not in found:
            raise self._broken(f"sent {found or 'no content type'!r} in place of {wanted}")

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise self._broken("sent what is not JSON") from None
        if not isinstance(value, dict):
            raise self._broken("sent JSON that is no object")
        if "error" in value and "choices" not in value:
            detail = value["error"]
            message = detail.get("message") if isinstance(detail, dict) else detail
            raise self._broken(f"failed: {self._shown(str(message))}")
        return value

    def _broken(self, what: str) -> TryFailed:
        return TryFailed(UpstreamFailed(f"The upstream of {self._expert} {what}."), "broken")

    def _interrupted(self, error: Exception, failure: Failure) -> TryFailed:
        import httpx

        if isinstance(error, TimeoutError):
            late = (
                f"The upstream of {self._expert} gave no answer within {self._timeout:g} seconds."
            )
            return TryFailed(UpstreamTimeout(late), "broken")
        kind = type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            what = f"cannot be reached ({kind}); is it running, and is its api_base right?"
        else:
            what = f"broke the connection ({kind})."
        return TryFailed(UpstreamFailed(f"The upstream of {self._expert} {what}"), failure)

    def _shown(self, text: str) -> str:
        """The upstream's own words, without our keys in them."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return text[:LONGEST_MESSAGE]


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


def _error_object(data: bytes | None) -> dict[str, Any]:
    """OpenAI's `error`, or what comes near to it."""
    try:
        value = orjson.loads(data or b"")
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(value, dict):
        return {}
    error = value.get("error", value.get("detail", value))
    return error if isinstance(error, dict) else {"message": str(error)}

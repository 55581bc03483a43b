"""What the failures of an upstream mean: to the client, and for another try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson

from polymath.errors import (
    Overloaded,
    PolymathError,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
)
from polymath.proxy.retry import seconds_to_wait

__all__ = ["Failure", "Failures", "TryFailed"]

LONGEST_MESSAGE = 500
"""Characters of an upstream's own error message that a client is shown."""

BUSY = frozenset({408, 409, 429})
"""Another try may do better, as in OpenAI's clients; so it may from 500 on."""
OUR_KEY = frozenset({401, 403, 407})
"""The upstream does not let this gateway in, which is no fault of the client."""

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


class Failures:
    """Those of one server.

    Args:
        expert: its name, for messages.
        secrets: what must stand in no message.
        timeout: seconds that an answer may take.
    """

    def __init__(self, expert: str, secrets: Sequence[str], timeout: float) -> None:
        self._expert = expert
        self._secrets = secrets
        self._timeout = timeout

    def refused(self, status: int, headers: Mapping[str, str], body: bytes | None) -> TryFailed:
        """What an error status means to the client.

        Args:
            body: None if it cannot be read.
        """
        error = _error_object(body)
        message = self.shown(str(error.get("message") or f"HTTP status {status}"))
        said = f"The upstream of {self._expert} answered {status}: {message}"
        if status == 429:
            wait = seconds_to_wait(headers)
            busy = Overloaded(said, retry_after=max(1, round(wait or 1)))
            return TryFailed(busy, "busy", wait)
        if status in BUSY or status >= 500:
            failure: Failure = "busy" if status in BUSY else "unreachable"
            return TryFailed(UpstreamFailed(said), failure, seconds_to_wait(headers))
        if status in OUR_KEY:
            mend = "check its api_key and headers in the config"
            return TryFailed(
                UpstreamFailed(f"The upstream of {self._expert} answered {status}; {mend}."),
                "refused",
            )
        if status < 400:
            return TryFailed(UpstreamFailed(f"{said}; check its api_base."), "refused")
        kind, code, param = (
            error.get(key) and self.shown(str(error[key])) for key in ("type", "code", "param")
        )
        return TryFailed(
            UpstreamRefused(
                message,
                status,
                code or UpstreamRefused.code,
                type=kind or UpstreamRefused.type,
                param=param or None,
            ),
            "refused",
        )

    def broken(self, what: str) -> TryFailed:
        """An answer that had begun."""
        return TryFailed(UpstreamFailed(f"The upstream of {self._expert} {what}."), "broken")

    def interrupted(self, error: Exception, failure: Failure) -> TryFailed:
        """What the transport raised."""
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

    def shown(self, text: str) -> str:
        """The upstream's own words, without our keys in them."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return text[:LONGEST_MESSAGE]


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

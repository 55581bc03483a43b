"""uvicorn's HTTP protocol, with limits to what a client may do before there is a request."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from polymath.errors import HeadersTooLarge
from polymath.gateway.request_limits import RequestLimits

__all__ = ["limited_protocol"]

END = b"\r\n\r\n"
"""Of the headers."""
TAIL = len(END) - 1


def limited_protocol(limits: RequestLimits) -> type[asyncio.Protocol]:
    """A protocol that ends connections whose headers are too large or too slow."""

    class LimitedProtocol(HttpToolsProtocol):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer: asyncio.TimerHandle | None = None
            self._tail = b""
            self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._timer is not None:
                self._header_bytes += len(data)
                body = _first_body_bytes(self._tail + data)
                self._tail = data[-TAIL:]
                if self._header_bytes > limits.max_header_bytes + body:
                    self._refuse()
                    return
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._timer is None:
                self._wait_for_headers()

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def _wait_for_headers(self) -> None:
            self._header_bytes = 0
            self._tail = b""
            self._timer = self.loop.call_later(limits.receive_timeout, self._close)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

        def _refuse(self) -> None:
            error = HeadersTooLarge(f"The headers are larger than {limits.max_header_bytes} bytes.")
            body = orjson.dumps(error.body())
            head = (
                f"HTTP/1.1 {error.status} Request Header Fields Too Large\r\n"
                "content-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            self._stop_waiting()
            self.transport.write(head.encode() + body)
            self.transport.close()

    return LimitedProtocol


def _first_body_bytes(data: bytes) -> int:
    """Bytes of a piece that stand behind the end of the headers."""
    end = data.find(END)
    return 0 if end < 0 else len(data) - end

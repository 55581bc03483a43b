"""Server-sent events from bytes (WHATWG HTML, section 9.2.6), with a limit on their size."""

from __future__ import annotations

from collections.abc import AsyncIterator

from polymath.errors import UpstreamFailed

__all__ = ["read_events"]


async def read_events(pieces: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The data of each event; comments and other fields are left out.

    Args:
        pieces: of the body, cut anywhere.
        most: bytes of the largest event.
    Raises:
        UpstreamFailed: an event is larger.
    """
    held, data = bytearray(), list[bytes]()
    async for piece in pieces:
        held += piece
        if b"\n" in piece:
            *lines, rest = bytes(held).split(b"\n")
            held = bytearray(rest)
            for line in lines:
                if line.rstrip(b"\r"):
                    data += _data(line)
                elif data:
                    yield b"\n".join(data)
                    data = []
        if len(held) + sum(map(len, data)) > most:
            raise UpstreamFailed(f"The upstream sent an event of more than {most} bytes.")
    if data := data + _data(bytes(held)):  # the last one, without the empty line after it
        yield b"\n".join(data)


def _data(line: bytes) -> list[bytes]:
    return [line[5:].removeprefix(b" ").rstrip(b"\r")] if line.startswith(b"data:") else []

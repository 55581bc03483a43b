"""Server-sent events from bytes that are cut anywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.errors import UpstreamFailed
from polymath.proxy.event_stream import read_events

LIMIT = 100


async def arriving(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def read(pieces: Iterable[bytes], most: int = LIMIT) -> list[bytes]:
    return [event async for event in read_events(arriving(pieces), most)]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b": keep-alive\n\ndata: a\n\n: bye\n\n", [b"a"]),
        (b"data: a\n: a comment within\ndata: b\n\n", [b"a\nb"]),
        (b"event: message\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: a\n\ndata: b", [b"a", b"b"]),
        (b"data: a\n\ndata: b\n", [b"a", b"b"]),
        (b"data: a: b\n\n", [b"a: b"]),
        ("data: 世界\n\n".encode(), ["世界".encode()]),
        (b"", []),
        (b": nothing\n\n", []),
    ],
)
async def test_the_data_of_each_event_comes_out(body: bytes, expected: list[bytes]) -> None:
    assert await read([body]) == expected
    assert await read([body[i : i + 1] for i in range(len(body))]) == expected


LINE = st.sampled_from(["data: a", "data:{}", "data: ü", ": comment", "event: x", "id: 1", ""])


@given(st.lists(LINE), st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(0, 10**6)))
async def test_any_way_of_cutting_gives_the_same_events(
    lines: list[str], ending: str, places: list[int]
) -> None:
    body = "".join(f"{line}{ending}" for line in lines).encode()
    whole = await read([body], most=10**6)
    assert await read(cut(body, places), most=10**6) == whole
    assert whole == await read([body.replace(b"\r\n", b"\n")], most=10**6)


@pytest.mark.parametrize(
    "body",
    [
        b"data: " + b"x" * 200,
        b"data: x\n" * 200,
        b": " + b"x" * 200,
        b"data: " + b"x" * 200 + b"\n\n",
    ],
    ids=["one line", "many lines", "a comment", "all at once"],
)
async def test_an_event_that_is_too_large_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamFailed, match="more than 100 bytes"):
        await read(cut(body, list(range(0, len(body), 50))))


async def test_an_endless_line_is_given_up_at_once() -> None:
    """It is not collected first."""
    seen = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal seen
        while True:
            seen += 10
            yield b"x" * 10

    with pytest.raises(UpstreamFailed):
        await anext(read_events(endless(), LIMIT))
    assert seen == LIMIT + 10


async def test_many_small_events_together_may_be_larger() -> None:
    assert await read([b"data: 0123456789\n\n"] * 50) == [b"0123456789"] * 50

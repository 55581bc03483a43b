"""`kind: upstream`: requests and answers pass through; others answer where the upstream cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from polymath.errors import InvalidRequest, Overloaded, PolymathError, UpstreamFailed
from polymath.proxy import Relay, Upstream, answer_text
from tests.proxy.conftest import settings_of
from tests.proxy.fake_expert import FakeExpert, among, request
from tests.proxy.stand_in import (
    HANG,
    Reply,
    StandInServer,
    chunk,
    completion,
    events,
    failing,
    sends,
    unused_port,
)

MakeRelay = Callable[..., Relay]

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture
async def relay(server: StandInServer) -> Any:
    """Makes relays to the server, whose fallbacks are `experts`."""
    made: list[Upstream] = []

    def make(url: str = server.url, experts: Any = None, **keys: Any) -> Relay:
        settings = settings_of(url, num_retries=0, fallbacks=tuple(experts or ()), **keys)
        made.append(Upstream("big", settings))
        return Relay(made[-1], settings, among(**(experts or {})))

    yield make
    for upstream in made:
        await upstream.close()


async def streamed(relay: Relay, body: dict[str, Any]) -> list[dict[str, Any]]:
    return [event async for event in await relay.stream(body)]


# --- there and back ------------------------------------------------------------------------------


async def test_a_request_goes_as_it_came(relay: MakeRelay, server: StandInServer) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = {
        "model": "big",
        "messages": [
            {"role": "system", "content": "Be brief.", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "ü"}, picture]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "4"},
        ],
        "tools": TOOLS,
        "reasoning_effort": "low",
        "temperature": 7,
        "seed": None,
        "their_own": {"deep": [1, 2.5, None, True]},
        "polymath": {"attribution": True},
    }
    await relay().whole(body)
    sent = server.requests[0].body
    assert "polymath" not in sent
    assert sent == {
        **{name: value for name, value in body.items() if name != "polymath"},
        "model": "their-model",
        "stream": False,
    }


async def test_an_answer_comes_back_as_it_is(relay: MakeRelay, server: StandInServer) -> None:
    reply = completion(None, reasoning_content="Hm.", tool_calls=[{"id": "1"}], odd=[1, None])
    server.says(reply)
    (sent,) = reply.pieces
    assert isinstance(sent, bytes)
    answer = await relay().whole(request())
    assert answer["choices"][0]["message"]["odd"] == [1, None]
    server.says(reply)
    assert await relay().whole(request()) == answer
    assert answer["usage"]["total_tokens"] == 5
    assert "polymath" not in answer


async def test_a_stream_comes_back_as_it_is(relay: MakeRelay, server: StandInServer) -> None:
    sent = [chunk("a", odd=1), {"choices": [], "usage": {"total_tokens": 5}}, {"x": None}]
    server.says(events(*sent))
    assert await streamed(relay(), request(stream_options={"include_usage": True})) == sent
    assert server.requests[0].body["stream"] is True
    assert server.requests[0].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"choices": None},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": [{"index": 0}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": "text"}]},
        {"id": "x", "object": "list"},
    ],
)
async def test_what_is_no_completion_is_an_error(
    relay: MakeRelay, server: StandInServer, value: dict[str, Any]
) -> None:
    server.says(sends(value))
    with pytest.raises(UpstreamFailed, match="sent no completion"):
        await relay().whole(request())


# --- what the config adds ------------------------------------------------------------------------


async def test_the_system_prompt_of_the_expert_stands_in_front(
    relay: MakeRelay, server: StandInServer
) -> None:
    system = {"role": "system", "content": "Answer in verse."}
    mine = {"role": "system", "content": "Be brief."}
    body = request()
    body["messages"].insert(0, mine)
    await relay(system_prompt="Answer in verse.").whole(body)
    assert server.requests[0].body["messages"] == [system, *body["messages"]]
    assert body["messages"][0] == mine


async def test_sampling_values_fill_in_where_the_request_has_none(
    relay: MakeRelay, server: StandInServer
) -> None:
    sampling = {"temperature": 0.2, "top_p": 0.9, "stop": ["END"], "max_tokens": 50}
    expert = relay(sampling=sampling)
    await expert.whole(request(top_p=0.5))
    await expert.whole(request(max_completion_tokens=7))
    first, second = (received.body for received in server.requests)
    assert {name: first[name] for name in sampling} == {**sampling, "top_p": 0.5}
    assert "top_k" not in first
    assert "max_tokens" not in second
    assert second["max_completion_tokens"] == 7


# --- fallbacks -----------------------------------------------------------------------------------

DOWN = FakeExpert(UpstreamFailed("Also down."))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "reply",
    [
        failing(500),
        failing(429),
        failing(401),
        failing(302),
        Reply(status=0),
        Reply([b"{"], headers={"content-type": "application/json"}),
        events(drop=True, done=False),
        Reply(before=[HANG]),
    ],
    ids=["500", "429", "401", "302", "cut", "broken", "cut stream", "late"],
)
async def test_another_expert_answers_where_the_upstream_cannot(
    relay: MakeRelay, server: StandInServer, reply: Reply, stream: bool
) -> None:
    server.says(reply)
    other = FakeExpert("Other.")
    expert = relay(experts={"ill": DOWN, "other": other}, timeout=0.2)
    body = request(polymath={"alpha": 1}, temperature=1)
    answer = (await streamed(expert, body))[0] if stream else await expert.whole(body)
    assert answer["polymath"] == {"fallback": "other"}
    assert other.asked == [body]
    said = answer["choices"][0]["delta" if stream else "message"]["content"]
    assert said == "Other."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_request_that_is_wrong_is_nobody_elses(
    relay: MakeRelay, server: StandInServer, status: int, stream: bool
) -> None:
    server.says(failing(status))
    other = FakeExpert()
    expert = relay(experts={"other": other})
    with pytest.raises(PolymathError) as caught:
        await (expert.stream(request()) if stream else expert.whole(request()))
    assert caught.value.status == status
    assert other.asked == []


async def test_while_the_breaker_is_open_the_fallback_answers(relay: MakeRelay) -> None:
    expert = relay(f"http://127.0.0.1:{unused_port()}/v1", experts={"other": FakeExpert("Other.")})
    for _ in range(7):
        assert answer_text(await expert.whole(request())) == "Other."


@pytest.mark.parametrize(
    "fallback", [DOWN, FakeExpert(InvalidRequest("No tools.")), FakeExpert(Overloaded("Full."))]
)
async def test_if_all_fail_the_upstreams_own_error_is_told(
    relay: MakeRelay, server: StandInServer, fallback: FakeExpert
) -> None:
    server.says(failing(500, "It hurts."))
    with pytest.raises(UpstreamFailed, match=r"answered 500: It hurts\."):
        await relay(experts={"other": fallback}).whole(request())


async def test_a_stream_that_breaks_after_it_began_has_no_fallback(
    relay: MakeRelay, server: StandInServer
) -> None:
    """The client has the first half already."""
    server.says(events(chunk("a"), drop=True, done=False))
    other = FakeExpert()
    with pytest.raises(UpstreamFailed):
        await streamed(relay(experts={"other": other}), request())
    assert other.asked == []


async def test_a_client_that_goes_away_starts_no_fallback(
    relay: MakeRelay, server: StandInServer
) -> None:
    server.says(Reply(before=[HANG]))
    other = FakeExpert()
    asking = asyncio.create_task(relay(experts={"other": other}).whole(request()))
    while not server.answering:
        await asyncio.sleep(0.005)
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()
    assert other.asked == []


# --- the queue -----------------------------------------------------------------------------------


def late(reply: Reply) -> Reply:
    """The same, after a while."""
    return replace(reply, before=[0.3])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("keys", "room"),
    [
        ({"max_parallel": 1}, 2),
        ({"max_parallel": 4}, 6),
        ({"max_parallel": 2, "max_waiting": 5}, 7),
        ({"max_parallel": 2, "max_waiting": 0}, 2),
    ],
)
async def test_more_than_the_queue_holds_are_refused_at_once(
    relay: MakeRelay, server: StandInServer, keys: dict[str, Any], room: int, stream: bool
) -> None:
    made = relay(**keys)
    body = request("big")
    ask = (lambda: streamed(made, body)) if stream else (lambda: made.whole(body))
    reply = events(chunk("a")) if stream else completion()
    server.says(*[late(reply)] * room)
    asking = [asyncio.create_task(ask()) for _ in range(room)]
    await asyncio.sleep(0.05)
    started = asyncio.get_running_loop().time()
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            await ask()
        assert caught.value.retry_after == 1
    assert asyncio.get_running_loop().time() - started < 0.1
    assert len(await asyncio.gather(*asking)) == room
    assert len(server.requests) == room
    server.says(reply)
    assert await ask()  # there is room again


async def test_the_fallback_answers_what_the_queue_does_not_hold(
    relay: MakeRelay, server: StandInServer
) -> None:
    server.says(late(completion()), completion("upstream"))
    made = relay(max_parallel=1, max_waiting=0, experts={"other": FakeExpert("fallback")})
    first = asyncio.create_task(made.whole(request("big")))
    await asyncio.sleep(0.05)
    assert answer_text(await made.whole(request("big"))) == "fallback"
    await first


async def test_who_leaves_the_queue_makes_room(relay: MakeRelay, server: StandInServer) -> None:
    server.says(late(completion()), completion("upstream"))
    made = relay(max_parallel=1, max_waiting=1)
    first = asyncio.create_task(made.whole(request("big")))
    leaving = asyncio.create_task(made.whole(request("big")))
    await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.wait({leaving})
    assert answer_text(await made.whole(request("big"))) == "upstream"
    await first

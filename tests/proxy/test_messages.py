"""What is read from and put into requests and answers."""

from __future__ import annotations

from typing import Any

import pytest

from polymath.proxy import FirstNoted, answer_text, noted, text_of
from polymath.proxy.messages import events_of, last_user_text, with_system_text
from tests.proxy.fake_expert import answer, request

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USER = {"role": "user", "content": "Hi."}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi.", "Hi."),
        ([{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}], "a\nb"),
        ([IMAGE], ""),
        ([], ""),
        (None, ""),
        (3, ""),
        ({"text": "a"}, ""),
        (["a", 3, None, {"text": 3}], ""),
    ],
)
def test_the_text_of_a_content(content: Any, text: str) -> None:
    assert text_of(content) == text


def test_the_last_user_turn_is_the_question() -> None:
    turns = [USER, {"role": "user", "content": [IMAGE, {"type": "text", "text": "Why?"}]}]
    assert last_user_text({"messages": [*turns, {"role": "tool", "content": "4"}]}) == "Why?"


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "x"}], [{}]])
def test_without_a_user_there_is_no_question(messages: list[Any]) -> None:
    assert last_user_text({"messages": messages}) == ""


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (answer("Hi."), "Hi."),
        ({"choices": [{"message": {"content": None, "tool_calls": []}}]}, ""),
        ({"choices": [{"message": {}}]}, ""),
        ({"choices": []}, ""),
        ({}, ""),
    ],
)
def test_the_text_of_an_answer(reply: dict[str, Any], text: str) -> None:
    assert answer_text(reply) == text


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_a_text_is_added_to_the_system_message(role: str, content: Any) -> None:
    first = {"role": role, "content": content, "name": "x"}
    body = {"messages": [first, USER], "n": 2}
    guided = with_system_text(body, "Law.")
    assert guided == {
        "messages": [{"role": role, "content": "Be brief.\n\nLaw.", "name": "x"}, USER],
        "n": 2,
    }
    assert body["messages"] == [first, USER]  # it is not changed in place


def test_without_a_system_message_there_is_a_new_one() -> None:
    guided = with_system_text(request("Hi."), "Law.")
    assert guided["messages"] == [{"role": "system", "content": "Law."}, USER]


def test_notes_are_joined() -> None:
    reply = noted(noted({"id": "1"}, {"a": 1}), {"b": 2})
    assert reply == {"id": "1", "polymath": {"a": 1, "b": 2}}


@pytest.mark.parametrize("theirs", [None, "text", 3, []])
def test_what_an_upstream_calls_polymath_does_no_harm(theirs: Any) -> None:
    assert noted({"polymath": theirs}, {"a": 1}) == {"polymath": {"a": 1}}


async def streamed(reply: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    return [event async for event in events_of(reply, body)]


async def test_a_whole_answer_as_a_stream_is_a_text_and_an_end_for_each_choice() -> None:
    reply = answer("Hi.", logprobs={"content": []})
    second = {"index": 1, "message": {"role": "assistant", "content": "Ho."}}
    reply = {**reply, "created": 7, "choices": [*reply["choices"], second], "usage": {"x": 1}}
    events = await streamed(reply)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {(event["id"], event["created"], event["model"]) for event in events} == {
        ("1", 7, "fake")
    }
    assert [event["choices"] for event in events] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "Hi."},
                "logprobs": {"content": []},
                "finish_reason": None,
            }
        ],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
        [
            {
                "index": 1,
                "delta": {"role": "assistant", "content": "Ho."},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        [{"index": 1, "delta": {}, "logprobs": None, "finish_reason": None}],
    ]


async def test_usage_is_the_last_chunk_if_it_is_wanted() -> None:
    reply = {**answer("Hi."), "usage": {"total_tokens": 5}}
    *_, last = await streamed(reply, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], {"total_tokens": 5})
    assert all("usage" not in event for event in await streamed(reply, stream_options=None))


async def test_tool_calls_are_numbered_in_a_stream() -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * 2
    reply = answer("", message={"role": "assistant", "content": None, "tool_calls": calls})
    delta = (await streamed(reply))[0]["choices"][0]["delta"]
    assert delta["tool_calls"] == [{"index": 0, **calls[0]}, {"index": 1, **calls[1]}]


async def test_the_first_chunk_alone_is_noted() -> None:
    events = FirstNoted(events_of(answer("Hi."), {}), {"a": 1})
    first, second = [event async for event in events]
    assert first["polymath"] == {"a": 1}
    assert "polymath" not in second

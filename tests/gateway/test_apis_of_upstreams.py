"""Completions and responses by an expert behind HTTP: what it is asked, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.running import Running, running, write_config
from tests.proxy.stand_in import StandInServer, chunk, completion, events, failing, sends

COMPLETION: dict[str, Any] = {"model": "law", "prompt": "Hi"}
RESPONSE: dict[str, Any] = {"model": "law", "input": "Hi"}


@pytest.fixture(scope="module")
def gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    config = write_config(tmp_path_factory.mktemp("apis"), text_router, upstream)
    with running(config, upstream) as gate:
        yield gate


def last_asked(gate: Running) -> dict[str, Any]:
    received = gate.server.requests[-1]
    assert received.path == "/v1/chat/completions"
    return received.body


def replying(**choice: Any) -> dict[str, Any]:
    return {"id": "theirs", "created": 1, "model": "their-model", "choices": [choice]}


# --- what it is asked ----------------------------------------------------------------------------


def test_an_upstream_is_asked_for_a_chat_in_place_of_a_completion(gate: Running) -> None:
    given: dict[str, Any] = {"stop": ["."], "logit_bias": {"7": 1}, "logprobs": 2, "user": "ada"}
    answer = gate.client().completions.create(**COMPLETION, **given)
    assert last_asked(gate) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 16,
        "stream": False,
        "stop": ["."],
        "logit_bias": {"7": 1},
        "logprobs": True,
        "top_logprobs": 2,
        "user": "ada",
    }
    assert (answer.id, answer.model) == ("cmpl-chatcmpl-theirs", "law")
    assert answer.choices[0].text == "Hello."
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5


def test_an_upstream_is_asked_for_a_chat_in_place_of_a_response(gate: Running) -> None:
    form = {"type": "json_schema", "name": "it", "schema": {"type": "object"}, "strict": True}
    answer = gate.client().responses.create(
        **RESPONSE,
        instructions="Be brief.",
        max_output_tokens=9,
        metadata={"team": "blue"},
        store=True,
        text={"format": form},  # type: ignore[arg-type]
    )
    assert last_asked(gate) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "max_tokens": 9,
        "stream": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": {"type": "object"}, "strict": True},
        },
    }
    assert (answer.id, answer.model) == ("resp_chatcmpl-theirs", "law")
    assert answer.output_text == "Hello."


# --- what becomes of it --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 429, 500])
@pytest.mark.parametrize("streaming", [False, True])
def test_its_refusals_are_errors_here(gate: Running, status: int, streaming: bool) -> None:
    expected = 502 if status == 500 else status
    for ask, given in (
        (gate.client().completions.create, COMPLETION),
        (gate.client().responses.create, RESPONSE),
    ):
        gate.server.says(failing(status))
        with pytest.raises(openai.APIStatusError) as caught:
            ask(stream=streaming, **given)
        assert caught.value.status_code == expected
    assert gate.gateway.door.inside == 0


def test_a_completion_that_breaks_off_ends_with_an_error(gate: Running) -> None:
    gate.server.says(events(chunk("Hel"), chunk("lo"), done=False, drop=True))
    pieces = gate.client().completions.create(stream=True, **COMPLETION)
    said: list[str] = []
    with pytest.raises(openai.APIError):
        said.extend(piece.choices[0].text for piece in pieces)
    assert "".join(said) == "Hello"
    assert gate.gateway.door.inside == 0


def test_a_response_that_breaks_off_has_failed(gate: Running) -> None:
    gate.server.says(events(chunk("Hel"), chunk("lo"), done=False, drop=True))
    received = list(gate.client().responses.create(stream=True, **RESPONSE))
    failed = received[-1]
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error is not None
    assert failed.response.error.code == "server_error"
    assert failed.response.output_text == "Hello"
    assert gate.gateway.door.inside == 0


def test_a_refusal_is_text_here(gate: Running) -> None:
    gate.server.says(completion(None, refusal="I cannot."), completion(None, refusal="I cannot."))
    assert gate.client().completions.create(**COMPLETION).choices[0].text == "I cannot."
    assert gate.client().responses.create(**RESPONSE).output_text == "I cannot."


ODD = [
    replying(message={"content": None}, finish_reason=None),
    replying(message={"content": [{"type": "text", "text": "a"}]}, logprobs=[], index=None),
    replying(message={"content": "a"}, logprobs={"content": [None, {"token": 7, "bytes": "x"}]}),
    replying(message={"content": "a"}, logprobs={"content": [{"bytes": [999]}]}),
    replying(message={"content": "a"}, logprobs={"content": [{"top_logprobs": [None]}]}),
    {**replying(message={"content": "a"}), "usage": {"prompt_tokens": "many"}},
    {**replying(message={"content": "a"}), "polymath": "ours", "id": None, "created": "today"},
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_answers_are_answers_still(gate: Running, odd: dict[str, Any]) -> None:
    gate.server.says(sends(odd), sends(odd))
    answer = gate.client().completions.create(**COMPLETION, logprobs=1)
    assert answer.choices[0].text in ("", "a")
    response = gate.client().responses.create(**RESPONSE, include=["message.output_text.logprobs"])
    assert response.output_text == answer.choices[0].text

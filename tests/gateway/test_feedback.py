"""`POST /v1/feedback`: whose answers, what is kept of it, and what the router learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from polymath.gateway.feedback import training_rows
from tests.gateway.asking import stream
from tests.gateway.running import LAW, Running, running, write_config
from tests.proxy.stand_in import StandInServer, chunk, completion, events, sends

IDS = count()


@pytest.fixture(scope="module")
def only_gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("feedback")
    with running(write_config(folder, text_router, upstream), upstream) as gate:
        yield gate


@pytest.fixture
def gate(only_gate: Running) -> Running:
    only_gate.server.forget()
    only_gate.server.otherwise = lambda _: sends({**body_of(), "id": f"chatcmpl-{next(IDS)}"})
    return only_gate


@pytest.fixture(scope="module")
def silent(only_gate: Running) -> str:
    return only_gate.create_key("silent")


@pytest.fixture(scope="module")
def keeping(only_gate: Running) -> str:
    return only_gate.create_key("keeping", keep_prompts=True)


def body_of() -> dict[str, Any]:
    (data,) = completion().pieces
    return dict(orjson.loads(data))  # type: ignore[arg-type]


def say(gate: Running, key: str | None, **said: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{gate.url}/v1/feedback", json=said, headers=headers)


def answered(gate: Running, key: str) -> str:
    return str(gate.post({"messages": LAW}, key).raise_for_status().json()["id"])


def kept(gate: Running) -> dict[str, Any]:
    """The last piece of feedback."""
    lines = (gate.config.parent / ".polymath" / "feedback.jsonl").read_bytes().splitlines()
    return dict(orjson.loads(lines[-1]))


def test_feedback_is_kept_with_what_was_decided(gate: Running, silent: str) -> None:
    completion_id = answered(gate, silent)
    answer = say(gate, silent, id=completion_id, thumbs="up", comment="Good.")
    expected = {"object": "feedback", "id": completion_id, "stored_prompt": False}
    assert (answer.status_code, answer.json()) == (200, expected)
    entry = kept(gate)
    assert entry["time"] > 0
    assert (entry["id"], entry["thumbs"], entry["comment"]) == (completion_id, "up", "Good.")
    assert (entry["answered"], entry["domain"], entry["right"]) == ("law", "law", "law")
    assert "messages" not in entry


def test_the_prompt_is_kept_if_the_key_allows_it(gate: Running, keeping: str) -> None:
    answer = say(gate, keeping, id=answered(gate, keeping), expert="math")
    assert answer.json()["stored_prompt"] is True
    entry = kept(gate)
    assert (entry["messages"], entry["right"]) == (LAW, "math")
    domains = {"law": "law", "math": "arithmetic"}
    (row,) = training_rows([entry], domains)
    assert row == {"text": LAW[0]["content"], "domain": "arithmetic", "source": "feedback"}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ({"thumbs": "down"}, None),
        ({"thumbs": "up"}, "law"),
        ({"expert": "math"}, "math"),
        ({"expert": "math", "thumbs": "down"}, "math"),
    ],
)
def test_who_was_right(gate: Running, silent: str, said: Any, right: str | None) -> None:
    assert say(gate, silent, id=answered(gate, silent), **said).status_code == 200
    assert kept(gate)["right"] == right


def test_a_streamed_answer_can_be_judged(gate: Running, silent: str) -> None:
    gate.server.says(events(chunk("Hello.", id="chatcmpl-streamed")))
    chunks = stream(gate.client(silent), model="law")
    gate.usage()
    assert say(gate, silent, id=chunks[0].id, thumbs="down").status_code == 200


def test_the_answer_of_another_key_is_not_found(gate: Running, silent: str, keeping: str) -> None:
    completion_id = answered(gate, keeping)
    answer = say(gate, silent, id=completion_id, thumbs="up")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("not_found", "id")
    assert say(gate, keeping, id=completion_id, thumbs="up").status_code == 200


def test_two_keys_may_have_answers_of_one_id(gate: Running, silent: str, keeping: str) -> None:
    """The id is the upstream's."""
    same = sends({**body_of(), "id": "chatcmpl-same"})
    gate.server.says(same, same)
    for key in (silent, keeping):
        assert answered(gate, key) == "chatcmpl-same"
    for key in (silent, keeping):
        assert say(gate, key, id="chatcmpl-same", thumbs="up").status_code == 200
        assert kept(gate)["key"] in key


def test_an_answer_that_never_was_is_not_found(gate: Running, silent: str) -> None:
    assert say(gate, silent, id="chatcmpl-never", thumbs="up").status_code == 404


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"id": "x"}, "expert"),
        ({"thumbs": "up"}, "id"),
        ({"id": "x", "thumbs": "sideways"}, "thumbs"),
        ({"id": "x", "thumbs": "up", "stars": 5}, "stars"),
        ({"id": "x", "thumbs": "up", "comment": "x" * 4001}, "comment"),
        ({"id": "x" * 300, "thumbs": "up"}, "id"),
    ],
)
def test_what_is_wrong_is_named(gate: Running, silent: str, said: Any, param: str) -> None:
    answer = say(gate, silent, **said)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_expert_that_is_nobody_is_refused(gate: Running, silent: str) -> None:
    answer = say(gate, silent, id=answered(gate, silent), expert="lawyer")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expert")


def test_logged_prompts_are_not_stored_with_the_feedback_of_a_key_that_forbids_it(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    config = write_config(tmp_path, text_router, upstream, server_keys="log_prompts: true")
    with running(config, upstream) as gate:
        assert say(gate, None, id=gate.post().json()["id"], thumbs="up").json()["stored_prompt"]
        key = gate.create_key()
        completion_id = gate.post(key=key).json()["id"]
        answer = say(gate, key, id=completion_id, thumbs="up")
        assert answer.json()["stored_prompt"] is False
        assert "messages" not in kept(gate)


def test_only_what_teaches_becomes_a_row() -> None:
    turns = [{"role": "user", "content": "Old."}, {"role": "assistant", "content": "Hm."}]
    last = {"role": "user", "content": [{"type": "text", "text": "New."}]}
    entries: list[dict[str, Any]] = [
        {"right": "law", "messages": [*turns, last]},
        {"right": "law"},
        {"right": None, "messages": turns},
        {"right": "gone", "messages": turns},
        {"right": "law", "messages": turns[1:]},
    ]
    rows = list(training_rows(entries, {"law": "law"}))
    assert rows == [{"text": "New.", "domain": "law", "source": "feedback"}]

"""The topic guard over HTTP: what is off topic is refused like an answer, or goes elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polymath.gateway.keys import KeyRecord
from polymath.gateway.topic_guard import Refusal, TopicGuardSettings, guard_of, off_topic
from polymath.router import RouteDecision
from tests.gateway.asking import ask, stream, streamed_text, text
from tests.gateway.running import CODING, LAW, MATH, Running, running, write_config
from tests.proxy.stand_in import StandInServer, completion

GUARD = "topic_guard: {allowed_domains: [law], refusal: 'Only {domains} here: {that}.'}\n"
REFUSED = "Only law here: {that}."


@pytest.fixture(scope="module")
def only_gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    with running(write_config(folder, text_router, upstream, GUARD), upstream) as gate:
        yield gate


@pytest.fixture
def gate(only_gate: Running) -> Running:
    only_gate.server.forget()
    return only_gate


@pytest.fixture(scope="module")
def key(only_gate: Running) -> str:
    return only_gate.create_key("everything")


def routed(gate: Running, key: str, messages: Any, **given: Any) -> Any:
    given = {"model": "polymath", "messages": messages, **given}
    return ask(gate.client(key), **given)


# --- refusals ------------------------------------------------------------------------------------


def test_what_is_on_topic_is_answered(gate: Running, key: str) -> None:
    answer = routed(gate, key, LAW)
    assert (text(answer), answer.model) == ("Hello.", "law")


@pytest.mark.parametrize("messages", [MATH, CODING], ids=["math", "coding"])
@pytest.mark.parametrize("model", ["polymath", "math"])
def test_what_is_off_topic_is_refused_and_no_expert_is_asked(
    gate: Running, key: str, model: str, messages: Any
) -> None:
    answer = routed(gate, key, messages, model=model)
    assert text(answer) == REFUSED
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 0
    assert (answer.model_extra or {})["polymath"]["off_topic"] == "refuse"
    assert gate.server.requests == []


def test_a_refusal_streams_like_an_answer(gate: Running, key: str) -> None:
    options = {"stream_options": {"include_usage": True}}
    chunks = stream(gate.client(key), model="polymath", messages=MATH, **options)
    assert streamed_text(chunks) == REFUSED
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 0
    assert len({one.id for one in chunks}) == 1
    assert (chunks[0].model_extra or {})["polymath"]["off_topic"] == "refuse"
    plain = stream(gate.client(key), model="polymath", messages=MATH)
    assert all(one.usage is None for one in plain)
    assert gate.server.requests == []


def test_there_are_as_many_refusals_as_choices_were_asked_for(gate: Running, key: str) -> None:
    answer = routed(gate, key, MATH, n=2)
    assert [choice.message.content for choice in answer.choices] == [REFUSED] * 2
    chunks = stream(gate.client(key), model="polymath", messages=MATH, n=2)
    assert [streamed_text(chunks, index) for index in (0, 1)] == [REFUSED] * 2


def test_an_expert_that_does_not_exist_is_not_refused_but_unknown(gate: Running, key: str) -> None:
    assert gate.post({"model": "nobody", "messages": MATH}, key).status_code == 404


def test_a_refusal_costs_nothing(gate: Running) -> None:
    own = gate.create_key("refused", budget={"dollars": 0.000001})
    for _ in range(2):
        assert text(routed(gate, own, MATH)) == REFUSED
    rows = [row for (name, _), row in gate.usage().items() if name == "refused"]
    assert sum(row.get("requests", 0) for row in rows) == 2
    assert not any(row.get("dollars") for row in rows)


def test_a_refusal_is_told_from_an_answer_in_what_is_recorded(gate: Running, key: str) -> None:
    routed(gate, key, MATH)
    stream(gate.client(key), model="polymath", messages=MATH)
    assert [entry["outcome"] for entry in gate.decisions()[:2]] == ["off_topic"] * 2


# --- of a key ------------------------------------------------------------------------------------


def test_a_key_has_domains_of_its_own(gate: Running) -> None:
    key = gate.create_key("maths", allowed_domains=("math", "coding"))
    assert routed(gate, key, MATH).model == "math"
    assert text(routed(gate, key, LAW)) == "Only math, coding here: {that}."


def test_a_key_that_may_talk_of_nothing_is_always_refused(gate: Running) -> None:
    key = gate.create_key("mute", allowed_domains=())
    for messages in (LAW, MATH, CODING):
        routed(gate, key, messages)
    assert gate.server.requests == []


def test_a_key_may_have_the_fallback_answer(gate: Running) -> None:
    key = gate.create_key("lenient", off_topic="fallback")
    answer = routed(gate, key, MATH)
    assert (text(answer), answer.model) == ("Hello.", "law")
    assert (answer.model_extra or {})["polymath"]["source"] == "fallback"
    assert routed(gate, key, MATH, model="math").model == "law"


def test_a_key_may_have_everything_answered(gate: Running) -> None:
    key = gate.create_key("open", off_topic="answer")
    assert routed(gate, key, MATH).model == "math"


def test_a_fallback_that_the_key_may_not_ask_does_not_answer(gate: Running) -> None:
    key = gate.create_key(
        "narrow", experts=("math",), allowed_domains=("coding",), off_topic="fallback"
    )
    assert text(routed(gate, key, MATH)) == "Only coding here: {that}."
    assert gate.server.requests == []


def test_the_topic_is_what_it_is_though_the_expert_of_it_is_forbidden(gate: Running) -> None:
    """The key's experts decide who answers, not what the prompt is about."""
    key = gate.create_key("math-only", experts=("math",), allowed_domains=("math",))
    assert routed(gate, key, MATH).model == "math"
    assert text(routed(gate, key, LAW)) == "Only math here: {that}."
    assert text(routed(gate, key, LAW, model="math")) == "Only math here: {that}."


def test_what_is_out_of_scope_is_off_topic_even_if_its_nearest_domain_is_allowed(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    config = write_config(tmp_path, text_router, upstream, GUARD)
    config.write_text(config.read_text().replace("min_confidence: 0", "min_confidence: 1"))
    with running(config, upstream) as gate:
        upstream.says(completion("Not to be asked."))
        answer = gate.post({"messages": LAW}).json()
        assert answer["choices"][0]["message"]["content"] == REFUSED
        assert upstream.requests == []


# --- alone ---------------------------------------------------------------------------------------


def decision(domain: str | None, source: Any = "encoder") -> RouteDecision:
    return RouteDecision({"x": 1.0}, 1.0, domain, source)


def record(**rights: Any) -> KeyRecord:
    given = {"id": "0" * 12, "name": "app", "secret_sha256": "0" * 64, "created": 0, **rights}
    return KeyRecord.model_validate(given)


def test_without_domains_there_is_no_guard() -> None:
    guard = guard_of(TopicGuardSettings(), record(off_topic="refuse"))
    assert not off_topic(guard, decision("law"))
    assert not off_topic(guard, decision(None, "fallback"))


@pytest.mark.parametrize(
    ("domain", "source", "expected"),
    [
        ("law", "encoder", False),
        ("law", "sticky", False),
        ("law", "rule", False),
        ("law", "fallback", True),
        ("math", "encoder", True),
        (None, "rule", True),
    ],
)
def test_off_topic(domain: str | None, source: str, expected: bool) -> None:
    guard = TopicGuardSettings(allowed_domains=("law",))
    assert off_topic(guard, decision(domain, source)) is expected


def test_what_a_key_does_not_say_is_that_of_the_gateway() -> None:
    guard = TopicGuardSettings(allowed_domains=("law",), off_topic="fallback", refusal="No.")
    assert guard_of(guard, None) == guard_of(guard, record()) == guard
    own = guard_of(guard, record(allowed_domains=["math"]))
    assert (own.allowed_domains, own.off_topic, own.refusal) == (("math",), "fallback", "No.")


@pytest.mark.parametrize("n", [None, 0, -1, "two", 1])
async def test_there_is_one_refusal_at_least(n: Any) -> None:
    refusal = Refusal(TopicGuardSettings(allowed_domains=("law", "math")))
    (choice,) = (await refusal.whole({"n": n}))["choices"]
    assert choice["message"]["content"] == "I can only help with these topics: law, math."

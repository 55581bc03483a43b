"""Answers that are given again, over HTTP: to whom, for how long, and in which form."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymath.gateway.answer_cache import AnswerCache, CacheSettings
from polymath.gateway.store import MemoryStore
from polymath.router import HasEmbedder, RouteDecision
from tests.gateway.asking import DEFAULTS, ask, stream, streamed_text, text, user
from tests.gateway.running import Running, running, wait_for, write_config
from tests.proxy.stand_in import StandInServer, chunk, completion, events, failing

EXPERTS = "covered: {<<: *law, model: m-covered, domains: [covered], fallbacks: [math]}\n"
USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}
ALL_ALIKE = "cache: {exact: true, semantic: true, threshold: 0.0001}\n"


class Gates:
    """Makes gateways whose config has a `cache` of its own."""

    def __init__(self, folder: Path, router: Path, upstream: StandInServer) -> None:
        self._place = (folder, router, upstream)
        self._upstream = upstream

    def __call__(self, cache: str) -> AbstractContextManager[Running]:
        config = write_config(*self._place, cache, experts=EXPERTS)
        return running(config, self._upstream)


@pytest.fixture
def gates(tmp_path: Path, text_router: Path, upstream: StandInServer) -> Gates:
    return Gates(tmp_path, text_router, upstream)


@pytest.fixture(scope="module")
def only_gate(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    gates = Gates(tmp_path_factory.mktemp("exact"), text_router, upstream)
    with gates("cache: {exact: true}\n") as gate:
        yield gate


@pytest.fixture
def gate(only_gate: Running) -> Running:
    """Remembers nothing that is asked by other tests."""
    only_gate.server.forget()
    only_gate.gateway.store._shelves.clear()
    return only_gate


@pytest.fixture(scope="module")
def only_alike(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    gates = Gates(tmp_path_factory.mktemp("semantic"), text_router, upstream)
    with gates(ALL_ALIKE) as gate:
        yield gate


@pytest.fixture
def alike(only_alike: Running) -> Running:
    """To which all texts mean the same."""
    only_alike.server.forget()
    only_alike.gateway.store._shelves.clear()
    return only_alike


def status(answer: httpx.Response) -> str | None:
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-polymath-cache")


def law(content: str = "Tell me about the moon.", **given: Any) -> dict[str, Any]:
    return {"model": "law", "messages": [user(content)], **given}


def lasting(answer: Any) -> dict[str, Any]:
    """An answer without what each reply has of its own."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


# --- the same answer -----------------------------------------------------------------------------


def test_a_cached_answer_is_the_first_answer(gate: Running) -> None:
    gate.server.says(completion("Once.", reasoning_content="Hm."))
    first, second = gate.post(law()), gate.post(law())
    assert (status(first), status(second)) == ("miss", "hit")
    assert lasting(first.json()) == lasting(second.json())
    assert first.json()["id"] != second.json()["id"]
    assert len(gate.server.requests) == 1


def test_a_routed_request_finds_the_answer_of_the_expert_by_its_name(gate: Running) -> None:
    assert status(gate.post({"messages": [user("What is the law?")]})) == "miss"
    named = gate.post(law("What is the law?"))
    assert status(named) == "hit"
    assert named.json()["polymath"]["source"] == "explicit"


@pytest.mark.parametrize("kept", ["whole", "stream"])
@pytest.mark.parametrize("asked", ["whole", "stream"])
def test_an_answer_is_replayed_in_the_form_that_is_asked_for(
    gate: Running, kept: str, asked: str
) -> None:
    client = gate.client()
    options = {"stream_options": {"include_usage": True}}
    if kept == "whole":
        gate.server.says(completion("Over and over."))
        ask(client, **law())
    else:
        gate.server.says(events(chunk("Over "), chunk("and over.", **ended()), usage()))
        assert streamed_text(stream(client, **law())) == "Over and over."
    if asked == "whole":
        again = ask(client, **law())
        assert text(again) == "Over and over."
        assert again.choices[0].finish_reason == "stop"
        assert again.choices[0].message.role == "assistant"
        assert again.usage is not None
        assert again.usage.total_tokens in (5, 50)
    else:
        chunks = stream(client, **law(), **options)
        assert streamed_text(chunks) == "Over and over."
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens in (5, 50)
        assert (chunks[0].model_extra or {})["polymath"]["expert"] == "law"
        assert all(one.model == "law" for one in chunks)
    assert len(gate.server.requests) == 1


def ended() -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": "and over."}, "finish_reason": "stop"}
    return {"choices": [choice]}


def usage() -> dict[str, Any]:
    return {**chunk(""), "choices": [], "usage": USAGE}


def test_a_stream_says_that_it_is_a_hit_and_shows_no_usage_unasked(gate: Running) -> None:
    gate.post(law())
    answer = gate.post(law(stream=True))
    assert status(answer) == "hit"
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_tool_calls_are_replayed_as_a_stream(gate: Running) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    gate.server.says(completion(None, tool_calls=[call]))
    gate.post(law(max_tokens=8))
    chunks = stream(gate.client(), **law())
    (found,) = chunks[0].choices[0].delta.tool_calls or []
    assert (found.index, found.id, found.function and found.function.name) == (0, "1", "add")


def test_metadata_is_that_of_the_request(gate: Running) -> None:
    gate.post(law(metadata={"user": "first"}))
    second = gate.post(law(metadata={"user": "second"}))
    assert status(second) == "hit"
    assert second.json()["metadata"] == {"user": "second"}
    assert "metadata" not in gate.post(law()).json()


def test_a_hit_costs_nothing(gate: Running) -> None:
    key = gate.create_key("thrifty")
    try:
        gate.post(law(), key)
        gate.post(law(), key)
        row = gate.usage()["thrifty", "law"]
        assert (row["requests"], row["completion_tokens"]) == (2, 2)
        assert [entry["cache"] for entry in gate.decisions()[:2]] == ["hit", "miss"]
    finally:
        (gate.config.parent / ".polymath" / "keys.json").unlink()
        gate.gateway.access._keys_seen = False


# --- which answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 1, "seed": 7}, True),
        ({"temperature": 1}, False),
        ({"temperature": None}, False),
        ({"temperature": 1, "seed": None}, False),
    ],
)
def test_only_what_would_be_answered_alike_is_kept(
    gate: Running, given: dict[str, Any], kept: bool
) -> None:
    found = [status(gate.post(law(**given))) for _ in range(2)]
    assert found == (["miss", "hit"] if kept else [None, None])


@pytest.mark.parametrize(
    "other",
    [
        {"max_tokens": 9},
        {"seed": 1},
        {"model": "math"},
        {"messages": [user("Tell me about the sun.")]},
        {"messages": [{"role": "system", "content": "Hm."}, user("Tell me about the moon.")]},
        {"messages": [{**user("Tell me about the moon."), "name": "Ada"}]},
        {"their_own": 1},
        {"n": 2},
    ],
)
def test_another_request_is_another_answer(gate: Running, other: dict[str, Any]) -> None:
    gate.post(law())
    assert status(gate.post(law(**other) if "model" not in other else {**law(), **other})) == "miss"


@pytest.mark.parametrize(
    "same",
    [
        {"user": "ada"},
        {"stream": False},
        {"timeout": 10},
        {"temperature": 0.0},
        {"top_p": None},
    ],
)
def test_what_does_not_change_an_answer_does_not_count(gate: Running, same: Any) -> None:
    gate.post(law())
    assert status(gate.post(law(**same))) == "hit"


def test_no_cache_asks_again_and_keeps_the_new_answer(gate: Running) -> None:
    gate.server.says(completion("old"), completion("new"), completion("newer"))
    gate.post(law())
    for said, wish in (("new", "no-cache"), ("newer", "private, Max-Age=0")):
        fresh = gate.post(law(), cache_control=wish)
        assert (status(fresh), content(fresh)) == ("miss", said)
        kept = gate.post(law())
        assert (status(kept), content(kept)) == ("hit", said)


def test_no_store_neither_reads_nor_keeps(gate: Running) -> None:
    gate.server.says(completion("hidden"), completion("kept"), completion("hidden too"))
    assert status(gate.post(law(), cache_control="no-store")) is None
    kept = gate.post(law())
    assert (status(kept), content(kept)) == ("miss", "kept")
    other = gate.post(law(), cache_control="No-Store")
    assert (status(other), content(other)) == (None, "hidden too")
    assert content(gate.post(law())) == "kept"


def content(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_failures_cut_answers_and_those_of_a_fallback_are_not_kept(gate: Running) -> None:
    covered = {"model": "covered"}
    gate.server.says(failing(500), completion("instead"), completion("own"))
    first = gate.post(covered)
    assert (first.json()["polymath"]["fallback"], content(first)) == ("math", "instead")
    assert content(gate.post(covered)) == "own"
    gate.server.says(failing(500), events(chunk("a"), done=False, drop=True), events(chunk("b")))
    assert gate.post(law()).status_code == 502
    gate.post(law(stream=True))
    gate.post(law(stream=True))  # which did not say that it was finished
    assert status(gate.post(law())) == "miss"


def test_a_stream_that_its_client_leaves_is_not_kept(gate: Running) -> None:
    gate.server.says(events(chunk("a"), chunk("b"), 0.2, chunk("c", **ended())))
    chunks = gate.client().chat.completions.create(stream=True, **{**DEFAULTS, **law()})
    next(chunks)
    chunks.close()
    wait_for(lambda: not gate.gateway.door.inside)
    assert status(gate.post(law())) == "miss"


# --- how long, how many --------------------------------------------------------------------------


def test_an_answer_is_kept_for_its_time(gates: Gates) -> None:
    with gates("cache: {exact: true, ttl: 0.3}\n") as gate:
        gate.post(law())
        time.sleep(0.4)
        assert status(gate.post(law())) == "miss"


def test_long_answers_are_not_kept(gates: Gates) -> None:
    with gates("cache: {exact: true, max_answer_bytes: 1024}\n") as gate:
        gate.server.says(completion("x" * 1024))
        assert [status(gate.post(law())) for _ in range(3)] == ["miss", "miss", "hit"]


def test_the_oldest_go_first(gates: Gates) -> None:
    with gates("cache: {exact: true, max_entries: 2}\n") as gate:
        for content in ("1", "2", "3"):
            gate.post(law(content))
        found = [status(gate.post(law(content))) for content in ("3", "2", "1")]
        assert found == ["hit", "hit", "miss"]


# --- whose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cache", ["exact: true", "exact: true, semantic: true, threshold: 0.001"])
def test_a_key_sees_answers_of_another_only_if_they_are_shared(
    gates: Gates, shared: bool, cache: str
) -> None:
    with gates(f"cache: {{{cache}, shared: {str(shared).lower()}}}\n") as gate:
        first, second = gate.create_key("first"), gate.create_key("second")
        narrow = gate.create_key("narrow", experts=("math",))
        assert status(gate.post(law(), first)) == "miss"
        assert status(gate.post(law(), first)) == "hit"
        assert status(gate.post(law(), second)) == ("hit" if shared else "miss")
        assert gate.post(law(), narrow).status_code == 403
        assert status(gate.post({"messages": law()["messages"]}, narrow)) == "miss"


# --- another config ------------------------------------------------------------------------------


def test_a_reload_of_the_same_config_keeps_the_answers(gate: Running) -> None:
    gate.post(law())
    assert gate.reload().status_code == 200
    assert status(gate.post(law())) == "hit"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("timeout: 20", "timeout: 20\n    system_prompt: Be brief."),
        ("model: m\n", "model: other\n"),
        ("timeout: 20", "timeout: 20\n    sampling: {temperature: 0.5}"),
    ],
)
def test_another_config_does_not_see_old_answers(gates: Gates, old: str, new: str) -> None:
    with gates("cache: {exact: true}\n") as gate:
        gate.post(law())
        before = gate.config.read_text()
        assert old in before
        gate.config.write_text(before.replace(old, new))
        assert gate.reload().status_code == 200
        assert status(gate.post(law())) == "miss"
        gate.config.write_text(before)
        assert gate.reload().status_code == 200
        assert status(gate.post(law())) == "hit"


def test_another_router_in_the_same_folder_does_not_see_old_answers(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    router = Path(shutil.copytree(text_router, tmp_path / "router"))
    with running(write_config(tmp_path, router, upstream, ALL_ALIKE), upstream) as gate:
        gate.post(law())
        (router / "note.txt").write_text("Trained again.")
        assert gate.reload().status_code == 200
        assert status(gate.post(law())) == "miss"


# --- what means the same -------------------------------------------------------------------------


def test_what_means_the_same_is_answered_the_same(alike: Running) -> None:
    alike.server.says(completion("Alike."))
    assert status(alike.post(law("Tell me about the moon."))) == "miss"
    again = alike.post(law("What of the moon?"))
    assert (status(again), content(again)) == ("semantic", "Alike.")
    assert status(alike.post(law("Tell me about the moon."))) == "hit"
    streamed = alike.post(law("And the moon?", stream=True))
    assert status(streamed) == "semantic"
    assert "Alike." in streamed.text
    assert len(alike.server.requests) == 1


@pytest.mark.parametrize("below", [True, False])
def test_the_threshold_is_the_cosine(alike: Running, gates: Gates, below: bool) -> None:
    texts = ["Tell me about the moon.", "sort the list of stocks"]
    router = alike.gateway.router
    assert isinstance(router, HasEmbedder)
    assert router.embedder is not None
    first, second = router.embedder.embed(texts)
    threshold = float(first @ second) + (-0.01 if below else 0.01)
    assert 0 < threshold < 1
    cache = f"cache: {{exact: true, semantic: true, threshold: {threshold:.4f}}}\n"
    with gates(cache) as gate:
        gate.post(law(texts[0]))
        assert status(gate.post(law(texts[1]))) == ("semantic" if below else "miss")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 2 plus 3?", "What is 2 plus 4?"),
        ("What is 12 plus 3?", "What is 1 plus 23?"),
        ("What is 1.5 doubled?", "What is 15 doubled?"),
        ("What is 2 + 3?", "What is 2 - 3?"),
        ("What is 2 + 3?", "What is 2 * 3?"),
        ("The root of -4?", "The root of 4?"),
        ("Is x < 5?", "Is x > 5?"),
        ("What is 7?", "What is it?"),
    ],
)
def test_other_numbers_never_mean_the_same(alike: Running, first: str, second: str) -> None:
    alike.post(law(first))
    assert status(alike.post(law(second))) == "miss"


def test_the_same_numbers_in_other_words_do(alike: Running) -> None:
    alike.post(law("How much is 2 + 3?"))
    assert status(alike.post(law("What is 2+3"))) == "semantic"


@pytest.mark.parametrize(
    "other",
    [
        {"model": "math"},
        {"max_tokens": 9},
        {"messages": [{"role": "system", "content": "Hm."}, user("What of the moon?")]},
        {"messages": [user("Hi."), {"role": "assistant", "content": "Hi."}, user("The moon?")]},
        {"messages": [{**user("The moon?"), "name": "Ada"}]},
        {"temperature": 1},
    ],
)
def test_all_else_must_be_equal(alike: Running, other: dict[str, Any]) -> None:
    alike.post(law())
    assert status(alike.post({**law("What of the moon?"), **other})) in ("miss", None)


def test_the_wishes_of_a_client_hold_for_what_means_the_same(alike: Running) -> None:
    alike.post(law())
    assert status(alike.post(law("What of the moon?"), cache_control="no-cache")) == "miss"
    assert status(alike.post(law("The moon?"), cache_control="no-store")) is None


async def test_a_bucket_keeps_the_newest(tmp_path: Path) -> None:
    """So that it does not grow for ever; the exact answers stay."""
    import numpy as np

    def embed(texts: Any) -> Any:
        vectors = np.zeros((len(texts), 1000), dtype=np.float32)
        for row, one in enumerate(texts):
            vectors[row, len(one)] = 1
        return vectors

    settings = CacheSettings(exact=True, semantic=True)
    cache = AnswerCache(MemoryStore(tmp_path), settings, "", embed)
    decision = RouteDecision({"law": 1.0}, 1.0, "law", "explicit")
    message = {"role": "assistant", "content": "Hi."}
    reply = {"id": "1", "choices": [{"message": message, "finish_reason": "stop"}]}
    queries = []
    for length in range(1, 131):
        query = cache.query({**law("x" * length), "temperature": 0}, decision, "me", None)
        assert query is not None
        await cache.keep(query, reply)
        queries.append(query)
    for query, expected in ((queries[0], None), (queries[-1], queries[-1].digest)):
        assert await cache._nearest(query) == expected
        assert await cache.find(query) is not None

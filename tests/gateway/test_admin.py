"""The admin API over HTTP: experts, router, keys, what happened, and that every change is noted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.running import ADMIN_KEY, LAW, MATH, Running, running, write_config
from tests.proxy.stand_in import StandInServer, chunk, events

SECRET = "sk-upstream"
NEW = {"kind": "upstream", "model": "m-new", "domains": ["coding"], "timeout": 5}
SMALL = {"name": "new", "settings": NEW}


@pytest.fixture
def gate(tmp_path: Path, text_router: Path, upstream: StandInServer) -> Iterator[Running]:
    config = write_config(tmp_path, text_router, upstream)
    with running(config, upstream) as gate:
        yield gate
        assert SECRET not in config.with_name(".polymath").joinpath("audit.jsonl").read_text()


@pytest.fixture(scope="module")
def only_steady(
    tmp_path_factory: pytest.TempPathFactory, text_router: Path, upstream: StandInServer
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("steady")
    with running(write_config(folder, text_router, upstream), upstream) as gate:
        yield gate


@pytest.fixture
def steady(only_steady: Running) -> Iterator[Running]:
    """For requests that change nothing."""
    live = only_steady.gateway.live
    yield only_steady
    assert only_steady.gateway.live is live


def experts(gate: Running) -> dict[str, Any]:
    data = gate.admin("GET", "/experts").raise_for_status().json()["data"]
    return {one["name"]: one for one in data}


def actions(gate: Running) -> list[tuple[str, str]]:
    data = gate.admin("GET", "/audit").raise_for_status().json()["data"]
    assert all(entry["actor"] == "admin API" and entry["time"] > 0 for entry in data)
    return [(entry["action"], entry["target"]) for entry in data]


def with_url(gate: Running, **more: Any) -> dict[str, Any]:
    return {**NEW, "api_base": gate.server.url, "api_key": SECRET, **more}


# --- its key -------------------------------------------------------------------------------------

PATHS = [
    ("POST", "/reload"),
    ("GET", "/experts"),
    ("POST", "/experts"),
    ("DELETE", "/experts/law"),
    ("GET", "/router"),
    ("PUT", "/router"),
    ("DELETE", "/router"),
    ("GET", "/decisions"),
    ("GET", "/usage"),
    ("GET", "/audit"),
    ("GET", "/keys"),
    ("POST", "/keys"),
    ("DELETE", "/keys/app"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_everything_needs_the_admin_key(steady: Running, method: str, path: str) -> None:
    user_key = steady.create_key()
    for given in (None, "Bearer", "Bearer wrong", f"Basic {ADMIN_KEY}", f"Bearer {user_key}"):
        headers = {} if given is None else {"authorization": given}
        body = {"name": "x", "settings": {}} if method != "GET" else None
        url = f"{steady.url}/admin{path}"
        answer = httpx.request(method, url, headers=headers, json=body)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert ADMIN_KEY not in answer.text


def test_without_an_admin_key_there_is_no_admin_api(
    tmp_path: Path, text_router: Path, upstream: StandInServer
) -> None:
    config = write_config(tmp_path, text_router, upstream)
    config.write_text(config.read_text().replace(f"admin_key: {ADMIN_KEY}, ", ""))
    with running(config, upstream) as gate:
        assert gate.admin("GET", "/experts").status_code == 404
        assert gate.reload().status_code == 404


def test_the_admin_key_opens_nothing_else(steady: Running) -> None:
    steady.create_key()
    assert steady.post({"model": "law"}, ADMIN_KEY).status_code == 401


# --- experts -------------------------------------------------------------------------------------


def test_experts_are_listed_without_secrets(steady: Running) -> None:
    answer = steady.admin("GET", "/experts")
    assert SECRET not in answer.text
    found = experts(steady)
    assert list(found) == ["law", "coding", "math"]
    assert found["law"]["settings"]["price"] == {"input": 1000.0, "output": 3000.0}
    assert not any(one["changed"] for one in found.values())


def test_an_expert_is_added_routed_to_and_taken_away(gate: Running) -> None:
    assert gate.admin("DELETE", "/experts/coding").json() == {"status": "removed", "name": "coding"}
    assert gate.post({"model": "coding"}).status_code == 404
    body = {"name": "new", "settings": with_url(gate)}
    answer = gate.admin("POST", "/experts", body)
    assert answer.json() == {"status": "added", "name": "new"}
    listed = gate.admin("GET", "/experts")
    assert SECRET not in answer.text + listed.text
    assert experts(gate)["new"]["changed"]
    routed = gate.post({"messages": [{"role": "user", "content": "sort a list"}]})
    assert routed.json()["model"] == "new"
    assert gate.server.requests[-1].headers["authorization"] == f"Bearer {SECRET}"
    assert gate.admin("DELETE", "/experts/new").status_code == 200
    assert list(experts(gate)) == ["law", "math"]
    assert actions(gate) == [
        ("remove expert", "experts.new"),
        ("add expert", "experts.new"),
        ("remove expert", "experts.coding"),
    ]


def test_an_expert_is_exchanged_while_its_answer_runs(gate: Running) -> None:
    gate.server.says(events(chunk("a"), 0.5, chunk("b")))
    given: dict[str, Any] = {"model": "math", "messages": MATH}
    chunks = gate.client().chat.completions.create(stream=True, **given)
    next(chunks)
    settings = with_url(gate, domains=["math"])
    assert gate.admin("POST", "/experts", {"name": "math", "settings": settings}).is_success
    assert [one.choices[0].delta.content for one in chunks] == ["b"]
    gate.post({"model": "math"})
    assert gate.server.requests[-1].body["model"] == "m-new"


def test_changes_outlast_reloads_and_restarts_and_are_not_in_the_file(
    gate: Running, upstream: StandInServer
) -> None:
    before = gate.config.read_text()
    gate.admin("POST", "/experts", {"name": "new", "settings": with_url(gate, domains=["x"])})
    gate.admin("DELETE", "/experts/coding")
    assert gate.reload().json()["experts"] == ["law", "math", "new"]
    assert gate.config.read_text() == before
    with running(gate.config, upstream) as again:
        assert list(experts(again)) == ["law", "math", "new"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"name": "new"}, "settings"),
        ({"settings": NEW}, "name"),
        ({"name": "a b", "settings": NEW}, "name"),
        ({"name": "x" * 200, "settings": NEW}, "name"),
        ({**SMALL, "more": 1}, "more"),
        ({"name": "new", "settings": {**NEW, "modle": 1}}, "modle"),
        ({"name": "new", "settings": {**NEW, "kind": "lawyer"}}, "experts.new.kind"),
        ({"name": "new", "settings": {**NEW, "timeout": -1}}, "experts.new.timeout"),
        ({"name": "new", "settings": {**NEW, "fallbacks": ["lawyer"]}}, "lawyer"),
        ({"name": "new", "settings": {**NEW, "domains": ["law"]}}, "law"),
        ({"name": "new", "settings": {"base_model": "none", "adapter": "x"}}, "base_model"),
        ({"name": "new", "settings": {**NEW, "api_key": "${NOT_THERE}"}}, "NOT_THERE"),
        ({"name": "auto", "settings": NEW}, "experts.auto"),
        ({"name": "new", "settings": []}, "settings"),
        ([], ""),
    ],
)
def test_an_expert_that_cannot_be_used_changes_nothing_and_is_named(
    steady: Running, body: Any, named: str
) -> None:
    if isinstance(body, dict) and isinstance(body.get("settings"), dict):
        own = {} if "base_model" in body["settings"] else {"api_base": steady.server.url}
        body = {**body, "settings": {**own, **body["settings"]}}
    answer = steady.admin("POST", "/experts", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert named in f"{error['param']} {error['message']}"
    assert list(experts(steady)) == ["law", "coding", "math"]


def test_a_secret_of_a_bad_expert_is_not_sent_back(steady: Running) -> None:
    settings = with_url(steady, api_key="sk-with\nnewline")
    answer = steady.admin("POST", "/experts", {"name": "new", "settings": settings})
    assert answer.status_code == 400
    assert "sk-with" not in answer.text


def test_whom_others_need_stays(steady: Running) -> None:
    answer = steady.admin("DELETE", "/experts/law")
    assert answer.status_code == 400
    assert "router.fallback: no expert 'law'" in answer.json()["error"]["message"]


def test_nobody_cannot_be_removed(steady: Running) -> None:
    answer = steady.admin("DELETE", "/experts/nobody")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")


# --- the router ----------------------------------------------------------------------------------


def test_the_router_is_swapped_and_restored(gate: Running, tmp_path: Path) -> None:
    shown = gate.admin("GET", "/router").json()
    assert shown["fallback"] == "law"
    folder = shutil.copytree(shown["path"], tmp_path / "other")
    body = {"path": str(folder), "fallback": "math", "min_confidence": 1}
    assert gate.admin("PUT", "/router", body).json() == {"status": "swapped"}
    assert gate.post({"messages": LAW}).json()["model"] == "math"
    assert gate.admin("GET", "/router").json()["path"] == str(folder)
    assert gate.admin("DELETE", "/router").json() == {"status": "restored"}
    assert gate.post({"messages": LAW}).json()["model"] == "law"
    assert gate.admin("DELETE", "/router").json() == {"status": "unchanged"}
    assert actions(gate) == [("restore router", "router"), ("swap router", "router")]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"fallback": "law"}, "path"),
        ({"path": "router"}, "fallback"),
        ({"path": "nowhere", "fallback": "law"}, "nowhere"),
        ({"path": "router", "fallback": "lawyer"}, "lawyer"),
        ({"path": "router", "fallback": "law", "fallbck": 1}, "fallbck"),
        ({"path": "router", "fallback": "law", "sticky": 2}, "router.sticky"),
    ],
)
def test_a_router_that_cannot_be_used_changes_nothing(
    steady: Running, body: dict[str, Any], named: str
) -> None:
    answer = steady.admin("PUT", "/router", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert named in f"{error['param']} {error['message']}"


# --- what happened -------------------------------------------------------------------------------


def test_decisions_of_late_say_who_answered_and_why(gate: Running) -> None:
    gate.post({"messages": LAW}, x_request_id="first")
    gate.post({"model": "math", "messages": MATH}, x_request_id="second")
    gate.post({"model": "math", "messages": MATH, "stream": True})
    failed, explicit, routed = gate.decisions()
    assert (routed["request_id"], routed["expert"], routed["source"]) == ("first", "law", "encoder")
    assert (routed["outcome"], routed["prompt_tokens"], routed["completion_tokens"]) == ("ok", 3, 2)
    assert routed["cost"] == pytest.approx(0.009)
    assert (explicit["request_id"], explicit["source"]) == ("second", "explicit")
    assert (failed["outcome"], failed["stream"]) == ("upstream_error", True)
    for entry in (failed, explicit, routed):
        assert "messages" not in entry

    def found(query: str) -> list[str]:
        data = gate.admin("GET", f"/decisions?{query}").raise_for_status().json()["data"]
        return [entry["request_id"] for entry in data]

    assert found("expert=law") == ["first"]
    assert found("limit=1") == [failed["request_id"]]
    assert found("key=nobody") == []
    gate.reload()


def test_usage_is_told_by_key_and_expert(gate: Running) -> None:
    gate.post({"model": "law"})
    first, second = gate.create_key("first"), gate.create_key("second")
    for key, model in ((first, "law"), (first, "law"), (second, "math")):
        gate.post({"model": model}, key)
    found = gate.usage()
    assert found.keys() == {(None, "law"), ("first", "law"), ("second", "math")}
    row = found["first", "law"]
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (2, 6, 4)
    assert row["dollars"] == pytest.approx(0.018)
    assert found[None, "law"]["key"] == "anybody"
    gate.reload()


@pytest.mark.parametrize(
    "query", ["/decisions?limit=0", "/decisions?limit=x", "/usage?days=0", "/audit?limit=9999999"]
)
def test_queries_have_limits(steady: Running, query: str) -> None:
    answer = steady.admin("GET", query)
    assert answer.status_code == 400
    assert query.partition("?")[2].partition("=")[0] in answer.json()["error"]["param"]


# --- keys ----------------------------------------------------------------------------------------


def test_a_key_is_made_listed_and_revoked(gate: Running) -> None:
    rights = {"name": "app", "experts": ["law"], "rpm": 5, "budget": {"dollars": 1}}
    made = gate.admin("POST", "/keys", rights).raise_for_status().json()
    assert made["experts"] == ["law"]
    key = made["key"]
    assert gate.post({"model": "law"}, key).status_code == 200
    assert gate.post({"model": "math"}, key).status_code == 403
    listed = gate.admin("GET", "/keys")
    (shown,) = listed.json()["data"]
    assert (shown["id"], shown["name"], shown["rpm"]) == (made["id"], "app", 5)
    assert key.rpartition("-")[2] not in listed.text
    assert "sha256" not in listed.text
    revoked = gate.admin("DELETE", f"/keys/{made['id']}")
    assert revoked.json()["revoked"] > 0
    assert gate.post({"model": "law"}, key).status_code == 401
    assert actions(gate) == [("revoke key", made["id"]), ("create key", made["id"])]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "app", "experts": ["lawyer"]}, "lawyer"),
        ({"name": "app", "rpm": -1}, "rpm"),
        ({"name": "app", "budget": {"dollars": -1}}, "budget.dollars"),
        ({"name": "app", "budget": {"dollars": 1, "period": "year"}}, "budget.period"),
        ({"name": "app", "off_topic": "shout"}, "off_topic"),
        ({"name": "app", "rmp": 1}, "rmp"),
    ],
)
def test_a_key_that_cannot_be_made_is_not(steady: Running, body: Any, named: str) -> None:
    before = steady.admin("GET", "/keys").json()
    answer = steady.admin("POST", "/keys", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert named in f"{error['param']} {error['message']}"
    assert steady.admin("GET", "/keys").json() == before


def test_a_key_that_is_not_there_cannot_be_revoked(steady: Running) -> None:
    answer = steady.admin("DELETE", "/keys/nobody")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "key")

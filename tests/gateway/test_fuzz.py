"""Whatever a client sends: no 5xx, and every error is an OpenAI body.

Requests are made from our own OpenAPI document (schemathesis), and message lists from nothing but
JSON (hypothesis). Experts are a small random model and a stand-in for an upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case

from polymath.gateway import load_config, prepare
from polymath.gateway.app import Gateway
from tests.conftest import serving
from tests.gateway.running import ADMIN_KEY, write_config
from tests.gateway.test_gradient_routing import write_text_router
from tests.proxy.stand_in import Received, Reply, StandInServer, chunk, completion, events
from tests.router.conftest import write_tiny_bert

LOCAL = "local: {kind: base, base_model: tiny, sampling: {max_tokens: 4}}"
MORE = "base_models: {tiny: {model: TINY}}\nengine: {backend: torch, dtype: float32}\nauth: none\n"
FEW = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
)
ERROR_KEYS = {"message", "type", "param", "code"}


def answer(received: Received) -> Reply:
    if received.body.get("stream"):
        return events(chunk("Hello."))
    return completion()


@pytest.fixture(scope="module")
def base_url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("fuzz")
    router = root / "router"
    write_text_router(
        write_tiny_bert(tmp_path_factory.mktemp("bert")), router, ("law", "coding", "math")
    )
    server = StandInServer()
    server.otherwise = answer
    config = write_config(
        root, router, server, MORE.replace("TINY", str(tiny_model)), experts=LOCAL
    )
    with serving(Gateway(prepare(load_config(config, {})))) as url:
        yield url
    server.close()


@pytest.fixture(scope="module")
def document(base_url: str) -> Any:
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    return schema.exclude(path_regex="^/admin/(experts|router)", method_regex="(?i)^(put|delete)$")


def test_no_request_of_the_document_is_a_failure_of_ours(document: Any) -> None:
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @FEW
        @given(case=operation.as_strategy())
        def ask(case: Case) -> None:
            check(case.call(headers={"authorization": f"Bearer {ADMIN_KEY}"}))

        ask()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "nobody"])
CONTENT = (
    st.text(max_size=200)
    | JSON
    | st.lists(
        st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=20)}), max_size=3
    )
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | JSON, "content": CONTENT}) | JSON, max_size=6
)
FIELDS = (
    *("stream", "n", "max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "user"),
    *("top_logprobs", "timeout", "response_format", "stream_options", "logit_bias", "polymath"),
    *("metadata", "tools"),
)


@FEW
@given(
    model=st.sampled_from(["local", "law", "polymath", "auto", "nobody"]),
    messages=MESSAGES,
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
)
def test_no_list_of_messages_is_a_failure_of_ours(
    base_url: str, model: str, messages: list[Any], fields: dict[str, Any]
) -> None:
    body = {**fields, "model": model, "messages": messages}
    check(httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=60))


PATHS = st.sampled_from(["chat/completions", "completions", "embeddings", "responses", "route"])


@FEW
@given(path=PATHS, data=st.binary(max_size=200))
def test_no_bytes_are_a_failure_of_ours(base_url: str, path: str, data: bytes) -> None:
    headers = {"content-type": "application/json"}
    check(httpx.post(f"{base_url}/v1/{path}", content=data, headers=headers, timeout=60))


def check(response: Any) -> None:
    """No failure of ours, and an OpenAI body where it is an error."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == ERROR_KEYS, response.text
        assert response.json()["error"]["message"]

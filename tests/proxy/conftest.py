"""Stand-in servers, and upstreams that ask them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from polymath.experts import ExpertSettings
from polymath.proxy import Upstream
from tests.proxy.stand_in import StandInServer

Connect = Callable[..., Upstream]

KEY = "sk-the-key-of-the-gateway"


@pytest.fixture(scope="session")
def second_server() -> Iterator[StandInServer]:
    server = StandInServer()
    yield server
    server.close()


@pytest.fixture
def other(second_server: StandInServer) -> StandInServer:
    second_server.forget()
    return second_server


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymath.proxy.upstream.backoff", lambda tries: 0.0)


@pytest.fixture
async def connect(server: StandInServer) -> AsyncIterator[Connect]:
    """Makes upstreams of the expert `big`; when the test is over none of them has work left."""
    made = []

    def connect(*urls: str, **keys: Any) -> Upstream:
        upstream = Upstream("big", settings_of(*(urls or [server.url]), **keys))
        made.append(upstream)
        return upstream

    yield connect
    for upstream in made:
        assert [deployment.outstanding for deployment in upstream.servers] == [0] * len(
            upstream.servers
        )
        await upstream.close()


def settings_of(*urls: str, **keys: Any) -> ExpertSettings:
    """An expert behind the servers of these URLs."""
    own = {"kind": "upstream", "model": "their-model", "timeout": 5}
    if len(urls) == 1:
        where: dict[str, Any] = {"api_base": urls[0]}
    else:
        where = {"deployments": [{"api_base": url} for url in urls]}
    return ExpertSettings.model_validate({**own, **where, **keys})

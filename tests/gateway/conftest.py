"""The official client of the session's server."""

from __future__ import annotations

import pytest
from openai import OpenAI


@pytest.fixture(scope="session")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=120)

"""How long a try waits for the next one."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.proxy.retry import FIRST, LONGEST, backoff, seconds_to_wait


@given(st.integers(1, 11))
def test_the_wait_doubles_with_jitter_up_to_a_limit(tries: int) -> None:
    full = min(FIRST * 2 ** (tries - 1), LONGEST)
    assert full / 2 <= backoff(tries) <= full


def test_clients_do_not_come_together() -> None:
    assert len({backoff(3) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert seconds_to_wait(headers) == seconds


def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert seconds_to_wait({"retry-after": date}) == pytest.approx(30, abs=2)


HOSTILE = ("inf", "-inf", "nan", "1e400", "Wed, 21 Oct 2015 07:28:00 +9999999999999999999")


@pytest.mark.parametrize("name", ["retry-after", "retry-after-ms"])
@pytest.mark.parametrize("value", HOSTILE)
def test_what_is_no_time_is_nothing(name: str, value: str) -> None:
    wait = seconds_to_wait({name: value})
    assert wait is None or 0 <= wait < math.inf


@given(st.text())
def test_any_header_is_a_finite_time_or_nothing(value: str) -> None:
    wait = seconds_to_wait({"retry-after": value})
    assert wait is None or 0 <= wait < math.inf

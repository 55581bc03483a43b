"""How long to wait before another try."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["LONGEST_WAIT", "backoff", "seconds_to_wait"]

FIRST = 0.5
LONGEST = 8.0
LONGEST_WAIT = 20.0
"""Seconds; an upstream that wants more is not tried again for this request."""


def backoff(tries: int) -> float:
    """Seconds after so many tries: doubling, with jitter, so that clients do not come together."""
    doubled: float = FIRST * 2 ** (tries - 1)
    return min(doubled, LONGEST) * random.uniform(0.5, 1.0)


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """What `Retry-After` says, in seconds or as a date (RFC 9110, section 10.2.3); None if nothing.

    `retry-after-ms`, which OpenAI sends, is finer.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        when = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError, OverflowError):
        return None
    return max((when - datetime.now(when.tzinfo or UTC)).total_seconds(), 0.0)

"""A circuit breaker (Nygard, Release It!, 2007): a server that keeps failing is left alone.

Closed: all calls pass. After `FAILURES` failures in a row it opens and no call passes. After
`COOLDOWN` seconds it is half open: one call passes, and what becomes of that one closes it or opens
it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

__all__ = ["BreakerState", "CircuitBreaker"]

BreakerState = Literal["closed", "half_open", "open"]

FAILURES = 5
COOLDOWN = 10.0
"""Seconds."""


class CircuitBreaker:
    """Of one server; used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._opened: float | None = None
        self._trial = False

    @property
    def state(self) -> BreakerState:
        """Closed, open, or half open."""
        if self._opened is None:
            return "closed"
        return "open" if self.seconds_left > 0 else "half_open"

    @property
    def seconds_left(self) -> float:
        """Until a call may be tried again; 0 if it may now."""
        if self._opened is None:
            return 0.0
        return max(self._opened + COOLDOWN - self._clock(), 0.0)

    @property
    def lets_pass(self) -> bool:
        """Whether a call may be made."""
        return self.state == "closed" or (self.state == "half_open" and not self._trial)

    def start(self) -> None:
        """A call is made."""
        self._trial = self.state == "half_open"

    def succeed(self) -> None:
        """The server answered as it should."""
        self._failures, self._opened, self._trial = 0, None, False

    def fail(self) -> None:
        """The server failed."""
        self._failures += 1
        if self._trial or self._failures >= FAILURES:
            self._opened = self._clock()
        self._trial = False

    def forget(self) -> None:
        """The call ended without saying anything about the server."""
        self._trial = False

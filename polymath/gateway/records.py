"""What is remembered of late: decisions, changes that somebody made, feedback of clients."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson

from polymath.errors import StoreUnavailable
from polymath.gateway.report import Report
from polymath.gateway.store import Store

__all__ = ["AuditLog", "DecisionLog", "FeedbackLog"]

logger = logging.getLogger(__name__)

MOST_BATCHES = 2000
BATCH = 25
"""Decisions at most in one of them, so that a busy gateway keeps 50,000 of them."""
MOST_WAITING = 10_000
MOST_CHANGES = 10_000
MOST_FEEDBACK = 1_000_000


class DecisionLog:
    """Reports of requests, sent to the store in batches so that they cost requests nothing.

    Args:
        prompts: whether prompts are kept of keys that do not allow it, too.
    """

    def __init__(self, store: Store, prompts: Callable[[], bool]) -> None:
        self._store = store
        self._prompts = prompts
        self._sending = asyncio.Lock()
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MOST_WAITING)

    def observe(self, report: Report) -> None:
        """Take down a request that is over."""
        entry = report.to_dict()
        if self._prompts() or report.keeps_prompt:
            entry["messages"] = report.prompt
        self._waiting.append(entry)

    async def flush(self) -> None:
        """Send what waits; what cannot be sent waits on, the oldest going first."""
        async with self._sending:  # so that whoever waits for it finds what was sent
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                try:
                    await self._store.append("decisions", _packed(batch), MOST_BATCHES)
                except StoreUnavailable as error:
                    logger.debug("decisions wait: %s", error.message)
                    self._waiting = deque([*batch, *self._waiting], maxlen=MOST_WAITING)
                    return

    async def recent(self, most: int) -> list[dict[str, Any]]:
        """The last decisions, the newest first."""
        await self.flush()
        found: list[dict[str, Any]] = []
        for batch in await self._store.recent("decisions", MOST_BATCHES):
            found += reversed(orjson.loads(zlib.decompress(batch)))
            if len(found) >= most:
                break
        return found[:most]

    async def find(self, completion: str, key: str) -> dict[str, Any] | None:
        """The decision of a completion that this key was given, if it is remembered."""
        await self.flush()
        for batch in await self._store.recent("decisions", MOST_BATCHES):
            text = zlib.decompress(batch)
            if completion.encode() in text:
                for entry in reversed(orjson.loads(text)):
                    if (entry["id"], entry["key"]) == (completion, key):
                        return dict(entry)
        return None


class AuditLog:
    """Who changed what."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(self, actor: str, action: str, target: str = "", **detail: Any) -> None:
        """Take down a change that was made.

        Raises:
            StoreUnavailable: it cannot be taken down.
        """
        entry = {
            "time": round(time.time(), 3),
            "actor": actor,
            "action": action,
            "target": target,
            "detail": detail,
        }
        logger.info("%s: %s %s", actor, action, target)
        await self._store.append("audit", orjson.dumps(entry), MOST_CHANGES)

    async def recent(self, most: int) -> list[dict[str, Any]]:
        """The last changes, the newest first."""
        return [orjson.loads(entry) for entry in await self._store.recent("audit", most)]


class FeedbackLog:
    """What clients think of answers."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(self, entry: dict[str, Any]) -> None:
        """Keep a piece of feedback.

        Raises:
            StoreUnavailable: it cannot be kept.
        """
        await self._store.append("feedback", orjson.dumps(entry), MOST_FEEDBACK)

    async def all(self) -> list[dict[str, Any]]:
        """Everything that is kept, the oldest first."""
        entries = await self._store.recent("feedback", MOST_FEEDBACK)
        return [orjson.loads(entry) for entry in reversed(entries)]


def _packed(entries: list[dict[str, Any]]) -> bytes:
    """JSON, compressed to a quarter: every entry has the same keys."""
    return zlib.compress(orjson.dumps(entries), level=1)

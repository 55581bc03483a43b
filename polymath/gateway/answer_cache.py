"""Answers that are given again: to the same request, or to one that means nearly the same.

Only what would be answered alike anyway is kept: requests of temperature 0 or with a seed. A key
sees answers of its own alone, unless the config shares them, and answers of the same expert.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from polymath.errors import StoreUnavailable
from polymath.gateway.store import Store
from polymath.proxy import Body, Events, answer_text, events_of, notes_of, text_of
from polymath.router import RouteDecision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AnswerCache", "CacheQuery", "CacheSettings", "CacheStatus", "Replay"]

logger = logging.getLogger(__name__)

CacheStatus = Literal["hit", "semantic", "miss"]

ANSWERS, NEARBY = "answers", "nearby"
"""Shelves: digest -> answer; bucket -> the digests and vectors in it."""
MOST_NEARBY = 128
"""Requests of a bucket that a new one is compared with."""
DIGEST_BYTES = 32
OWN = frozenset({"metadata"})
"""Fields of an answer that belong to one request."""
IRRELEVANT = frozenset({"model", "stream", "stream_options", "user", "metadata", "timeout"})
"""Fields that do not change an answer; the model is in the decision."""
NUMBER = re.compile(r"([-+\u2212*/\u00d7\u00f7^<>=%]?)\s*(\d+(?:[.,]\d+)*)")
"""With what stands before it: 2 - 3 is not 2 + 3."""
NOT_READ = frozenset({"no-cache", "max-age=0"})


class CacheSettings(BaseModel):
    """Which answers are kept, and for whom."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exact: bool = Field(default=False, description="Answer equal requests from the cache.")
    semantic: bool = Field(
        default=False,
        description="And those whose last turn means the same, all else being equal: same earlier "
        "turns, same settings, same numbers in the text.",
    )
    threshold: float = Field(
        default=0.97, gt=0, le=1, description="Least cosine of two turns that mean the same."
    )
    ttl: float = Field(default=3600.0, gt=0, description="Seconds that an answer is kept.")
    max_entries: int = Field(default=10_000, ge=1, description="The oldest go first.")
    max_answer_bytes: int = Field(default=262_144, ge=1024, description="Longer ones are not kept.")
    shared: bool = Field(default=False, description="Keys see each other's answers.")

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self.exact or self.semantic


@dataclass(frozen=True, slots=True)
class CacheQuery:
    """A request as the cache knows it.

    Attributes:
        digest: of everything that the answer depends on.
        bucket: of the same without the words of the last turn.
        text: the last turn.
        reads, keeps: what the client's `Cache-Control` allows (RFC 9111, section 5.2.1).
    """

    digest: str
    bucket: str
    text: str
    reads: bool = True
    keeps: bool = True


class AnswerCache:
    """Keeps whole answers in a store.

    Args:
        fingerprint: of the config and the adapters; answers of other ones are not seen.
        embed: texts to unit vectors, for the semantic cache.
    """

    def __init__(
        self,
        store: Store,
        settings: CacheSettings,
        fingerprint: str,
        embed: Callable[[Sequence[str]], NDArray[np.float32]] | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._fingerprint = fingerprint
        self._embed = embed if settings.semantic else None

    def query(
        self, body: Body, decision: RouteDecision, owner: str, cache_control: str | None
    ) -> CacheQuery | None:
        """What to look for; None if such a request is never kept.

        Args:
            owner: in whose name answers are kept.
            cache_control: the header of the request.
        """
        wishes = {part.strip().lower() for part in (cache_control or "").split(",")}
        if not self._settings.on or "no-store" in wishes or not _repeatable(body):
            return None
        rest = {
            name: _plain(value)
            for name, value in body.items()
            if value is not None and name not in IRRELEVANT
        }
        *earlier, last = rest.pop("messages")
        text = text_of(last.get("content"))
        known: Any = {
            "fingerprint": self._fingerprint,
            "owner": None if self._settings.shared else owner,
            "experts": decision.weights if decision.combine != "select" else decision.expert,
            "combine": decision.combine,
            "rest": rest,
            "earlier": earlier,
        }
        bucket = _digest({**known, "last": {**last, "content": NUMBER.findall(text)}})
        digest = _digest({**known, "last": last})
        return CacheQuery(digest, bucket, text, reads=not wishes & NOT_READ)

    async def find(self, query: CacheQuery) -> tuple[dict[str, Any], CacheStatus] | None:
        """An answer that was kept, and how it was found."""
        if not query.reads:
            return None
        try:
            if (reply := await self._answer(query.digest)) is not None:
                return reply, "hit"
            digest = await self._nearest(query)
            if digest is not None and (reply := await self._answer(digest)) is not None:
                return reply, "semantic"
        except StoreUnavailable as error:
            logger.debug("the cache cannot be read: %s", error.message)
        return None

    async def keep(self, query: CacheQuery, reply: Mapping[str, Any]) -> None:
        """Keep an answer, unless it is too long, was cut off, or is that of a fallback."""
        data = orjson.dumps({name: value for name, value in reply.items() if name not in OWN})
        settings = self._settings
        if len(data) > settings.max_answer_bytes or not _complete(reply):
            return
        try:
            await self._store.put(ANSWERS, query.digest, data, settings.ttl, settings.max_entries)
            if self._embed is not None and query.text:
                await self._keep_nearby(query)
        except StoreUnavailable as error:
            logger.debug("an answer is not kept: %s", error.message)

    async def _answer(self, digest: str) -> dict[str, Any] | None:
        data = await self._store.get(ANSWERS, digest)
        return None if data is None else orjson.loads(data)

    async def _nearest(self, query: CacheQuery) -> str | None:
        if self._embed is None or not query.text:
            return None
        known = await self._store.get(NEARBY, query.bucket)
        if not known:
            return None
        vector = (await asyncio.to_thread(self._embed, [query.text]))[0]
        digests, vectors = _unpacked(known, len(vector))
        cosines = vectors @ vector
        best = int(cosines.argmax())
        return digests[best] if cosines[best] >= self._settings.threshold else None

    async def _keep_nearby(self, query: CacheQuery) -> None:
        assert self._embed is not None
        vector = (await asyncio.to_thread(self._embed, [query.text]))[0]
        own = bytes.fromhex(query.digest) + vector.astype("float16").tobytes()
        known = await self._store.get(NEARBY, query.bucket) or b""
        others = [known[at : at + len(own)] for at in range(0, len(known), len(own))]
        kept = [entry for entry in others if entry[:DIGEST_BYTES] != own[:DIGEST_BYTES]]
        value = b"".join([*kept, own][-MOST_NEARBY:])
        settings = self._settings
        await self._store.put(NEARBY, query.bucket, value, settings.ttl, settings.max_entries)


class Replay:
    """Answers with what was kept, whole or as a stream."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        self._reply = {
            **reply,
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
        }

    async def whole(self, body: Body) -> dict[str, Any]:
        own = body.get("metadata")
        return self._reply if own is None else {**self._reply, "metadata": own}

    async def stream(self, body: Body) -> Events:
        return events_of(self._reply, body)


def _repeatable(body: Body) -> bool:
    """Whether the same request would be answered alike."""
    return body.get("temperature") == 0 or isinstance(body.get("seed"), int)


def _plain(value: Any) -> Any:
    """Equal settings in one form: 0.0 is 0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _complete(reply: Mapping[str, Any]) -> bool:
    if "fallback" in notes_of(reply):
        return False
    finished = all(c.get("finish_reason") not in (None, "error") for c in reply["choices"])
    return finished and bool(answer_text(reply) or reply["choices"][0]["message"].get("tool_calls"))


def _digest(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _unpacked(known: bytes, dimensions: int) -> tuple[list[str], NDArray[np.float32]]:
    """Digests and vectors of a bucket, as `_keep_nearby` wrote them."""
    import numpy as np

    size = DIGEST_BYTES + dimensions * np.dtype(np.float16).itemsize
    table = np.frombuffer(known, dtype=np.uint8).reshape(-1, size)
    vectors = table[:, DIGEST_BYTES:].copy().view(np.float16).astype(np.float32)
    return [bytes(row).hex() for row in table[:, :DIGEST_BYTES]], vectors

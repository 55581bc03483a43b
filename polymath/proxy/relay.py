"""`kind: upstream`: a request goes to another server as it came, and the answer comes back so.

Fields that we do not know (tools, images, reasoning) are handed on untouched in both directions.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from polymath.errors import Overloaded, PolymathError, UpstreamFailed
from polymath.experts import ExpertSettings
from polymath.proxy.answering import Answering, Ask, Body, Events
from polymath.proxy.messages import FirstNoted, noted
from polymath.proxy.upstream import Upstream

__all__ = ["Relay"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PATH = "/chat/completions"
OURS = ("polymath",)
"""Fields of a request that are for this gateway alone."""


class Relay:
    """An upstream, and whoever answers in its place.

    Args:
        ask: finds the fallbacks.
        fallbacks: by default those of the settings.
    """

    def __init__(
        self,
        upstream: Upstream,
        settings: ExpertSettings,
        ask: Ask,
        fallbacks: Sequence[str] | None = None,
    ) -> None:
        self._upstream = upstream
        self._settings = settings
        self._ask = ask
        self._fallbacks = settings.fallbacks if fallbacks is None else tuple(fallbacks)

    def within(self, allowed: Collection[str]) -> Relay:
        """The same, in whose place only these experts answer."""
        kept = [name for name in self._fallbacks if name in allowed]
        return Relay(self._upstream, self._settings, self._ask, kept)

    async def whole(self, body: Body) -> dict[str, Any]:
        outgoing = {**self._outgoing(body), "stream": False}

        async def own() -> dict[str, Any]:
            self._upstream.check_room()
            reply = await self._upstream.post(PATH, outgoing)
            if not _is_completion(reply):
                raise UpstreamFailed(f"The upstream of {self._upstream.name} sent no completion.")
            return reply

        return await self._first_of(own, lambda other: other.whole(body), noted)

    async def stream(self, body: Body) -> Events:
        outgoing = {**self._outgoing(body), "stream": True}

        async def own() -> Events:
            self._upstream.check_room()
            return await self._upstream.stream(PATH, outgoing)

        return await self._first_of(own, lambda other: other.stream(body), FirstNoted)

    async def _first_of(
        self,
        own: Callable[[], Awaitable[Result]],
        others: Callable[[Answering], Awaitable[Result]],
        noting: Callable[[Result, Mapping[str, Any]], Result],
    ) -> Result:
        """The upstream's answer, or that of the first fallback that has one."""
        try:
            return await own()
        except (UpstreamFailed, Overloaded) as error:
            for name in self._fallbacks:
                try:
                    result = await others(self._ask(name))
                except PolymathError as problem:
                    logger.warning("fallback %s: %s", name, problem.message)
                else:
                    logger.warning("%s answered in place of %s", name, self._upstream.name)
                    return noting(result, {"fallback": name})
            raise error

    def _outgoing(self, body: Body) -> dict[str, Any]:
        kept = {name: value for name, value in body.items() if name not in OURS}
        return {**dict(self._defaults(kept)), **kept, "messages": self._messages(body)}

    def _defaults(self, body: Body) -> Iterator[tuple[str, Any]]:
        """The expert's sampling values, where the request has none."""
        given = self._settings.sampling.model_dump(exclude_none=True, exclude_defaults=True)
        limited = "max_tokens" in body or "max_completion_tokens" in body
        for name, value in given.items():
            if not (name == "max_tokens" and limited):
                yield name, value

    def _messages(self, body: Body) -> list[Any]:
        own = self._settings.system_prompt
        first = [] if own is None else [{"role": "system", "content": own}]
        return [*first, *body["messages"]]


def _is_completion(reply: Mapping[str, Any]) -> bool:
    """Whether there are choices, each with a message."""
    choices = reply.get("choices")
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(
            isinstance(choice, dict) and isinstance(choice.get("message"), dict)
            for choice in choices
        )
    )

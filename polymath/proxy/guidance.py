"""`kind: guided`: a small expert of the domain writes background for a black-box model.

The upstream reads it in its system message (BLADE, Li et al. 2024; PKG, Luo et al. 2023). If the
background fails or is late, the upstream answers without it, and the answer says so.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from polymath.errors import PolymathError
from polymath.experts import ExpertSettings
from polymath.proxy.answering import Ask, Body, Events
from polymath.proxy.messages import (
    FirstNoted,
    answer_text,
    last_user_text,
    noted,
    with_system_text,
)

__all__ = ["Guided"]


@dataclass(frozen=True, slots=True)
class Guidance:
    """What became of the background.

    Attributes:
        text: None if there is none.
        failure: why not.
    """

    expert: str
    text: str | None
    failure: str | None = None

    def note(self) -> dict[str, Any]:
        """For the `polymath` object of the answer."""
        used = self.text is not None
        return {"guidance": {"expert": self.expert, "used": used, "failure": self.failure}}


class Guided:
    """An expert that answers with the background of another.

    Args:
        settings: of kind `guided`.
    """

    def __init__(self, settings: ExpertSettings, ask: Ask) -> None:
        self._settings = settings
        self._guide, self._upstream = str(settings.guide), str(settings.upstream)
        self._ask = ask

    async def whole(self, body: Body) -> dict[str, Any]:
        guidance = await self._guidance(body)
        reply = await self._ask(self._upstream).whole(self._guided(body, guidance))
        return noted(reply, guidance.note())

    async def stream(self, body: Body) -> Events:
        guidance = await self._guidance(body)
        events = await self._ask(self._upstream).stream(self._guided(body, guidance))
        return FirstNoted(events, guidance.note())

    async def _guidance(self, body: Body) -> Guidance:
        settings = self._settings
        question = settings.guide_prompt.replace("{question}", last_user_text(body))
        request = {
            "model": self._guide,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": settings.guide_tokens,
            "temperature": 0,
        }
        try:
            async with asyncio.timeout(settings.guide_timeout):
                text = answer_text(await self._ask(self._guide).whole(request)).strip()
        except TimeoutError:
            late = f"no background within {settings.guide_timeout:g} seconds"
            return Guidance(self._guide, None, late)
        except PolymathError as error:
            return Guidance(self._guide, None, error.message)
        if not text:
            return Guidance(self._guide, None, "the background is empty")
        return Guidance(self._guide, text)

    def _guided(self, body: Body, guidance: Guidance) -> Body:
        if guidance.text is None:
            return body
        text = self._settings.template.replace("{background}", guidance.text)
        return with_system_text(body, text)

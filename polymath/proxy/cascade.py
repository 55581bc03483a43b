"""`kind: cascade`: a cheap expert answers, a judge looks at it, a strong one answers if need be.

A stream is held back until the judge has spoken, at most for the judge's `timeout`. A judge of the
question alone (`difficulty`) speaks before anybody answers, and nothing is held back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polymath.errors import PolymathError
from polymath.experts import ExpertSettings, JudgeSettings
from polymath.proxy.answering import Ask, Body, Events
from polymath.proxy.judges import Confidence, open_judge
from polymath.proxy.messages import FirstNoted, events_of, noted

__all__ = ["Cascade"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge said.

    Attributes:
        reply: the cheap answer, if it is trusted and was asked for.
        score: None if there is none.
        failure: why there is none.
    """

    trusted: bool
    score: float | None = None
    reply: Mapping[str, Any] | None = None
    failure: str | None = None


class Cascade:
    """A cheap and a strong expert.

    Args:
        settings: of kind `cascade`.
        confidence: the router's, for the judge `difficulty`.

    Attributes:
        cheap, strong: names of the experts.
    Raises:
        DataError: a reference answer cannot be used.
    """

    def __init__(self, settings: ExpertSettings, ask: Ask, confidence: Confidence) -> None:
        assert settings.judge is not None
        self.cheap, self.strong = str(settings.cheap), str(settings.strong)
        self._settings: JudgeSettings = settings.judge
        self._ask = ask
        self._confidence = confidence
        self._judge = open_judge(settings.judge, self.cheap, ask)

    async def whole(self, body: Body) -> dict[str, Any]:
        verdict = await self._verdict(body)
        if verdict.reply is not None:
            return noted(verdict.reply, self._note(verdict))
        reply = await self._ask(self._chosen(verdict)).whole(body)
        return noted(reply, self._note(verdict))

    async def stream(self, body: Body) -> Events:
        verdict = await self._verdict(body)
        if verdict.reply is not None:
            return FirstNoted(events_of(verdict.reply, body), self._note(verdict))
        events = await self._ask(self._chosen(verdict)).stream(body)
        return FirstNoted(events, self._note(verdict))

    def _chosen(self, verdict: Verdict) -> str:
        return self.cheap if verdict.trusted else self.strong

    def _note(self, verdict: Verdict) -> dict[str, Any]:
        return {
            "cascade": {
                "expert": self._chosen(verdict),
                "trusted": verdict.trusted,
                "judge": self._settings.kind,
                "score": verdict.score,
                "threshold": self._settings.threshold,
                "failure": verdict.failure,
            }
        }

    async def _verdict(self, body: Body) -> Verdict:
        limit = self._settings.timeout
        try:
            async with asyncio.timeout(limit):
                return await self._judged(body)
        except TimeoutError:
            return Verdict(False, failure=f"no verdict within {limit:g} seconds")
        except PolymathError as error:
            return Verdict(False, failure=error.message)

    async def _judged(self, body: Body) -> Verdict:
        threshold = self._settings.threshold
        if self._settings.kind == "difficulty":
            score = await self._confidence(body)
            return Verdict(score >= threshold, score)
        score, reply = await self.scored(body)
        if score < threshold:
            return Verdict(False, score)
        return Verdict(True, score, self._shown(reply, body))

    async def scored(self, body: Body) -> tuple[float, Mapping[str, Any]]:
        """The judge's score of the cheap answer, and that answer.

        Raises:
            PolymathError: there is no answer, or no score.
        """
        reply = await self._ask(self.cheap).whole(self._cheap_request(body))
        if self._settings.kind == "difficulty":
            return await self._confidence(body), reply
        return await self._judge(body, reply), reply

    def _cheap_request(self, body: Body) -> Body:
        whole = {name: value for name, value in body.items() if name != "stream_options"}
        whole |= {"stream": False}
        return {**whole, "logprobs": True} if self._settings.kind == "logprob" else whole

    def _shown(self, reply: Mapping[str, Any], body: Body) -> Mapping[str, Any]:
        """Without the log-probabilities, if only the judge wanted them."""
        if body.get("logprobs"):
            return reply
        return {**reply, "choices": [{**choice, "logprobs": None} for choice in reply["choices"]]}

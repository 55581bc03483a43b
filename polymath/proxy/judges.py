"""Whether the answer of a cheap expert is trusted: three scores, each with a threshold."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymath.errors import DataError, UpstreamFailed
from polymath.experts import JudgeSettings
from polymath.proxy.answering import Ask, Body
from polymath.proxy.messages import answer_text, last_user_text

__all__ = ["Confidence", "Judge", "Reference", "answer_confidence", "open_judge", "read_references"]

Judge = Callable[[Body, Mapping[str, Any]], Awaitable[float]]
"""The score of an answer to a request."""

Confidence = Callable[[Body], Awaitable[float]]
"""The router's, in the domain of a request."""

RANKING_PROMPT = """Two answers to two questions follow. Which answer is the more correct one?

Question A: {first_prompt}
Answer A: {first_answer}

Question B: {second_prompt}
Answer B: {second_answer}

Reply with A or B alone."""

MALFORMED = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""What comes of reading an answer that is not of OpenAI's form."""

LONGEST_QUOTE = 1500
"""Characters of a question or answer that the judge is shown."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An answer of known quality.

    Attributes:
        score: from 0, wrong, to 1, right.
    """

    prompt: str
    answer: str
    score: float


def open_judge(settings: JudgeSettings, cheap: str, ask: Ask) -> Judge:
    """The judge that a config describes; `difficulty` needs none, as it looks at no answer.

    Raises:
        DataError: a reference cannot be used.
    """
    if settings.kind == "logprob":
        return _mean_log_probability
    references = read_references(settings.references) if settings.references else []
    return MetaRanking(settings.expert or cheap, _spread(references, settings.pairs), ask)


async def _mean_log_probability(body: Body, reply: Mapping[str, Any]) -> float:
    return answer_confidence(reply)


def answer_confidence(reply: Mapping[str, Any]) -> float:
    """Nats a token of the first choice, which must come with `logprobs`.

    Raises:
        UpstreamFailed: it has none.
    """
    try:
        logprobs = reply["choices"][0].get("logprobs") or {}
        values = [float(token["logprob"]) for token in logprobs.get("content") or ()]
    except MALFORMED as error:
        raise UpstreamFailed("The cheap expert's log-probabilities cannot be read.") from error
    if not values:
        raise UpstreamFailed("The cheap expert gave no log-probabilities to judge it by.")
    return sum(values) / len(values)


class MetaRanking:
    """A weak model compares a question and its answer with references of known quality.

    It need not be able to answer; telling the better of two pairs is easier (Meta Ranking, Liu et
    al. 2024). Being better than a good reference is strong evidence, being better than a bad one is
    weak, and the other way round; so a vote for the answer weighs `score`, a vote against it
    `1 - score`. Each pair is shown in both orders, as models prefer a place.

    Args:
        judge: name of the expert that compares.
    """

    def __init__(self, judge: str, references: Sequence[Reference], ask: Ask) -> None:
        self._judge = judge
        self._references = references
        self._ask = ask

    async def __call__(self, body: Body, reply: Mapping[str, Any]) -> float:
        """Weighted votes, from -1 to 1."""
        mine = Reference(last_user_text(body), answer_text(reply), 0.0)
        votes = [await self._vote(mine, other) for other in self._references]
        return weighted_votes(votes, [other.score for other in self._references])

    async def _vote(self, mine: Reference, other: Reference) -> float:
        """How much more probable it is that mine is better, from -1 to 1."""
        first, second = await asyncio.gather(
            self._preference(mine, other), self._preference(other, mine)
        )
        return (first - second) / 2

    async def _preference(self, first: Reference, second: Reference) -> float:
        """Probability of A less that of B."""
        prompt = RANKING_PROMPT.format(
            first_prompt=first.prompt[:LONGEST_QUOTE],
            first_answer=first.answer[:LONGEST_QUOTE],
            second_prompt=second.prompt[:LONGEST_QUOTE],
            second_answer=second.answer[:LONGEST_QUOTE],
        )
        request = {
            "model": self._judge,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        return _preference_in(await self._ask(self._judge).whole(request))


def _preference_in(reply: Mapping[str, Any]) -> float:
    """Probability of A less that of B as the first token; 0 if neither is likely.

    Raises:
        UpstreamFailed: the log-probabilities are of another form.
    """
    try:
        logprobs = reply["choices"][0].get("logprobs") or {}
        tokens = [*(logprobs.get("content") or ()), {}][0].get("top_logprobs") or ()
        a, b = (
            sum(math.exp(t["logprob"]) for t in tokens if t["token"].strip() == letter)
            for letter in "AB"
        )
    except MALFORMED as error:
        raise UpstreamFailed("The judge's log-probabilities cannot be read.") from error
    return (a - b) / (a + b) if a + b else 0.0


def weighted_votes(votes: Sequence[float], scores: Sequence[float]) -> float:
    """Votes from -1 to 1, each by what it says of an answer beside a reference of such a score."""
    weights = [score if vote > 0 else 1 - score for vote, score in zip(votes, scores, strict=True)]
    total = sum(weights)
    return sum(v * w for v, w in zip(votes, weights, strict=True)) / total if total else 0.0


def read_references(file: Path) -> list[Reference]:
    """The rows of a JSONL file.

    Raises:
        DataError: a row cannot be used, or there is none.
    """
    references = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            references.append(_reference(file, number, line))
    if not references:
        raise DataError(f"{file} holds no reference answers")
    return references


def _reference(file: Path, number: int, line: str) -> Reference:
    wanted = 'a row is {"prompt": text, "answer": text, "score": 0 to 1}'
    try:
        row = json.loads(line)
        reference = Reference(row["prompt"], row["answer"], float(row["score"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}:{number}: {wanted}") from error
    texts = isinstance(reference.prompt, str) and isinstance(reference.answer, str)
    if not texts or not 0 <= reference.score <= 1:
        raise DataError(f"{file}:{number}: {wanted}")
    return reference


def _spread(references: Sequence[Reference], count: int) -> list[Reference]:
    """So many of them, from the worst to the best."""
    ordered = sorted(references, key=lambda reference: reference.score)
    if count >= len(ordered):
        return ordered
    step = (len(ordered) - 1) / max(count - 1, 1)
    return [ordered[round(index * step)] for index in range(count)]

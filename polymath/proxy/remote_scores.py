"""The likeliest next tokens of a model behind HTTP, for one position or for a block of them.

Asked through `/completions`, as OpenAI defined it: `logprobs` gives the likeliest tokens of what is
generated, `echo` those at every position of the prompt as well. vLLM names tokens by their ids if
asked (`return_tokens_as_token_ids`); others give their text, so that a token is known only if no
other one has the same text, and the empty text, by which control tokens and parts of characters are
written, is taken for the end of the answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymath.errors import ModelSourceError, PolymathError, UpstreamFailed, UpstreamRefused
from polymath.experts import LoraModel
from polymath.proxy.upstream import Upstream

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RemoteScores", "Support"]

PATH = "/completions"
ID = "token_id:"
PROBE = 'Tokens of naïve cafés: 12345 == [x**2 for x in (1, 2)]\n\t"日本" - don\'t, e.g. 3.14%'
"""A text whose tokens differ between tokenizers."""


@dataclass(frozen=True, slots=True)
class Support:
    """The likeliest tokens at one position.

    Attributes:
        log_probs: token id -> nats.
    """

    log_probs: Mapping[int, float]

    @property
    def missing_mass(self) -> float:
        """Probability of all other tokens."""
        return max(1.0 - sum(map(math.exp, self.log_probs.values())), 0.0)

    def logits(self, vocabulary: int) -> Tensor:
        """[vocab], minus infinity outside of the support and without ids that it pads with."""
        import torch

        known = {index: value for index, value in self.log_probs.items() if index < vocabulary}
        row = torch.full((vocabulary,), -math.inf)
        row[list(known)] = torch.tensor(list(known.values()))
        return row


class RemoteScores:
    """Scores of one upstream, in the ids of a local tokenizer.

    Args:
        local: a model with the upstream's vocabulary.
        size: tokens of a support.
    """

    def __init__(self, upstream: Upstream, local: LoraModel, size: int) -> None:
        self._upstream = upstream
        self._local = local
        self._size = size
        self._by_id: bool | None = None
        self._ids: dict[str, int] = {}

    async def check(self) -> None:
        """Make sure that the upstream means by a token what we mean by it; once.

        Raises:
            ModelSourceError: it cuts the probe text otherwise, or gives no log-probabilities.
            PolymathError: it cannot be asked.
        """
        if self._by_id is not None:
            return
        request = {"prompt": PROBE, "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0}
        try:
            reply = await self._upstream.post(PATH, {**request, "return_tokens_as_token_ids": True})
        except UpstreamRefused:  # a server that knows OpenAI's own fields alone
            reply = await self._upstream.post(PATH, request)
        tokens, _ = self._scored(reply)
        by_id = bool(tokens) and all(token.startswith(ID) for token in tokens)
        if not by_id:
            self._ids = self._ids_by_text()
        ids = self._local.tokenizer.encode(PROBE, add_special_tokens=False)
        own = [f"{ID}{index}" if by_id else self._text(index) for index in ids]
        theirs = tokens[:-1][-len(own) :]  # without what it generated, and its begin token
        self._compare(own, theirs)
        self._by_id = by_id

    async def score(self, tokens: Sequence[int], drafted: int) -> list[Support]:
        """Supports of the last `drafted` tokens of a text and of the token after it.

        Where the upstream cuts the drafted text otherwise, only the first support is given.

        Raises:
            PolymathError: the upstream cannot be asked.
        """
        await self.check()
        reply = await self._upstream.post(PATH, self._request(tokens, echo=drafted > 0))
        named, likeliest = self._scored(reply)
        if drafted:
            draft = tokens[len(tokens) - drafted :]
            own = [self._name(index) for index in draft]
            if named[-drafted - 1 : -1] != own or not self._can_be_told(draft):
                return await self.score(tokens[: len(tokens) - drafted], 0)
        if len(likeliest) <= drafted:
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        return [self._support(values, self._size) for values in likeliest[-drafted - 1 :]]

    async def every(self, tokens: Sequence[int]) -> list[Support]:
        """Supports after every token of a text, with the token that follows, for measurements.

        Raises:
            PolymathError: the upstream cannot be asked, or cuts the text otherwise.
        """
        await self.check()
        reply = await self._upstream.post(PATH, self._request(tokens, echo=True))
        named, likeliest = self._scored(reply)
        if named[-len(tokens) - 1 : -1] != [self._name(index) for index in tokens]:
            raise self._unfit("cuts a text otherwise than the local model")
        if len(likeliest) < len(tokens):
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        places = likeliest[len(likeliest) - len(tokens) :]
        return [self._support(values, self._size + 1) for values in places]

    def _request(self, tokens: Sequence[int], echo: bool) -> dict[str, Any]:
        prompt: Any = list(tokens)
        if not self._by_id:
            prompt = self._local.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": self._size, "temperature": 0}
        if self._by_id:
            request["return_tokens_as_token_ids"] = True
        return {**request, "echo": True} if echo else request

    def _scored(self, reply: Mapping[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
        """Tokens and the likeliest ones at their places."""
        try:
            logprobs = reply["choices"][0]["logprobs"]
            tokens = [str(token) for token in logprobs["tokens"]]
            likeliest = [
                {str(name): float(value) for name, value in (values or {}).items()}
                for values in logprobs["top_logprobs"]
            ]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise self._unfit("gives no log-probabilities of completions") from None
        return tokens, likeliest

    def _support(self, values: Mapping[str, float], size: int) -> Support:
        """The likeliest of those that are known; a token that was not among them may be listed."""
        best = sorted(values.items(), key=lambda item: item[1], reverse=True)[:size]
        known = {index: value for name, value in best if (index := self._id(name)) is not None}
        if not known:
            raise self._unfit("names no token that is known here")
        return Support(known)

    def _id(self, name: str) -> int | None:
        if not self._by_id:
            return self._ids.get(name)
        number = name.removeprefix(ID)
        return int(number) if number.isdecimal() else None

    def _can_be_told(self, draft: Sequence[int]) -> bool:
        """Whether a draft arrives as it is: half a character is another text."""
        if not self._by_id:
            try:
                b"".join(map(self._local.vocabulary.piece, draft)).decode()
            except UnicodeDecodeError:
                return False
        return True

    def _name(self, index: int) -> str:
        return f"{ID}{index}" if self._by_id else self._text(index)

    def _text(self, index: int) -> str:
        return self._local.vocabulary.piece(index).decode("utf-8", "ignore")

    def _ids_by_text(self) -> dict[str, int]:
        """Of tokens that are whole characters."""
        pieces = {index: self._piece(index) for index in range(len(self._local.vocabulary))}
        whole = {index: text for index, text in pieces.items() if text is not None}
        often = Counter(whole.values())
        ids = {text: index for index, text in whole.items() if often[text] == 1}
        return {**ids, "": min(self._local.eos_ids)}

    def _piece(self, index: int) -> str | None:
        try:
            return self._local.vocabulary.piece(index).decode()
        except UnicodeDecodeError:
            return None

    def _compare(self, own: Sequence[str], theirs: Sequence[str]) -> None:
        for place, (mine, its) in enumerate(zip(own, theirs, strict=False)):
            if mine != its:
                raise self._unfit(
                    f"has another tokenizer: at token {place} of the probe text it has {its!r} "
                    f"where the local model has {mine!r}"
                )
        if len(theirs) < len(own):
            raise self._unfit(
                f"has another tokenizer: {len(theirs)} tokens of the probe text, not {len(own)}"
            )

    def _unfit(self, what: str) -> PolymathError:
        if self._by_id is None:
            return ModelSourceError(
                f"The upstream of {self._upstream.name} {what}; it cannot be steered."
            )
        return UpstreamFailed(f"The upstream of {self._upstream.name} {what}.")

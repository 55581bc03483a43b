"""The likeliest next tokens of a model behind HTTP, for one position or for a block of them.

Asked through `/completions`, as OpenAI defined it: `logprobs` gives the likeliest tokens of what is
generated, `echo` those at every position of the prompt as well. vLLM names tokens by their ids;
llama-cpp-python by their texts, and there the empty text stands for several tokens at once, and
nothing is listed where the answer ends. How likely the end is, is told for sure where the end
stands in the prompt itself; so it is written behind the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from polymath.errors import ModelSourceError, PolymathError, UpstreamFailed, UpstreamRefused
from polymath.experts import LoraModel, render_chat
from polymath.proxy.support import Support
from polymath.proxy.token_names import ID, NAMELESS, TokenNames
from polymath.proxy.upstream import Upstream

__all__ = ["RemoteScores", "Scored"]

PATH = "/completions"
PROBE = (
    'Tokens of naïve cafés: 12345 == [x**2 for x in (1, 2)]\n\t"日本" - don\'t, e.g. 3.14% of the'
)
"""A text whose tokens differ between tokenizers, and that does not end here."""
SAME_NATS = 0.5
"""Between the log-probabilities of one place in two requests, which may be computed otherwise."""

Places = tuple[list[str], list[dict[str, float]]]
"""Names of tokens, and the likeliest ones in their places."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What is known of a draft.

    Attributes:
        supports: of its first tokens, at least one; if of all, then also of the token after it.
        calls: that it took.
    """

    supports: Sequence[Support]
    calls: int


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
        self._known: TokenNames | None = None

    async def check(self) -> None:
        """Make sure that the upstream means by a token what we mean by it; once.

        The probe begins as a prompt does: llama-cpp-python gives the places of a prompt the values
        of their neighbours, unless it begins with the model's begin token.

        Raises:
            ModelSourceError: it cuts the probe text otherwise, or gives no log-probabilities.
            PolymathError: it cannot be asked.
        """
        if self._known is not None:
            return
        text = self._opening() + PROBE
        reply = await self._generated(text)
        (name, *_), (generated, *_) = self._listed(reply, 1)
        names = TokenNames(self._local, by_id=name.startswith(ID))
        asked = self._request(names, text, echo=True, marked=not names.by_id)
        said, likeliest = self._before_generated(await self._upstream.post(PATH, asked))
        if not names.by_id:
            if said[-1:] != [NAMELESS] or not _alike(likeliest[-1], generated):
                raise self._unfit("gives places of a prompt (`echo`) the values of other places")
            said.pop()
        own = [names.name(i) for i in self._local.tokenizer.encode(PROBE, add_special_tokens=False)]
        self._compare(own, said[-len(own) :])
        self._known = names

    async def score(self, tokens: Sequence[int], drafted: int) -> Scored:
        """Supports of the last `drafted` tokens of a text and of the token after it.

        Where the upstream cuts the drafted text otherwise, only the first support is given.

        Raises:
            PolymathError: the upstream cannot be asked.
        """
        names = await self._names()
        supports = await self._asked(tokens, drafted, marked=drafted > 0 and not names.by_id)
        if supports:
            return Scored(supports, 1)
        return Scored([await self.settled(tokens[: len(tokens) - drafted])], 2)

    async def settled(self, tokens: Sequence[int]) -> Support:
        """The support after a text, sure of the end.

        Raises:
            PolymathError: the upstream cannot be asked.
        """
        names = await self._names()
        supports = await self._asked(tokens, 0, marked=not names.by_id)
        if not supports:
            raise self._unfit("does not list the end of an answer that stands in a prompt")
        return supports[0]

    async def every(self, tokens: Sequence[int]) -> list[Support]:
        """Supports after every token of a text, with the token that follows, for measurements.

        Empty before a begin token that the upstream does not list.

        Raises:
            PolymathError: the upstream cannot be asked, or cuts the text otherwise.
        """
        names = await self._names()
        said, likeliest = await self._places(tokens, echo=True, marked=not names.by_id)
        begin = None if names.by_id else self._begin_left_out(said, len(tokens))
        listed = [index for index in tokens if index != begin]
        if said[-len(listed) - 1 : -1] != [names.name(index) for index in listed]:
            raise self._unfit("cuts a text otherwise than the local model")
        following = [index for index in tokens[1:] if index != begin]
        if len(likeliest) <= len(following):
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        values = iter(
            zip(likeliest[-len(following) - 1 :], said[-len(following) - 1 :], strict=True)
        )
        return [
            Support({})
            if index is not None and index == begin
            else self._support(*next(values), self._size + 1)
            for index in (*tokens[1:], None)
        ]

    def _begin_left_out(self, said: Sequence[str], count: int) -> int | None:
        """llama-cpp-python's list of a prompt lacks its begin tokens."""
        begin = self._local.tokenizer.bos_token_id
        return begin if len(said) <= count else None

    async def _asked(self, tokens: Sequence[int], drafted: int, marked: bool) -> list[Support]:
        """Supports as far as they are known; none if the draft is cut otherwise, or at the end."""
        names = await self._names()
        said, likeliest = await self._places(tokens, echo=drafted > 0, marked=marked)
        if not (said or names.by_id or marked):
            return []
        draft = tokens[len(tokens) - drafted :]
        own = [*map(names.name, draft), *([NAMELESS] if marked else said[-1:])]
        if said[-drafted - 1 :] != own or not names.can_be_told(draft):
            return []
        if len(likeliest) <= drafted:
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        places = zip(likeliest[-drafted - 1 :], own, strict=True)
        return [
            self._support(values, name, self._size)
            for values, name in takewhile(self._is_told_apart, places)
        ]

    async def _places(self, tokens: Sequence[int], echo: bool, marked: bool) -> Places:
        """Those of a reply; of the prompt alone, if the end is written behind it (`marked`)."""
        names = await self._names()
        prompt: Any = list(tokens)
        if not names.by_id:
            prompt = self._local.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        reply = await self._upstream.post(PATH, self._request(names, prompt, echo, marked))
        return self._before_generated(reply) if marked else self._listed(reply)

    def _request(self, names: TokenNames, prompt: Any, echo: bool, marked: bool) -> dict[str, Any]:
        text = prompt + names.end_text if marked else prompt
        request = {"prompt": text, "max_tokens": 1, "logprobs": self._size, "temperature": 0}
        if names.by_id:
            request["return_tokens_as_token_ids"] = True
        return {**request, "echo": True} if echo or marked else request

    async def _names(self) -> TokenNames:
        await self.check()
        assert self._known is not None
        return self._known

    async def _generated(self, text: str) -> Mapping[str, Any]:
        """A reply that names tokens by their ids, if the server can."""
        request = {"prompt": text, "max_tokens": 1, "logprobs": self._size, "temperature": 0}
        try:
            return await self._upstream.post(PATH, {**request, "return_tokens_as_token_ids": True})
        except UpstreamRefused:  # a server that knows OpenAI's own fields alone
            return await self._upstream.post(PATH, request)

    def _opening(self) -> str:
        """What stands before the first words of a conversation."""
        tokenizer = self._local.tokenizer
        if not tokenizer.chat_template:
            return ""
        text = str(tokenizer.decode(render_chat(tokenizer, [{"role": "user", "content": PROBE}])))
        return text.partition(PROBE)[0] if PROBE in text else ""

    def _before_generated(self, reply: Mapping[str, Any]) -> Places:
        """Those of the prompt; llama-cpp-python lists nothing where the end is generated."""
        names, likeliest = self._listed(reply)
        usage = reply.get("usage")
        ended = isinstance(usage, dict) and usage.get("completion_tokens") == 0
        return (names, likeliest) if ended else (names[:-1], likeliest[:-1])

    def _listed(self, reply: Mapping[str, Any], least: int = 0) -> Places:
        try:
            logprobs = reply["choices"][0]["logprobs"]
            names = [str(token) for token in logprobs["tokens"]]
            likeliest = [
                {str(name): float(value) for name, value in (values or {}).items()}
                for values in logprobs["top_logprobs"]
            ]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise self._unfit("gives no log-probabilities of completions") from None
        if min(len(names), len(likeliest)) < least:
            raise self._unfit("gives no log-probabilities of completions")
        return names, likeliest

    def _is_told_apart(self, place: tuple[Mapping[str, float], str]) -> bool:
        """Whether it is clear if the token that stands there is one of the likeliest.

        It is added to a list that lacks it, which shows in the length, unless other tokens of the
        list share a text.
        """
        values, name = place
        if NAMELESS not in values or name == NAMELESS or len(values) > self._size:
            return True
        return values.get(name, 0.0) > min(values.values())

    def _support(self, values: Mapping[str, float], name: str, size: int) -> Support:
        """The likeliest of those that are known; a token that was not among them may be listed.

        Args:
            name: of the token that stands there.
        """
        assert self._known is not None
        best = sorted(values.items(), key=lambda item: item[1], reverse=True)[:size]
        known = {index: nats for its, nats in best if (index := self._known.id(its)) is not None}
        nameless = dict(best).get(NAMELESS)
        if nameless is not None and name == NAMELESS:
            known[self._known.end] = nameless
        unsure = self._known.end if nameless is not None and name != NAMELESS else None
        if not known and unsure is None:
            raise self._unfit("names no token that is known here")
        return Support(known, unsure)

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
        if self._known is None:
            return ModelSourceError(
                f"The upstream of {self._upstream.name} {what}; it cannot be steered."
            )
        return UpstreamFailed(f"The upstream of {self._upstream.name} {what}.")


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two lists are those of one place."""
    name, nats = max(other.items(), key=lambda item: item[1], default=("", 0.0))
    return name in one and abs(one[name] - nats) < SAME_NATS

"""The likeliest next tokens of a model behind HTTP, for one position or for a block of them.

Asked through `/completions`, as OpenAI defined it: `logprobs` gives the likeliest tokens of what is
generated, `echo` those at every position of the prompt as well. vLLM names tokens by their ids;
llama-cpp-python by their texts, and there some texts stand for several tokens at once, and nothing
is listed where the answer ends. How likely a token is, is told for sure where it stands in the
prompt itself; so the end is written behind a prompt.
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
Place = tuple[dict[str, float], str]
"""The likeliest tokens in one place, and the name of the one that stands there."""


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
        (name, *_), (generated, *_) = self._listed(await self._generated(text), 1)
        names = TokenNames(self._local, by_id=name.startswith(ID))
        end = "" if names.by_id else self._local.tokenizer.decode([names.end])
        request = self._request(text + end, names.by_id)
        said, likeliest = self._of_prompt(
            await self._upstream.post(PATH, {**request, "echo": True})
        )
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
        draft = tokens[len(tokens) - drafted :]
        places = await (self._drafted(tokens, draft) if drafted else self._next(tokens))
        supports = [self._support(*place, self._size) for place in places]
        if supports:
            return Scored(supports, 1)
        start = tokens[: len(tokens) - drafted]
        places = await (self._next(start) if names.by_id else self._drafted(start, ()))
        if not places:
            raise self._unfit("does not list the end of an answer that stands in a prompt")
        return Scored([self._support(*places[0], self._size)], 2)

    async def nats(self, tokens: Sequence[int], token: int) -> float | None:
        """The log-probability of one token after a text; None if it cannot be told there.

        Raises:
            PolymathError: the upstream cannot be asked.
        """
        names = await self._names()
        said, likeliest = self._of_prompt(await self._posted([*tokens, token], echo=True))
        if said[-2:] != [names.name(tokens[-1]), names.name(token)] or not likeliest[-1:]:
            return None
        return likeliest[-1].get(said[-1])

    async def every(self, tokens: Sequence[int]) -> list[Support]:
        """Supports after every token of a text, with the token that follows, for measurements.

        llama-cpp-python tells nothing of the first place and of begin tokens; there it is empty.

        Raises:
            PolymathError: the upstream cannot be asked, or cuts the text otherwise.
        """
        names = await self._names()
        end = [] if names.by_id else [names.end]
        reply = await self._posted([*tokens, *end], echo=True)
        said, likeliest = self._listed(reply) if names.by_id else self._of_prompt(reply)
        begin = None if names.by_id else self._begin_left_out(said, len(tokens))
        listed = [index for index in tokens if index != begin]
        if said[-len(listed) - 1 : -1] != [names.name(index) for index in listed]:
            raise self._unfit("cuts a text otherwise than the local model")
        following = sum(index != begin for index in tokens[1:])
        if len(likeliest) <= following:
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        places = zip(likeliest[-following - 1 :], said[-following - 1 :], strict=True)
        supports = []
        for place, index in enumerate([*tokens[1:], None]):
            left_out = index is not None and index == begin
            values, name = ({}, NAMELESS) if left_out else next(places)
            told = bool(values) or not (left_out or place == 0)
            supports.append(self._support(values, name, self._size + 1) if told else Support({}))
        return supports

    def _begin_left_out(self, said: Sequence[str], count: int) -> int | None:
        """llama-cpp-python's list of a prompt lacks its begin tokens."""
        begin = self._local.tokenizer.bos_token_id
        return begin if len(said) <= count else None

    async def _drafted(self, tokens: Sequence[int], draft: Sequence[int]) -> list[Place]:
        """Those of a draft and of the token after it, as far as they are clear.

        None if the upstream cuts the draft otherwise.
        """
        names = await self._names()
        end = [] if names.by_id else [names.end]
        reply = await self._posted([*tokens, *end], echo=True)
        said, likeliest = self._listed(reply) if names.by_id else self._of_prompt(reply)
        own = [names.name(index) for index in (*draft, *end)] + (said[-1:] if names.by_id else [])
        if said[-len(draft) - 1 :] != own or not names.can_be_told(draft):
            return []
        if len(likeliest) <= len(draft):
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        places = zip(likeliest[-len(own) :], own, strict=True)
        return list(takewhile(self._is_clear, places))

    async def _next(self, tokens: Sequence[int]) -> list[Place]:
        """That of the token after a text; none if the end has come and is not listed."""
        names = await self._names()
        said, likeliest = self._listed(await self._posted(tokens, echo=False))
        if not (said or names.by_id):
            return []
        if not likeliest:
            raise self._unfit("gave fewer log-probabilities than it was asked for")
        return [(likeliest[-1], said[-1])]

    async def _posted(self, tokens: Sequence[int], echo: bool) -> Mapping[str, Any]:
        names = await self._names()
        prompt: Any = list(tokens)
        if not names.by_id:
            prompt = self._local.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        request = self._request(prompt, names.by_id)
        return await self._upstream.post(PATH, {**request, "echo": True} if echo else request)

    def _request(self, prompt: Any, by_id: bool) -> dict[str, Any]:
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": self._size, "temperature": 0}
        return {**request, "return_tokens_as_token_ids": True} if by_id else request

    async def _names(self) -> TokenNames:
        await self.check()
        assert self._known is not None
        return self._known

    async def _generated(self, text: str) -> Mapping[str, Any]:
        """A reply that names tokens by their ids, if the server can."""
        try:
            return await self._upstream.post(PATH, self._request(text, by_id=True))
        except UpstreamRefused:  # a server that knows OpenAI's own fields alone
            return await self._upstream.post(PATH, self._request(text, by_id=False))

    def _opening(self) -> str:
        """What stands before the first words of a conversation."""
        tokenizer = self._local.tokenizer
        if not tokenizer.chat_template:
            return ""
        text = str(tokenizer.decode(render_chat(tokenizer, [{"role": "user", "content": PROBE}])))
        return text.partition(PROBE)[0] if PROBE in text else ""

    def _of_prompt(self, reply: Mapping[str, Any]) -> Places:
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

    def _is_clear(self, place: Place) -> bool:
        """Whether it shows if the token that stands there is one of the likeliest.

        It is added to a list that lacks it, which shows in the length, unless several tokens of the
        list have one name.
        """
        values, name = place
        if len(values) > self._size or not self._ambiguous(values, name):
            return True
        return values.get(name, 0.0) > min(values.values())

    def _ambiguous(self, values: Mapping[str, float], name: str) -> set[str]:
        """Names that may stand for several tokens; not that of the token that stands there."""
        assert self._known is not None
        return {its for its in values if its in self._known.ambiguous and its != name}

    def _support(self, values: Mapping[str, float], name: str, size: int) -> Support:
        """The likeliest of those that are known; a token that was not among them may be listed.

        Args:
            name: of the token that stands there.
        """
        assert self._known is not None
        best = dict(sorted(values.items(), key=lambda item: item[1], reverse=True)[:size])
        doubtful = self._ambiguous(best, name)
        if len(values) >= self._size:  # each of the likeliest has a name of its own
            doubtful &= {NAMELESS}
        ids = {its: index for its in best if (index := self._known.id(its)) is not None}
        if not ids:
            raise self._unfit("names no token that is known here")
        known = {index: best[its] for its, index in ids.items() if its not in doubtful}
        return Support(known, frozenset(ids[its] for its in doubtful))

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

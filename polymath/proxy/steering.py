"""Proxy-tuning of a model whose weights we do not hold (Liu et al. 2024), in blocks.

Two small local models, tuned (M+) and untuned (M-), steer a large remote one (M) on the tokens that
it says are likeliest: softmax(s_M + alpha (s_M+ - s_M-)) over this support. The tuned one drafts a
block, one call scores it, and rejection sampling keeps the longest beginning that the steered
distribution accepts, and one token more (speculative sampling, Leviathan et al. 2023, algorithm 1).
So the answer has exactly the steered distribution; without a draft each token takes a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymath.experts import (
    AnswerWriter,
    Chunk,
    CombinerState,
    DecodeGroup,
    LoraModel,
    Sampler,
    ScoredRow,
    attribute,
    certainty,
)
from polymath.proxy.draft_length import DraftLength
from polymath.proxy.remote_scores import RemoteScores
from polymath.proxy.support import Support

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SteeredAnswer"]

NEGLIGIBLE = 1e-3
"""Probability of a token that need not be asked for; then it is one of those left out."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A draft and what there is to judge it by.

    Attributes:
        tokens: drafted.
        probabilities: [vocab] for each of them, what it was drawn from.
        logits: of M+ and M-, [drafted + 1, 2, vocab].
        supports: of M; as many, or one.
    """

    tokens: tuple[int, ...]
    probabilities: tuple[Tensor, ...]
    logits: Tensor
    supports: Sequence[Support]


class SteeredAnswer:
    """An async iterator of the chunks of one answer.

    Args:
        prompt: token ids as the remote model gets them.
        tuned, untuned: rows that are open and to be closed with the answer.
        local: the model of both, for its vocabulary.
        group: how the three are combined and the answer is drawn.
    """

    def __init__(
        self,
        remote: RemoteScores,
        prompt: Sequence[int],
        tuned: ScoredRow,
        untuned: ScoredRow,
        local: LoraModel,
        group: DecodeGroup,
        draft: DraftLength,
    ) -> None:
        self._remote = remote
        self._tokens = list(prompt)
        self._tuned, self._untuned = tuned, untuned
        self._eos_ids = local.eos_ids
        self._combiner = group.combiner
        self._sampling = group.sampling
        self._attribution = group.attribution
        self._draft = draft
        self._sampler = Sampler(group.sampling)
        self._writer = AnswerWriter(group.sampling, local.vocabulary, local.eos_ids)
        self._calls = 0
        self._missing = 0.0
        self._chunks = self._answer()

    def __aiter__(self) -> SteeredAnswer:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    def close(self) -> None:
        """Give the rows' places away."""
        self._tuned.close()
        self._untuned.close()

    def note(self) -> dict[str, Any]:
        """Calls to the upstream, tokens, and the mean probability that its supports left out."""
        tokens = self._writer.tokens
        missing = self._missing / tokens if tokens else 0.0
        return {
            "steering": {
                "upstream_calls": self._calls,
                "tokens": tokens,
                "missing_mass": round(missing, 6),
            }
        }

    async def _answer(self) -> AsyncGenerator[Chunk, None]:
        block = await self._block(await self._extended(()))
        while True:
            said: list[int] = []
            for place, given in enumerate(block.supports):
                support = await self._settled(block.logits[place], given)
                token, chunk = self._step(block, place, support)
                yield chunk
                if chunk.finish_reason is not None:
                    return
                self._tokens.append(token)
                said.append(token)
                if block.tokens[place : place + 1] != (token,):
                    break
            if len(block.supports) > len(block.tokens):
                self._draft.learn(len(block.tokens), len(said) - 1)
            # what was said is fed already, but for the last token
            cut = len(block.tokens) - len(said) + 1
            block = await self._block(await self._extended(said[-1:], cut))

    async def _block(self, logits: Tensor) -> _Block:
        """Draft a block and have it scored.

        Args:
            logits: of M+ and M- after what has been said, [2, vocab].
        """
        import torch

        rows, tokens = [logits], list[int]()
        probabilities: list[Tensor] = []
        while len(tokens) < self._draft_limit() and self._eos_ids.isdisjoint(tokens):
            probabilities.append(self._draft_probabilities(rows[-1][0]))
            tokens.append(self._sampler.draw(probabilities[-1]))
            rows.append(await self._extended(tokens[-1:]))
        scored = await self._remote.score([*self._tokens, *tokens], len(tokens))
        self._calls += scored.calls
        return _Block(tuple(tokens), tuple(probabilities), torch.stack(rows), scored.supports)

    async def _extended(self, token: Sequence[int], cut: int = 0) -> Tensor:
        """Logits of M+ and M- after one token more, [2, vocab].

        They share a step of the engine. Drafts are fed to both one by one, as without a draft: a
        network may sum a block in another order than its tokens.
        """
        import torch

        both = await asyncio.gather(
            self._tuned.extend(token, cut), self._untuned.extend(token, cut)
        )
        return torch.cat(both)

    def _draft_limit(self) -> int:
        """The last token of an answer needs no draft."""
        return min(self._draft.tokens, self._sampling.max_tokens - self._writer.tokens - 1)

    def _draft_probabilities(self, logits: Tensor) -> Tensor:
        if self._sampler.greedy:
            return certainty(logits)
        return (logits / self._sampling.temperature).softmax(-1)

    async def _settled(self, small: Tensor, support: Support) -> Support:
        """The support, sure of all tokens that may be the next one."""
        while (token := self._doubt(small, support)) is not None:
            self._calls += 1
            support = support.sure_of(token, await self._remote.nats(self._tokens, token))
        return support

    def _doubt(self, small: Tensor, support: Support) -> int | None:
        """A token that it is unsure of and that would not be negligible at its likeliest."""
        if not support.unsure:
            return None
        _, log_probs = self._steered(small, support.with_unsure())
        wanted = self._sampler.probabilities(log_probs)
        token = max(support.unsure, key=lambda index: float(wanted[index]))
        return token if wanted[token] >= NEGLIGIBLE * wanted.sum() else None

    def _steered(self, small: Tensor, support: Support) -> tuple[Tensor, Tensor]:
        """Logits of M, M+ and M-, and what they make together."""
        import torch

        logits = torch.cat([support.logits(small.shape[-1])[None], small])
        return logits, self._combiner(logits, _no_state(self._writer.tokens))[0]

    def _step(self, block: _Block, place: int, support: Support) -> tuple[int, Chunk]:
        """The token at one place of a block."""
        logits, log_probs = self._steered(block.logits[place], support)
        token = self._chosen(block, place, self._sampler.probabilities(log_probs))
        self._sampler.take(token)
        self._missing += support.missing_mass
        weights = self._combiner.weights(_no_state(self._writer.tokens))
        attribution = attribute(token, logits, weights) if self._attribution else None
        return token, self._writer.write(token, log_probs, attribution)

    def _chosen(self, block: _Block, place: int, wanted: Tensor) -> int:
        """The drafted token as often as the steered distribution has it, else another of its own.

        Args:
            wanted: [vocab], the steered distribution, need not be normalised.
        """
        if place == len(block.tokens):
            return self._sampler.draw(wanted)
        wanted = wanted / wanted.sum()
        drafted, drawn_from = block.tokens[place], block.probabilities[place]
        if self._sampler.uniform() * float(drawn_from[drafted]) < float(wanted[drafted]):
            return drafted
        rest = (wanted - drawn_from).clamp(min=0)
        return self._sampler.draw(rest if rest.any() else wanted)


def _no_state(tokens: int) -> CombinerState:
    """Proxy-tuning does not follow the text."""
    import torch

    return CombinerState(torch.zeros(3), torch.zeros(3), tokens)

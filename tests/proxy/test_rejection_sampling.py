"""Drafts do not change what is drawn: the answer has the steered distribution, whoever drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from polymath.experts import DecodeGroup, ProxyTuning, Row, SamplingParams
from polymath.proxy import DraftLength, Scored, SteeredAnswer, Support

VOCABULARY = 6
END = 5
PROMPT = (0,)
LEAST_P = 1e-3
"""Of a chi-square test; the seeds are fixed, so that it holds always or never."""

TOKENS = 1500


def table(seed: int, scale: float = 1.5) -> Tensor:
    """Logits after each token, [vocab, vocab]; a language model of one token of context."""
    return scale * torch.randn(
        VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)
    )


LARGE, TUNED, UNTUNED = table(1), table(2), table(3)
OPPOSITE = -3 * TUNED
DRAFTERS = {"tuned": TUNED, "sharp": 9 * TUNED, "opposite": OPPOSITE, "even": 0 * TUNED}


class FakeRow:
    """Stands for a scored row: it says what a table says of its last token."""

    def __init__(self, logits: Tensor) -> None:
        self.tokens = list(PROMPT)
        self.closed = False
        self._logits = logits

    async def extend(self, tokens: Sequence[int], cut: int = 0) -> Tensor:
        self.tokens = [*self.tokens[: len(self.tokens) - cut], *tokens]
        return self._logits[self.tokens[-1]][None]

    def close(self) -> None:
        self.closed = True


class FakeRemote:
    """Stands for the scores of an upstream; checks that it is asked of what the rows have read.

    Args:
        size: tokens of a support.
        forgetful: every third draft is one that it cuts otherwise.
        unsure: tokens that it tells of only if it is asked for them.
    """

    def __init__(
        self,
        row: FakeRow,
        size: int = VOCABULARY,
        forgetful: bool = False,
        unsure: Collection[int] = (),
    ) -> None:
        self.calls = self._asked = 0
        self._row, self._size, self._forgetful = row, size, forgetful
        self._unsure = frozenset(unsure)

    async def score(self, tokens: Sequence[int], drafted: int) -> Scored:
        assert list(tokens) == self._row.tokens
        self._asked += 1
        one = self._forgetful and self._asked % 3 == 0
        calls = 2 if one and drafted else 1  # it is asked again without the draft
        self.calls += calls
        places = range(len(tokens) - drafted - 1, len(tokens))
        supports = [self._shown(support(tokens[place], self._size)) for place in places]
        return Scored(supports[: 1 if one else None], calls)

    async def nats(self, tokens: Sequence[int], token: int) -> float | None:
        self.calls += 1
        return support(tokens[-1], VOCABULARY).log_probs[token]

    def _shown(self, whole: Support) -> Support:
        kept = {i: nats for i, nats in whole.log_probs.items() if i not in self._unsure}
        return Support(kept, self._unsure & whole.log_probs.keys())


class FakeVocabulary:
    """Stands for one of letters."""

    starts_with_space = False

    def piece(self, index: int) -> bytes:
        return b"abcdef"[index : index + 1]


class FakeLocal:
    """Stands for the local model."""

    vocabulary = FakeVocabulary()
    eos_ids = frozenset({END})


def support(token: int, size: int) -> Support:
    values, ids = LARGE[token].log_softmax(-1).topk(size)
    return Support(dict(zip(ids.tolist(), values.tolist(), strict=True)))


def steered(
    draft: int | None,
    drafter: Tensor = TUNED,
    alpha: float = 1.0,
    size: int = VOCABULARY,
    forgetful: bool = False,
    unsure: Collection[int] = (),
    **sampling: Any,
) -> tuple[list[int], SteeredAnswer]:
    """The tokens of an answer that goes on at its end token, unless told otherwise."""
    values = {"max_tokens": TOKENS, "seed": 0, "ignore_eos": True, **sampling}

    async def run() -> tuple[list[int], SteeredAnswer]:
        tuned, untuned = FakeRow(drafter), FakeRow(UNTUNED)
        rows: Any = tuned, untuned
        remote: Any = FakeRemote(tuned, size, forgetful, unsure)
        local: Any = FakeLocal()
        row = Row("small", None, PROMPT)
        group = DecodeGroup((row, row), ProxyTuning(alpha), SamplingParams(**values))
        answer = SteeredAnswer(remote, PROMPT, *rows, local, group, DraftLength(draft))
        said = [chunk.token.id async for chunk in until_over(answer) if chunk.token is not None]
        assert tuned.tokens[: len(said)] == [*PROMPT, *said][: len(said)]
        assert answer.note()["steering"]["upstream_calls"] == remote.calls
        return said, answer

    return asyncio.run(run())


async def until_over(answer: SteeredAnswer) -> Any:
    async for chunk in answer:
        yield chunk
        if chunk.finish_reason is not None:
            return


def wanted(drafter: Tensor, alpha: float, size: int, temperature: float) -> Tensor:
    """softmax((s_M + alpha (s_M+ - s_M-)) / T) over the support, [vocab, vocab]."""
    large = torch.stack([support(token, size).logits(VOCABULARY) for token in range(VOCABULARY)])
    return ((large + alpha * (drafter - UNTUNED)) / temperature).double().softmax(-1)


def p_value(said: Sequence[int], expected: Tensor) -> float:
    """Of what follows each token, against what should: the least of one for each token."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    for token, following in zip([*PROMPT, *said], said, strict=False):
        counts[token, following] += 1
    values = [1.0]
    for row, shares in zip(counts, expected.numpy(), strict=True):
        assert not row[shares == 0].any()
        common = shares * row.sum() >= 5
        if common.sum() > 1:
            observed = [*row[common], row[~common].sum()]
            hoped = [*(shares[common] * row.sum()), shares[~common].sum() * row.sum()]
            kept = np.array(hoped) > 0
            values.append(float(chisquare(np.array(observed)[kept], np.array(hoped)[kept]).pvalue))
    return min(values)


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
@pytest.mark.parametrize("draft", [0, 1, 4, None])
def test_the_answer_has_the_steered_distribution_whoever_drafts(
    drafter: Tensor, draft: int | None
) -> None:
    said, _ = steered(draft, drafter, alpha=0.4)
    assert len(said) == TOKENS
    assert p_value(said, wanted(drafter, 0.4, VOCABULARY, 1.0)) > LEAST_P


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize(("alpha", "size", "temperature"), [(1.0, 2, 1.0), (0.7, 4, 1.6)])
def test_it_has_it_on_a_support_and_at_a_temperature(
    draft: int, alpha: float, size: int, temperature: float
) -> None:
    """The drafter is at home on the whole vocabulary."""
    said, _ = steered(draft, alpha=alpha, size=size, temperature=temperature)
    assert p_value(said, wanted(TUNED, alpha, size, temperature)) > LEAST_P


def test_it_has_it_where_drafts_are_cut_otherwise() -> None:
    said, _ = steered(4, alpha=0.5, forgetful=True)
    assert p_value(said, wanted(TUNED, 0.5, VOCABULARY, 1.0)) > LEAST_P


@pytest.mark.parametrize("draft", [0, 4])
def test_it_has_it_where_tokens_are_told_only_if_asked_for(draft: int) -> None:
    said, _ = steered(draft, alpha=0.5, unsure={1, END})
    assert p_value(said, wanted(TUNED, 0.5, VOCABULARY, 1.0)) > LEAST_P


@pytest.mark.parametrize("draft", [0, 4])
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_what_may_not_be_the_next_token_is_not_asked_for(drafter: Tensor, draft: int) -> None:
    sure, _ = steered(draft, drafter, temperature=0.0, max_tokens=30)
    unsure, answer = steered(draft, drafter, temperature=0.0, max_tokens=30, unsure={1, END})
    assert unsure == sure
    steering = answer.note()["steering"]
    assert steering["upstream_calls"] < 3 * steering["tokens"]


def test_the_test_would_notice_another_distribution() -> None:
    said, _ = steered(4, alpha=0.4)
    assert p_value(said, wanted(TUNED, 0.0, VOCABULARY, 1.0)) < 1e-9
    assert p_value(said, TUNED.double().softmax(-1)) < 1e-9


@pytest.mark.parametrize("top", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}], ids=str)
def test_what_is_cut_off_is_never_drawn(top: dict[str, float]) -> None:
    said, _ = steered(3, max_tokens=300, **top)
    chosen = wanted(TUNED, 1.0, VOCABULARY, 1.0)
    for token, following in zip([*PROMPT, *said], said, strict=False):
        better = chosen[token][chosen[token] > chosen[token, following]]
        if "top_k" in top:
            assert len(better) < 2
        elif "top_p" in top:
            assert better.sum() < 0.6
        else:
            assert chosen[token, following] >= 0.5 * chosen[token].max()


@pytest.mark.parametrize("draft", [1, 4, None])
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_a_greedy_answer_is_the_same_in_blocks(drafter: Tensor, draft: int | None) -> None:
    single, _ = steered(0, drafter, temperature=0.0, max_tokens=30)
    blocks, _ = steered(draft, drafter, temperature=0.0, max_tokens=30)
    likeliest = wanted(drafter, 1.0, VOCABULARY, 1.0).argmax(-1)
    assert single == [int(likeliest[token]) for token in [*PROMPT, *single[:-1]]]
    assert blocks == single


@pytest.mark.parametrize("draft", [0, 4, None])
@pytest.mark.parametrize("most", [1, 2, 7])
def test_no_answer_is_longer_than_it_may_be(draft: int | None, most: int) -> None:
    said, answer = steered(draft, max_tokens=most)
    assert len(said) == answer.note()["steering"]["tokens"] == most


def test_the_answer_ends_at_its_end_token_in_the_middle_of_a_block() -> None:
    lengths = set()
    for seed in range(12):
        said, _ = steered(4, alpha=-0.5, seed=seed, ignore_eos=False, max_tokens=200)
        assert END not in said
        lengths.add(len(said))
    assert len(lengths) > 3
    assert max(lengths) < 200


def test_good_drafts_save_calls_and_bad_ones_do_not() -> None:
    """M+ == M and alpha 0: all is accepted. An end token ends a draft, even if not the answer."""
    calls = {}
    for name, drafter in (("good", LARGE), ("bad", OPPOSITE)):
        said, answer = steered(4, drafter, alpha=0.0, max_tokens=200)
        calls[name] = answer.note()["steering"]["upstream_calls"]
        if name == "good":
            assert 200 / 5 <= calls[name] <= 200 / 5 + said.count(END)
    assert 2 * calls["good"] < calls["bad"] <= 200


def test_the_missing_mass_is_the_mean_over_the_tokens() -> None:
    said, answer = steered(0, size=2, max_tokens=50)
    missing = [support(token, 2).missing_mass for token in [*PROMPT, *said[:-1]]]
    found = answer.note()["steering"]["missing_mass"]
    assert found == pytest.approx(sum(missing) / len(missing), abs=1e-5)


def test_closing_an_answer_closes_its_rows() -> None:
    async def rows_of_a_closed_answer() -> list[FakeRow]:
        rows = [FakeRow(TUNED), FakeRow(UNTUNED)]
        some: Any = rows
        local: Any = FakeLocal()
        remote: Any = FakeRemote(rows[0])
        row = Row("small", None, PROMPT)
        group = DecodeGroup((row, row), ProxyTuning(1.0), SamplingParams(max_tokens=9))
        answer = SteeredAnswer(remote, PROMPT, *some, local, group, DraftLength())
        await anext(answer)
        answer.close()
        return rows

    assert [row.closed for row in asyncio.run(rows_of_a_closed_answer())] == [True, True]

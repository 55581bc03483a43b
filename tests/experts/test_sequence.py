"""One row in progress: what it has been fed, and how likely it found the answer."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polymath.experts import (
    Chunk,
    CombinerState,
    DecodeGroup,
    EngineSettings,
    LoraModel,
    Row,
    SamplingParams,
)
from polymath.experts.decoding import Decoding
from polymath.experts.prefix_cache import PrefixCache
from polymath.experts.running_batch import RunningBatch
from polymath.experts.sequence import Sequence

VOCABULARY = 7

texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=10)
cuts = st.lists(st.integers(1, 6), min_size=24, max_size=24)
seeds = st.integers(0, 10_000)


def row_of(prompt: SequenceOf[int], max_tokens: int = 16) -> Sequence:
    return Sequence(Row("smollm2", None, tuple(prompt)), None, max_tokens)


def logits_of(tokens: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def feed(row: Sequence, logits: Tensor, count: int) -> None:
    """As the model does it: logits at every position only where the row lags."""
    of_count = logits[row.cached : row.cached + count]
    row.take(count, of_count if row.lags else of_count[-1:])


def feed_all(row: Sequence, logits: Tensor, sizes: SequenceOf[int]) -> None:
    for size in sizes:
        if row.pending:
            feed(row, logits, min(size, row.pending))
    assert not row.pending


def likelihood(prompt: SequenceOf[int], answer: SequenceOf[int], logits: Tensor) -> float:
    """Of the answer, token by token, in float64."""
    log_probs = logits.double().log_softmax(-1)
    return sum(
        log_probs[len(prompt) - 1 + index, token].item() for index, token in enumerate(answer)
    )


def decode(row: Sequence, logits: Tensor, token: int, sizes: SequenceOf[int]) -> None:
    """One step of a row that is not left out: feed what is pending, then score and append."""
    feed_all(row, logits, sizes)
    assert row.logits is not None
    row.score(float(row.logits.log_softmax(-1)[token]))
    row.tokens.append(token)


@given(texts, texts, cuts, seeds)
def test_catching_up_gives_the_likelihood_of_the_answer_however_it_is_cut(
    prompt: list[int], answer: list[int], sizes: list[int], seed: int
) -> None:
    """A row that was left out from the beginning."""
    logits = logits_of(len(prompt) + len(answer), seed)
    row = row_of(prompt)
    row.tokens += answer
    feed_all(row, logits, sizes)
    assert row.scored == len(answer)
    assert row.log_likelihood == pytest.approx(likelihood(prompt, answer, logits), abs=1e-4)


@given(texts, texts, texts, texts, cuts, seeds)
def test_catching_up_goes_on_where_the_row_was_left_out(
    prompt: list[int],
    followed: list[int],
    missed: list[int],
    after: list[int],
    sizes: list[int],
    seed: int,
) -> None:
    """A row that decodes, is left out, catches up, and decodes again."""
    answer = [*followed, *missed, *after]
    logits = logits_of(len(prompt) + len(answer), seed)
    row = row_of(prompt)
    for token in followed:
        decode(row, logits, token, sizes)
    row.tokens += missed
    assert (row.lags, row.scored) == (True, len(followed))
    for token in after:
        decode(row, logits, token, sizes)
        assert not row.lags
    assert row.scored == len(answer)
    assert row.log_likelihood == pytest.approx(likelihood(prompt, answer, logits), abs=1e-3)


@given(texts, cuts, seeds)
def test_the_logits_are_those_after_the_last_token_fed(
    prompt: list[int], sizes: list[int], seed: int
) -> None:
    logits, row = logits_of(len(prompt), seed), row_of(prompt)
    for size in sizes:
        if row.pending:
            feed(row, logits, min(size, row.pending))
            assert row.logits is not None
            assert torch.equal(row.logits, logits[row.cached - 1])


@given(texts, cuts)
def test_a_prompt_has_no_likelihood(prompt: list[int], sizes: list[int]) -> None:
    row = row_of(prompt)
    feed_all(row, logits_of(len(prompt)), sizes)
    assert (row.log_likelihood, row.scored, row.lags) == (0.0, 0, False)


def test_a_fresh_row_has_its_prompt_pending() -> None:
    row = row_of([4, 5, 6], max_tokens=10)
    assert (row.tokens, row.pending, row.cached) == ([4, 5, 6], 3, 0)
    assert (row.prompt_tokens, row.longest) == (3, 13)
    assert (row.logits, row.weights, row.adapter, row.lags) == (None, None, None, False)


def test_the_tokens_of_a_row_are_its_own() -> None:
    row = Row("smollm2", None, (1, 2))
    one, other = Sequence(row, None, 4), Sequence(row, None, 4)
    one.tokens.append(3)
    assert (row.prompt, other.tokens) == ((1, 2), [1, 2])


def test_pending_counts_what_was_not_fed() -> None:
    row = row_of([1, 2, 3, 4])
    row.take(3, torch.zeros(1, VOCABULARY))
    assert (row.pending, row.cached) == (1, 3)
    row.take(1, torch.zeros(1, VOCABULARY))
    row.tokens.append(5)
    assert (row.pending, row.cached) == (1, 4)


def test_a_row_lags_while_a_token_of_the_answer_is_not_scored() -> None:
    row = row_of([1, 2])
    row.tokens.append(3)
    assert row.lags
    row.score(-0.5)
    assert not row.lags


def test_scores_add_up() -> None:
    row = row_of([1])
    row.score(-0.5)
    row.score(-0.25)
    assert (row.log_likelihood, row.scored) == (-0.75, 2)


@dataclass(frozen=True, slots=True)
class SecondRowComesLate:
    """A combiner that leaves the second row out of the first steps."""

    follows_text: ClassVar[bool] = True
    steps: int

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        return logits[0].log_softmax(-1), state

    def weights(self, state: CombinerState) -> SequenceOf[float]:
        return (1.0, float(state.answer_tokens >= self.steps))


@pytest.mark.parametrize("late", [0, 1, 5, 9])
def test_a_row_scores_the_same_whether_its_beginning_was_found_or_not(
    tiny_model: Path, late: int
) -> None:
    """The second time, the cache knows the answer too, not the prompt alone."""
    model = LoraModel(tiny_model, {}, EngineSettings())
    batch = RunningBatch({"tiny": model}, PrefixCache(4096), prefill_chunk=16)
    prompts = [model.tokenizer.encode(text) for text in ("Hello, who are you?", "And who am I?")]

    def run() -> Sequence:
        chunks: list[Chunk | Exception] = []
        group = DecodeGroup(
            tuple(Row("tiny", None, tuple(prompt)) for prompt in prompts),
            SecondRowComesLate(late),
            SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
        )
        rows = [Sequence(row, None, 12) for row in group.rows]
        decoding = Decoding(group, rows, model.vocabulary, model.eos_ids, chunks.append)
        batch.start(decoding)
        while not decoding.over:
            batch.step()
        batch.release()
        return rows[1]

    first, second = run(), run()
    assert first.scored == second.scored == 12
    assert second.log_likelihood == pytest.approx(first.log_likelihood, abs=1e-3)

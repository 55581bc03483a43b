"""One token from one distribution: greedy, seeded, truncated, biased and penalised."""

from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymath.experts import GrammarSpec, Sampler, SamplingParams, Vocabulary
from polymath.experts.grammar import GrammarCompiler
from polymath.experts.sampling import _nucleus

VOCABULARY = 8
DRAWS = 4000
TOLERANCE = 0.03

seeds = st.integers(0, 2**63 - 1)
scores = st.permutations(range(VOCABULARY)).map(
    lambda order: torch.tensor(order, dtype=torch.float32).log_softmax(-1)
)
penalties = st.integers(-128, 128).map(lambda steps: steps / 64)


def sampler(**values: Any) -> Sampler:
    return Sampler(SamplingParams(**{"max_tokens": 1, **values}))


def sequence(log_probs: Tensor, length: int = 40, **values: Any) -> list[int]:
    drawn = sampler(**values)
    return [drawn.sample(log_probs) for _ in range(length)]


def distribution() -> Tensor:
    return torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -4.0]).log_softmax(-1)


def frequencies(log_probs: Tensor, **values: Any) -> Tensor:
    counts = Counter(sequence(log_probs, DRAWS, seed=0, **values))
    return torch.tensor([counts[token] / DRAWS for token in range(len(log_probs))])


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().sum() / 2 < TOLERANCE


def renormalised(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum()


@given(scores, seeds)
@settings(deadline=None)
def test_temperature_zero_is_the_likeliest_token(log_probs: Tensor, seed: int) -> None:
    assert sampler(temperature=0.0, seed=seed).sample(log_probs) == log_probs.argmax()


@given(scores, seeds)
@settings(deadline=None)
def test_temperature_zero_is_its_limit(log_probs: Tensor, seed: int) -> None:
    zero = sequence(log_probs, 4, temperature=0.0, presence_penalty=1.5, seed=seed)
    assert sequence(log_probs, 4, temperature=1e-6, presence_penalty=1.5, seed=seed) == zero


@pytest.mark.parametrize("temperature", [1e-4, 2e-5])
def test_a_temperature_near_zero_is_greedy_without_overflow(temperature: float) -> None:
    log_probs = torch.tensor([0.0, 1e3, -1e3]).log_softmax(-1)
    assert sampler(temperature=temperature, seed=0).sample(log_probs) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1},
        {"min_p": 1.0},
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"top_p": 1e-9},
        {"top_p": 0.0, "min_p": 1.0, "top_k": 1},
    ],
    ids=str,
)
@given(log_probs=scores, seed=seeds)
@settings(deadline=None, max_examples=30)
def test_keeping_one_token_is_greedy_whatever_the_seed(
    values: dict[str, Any], log_probs: Tensor, seed: int
) -> None:
    drawn = sampler(temperature=2.0, seed=seed, **values)
    assert drawn.sample(log_probs) == log_probs.argmax()


@given(scores, seeds)
@settings(deadline=None, max_examples=20)
def test_the_same_seed_draws_the_same_tokens(log_probs: Tensor, seed: int) -> None:
    assert sequence(log_probs, seed=seed) == sequence(log_probs, seed=seed)


@given(scores, seeds)
@settings(deadline=None, max_examples=20)
def test_another_seed_draws_other_tokens(log_probs: Tensor, seed: int) -> None:
    assert sequence(log_probs, seed=seed) != sequence(log_probs, seed=seed ^ 1)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_seed_that_a_request_may_give_works(seed: int) -> None:
    assert sequence(distribution(), seed=seed) == sequence(distribution(), seed=seed)


def test_no_seed_draws_afresh() -> None:
    assert sequence(distribution()) != sequence(distribution())


def test_two_samplers_do_not_disturb_each_other() -> None:
    alone = sequence(distribution(), 20, seed=1)
    one, other = sampler(seed=1), sampler(seed=2)
    among = []
    for _ in range(20):
        among.append(one.sample(distribution()))
        other.sample(distribution())
    assert among == alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    found = frequencies(distribution(), temperature=temperature)
    assert_close(found, torch.softmax(distribution() / temperature, -1))


@pytest.mark.parametrize("top_k", [2, 5, VOCABULARY, 100])
def test_top_k_draws_from_the_k_likeliest(top_k: int) -> None:
    expected = distribution().exp()
    expected[top_k:] = 0
    assert_close(frequencies(distribution(), top_k=top_k), renormalised(expected))


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.6, 2), (0.8, 3), (0.9, 4), (0.999, 8)])
def test_top_p_draws_from_the_smallest_nucleus(top_p: float, kept: int) -> None:
    expected = distribution().exp()
    assert expected[: kept - 1].sum() < top_p <= expected[:kept].sum() + 1e-6
    expected[kept:] = 0
    assert_close(frequencies(distribution(), top_p=top_p), renormalised(expected))


@pytest.mark.parametrize(("min_p", "kept"), [(0.1, 5), (0.5, 2), (0.7, 1)])
def test_min_p_is_relative_to_the_likeliest(min_p: float, kept: int) -> None:
    expected = distribution().exp()
    assert (expected >= min_p * expected[0]).sum() == kept
    expected[kept:] = 0
    assert_close(frequencies(distribution(), min_p=min_p), renormalised(expected))


@given(log_probs=scores, seed=seeds, top_p=st.floats(0, 1), min_p=st.floats(0, 1))
@settings(deadline=None)
def test_any_truncation_leaves_a_token_to_draw(
    log_probs: Tensor, seed: int, top_p: float, min_p: float
) -> None:
    token = sampler(seed=seed, top_p=top_p, min_p=min_p, top_k=3).sample(log_probs)
    assert log_probs[token] >= log_probs.topk(3).values[-1]


def test_a_bias_of_minus_100_bans_a_token() -> None:
    assert 0 not in sequence(distribution(), 1000, logit_bias={0: -100.0}, seed=0)
    assert 0 not in sequence(distribution(), 5, logit_bias={0: -100.0}, temperature=0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_bias_of_100_forces_a_token(temperature: float) -> None:
    values = {"logit_bias": {7: 100.0}, "temperature": temperature, "seed": 0}
    assert set(sequence(distribution(), 200, **values)) == {7}


def test_a_bias_is_added_to_the_logits() -> None:
    biased = distribution()
    biased[5] += 2.5
    found = frequencies(distribution(), logit_bias={5: 2.5})
    assert_close(found, torch.softmax(biased, -1))


@given(
    start=st.lists(st.integers(-128, 128).map(lambda n: n / 64), min_size=4, max_size=4),
    frequency=penalties,
    presence=penalties,
    bias=st.dictionaries(st.integers(0, 3), penalties),
)
@settings(deadline=None)
def test_penalties_are_the_formula_of_openai(
    start: list[float], frequency: float, presence: float, bias: dict[int, float]
) -> None:
    """mu[j] - c[j] * frequency_penalty - (c[j] > 0) * presence_penalty, in exact sixty-fourths."""
    drawn = sampler(
        temperature=0.0, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    counts = [0] * len(start)
    for _ in range(12):
        expected = [
            score + bias.get(j, 0.0) - counts[j] * frequency - (counts[j] > 0) * presence
            for j, score in enumerate(start)
        ]
        token = drawn.sample(torch.tensor(start))
        assert expected[token] == max(expected)
        counts[token] += 1


def test_a_presence_penalty_counts_once() -> None:
    log_probs = torch.tensor([1.0, 0.0])
    assert sequence(log_probs, 4, temperature=0.0, presence_penalty=0.75) == [0, 0, 0, 0]
    assert sequence(log_probs, 4, temperature=0.0, presence_penalty=1.25) == [0, 1, 0, 0]


def test_a_frequency_penalty_grows_with_every_use() -> None:
    log_probs = torch.tensor([1.0, 0.0])
    assert sequence(log_probs, 6, temperature=0.0, frequency_penalty=0.4) == [0, 0, 0, 1, 0, 1]


def test_penalties_change_what_is_drawn_and_not_only_what_is_greedy() -> None:
    plain = Counter(sequence(distribution(), 200, seed=3))
    penalised = Counter(sequence(distribution(), 200, seed=3, frequency_penalty=2.0))
    assert max(penalised.values()) < max(plain.values())
    assert set(penalised) == set(range(VOCABULARY))


def test_the_distribution_given_is_left_alone() -> None:
    log_probs = distribution()
    sequence(log_probs, 5, seed=0, logit_bias={1: 5.0}, presence_penalty=1.0, top_p=0.5, min_p=0.1)
    assert torch.equal(log_probs, distribution())


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    log_probs = torch.tensor([0.0, float("-inf"), 0.0]).log_softmax(-1)
    assert 1 not in sequence(log_probs, 500, seed=0, temperature=2.0)


UNIT = 2.0**-12
"""Probabilities are whole numbers of this, so that float32 adds and multiplies them exactly."""

steep = st.lists(st.integers(0, 12), min_size=1, max_size=30).map(
    lambda powers: [2**power for power in powers]
)
level = st.lists(st.integers(8, 12), min_size=1, max_size=40)
sparse = st.lists(st.integers(0, 3), min_size=1, max_size=40)
masses = (steep | level | sparse).filter(lambda units: 0 < sum(units) <= 1 / UNIT)


def textbook_nucleus(probabilities: Tensor, top_p: float) -> list[float]:
    """Sort, cumulate, and stop with the first that reaches the mass (Holtzman et al. 2020)."""
    values = sorted(probabilities.tolist(), reverse=True)
    sums = list(accumulate(values))
    return values[: 1 + next(i for i, mass in enumerate(sums) if mass >= top_p * sums[-1])]


@given(masses, st.integers(0, 4095).map(lambda units: units * UNIT))
@settings(deadline=None, max_examples=300)
def test_the_nucleus_is_the_one_of_the_textbook(units: list[int], top_p: float) -> None:
    """Whatever the sum: top-k and min-p leave less than 1."""
    probabilities = torch.tensor(units) * UNIT
    nucleus = _nucleus(probabilities, top_p)
    expected = textbook_nucleus(probabilities, top_p)
    kept = nucleus > 0
    assert torch.equal(nucleus[kept], probabilities[kept])
    assert sorted(nucleus.tolist(), reverse=True)[: len(expected)] == expected
    assert int(kept.sum()) == len(expected)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 1), (0.75, 2), (0.875, 3)])
def test_a_nucleus_that_reaches_top_p_exactly_takes_no_more(top_p: float, kept: int) -> None:
    probabilities = torch.tensor([0.125, 0.5, 0.125, 0.25])
    assert int((_nucleus(probabilities, top_p) > 0).sum()) == kept


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
@pytest.mark.parametrize("tokens", [8, 10, 1000, 128_256])
def test_the_nucleus_of_equal_tokens_is_never_empty(tokens: int, top_p: float) -> None:
    """A fair share, computed in float32, may be more than the share of each."""
    nucleus = _nucleus(torch.zeros(tokens).softmax(-1), top_p)
    assert (nucleus > 0).sum() == 1


class ByteTokens:
    """The tiny model's vocabulary, of which every token is a byte, with some padding."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocabulary = Vocabulary(tokenizer)
        self.eos: int = tokenizer.eos_token_id
        self.size = len(self.vocabulary) + 6
        self._compiler = GrammarCompiler(tokenizer, frozenset({self.eos}))

    def params(self, *choices: str, **values: Any) -> SamplingParams:
        grammar = self._compiler.compile(GrammarSpec("choice", choices, "guided_choice"))
        return SamplingParams(**{"max_tokens": 32, **values, "grammar": grammar})

    def id(self, character: str) -> int:
        return next(i for i in range(self.size) if self.vocabulary.piece(i) == character.encode())

    def scores(self, **logits: float) -> Tensor:
        """Log-probabilities that are alike but for the characters named."""
        scores = torch.zeros(self.size)
        for character, logit in logits.items():
            scores[self.id(character)] = logit
        return scores.log_softmax(-1)

    def answer(self, params: SamplingParams, log_probs: Tensor) -> str:
        drawn, text = Sampler(params), b""
        for _ in range(params.max_tokens):
            token = drawn.sample(log_probs)
            if token == self.eos:
                break
            text += self.vocabulary.piece(token)
        return text.decode()


@pytest.fixture(scope="module")
def byte_tokens(tiny_model: Path) -> ByteTokens:
    return ByteTokens(tiny_model)


CHOICES = ("yes", "no", "never", "no idea")


@given(
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_k=st.integers(0, 4),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=seeds,
)
@settings(deadline=None, max_examples=60)
def test_whatever_is_drawn_under_a_grammar_matches(
    byte_tokens: ByteTokens, seed: int, **values: Any
) -> None:
    log_probs = torch.randn(byte_tokens.size, generator=torch.Generator().manual_seed(seed % 1000))
    params = byte_tokens.params(*CHOICES, seed=seed, **values)
    assert byte_tokens.answer(params, 9 * log_probs) in CHOICES


def test_greedy_under_a_grammar_is_the_likeliest_token_that_is_allowed(
    byte_tokens: ByteTokens,
) -> None:
    """`x` is likelier than both, but neither answer begins with it."""
    log_probs = byte_tokens.scores(x=5.0, n=2.0, y=1.0, o=1.0)
    params = byte_tokens.params("yes", "no", temperature=0.0)
    assert byte_tokens.answer(params, log_probs) == "no"


def test_a_grammar_leaves_the_proportions_of_what_it_allows(byte_tokens: ByteTokens) -> None:
    log_probs = byte_tokens.scores(x=5.0, y=1.0, n=0.0)
    params = byte_tokens.params("y", "n")
    counts = Counter(Sampler(params).sample(log_probs) for _ in range(DRAWS))
    share = counts[byte_tokens.id("y")] / DRAWS
    assert set(counts) == {byte_tokens.id("y"), byte_tokens.id("n")}
    assert share == pytest.approx(math.e / (1 + math.e), abs=TOLERANCE)


def test_truncation_counts_what_the_grammar_allows_alone(byte_tokens: ByteTokens) -> None:
    """The two likeliest of all tokens are banned: top-k of 2 must not leave nothing to draw."""
    log_probs = byte_tokens.scores(x=9.0, z=8.0, y=1.0, n=0.0)
    params = byte_tokens.params("y", "n", top_k=2)
    drawn = {Sampler(params).sample(log_probs) for _ in range(100)}
    assert drawn == {byte_tokens.id("y"), byte_tokens.id("n")}


def test_no_bias_and_no_penalty_gets_past_a_grammar(byte_tokens: ByteTokens) -> None:
    banned, allowed = byte_tokens.id("x"), byte_tokens.id("a")
    params = byte_tokens.params(
        "aaaa",
        logit_bias={banned: 100.0, allowed: -100.0, byte_tokens.eos: 100.0},
        frequency_penalty=2.0,
        presence_penalty=2.0,
    )
    assert byte_tokens.answer(params, byte_tokens.scores()) == "aaaa"


def test_a_bias_chooses_among_what_a_grammar_allows(byte_tokens: ByteTokens) -> None:
    params = byte_tokens.params("yes", "no", logit_bias={byte_tokens.id("n"): 100.0})
    assert byte_tokens.answer(params, byte_tokens.scores()) == "no"


def test_padding_of_the_vocabulary_is_never_drawn_under_a_grammar(byte_tokens: ByteTokens) -> None:
    log_probs = byte_tokens.scores()
    log_probs[-6:] = 100.0
    params = byte_tokens.params(*CHOICES)
    assert byte_tokens.answer(params, log_probs) in CHOICES


def test_answers_of_one_grammar_do_not_disturb_each_other(byte_tokens: ByteTokens) -> None:
    params = byte_tokens.params("no idea", temperature=0.0)
    log_probs, text = byte_tokens.scores(), [b"", b""]
    samplers = [Sampler(params), Sampler(params)]
    for _ in range(len("no idea")):
        for index, one in enumerate(samplers):
            text[index] += byte_tokens.vocabulary.piece(one.sample(log_probs))
    assert text == [b"no idea"] * 2
    assert [one.sample(log_probs) for one in samplers] == [byte_tokens.eos] * 2


def test_the_distribution_given_is_left_alone_under_a_grammar(byte_tokens: ByteTokens) -> None:
    log_probs = byte_tokens.scores()
    byte_tokens.answer(byte_tokens.params("yes"), log_probs)
    assert torch.equal(log_probs, byte_tokens.scores())

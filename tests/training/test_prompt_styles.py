"""Variants of prompts: drawn from the seed, never empty, and no more changed than asked for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.training.prompt_styles import (
    CLOSINGS,
    LONG_WORD,
    OPENINGS,
    TYPO_RATE,
    restyle,
    with_typos,
)

texts = st.text(min_size=1, max_size=200)
sentences = st.lists(st.text("abcdefg", min_size=1, max_size=12), min_size=1).map(" ".join)
seeds = st.integers(0, 2**32)
shares = st.floats(0, 1)
MANY = 20_000
LONG_WORDS = " ".join(["abcdefgh"] * MANY)


def restyled(text: str, strength: float, seed: int = 0) -> str:
    return restyle(text, random.Random(seed), strength)


def variants(text: str, strength: float, count: int = 2000) -> list[str]:
    rng = random.Random(0)
    return [restyle(text, rng, strength) for _ in range(count)]


@settings(deadline=None)
@given(text=texts, seed=seeds)
def test_strength_zero_is_the_identity(text: str, seed: int) -> None:
    assert restyled(text, 0.0, seed) == text


@settings(deadline=None)
@given(text=texts, seed=seeds)
def test_a_typo_rate_of_zero_is_the_identity(text: str, seed: int) -> None:
    assert with_typos(text, random.Random(seed), 0.0) == text


@settings(deadline=None)
@given(text=texts, strength=shares, seed=seeds)
def test_the_same_seed_gives_the_same_text(text: str, strength: float, seed: int) -> None:
    assert restyled(text, strength, seed) == restyled(text, strength, seed)


def test_every_draw_is_another() -> None:
    assert len(set(variants("what is the integral of x?", 1.0))) > 500


@settings(deadline=None)
@given(text=texts, strength=shares, seed=seeds)
def test_a_variant_is_never_empty(text: str, strength: float, seed: int) -> None:
    assert restyled(text, strength, seed)


@settings(deadline=None)
@given(text=st.sampled_from(["?", "!", ".", " ", "?! .", "...."]), seed=seeds)
def test_a_text_of_marks_alone_keeps_something(text: str, seed: int) -> None:
    assert restyled(text, 1.0, seed)


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.8, 1.0])
def test_openings_are_as_frequent_as_asked(strength: float) -> None:
    found = variants("1 2 3", strength)
    opened = sum(not variant.startswith("1 2 3") for variant in found)
    assert opened / len(found) == pytest.approx(strength, abs=0.04)


@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
def test_closings_are_half_as_frequent(strength: float) -> None:
    found = variants("1 2 3", strength)
    closed = sum(not variant.endswith("1 2 3") for variant in found)
    assert closed / len(found) == pytest.approx(strength / 2, abs=0.04)


def test_capitals_go_in_half_as_many_variants() -> None:
    found = variants("ABC", 0.6)
    assert sum("abc" in variant for variant in found) / len(found) == pytest.approx(0.3, abs=0.04)


def test_the_mark_at_the_end_goes_in_a_quarter_as_many_variants() -> None:
    found = [v for v in variants("a b?", 0.8) if not v.lower().endswith(lowered(CLOSINGS))]
    bare = [variant for variant in found if variant.lower().endswith("a b")]
    assert len(bare) / len(found) == pytest.approx(0.2, abs=0.05)


def test_all_openings_and_closings_are_used() -> None:
    found = variants("1 2 3", 0.5)
    assert all(any(variant.startswith(opening) for variant in found) for opening in OPENINGS)
    assert all(any(variant.endswith(closing) for variant in found) for closing in CLOSINGS)


@settings(deadline=None)
@given(text=sentences, seed=seeds)
def test_short_words_are_never_misspelt(text: str, seed: int) -> None:
    changed = with_typos(text, random.Random(seed), 1.0)
    pairs = list(zip(text.split(" "), changed.split(" "), strict=True))
    assert all(word == slip for word, slip in pairs if len(word) < LONG_WORD)


@settings(deadline=None)
@given(text=sentences, seed=seeds)
def test_a_slip_is_a_swap_a_loss_or_a_doubling(text: str, seed: int) -> None:
    changed = with_typos(text, random.Random(seed), 1.0)
    for word, slip in zip(text.split(" "), changed.split(" "), strict=True):
        assert slip == word or slip in slips(word)


@settings(deadline=None)
@given(text=texts, rate=shares, seed=seeds)
def test_typos_leave_the_spaces_where_they_are(text: str, rate: float, seed: int) -> None:
    assert with_typos(text, random.Random(seed), rate).count(" ") == text.count(" ")


@pytest.mark.parametrize("rate", [TYPO_RATE, 0.5, 1.0])
def test_typos_change_the_given_share_of_words(rate: float) -> None:
    changed = with_typos(LONG_WORDS, random.Random(0), rate).split(" ")
    share = sum(word != "abcdefgh" for word in changed) / MANY
    assert share == pytest.approx(rate, abs=0.02)


def lowered(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.lower() for part in parts)


def slips(word: str) -> set[str]:
    """All that one slip can make of a word."""
    found = set()
    for place in range(len(word) - 1):
        before, first, second, after = word[:place], word[place], word[place + 1], word[place + 2 :]
        found |= {
            before + second + first + after,
            before + second + after,
            before + first + first + second + after,
        }
    return found

"""The prefix cache: the longest beginning that is known, and no more memory than was given."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polymath.experts.prefix_cache import PrefixCache

MATH = ("smollm2", "math")
BARE = ("smollm2", None)

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8)
owners = st.sampled_from([MATH, BARE])
kept_prompts = st.lists(st.tuples(owners, prompts), max_size=12)


def saved(tokens: Sequence[int]) -> Tensor:
    """A cache of two layers, three heads and one feature, in which each token shows its id."""
    return torch.tensor(tokens, dtype=torch.float32)[:, None].expand(2, 2, 3, -1, 1)


def found(cache: PrefixCache, owner: Hashable, tokens: Sequence[int]) -> list[int]:
    """The tokens of the beginning that a prompt finds."""
    tensor = cache.longest(owner, tokens)
    if tensor is None:
        return []
    assert torch.equal(tensor, saved(tensor[0, 0, 0, :, 0].int().tolist()))
    return tensor[0, 0, 0, :, 0].int().tolist()


def keep(cache: PrefixCache, owner: Hashable, *entries: Sequence[int]) -> None:
    for tokens in entries:
        cache.keep(owner, tokens, saved(tokens))


def known(cache: PrefixCache, owner: Hashable, tokens: Sequence[int]) -> bool:
    """Whether a prompt that goes on after these tokens finds all of them."""
    return found(cache, owner, [*tokens, -1, -1]) == list(tokens)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


@given(kept_prompts, owners, prompts)
def test_a_prompt_finds_its_longest_common_beginning_with_any_entry_of_its_owner(
    kept: list[tuple[Hashable, list[int]]], owner: Hashable, prompt: list[int]
) -> None:
    cache = PrefixCache(1000)
    for other, tokens in kept:
        keep(cache, other, tokens)
    length = max(
        (common(tokens, prompt[:-2]) for other, tokens in kept if other == owner), default=0
    )
    assert found(cache, owner, prompt) == prompt[:length]


@given(kept_prompts)
def test_what_was_kept_is_found_by_the_next_turn(kept: list[tuple[Hashable, list[int]]]) -> None:
    cache = PrefixCache(1000)
    for owner, tokens in kept:
        keep(cache, owner, tokens)
    assert all(known(cache, owner, tokens) for owner, tokens in kept)


@given(kept_prompts, st.integers(0, 16))
def test_the_budget_is_kept_and_the_last_entry_stays(
    kept: list[tuple[Hashable, list[int]]], budget: int
) -> None:
    cache = PrefixCache(budget)
    for owner, tokens in kept:
        keep(cache, owner, tokens)
        assert cache.tokens <= budget
        assert known(cache, owner, tokens) == (len(tokens) <= budget)


@given(kept_prompts, prompts)
def test_hits_never_exceed_what_was_queried(
    kept: list[tuple[Hashable, list[int]]], prompt: list[int]
) -> None:
    cache = PrefixCache(1000)
    total = 0
    for owner, tokens in kept:
        total += len(found(cache, owner, prompt))
        keep(cache, owner, tokens)
    assert (cache.queried, cache.hit) == (len(kept) * len(prompt), total)


def test_the_last_two_tokens_of_a_prompt_are_never_found() -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2, 3, 4, 5])
    assert found(cache, MATH, [1, 2, 3, 4, 5]) == [1, 2, 3]
    assert found(cache, MATH, [1, 2, 3, 4, 5, 6]) == [1, 2, 3, 4]
    assert found(cache, MATH, [1, 2, 3, 4, 5, 6, 7]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("prompt", [[], [1], [1, 2]])
def test_a_prompt_of_two_tokens_finds_nothing(prompt: list[int]) -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2, 3])
    assert cache.longest(MATH, prompt) is None


def test_what_is_found_is_cut_to_the_common_length() -> None:
    cache = PrefixCache(100)
    cache.keep(MATH, [5, 6, 7, 8], torch.arange(2 * 2 * 3 * 4 * 5).reshape(2, 2, 3, 4, 5))
    tensor = cache.longest(MATH, [5, 6, 9, 9, 9])
    assert tensor is not None
    assert tensor.shape == (2, 2, 3, 2, 5)
    assert torch.equal(tensor, torch.arange(240).reshape(2, 2, 3, 4, 5)[:, :, :, :2])


def test_another_beginning_finds_nothing() -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2, 3, 4])
    assert cache.longest(MATH, [2, 2, 3, 4, 5]) is None


@pytest.mark.parametrize("other", [BARE, ("smollm2", "law"), ("another", "math")])
def test_another_base_model_or_adapter_finds_nothing(other: Hashable) -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2, 3, 4])
    assert cache.longest(other, [1, 2, 3, 4, 5, 6]) is None
    assert known(cache, MATH, [1, 2, 3, 4])


def test_an_entry_that_is_the_beginning_of_a_new_one_is_replaced() -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2], [1, 3], [1, 2, 3, 4])
    assert (len(cache), cache.tokens) == (2, 6)
    assert known(cache, MATH, [1, 3])


def test_an_equal_entry_is_replaced() -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2, 3], [1, 2, 3])
    assert (len(cache), cache.tokens) == (1, 3)


def test_the_beginning_that_another_owner_has_stays() -> None:
    cache = PrefixCache(100)
    keep(cache, BARE, [1, 2])
    keep(cache, MATH, [1, 2, 3])
    assert len(cache) == 2
    assert known(cache, BARE, [1, 2])


def test_the_oldest_entry_is_let_go_first() -> None:
    cache = PrefixCache(9)
    keep(cache, MATH, [1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4])
    assert [known(cache, MATH, [i] * 3) for i in (1, 2, 3)] == [False, True, True]
    assert cache.tokens == 8


def test_an_entry_that_was_found_counts_as_new() -> None:
    cache = PrefixCache(9)
    keep(cache, MATH, [1, 1, 1], [2, 2, 2], [3, 3, 3])
    assert found(cache, MATH, [1, 9, 9, 9]) == [1]
    keep(cache, MATH, [4, 4, 4])
    assert [known(cache, MATH, [i] * 3) for i in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_lookup_that_finds_nothing_changes_no_order() -> None:
    cache = PrefixCache(6)
    keep(cache, MATH, [1, 1, 1], [2, 2, 2])
    assert cache.longest(MATH, [9, 9, 9, 9]) is None
    assert cache.longest(BARE, [1, 1, 1, 1]) is None
    keep(cache, MATH, [3, 3, 3])
    assert [known(cache, MATH, [i] * 3) for i in (1, 2, 3)] == [False, True, True]


def test_as_many_entries_go_as_the_new_one_needs() -> None:
    cache = PrefixCache(6)
    keep(cache, MATH, [1, 1], [2, 2], [3, 3], [4, 4, 4, 4])
    assert [known(cache, MATH, [i] * 2) for i in (1, 2, 3)] == [False, False, True]
    assert known(cache, MATH, [4, 4, 4, 4])


def test_an_entry_larger_than_the_budget_lets_nobody_go() -> None:
    cache = PrefixCache(4)
    keep(cache, MATH, [1, 1], [2, 2], [3, 3, 3, 3, 3])
    assert (len(cache), cache.tokens) == (2, 4)


def test_an_entry_as_large_as_the_budget_is_kept() -> None:
    cache = PrefixCache(3)
    keep(cache, MATH, [1, 1, 1])
    assert known(cache, MATH, [1, 1, 1])


def test_no_budget_keeps_nothing() -> None:
    cache = PrefixCache(0)
    keep(cache, MATH, [], [1], [1, 2, 3])
    assert (len(cache), cache.tokens) == (0, 0)
    assert cache.longest(MATH, [1, 2, 3, 4, 5]) is None
    assert (cache.queried, cache.hit) == (5, 0)


def test_queried_and_hit_count_tokens() -> None:
    cache = PrefixCache(100)
    keep(cache, MATH, [1, 2, 3])
    for prompt in ([1, 2, 3, 4, 5], [1, 9, 9, 9], [9, 9, 9]):
        cache.longest(MATH, prompt)
    assert (cache.queried, cache.hit) == (12, 3 + 1 + 0)

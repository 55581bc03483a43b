"""Folds that leave one data set out: what is held out, and what is never held out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.training import OUT_OF_SCOPE, PromptRow
from polymath.training.source_folds import SourceFold, source_folds


def rows_of(*labels: tuple[str, str | None]) -> list[PromptRow]:
    return [
        PromptRow(text=f"prompt {index}", domain=domain, source=source)
        for index, (domain, source) in enumerate(labels)
    ]


def held_out(rows: Sequence[PromptRow], fold: SourceFold) -> list[tuple[str, str | None]]:
    return [(rows[index].domain, rows[index].source) for index in fold.held_out]


any_label = st.tuples(
    st.sampled_from(["law", "math", OUT_OF_SCOPE]),
    st.sampled_from([None, "a", "b", "a/one", "a/two", "a/three", "b/one", "c/one"]),
)
any_rows = st.lists(any_label, max_size=40).map(lambda labels: rows_of(*labels))


def test_each_data_set_of_a_domain_with_two_is_left_out_whole() -> None:
    rows = rows_of(("math", "a/one"), ("math", "b"), ("math", "a/two"), ("math", "b"))
    assert source_folds(rows) == [SourceFold("a", (0, 2)), SourceFold("b", (1, 3))]


def test_half_of_the_only_data_set_of_a_domain_is_left_out() -> None:
    rows = rows_of(*[("law", f"mmlu/{part}") for part in "abcd" for _ in range(3)])
    (fold,) = source_folds(rows)
    assert fold.name == "mmlu"
    assert len(fold.held_out) == 6
    assert len(set(held_out(rows, fold))) == 2


def test_of_an_odd_number_of_parts_the_smaller_half_is_left_out() -> None:
    rows = rows_of(*[("law", f"mmlu/{part}") for part in "abc"])
    assert len(source_folds(rows)[0].held_out) == 1


def test_a_single_source_of_a_domain_cannot_be_left_out() -> None:
    assert source_folds(rows_of(("law", "a/train"), ("law", "a/train"), ("math", "b"))) == []


def test_a_data_set_is_left_out_of_all_its_domains_at_once() -> None:
    """Of math all of `a`, since `b` remains; of law, which has nothing else, one of two parts."""
    rows = rows_of(("math", "a/one"), ("math", "b"), ("law", "a/one"), ("law", "a/two"))
    folds = {fold.name: fold for fold in source_folds(rows)}
    assert list(folds) == ["a", "b"]
    assert held_out(rows, folds["a"]).count(("math", "a/one")) == 1
    assert sum(domain == "law" for domain, _ in held_out(rows, folds["a"])) == 1
    assert held_out(rows, folds["b"]) == [("math", "b")]


def test_what_one_domain_leaves_out_another_may_keep() -> None:
    """`a/one` of math is held out whole, while one of the two parts of law is trained on."""
    rows = rows_of(("math", "a/one"), ("math", "a/two"), ("math", "b"), ("law", "a/one"))
    (fold,) = [fold for fold in source_folds(rows) if fold.name == "a"]
    assert held_out(rows, fold) == [("math", "a/one"), ("math", "a/two")]


@pytest.mark.parametrize("rows", [[], rows_of(("law", None), ("math", None))])
def test_without_sources_there_are_no_folds(rows: list[PromptRow]) -> None:
    assert source_folds(rows) == []


def test_the_seed_chooses_the_half() -> None:
    rows = rows_of(*[("law", f"mmlu/{part}") for part in "abcdefgh"])
    assert source_folds(rows, 3) == source_folds(rows, 3)
    assert len({source_folds(rows, seed)[0].held_out for seed in range(10)}) > 1


@given(rows=any_rows, seed=st.integers(0, 99))
@settings(deadline=None)
def test_folds_are_named_once_in_order_and_hold_something(rows: list[PromptRow], seed: int) -> None:
    names = [fold.name for fold in source_folds(rows, seed)]
    assert names == sorted(set(names))
    assert all(fold.held_out for fold in source_folds(rows, seed))


@given(rows=any_rows, seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_fold_holds_rows_of_its_data_set_alone(rows: list[PromptRow], seed: int) -> None:
    for fold in source_folds(rows, seed):
        assert {rows[index].family for index in fold.held_out} == {fold.name}
        assert all(rows[index].domain != OUT_OF_SCOPE for index in fold.held_out)


@given(rows=any_rows, seed=st.integers(0, 99))
@settings(deadline=None)
def test_no_source_of_a_domain_is_on_both_sides(rows: list[PromptRow], seed: int) -> None:
    for fold in source_folds(rows, seed):
        outside = set(held_out(rows, fold))
        kept = [row for index, row in enumerate(rows) if index not in fold.held_out]
        assert outside.isdisjoint((row.domain, row.source) for row in kept)


@given(rows=any_rows, seed=st.integers(0, 99))
@settings(deadline=None)
def test_every_domain_can_still_be_learned(rows: list[PromptRow], seed: int) -> None:
    for fold in source_folds(rows, seed):
        kept = {row.domain for index, row in enumerate(rows) if index not in fold.held_out}
        assert kept == {row.domain for row in rows}


@given(rows=any_rows, seed=st.integers(0, 99))
@settings(deadline=None)
def test_rows_without_a_source_are_never_held_out(rows: list[PromptRow], seed: int) -> None:
    for fold in source_folds(rows, seed):
        assert all(rows[index].source for index in fold.held_out)


@given(labels=st.lists(any_label, max_size=30), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_order_of_the_rows_does_not_matter(
    labels: list[tuple[str, str | None]], seed: int
) -> None:
    forwards, backwards = rows_of(*labels), rows_of(*labels[::-1])
    assert [sorted(map(str, held_out(forwards, f))) for f in source_folds(forwards, seed)] == [
        sorted(map(str, held_out(backwards, f))) for f in source_folds(backwards, seed)
    ]

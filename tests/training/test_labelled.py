"""Targets and weights of labelled prompts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.errors import DataError
from polymath.training import OUT_OF_SCOPE, PromptRow
from polymath.training.labelled import DATA_SET_CAP, LabelledPrompts
from tests.training.conftest import DOMAINS, prompts


def mass(data: LabelledPrompts, **of: str | None) -> float:
    """Summed weight of the rows that have these values."""
    members = [all(getattr(row, name) == value for name, value in of.items()) for row in data.rows]
    return float(data.weights[members].sum())


some_rows = st.lists(
    st.tuples(
        st.sampled_from([*DOMAINS, OUT_OF_SCOPE]), st.sampled_from([None, "a/x", "a/y", "b"])
    ),
    max_size=60,
).map(
    lambda labels: (
        prompts(2, *DOMAINS)
        + [
            PromptRow(text=str(index), domain=domain, source=source)
            for index, (domain, source) in enumerate(labels + labels)
        ]
    )
)


def test_labels_are_the_domains_by_name_and_none_comes_after_them() -> None:
    rows = prompts(2, "math", "none", "coding", "law")
    data = LabelledPrompts.of(rows)
    assert data.labels == ("coding", "law", "math")
    assert data.targets.tolist() == [2, 2, 3, 3, 0, 0, 1, 1]


def test_a_domain_that_sorts_after_none_keeps_its_place() -> None:
    rows = [PromptRow(text=domain, domain=domain) for domain in ("zoology", "none", "art") * 2]
    data = LabelledPrompts.of(rows)
    assert data.labels == ("art", "zoology")
    assert data.targets.tolist() == [1, 2, 0] * 2


@pytest.mark.parametrize(("domains", "knows"), [(DOMAINS, False), ((*DOMAINS, "none"), True)])
def test_it_is_known_whether_there_are_prompts_of_no_domain(
    domains: tuple[str, ...], knows: bool
) -> None:
    assert LabelledPrompts.of(prompts(2, *domains)).knows_none is knows


def test_equal_classes_have_weights_of_one() -> None:
    np.testing.assert_allclose(LabelledPrompts.of(prompts(7, *DOMAINS)).weights, 1.0)


def test_a_rare_domain_counts_as_much_as_a_common_one() -> None:
    data = LabelledPrompts.of([*prompts(90, "math"), *prompts(10, "law")])
    assert mass(data, domain="math") == pytest.approx(50)
    assert mass(data, domain="law") == pytest.approx(50)


def test_a_domain_of_nine_times_the_prompts_is_drawn_three_times_as_often() -> None:
    data = LabelledPrompts.of([*prompts(90, "math"), *prompts(10, "law")])
    assert data.draws[data.targets == data.labels.index("math")].sum() == pytest.approx(75)


def test_a_large_data_set_counts_as_much_as_one_of_the_size_of_the_cap() -> None:
    large = prompts(4 * DATA_SET_CAP, "math", source="large")
    small = prompts(DATA_SET_CAP, "math", source="small")
    data = LabelledPrompts.of([*large, *small, *prompts(9, "law")])
    assert mass(data, source="large") == pytest.approx(mass(data, source="small"))


def test_the_parts_of_a_data_set_share_its_cap() -> None:
    parts = [row for part in "ab" for row in prompts(DATA_SET_CAP, "math", source=f"large/{part}")]
    small = prompts(DATA_SET_CAP, "math", source="small")
    data = LabelledPrompts.of([*parts, *small, *prompts(9, "law")])
    both = mass(data, source="large/a") + mass(data, source="large/b")
    assert both == pytest.approx(mass(data, source="small"))


def test_the_cap_is_for_each_domain() -> None:
    """Two domains of one data set, each of the size of the cap: nothing is capped."""
    shared = prompts(DATA_SET_CAP, "math", "law", source="shared")
    data = LabelledPrompts.of([*shared, *prompts(DATA_SET_CAP, "math", "law", source="other")])
    np.testing.assert_allclose(data.weights, 1.0)


def test_below_the_cap_every_prompt_of_a_domain_counts_the_same() -> None:
    data = LabelledPrompts.of([*prompts(30, "math", source="a"), *prompts(5, "math", "law")])
    assert len(set(data.weights[data.targets == data.labels.index("math")])) == 1


def test_rows_without_a_source_are_not_capped() -> None:
    many = prompts(3 * DATA_SET_CAP, "math", source=None)
    small = prompts(DATA_SET_CAP, "math", source="small")
    data = LabelledPrompts.of([*many, *small, *prompts(9, "law")])
    assert mass(data, source=None) == pytest.approx(3 * mass(data, domain="math", source="small"))


@settings(deadline=None)
@given(rows=some_rows)
def test_weights_have_a_mean_of_one_and_every_class_the_same(rows: list[PromptRow]) -> None:
    data = LabelledPrompts.of(rows)
    assert data.weights.mean() == pytest.approx(1.0)
    assert (data.weights > 0).all()
    masses = [mass(data, domain=domain) for domain in {row.domain for row in rows}]
    assert masses == pytest.approx([masses[0]] * len(masses))


@settings(deadline=None)
@given(rows=some_rows)
def test_draws_are_weights_with_classes_by_the_square_root_of_their_size(
    rows: list[PromptRow],
) -> None:
    """Of their prompts after the cap."""
    data = LabelledPrompts.of(rows)
    assert data.draws.mean() == pytest.approx(1.0)
    sizes = Counter((row.domain, row.family) for row in rows if row.source)
    capped = np.array(
        [min(1.0, DATA_SET_CAP / sizes[r.domain, r.family]) if r.source else 1.0 for r in rows]
    )
    for target in np.unique(data.targets):
        members = data.targets == target
        ratio = data.draws[members].sum() / math.sqrt(capped[members].sum())
        first = data.targets == data.targets[0]
        assert ratio == pytest.approx(data.draws[first].sum() / math.sqrt(capped[first].sum()))


@settings(deadline=None)
@given(rows=some_rows)
def test_a_target_is_the_place_of_the_domain(rows: list[PromptRow]) -> None:
    data = LabelledPrompts.of(rows)
    names = (*data.labels, OUT_OF_SCOPE)
    assert [names[target] for target in data.targets] == [row.domain for row in rows]


def test_taking_all_rows_changes_nothing() -> None:
    data = LabelledPrompts.of([*prompts(9, *DOMAINS), *prompts(3, "none")])
    same = data.take(np.arange(len(data.rows)))
    assert (same.rows, same.labels) == (data.rows, data.labels)
    np.testing.assert_array_equal(same.targets, data.targets)
    np.testing.assert_array_equal(same.weights, data.weights)


def test_taken_rows_come_in_order_and_are_weighed_anew() -> None:
    data = LabelledPrompts.of(prompts(4, *DOMAINS))
    some = data.take(np.array([9, 0, 1, 2]))
    assert some.rows == [data.rows[index] for index in (9, 0, 1, 2)]
    assert some.targets.tolist() == [2, 0, 0, 0]
    np.testing.assert_allclose(some.weights, [2, 2 / 3, 2 / 3, 2 / 3])


def test_taken_rows_keep_the_labels_of_all() -> None:
    data = LabelledPrompts.of(prompts(4, *DOMAINS))
    assert data.take(np.array([0, 1, 4])).labels == DOMAINS


@pytest.mark.parametrize("rows", [[], prompts(9, "law"), prompts(9, "law", "none")])
def test_fewer_than_two_domains_are_refused(rows: list[PromptRow]) -> None:
    with pytest.raises(DataError, match="at least two domains"):
        LabelledPrompts.of(rows)


@pytest.mark.parametrize("rare", ["coding", "none"])
def test_a_single_prompt_of_a_class_is_refused_by_name(rare: str) -> None:
    rows = [*prompts(9, "law", "math"), *prompts(1, rare)]
    with pytest.raises(DataError, match=f"at least two prompts of every domain: '{rare}'"):
        LabelledPrompts.of(rows)


def test_prompts_of_the_fixtures_differ() -> None:
    """What these tests count must not be the same text over and over."""
    texts = Counter(row.text for row in prompts(50, *DOMAINS))
    assert texts.most_common(1)[0][1] == 1

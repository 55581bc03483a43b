"""How long drafts are: more while they are accepted, fewer when they are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.proxy import DraftLength
from polymath.proxy.draft_length import FIRST, LONGEST


def test_a_draft_that_was_accepted_makes_the_next_one_longer_by_two() -> None:
    draft = DraftLength()
    draft.learn(FIRST, FIRST)
    assert draft.tokens == FIRST + 2


@pytest.mark.parametrize("accepted", [0, 1, FIRST - 1])
def test_a_draft_that_was_refused_anywhere_makes_it_shorter_by_one(accepted: int) -> None:
    draft = DraftLength()
    draft.learn(FIRST, accepted)
    assert draft.tokens == FIRST - 1


@pytest.mark.parametrize(("accepted", "limit"), [(0, 1), (3, LONGEST)])
def test_it_has_its_limits(accepted: int, limit: int) -> None:
    draft = DraftLength()
    for _ in range(40):
        draft.learn(3, accepted)
    assert draft.tokens == limit


@pytest.mark.parametrize("fixed", [0, 1, 4, 64])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_fixed_length_stays(fixed: int, drafts: list[tuple[int, int]]) -> None:
    draft = DraftLength(fixed)
    for drafted, accepted in drafts:
        draft.learn(drafted, accepted)
        assert draft.tokens == fixed


@given(st.lists(st.booleans()))
def test_any_history_leaves_something_to_draft(history: list[bool]) -> None:
    draft = DraftLength()
    for accepted in history:
        draft.learn(draft.tokens, draft.tokens if accepted else 0)
        assert 1 <= draft.tokens <= LONGEST

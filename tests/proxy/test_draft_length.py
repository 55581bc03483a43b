"""How long drafts are: the more tokens are accepted, the longer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.proxy import DraftLength
from polymath.proxy.draft_length import LONGEST, WORTH


def test_a_draft_that_was_accepted_never_makes_the_next_one_shorter() -> None:
    draft = DraftLength()
    lengths = [draft.tokens]
    for _ in range(20):
        draft.learn(draft.tokens, draft.tokens)
        lengths.append(draft.tokens)
    assert lengths == sorted(lengths)
    assert lengths[-1] == LONGEST


def test_where_nothing_is_accepted_one_token_is_drafted() -> None:
    draft = DraftLength()
    for _ in range(40):
        draft.learn(draft.tokens, 0)
    assert draft.tokens == 1


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 0.85])
def test_the_last_token_of_a_draft_is_accepted_as_often_as_is_worth_it(rate: float) -> None:
    draw = random.Random(0)
    draft = DraftLength()
    for _ in range(4000):
        drafted = draft.tokens
        accepted = next((n for n in range(drafted) if draw.random() > rate), drafted)
        draft.learn(drafted, accepted)
    assert rate ** (draft.tokens + 1) < WORTH * 1.1
    assert rate**draft.tokens > WORTH * 0.9


@pytest.mark.parametrize("fixed", [0, 1, 4, 64])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_fixed_length_stays(fixed: int, drafts: list[tuple[int, int]]) -> None:
    draft = DraftLength(fixed)
    for drafted, accepted in drafts:
        draft.learn(drafted, accepted)
        assert draft.tokens == fixed


@given(st.lists(st.floats(0, 1)))
def test_any_history_leaves_something_to_draft(history: list[float]) -> None:
    draft = DraftLength()
    for share in history:
        draft.learn(draft.tokens, round(share * draft.tokens))
        assert 1 <= draft.tokens <= LONGEST

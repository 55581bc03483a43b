"""Who is fed: every row that decodes, and one prompt a step, short ones soon and all in the end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.experts import Row
from polymath.experts.lora_model import Feed
from polymath.experts.scheduler import Scheduler
from polymath.experts.sequence import Sequence

LEAST_CHUNK = 8
"""Of `engine.prefill_chunk`."""

prompt_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)
chunks = st.integers(LEAST_CHUNK, 40)


def row_of(prompt: int, cached: int = 0) -> Sequence:
    row = Sequence(Row("smollm2", None, (0,) * prompt), None, 8)
    row.cached = cached
    return row


def nothing_reused(row: Sequence) -> None:
    """An empty prefix cache."""


def scheduler(chunk: int = LEAST_CHUNK) -> Scheduler:
    return Scheduler(chunk, nothing_reused)


def step(of: Scheduler, rows: list[Sequence]) -> list[Feed]:
    """One step of the engine: the feeds, of which the rows have taken note."""
    feeds = of.feeds([row for row in rows if row.pending])
    for feed in feeds:
        feed.sequence.cached += feed.count
    return feeds


def prompt_of(feeds: list[Feed]) -> Feed:
    [feed] = [feed for feed in feeds if feed.before > 1]
    return feed


@given(prompt_lengths, chunks)
def test_every_row_of_one_token_is_fed_and_one_chunk_of_one_prompt(
    lengths: list[int], chunk: int
) -> None:
    rows = [row_of(length) for length in lengths]
    feeds = scheduler(chunk).feeds(rows)
    singles = [row for row in rows if row.pending == 1]
    assert [feed.sequence for feed in feeds if feed.before == 1] == singles
    assert len(feeds) == len(singles) + (len(singles) < len(rows))


@given(prompt_lengths, chunks)
def test_a_feed_is_no_more_than_a_chunk_and_no_more_than_is_pending(
    lengths: list[int], chunk: int
) -> None:
    for feed in scheduler(chunk).feeds([row_of(length) for length in lengths]):
        assert feed.before == feed.sequence.pending
        assert 1 <= feed.count <= min(chunk, feed.before)


@given(st.integers(2, 300), chunks)
def test_a_prompt_is_never_fed_all_but_one_token(length: int, chunk: int) -> None:
    """Its last token alone would be summed in another order, and give other bits."""
    row, of = row_of(length), scheduler(chunk)
    while row.pending:
        [feed] = step(of, [row])
        assert feed.count > 1
        assert row.pending != 1


@given(st.integers(2, 300), chunks)
def test_a_prompt_alone_takes_as_few_steps_as_it_can(length: int, chunk: int) -> None:
    row, of = row_of(length), scheduler(chunk)
    steps = 0
    while row.pending:
        step(of, [row])
        steps += 1
    assert steps == -(-length // chunk)


@given(prompt_lengths, chunks)
def test_every_prompt_is_fed_in_the_end(lengths: list[int], chunk: int) -> None:
    rows, of = [row_of(length) for length in lengths], scheduler(chunk)
    for _ in range(sum(-(-length // chunk) for length in lengths)):
        step(of, rows)
    assert not any(row.pending for row in rows)


@pytest.mark.parametrize(
    ("pending", "count"), [(1, 1), (2, 2), (7, 7), (8, 8), (9, 7), (10, 8), (16, 8), (17, 8)]
)
def test_the_next_chunk_of_a_prompt(pending: int, count: int) -> None:
    [feed] = scheduler(chunk=8).feeds([row_of(pending)])
    assert (feed.count, feed.before) == (count, pending)


def test_nobody_hungry_means_nothing_to_feed() -> None:
    assert scheduler().feeds([]) == []


def test_the_shortest_and_the_oldest_take_turns() -> None:
    oldest, middle, shortest = rows = [row_of(200), row_of(300), row_of(100)]
    of = scheduler()
    chosen = [prompt_of(step(of, rows)).sequence for _ in range(8)]
    assert all(one is not other for one, other in pairwise(chosen))
    assert {id(row) for row in chosen} == {id(oldest), id(shortest)}
    assert middle.cached == 0


def test_the_shortest_is_the_one_with_the_least_left() -> None:
    begun, fresh = rows = [row_of(200), row_of(500, cached=400)]
    of = scheduler()
    chosen = {id(prompt_of(step(of, rows)).sequence) for _ in range(2)}
    assert chosen == {id(begun), id(fresh)}
    assert fresh.cached == 408


@given(st.integers(2, 400), chunks)
def test_a_long_prompt_is_answered_however_many_short_ones_come(length: int, chunk: int) -> None:
    rows, of = [row_of(length)], scheduler(chunk)
    for _ in range(2 * -(-length // chunk)):
        rows.append(row_of(2))
        step(of, rows)
    assert rows[0].pending == 0


@given(st.lists(st.integers(50, 400), min_size=1, max_size=5))
def test_a_short_prompt_waits_at_most_one_step_for_long_ones(lengths: list[int]) -> None:
    rows = [*(row_of(length) for length in lengths), short := row_of(5)]
    of = scheduler()
    step(of, rows)
    step(of, rows)
    assert short.pending == 0


def test_decoding_goes_on_while_a_prompt_is_fed() -> None:
    prompt, decoding = row_of(100), [row_of(20, cached=19), row_of(30, cached=29)]
    of = scheduler()
    while prompt.pending:
        for row in decoding:
            row.tokens += [0] * (1 - row.pending)
        feeds = step(of, [prompt, *decoding])
        assert [(feed.sequence, feed.count) for feed in feeds[:2]] == [(row, 1) for row in decoding]


@given(prompt_lengths, chunks, st.lists(st.integers(0, 60), min_size=8, max_size=8))
def test_reuse_is_tried_once_before_the_first_token_of_a_prompt(
    lengths: list[int], chunk: int, known: list[int]
) -> None:
    rows = [row_of(length) for length in lengths]
    tried: list[Sequence] = []

    def reuse(row: Sequence) -> None:
        assert row.cached == 0
        tried.append(row)
        row.cached = max(min(known[rows.index(row)], row.pending - 2), 0)

    of = Scheduler(chunk, reuse)
    while any(row.pending for row in rows):
        for feed in of.feeds([row for row in rows if row.pending]):
            assert feed.before == feed.sequence.pending
            assert feed.before == 1 or feed.sequence in tried
            feed.sequence.cached += feed.count
    prompts = [row for row in rows if len(row.tokens) > 1]
    assert sorted(map(id, tried)) == sorted(map(id, prompts))


def test_what_was_found_is_not_fed_again() -> None:
    def reuse(row: Sequence) -> None:
        row.cached = 90

    [feed] = Scheduler(64, reuse).feeds([row_of(100)])
    assert (feed.count, feed.before) == (10, 10)


def test_a_prompt_that_waits_is_not_looked_up_yet() -> None:
    tried: list[Sequence] = []
    rows = [row_of(100), row_of(50)]
    Scheduler(8, tried.append).feeds(rows)
    assert len(tried) == 1

"""The cache of rows in progress: whoever comes, goes or moves, a row reads back what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from polymath.experts.kv_slots import FIRST_CAPACITY, CacheShape, KvSlots

LAYERS, HEADS, WIDTH = 2, 2, 3
MAX_TOKENS = 3 * FIRST_CAPACITY
MAX_ROWS = 6

lengths = st.integers(1, MAX_TOKENS) | st.integers(1, 8)


@dataclass
class HeldRow:
    """Equal to others of the same length, so that mistaking one for another shows."""

    cached: int = 0


def shape(dtype: torch.dtype = torch.float32) -> CacheShape:
    return CacheShape(LAYERS, HEADS, WIDTH, dtype, torch.device("cpu"))


def empty_slots(max_tokens: int = MAX_TOKENS) -> KvSlots:
    return KvSlots(shape(), max_tokens)


def random_cache(tokens: int, seed: int = 0) -> Tensor:
    """Keys and values of a row, as `read` gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, 2, HEADS, tokens, WIDTH, generator=generator)


def feed(slots: KvSlots, row: HeldRow, new: Tensor) -> None:
    """Append tokens to a row as a network does: straight into the tensors."""
    slot, start, end = slots.slot(row), row.cached, row.cached + new.shape[3]
    for layer in range(LAYERS):
        slots.keys[layer][slot, :, start:end] = new[layer, 0]
        slots.values[layer][slot, :, start:end] = new[layer, 1]
    row.cached = end


def joined(slots: KvSlots, *cached: int) -> list[HeldRow]:
    """Rows with so many tokens of random cache each."""
    rows = []
    for seed, tokens in enumerate(cached):
        row = HeldRow()
        slots.join(row, max(tokens, 1))
        feed(slots, row, random_cache(tokens, seed))
        rows.append(row)
    return rows


class SlotsAgainstModel(RuleBasedStateMachine):
    """Random operations beside a list of rows with what each of them must read."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = empty_slots()
        self.rows: list[HeldRow] = []
        self.expected: dict[int, Tensor] = {}
        self.room: dict[int, int] = {}
        self.seed = 0

    def fresh(self, tokens: int) -> Tensor:
        self.seed += 1
        return random_cache(tokens, self.seed)

    def drawn(self, data: st.DataObject) -> HeldRow:
        return self.rows[data.draw(st.integers(0, len(self.rows) - 1))]

    @precondition(lambda self: len(self.rows) < MAX_ROWS)
    @rule(tokens=lengths)
    def join(self, tokens: int) -> None:
        row, version, keys = HeldRow(), self.slots.version, list(self.slots.keys)
        self.slots.join(row, tokens)
        self.rows.append(row)
        self.expected[id(row)] = random_cache(0)
        self.room[id(row)] = tokens
        replaced = [old is not new for old, new in zip(keys, self.slots.keys, strict=False)]
        assert (self.slots.version != version) == (not keys or all(replaced))
        assert not keys or all(replaced) == any(replaced)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        row = self.drawn(data)
        self.slots.leave(row)
        self.rows = [other for other in self.rows if other is not row]
        assert not self.slots.holds(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def arrange(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.integers(0, len(self.rows) - 1)))
        wanted = [self.rows[index] for index in chosen]
        self.slots.arrange(wanted)
        assert {id(row) for row in self.slots.rows(len(wanted))} == {id(row) for row in wanted}

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=lengths)
    def take_tokens(self, data: st.DataObject, tokens: int) -> None:
        row = self.drawn(data)
        new = self.fresh(min(tokens, self.room[id(row)] - row.cached))
        feed(self.slots, row, new)
        self.expected[id(row)] = torch.cat([self.expected[id(row)], new], 3)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=lengths)
    def write(self, data: st.DataObject, tokens: int) -> None:
        row = self.drawn(data)
        saved = self.fresh(min(tokens, self.room[id(row)]))
        self.slots.write(row, saved)
        row.cached = max(row.cached, saved.shape[3])
        rest = self.expected[id(row)][:, :, :, saved.shape[3] :]
        self.expected[id(row)] = torch.cat([saved, rest], 3)

    @invariant()
    def every_row_reads_what_is_its_own(self) -> None:
        for row in self.rows:
            assert torch.equal(self.slots.read(row), self.expected[id(row)])

    @invariant()
    def every_row_has_a_slot_with_the_room_it_asked_for(self) -> None:
        assert len(self.slots) == len(self.rows)
        assert sorted(self.slots.slot(row) for row in self.rows) == list(range(len(self.rows)))
        assert all(self.slots.holds(row) for row in self.rows)
        assert all(self.room[id(row)] <= self.slots.capacity for row in self.rows)

    @invariant()
    def the_tensors_have_the_size_that_is_said(self) -> None:
        for tensor in (*self.slots.keys, *self.slots.values):
            assert tensor.shape[0] >= len(self.rows)
            assert tensor.shape[1:] == (HEADS, self.slots.capacity, WIDTH)


SlotsAgainstModel.TestCase.settings = settings(
    deadline=None, max_examples=40, stateful_step_count=30
)
TestSlotsAgainstModel: Any = SlotsAgainstModel.TestCase


def test_what_is_written_is_what_is_read() -> None:
    slots = empty_slots()
    [row] = joined(slots, 0)
    saved = random_cache(5)
    slots.write(row, saved)
    row.cached = 5
    assert torch.equal(slots.read(row), saved)


def test_what_was_read_is_a_copy() -> None:
    slots = empty_slots()
    [row] = joined(slots, 3)
    before = slots.read(row)
    slots.keys[0].zero_()
    assert torch.equal(before, random_cache(3))


def test_what_one_row_read_can_be_given_to_another() -> None:
    slots = empty_slots()
    one, other = joined(slots, 9, 4)
    slots.write(other, slots.read(one)[:, :, :, :7])
    other.cached = 7
    assert torch.equal(slots.read(other), random_cache(9)[:, :, :, :7])
    assert torch.equal(slots.read(one), random_cache(9))


def test_a_row_takes_the_slot_after_the_others() -> None:
    slots = empty_slots()
    assert [slots.slot(row) for row in joined(slots, 1, 1, 1)] == [0, 1, 2]


def test_the_last_row_moves_into_a_slot_that_is_left() -> None:
    slots = empty_slots()
    first, second, last = joined(slots, 4, 2, 7)
    slots.leave(first)
    assert [slots.slot(second), slots.slot(last)] == [1, 0]
    assert torch.equal(slots.read(last), random_cache(7, seed=2))


def test_rows_that_stand_in_front_already_do_not_move() -> None:
    slots = empty_slots()
    rows = joined(slots, 1, 2, 3, 4)
    slots.arrange([rows[1], rows[0]])
    assert [slots.slot(row) for row in rows] == [0, 1, 2, 3]


def test_arranging_moves_no_more_rows_than_it_must() -> None:
    slots = empty_slots()
    rows = joined(slots, 1, 2, 3, 4)
    slots.arrange([rows[0], rows[3]])
    assert [slots.slot(row) for row in rows] == [0, 3, 2, 1]


def test_rows_are_told_apart_by_identity() -> None:
    slots = empty_slots()
    one, other = joined(slots, 2, 2)
    assert one == other
    assert (slots.slot(one), slots.slot(other)) == (0, 1)
    assert not slots.holds(HeldRow(2))
    slots.leave(other)
    assert (slots.holds(one), slots.holds(other)) == (True, False)


def test_nothing_is_allocated_before_the_first_row() -> None:
    slots = empty_slots()
    assert (len(slots), slots.capacity, slots.version, slots.keys) == (0, 0, 0, [])


@pytest.mark.parametrize(
    ("asked", "capacity"),
    [
        (1, FIRST_CAPACITY),
        (FIRST_CAPACITY, FIRST_CAPACITY),
        (FIRST_CAPACITY + 1, 2 * FIRST_CAPACITY),
        (2 * FIRST_CAPACITY + 1, MAX_TOKENS),
        (MAX_TOKENS, MAX_TOKENS),
        (MAX_TOKENS + 1, MAX_TOKENS + 1),
    ],
)
def test_the_room_doubles_up_to_the_longest_row(asked: int, capacity: int) -> None:
    slots = empty_slots()
    slots.join(HeldRow(), asked)
    assert slots.capacity == capacity


def test_a_short_context_takes_no_more_than_it_needs() -> None:
    slots = empty_slots(max_tokens=32)
    slots.join(HeldRow(), 20)
    assert slots.capacity == 32


def test_room_is_not_taken_back_from_a_row_longer_than_was_said() -> None:
    slots = empty_slots(max_tokens=8)
    row, tokens = HeldRow(), FIRST_CAPACITY + 1
    slots.join(row, tokens)
    feed(slots, row, random_cache(tokens))
    slots.join(HeldRow(), 4)
    assert torch.equal(slots.read(row), random_cache(tokens))


def test_the_version_changes_when_the_tensors_do() -> None:
    slots = empty_slots()
    versions = []
    for tokens in (10, 10, 10, 10, 10, FIRST_CAPACITY + 1, FIRST_CAPACITY + 2):
        slots.join(HeldRow(), tokens)
        versions.append(slots.version)
    assert versions == [1, 2, 3, 3, 4, 5, 5]


def test_a_slot_that_was_left_is_used_again() -> None:
    slots = empty_slots()
    one, _ = joined(slots, 5, 5)
    before = list(slots.keys)
    for _ in range(5):
        slots.leave(one)
        slots.join(one, 5)
    assert all(old is new for old, new in zip(before, slots.keys, strict=True))


def test_memory_that_nobody_wrote_is_zero() -> None:
    """A masked position may be read, and zero times NaN is NaN."""
    slots = empty_slots()
    [row] = joined(slots, 3)
    assert not slots.keys[0][slots.slot(row), :, 3:].any()
    slots.join(HeldRow(), MAX_TOKENS)
    assert not slots.values[1][slots.slot(row), :, 3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_has_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    slots = KvSlots(shape(dtype), MAX_TOKENS)
    row, saved = HeldRow(), random_cache(4).to(dtype)
    slots.join(row, 4)
    slots.write(row, saved)
    row.cached = 4
    slots.join(HeldRow(), MAX_TOKENS)
    assert slots.read(row).dtype == dtype
    assert torch.equal(slots.read(row), saved)

"""Adapters by name: read when first used, let go when others need the room, never under a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.errors import AdapterError, ModelNotFound
from polymath.experts import AdapterFile
from polymath.experts.adapter_bank import AdapterBank
from polymath.experts.lora_weights import LoraWeights
from tests.experts.test_adapter import BASE, DOWN, factors, write_adapter

NAMES = ("math", "law", "coding", "health")

uses = st.lists(st.sampled_from(NAMES), max_size=20)


class Shelf:
    """Adapter folders on disk, and a list of the names that were read from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: list[str] = []

    def open(self, max_loaded: int, names: Iterable[str] = NAMES) -> AdapterBank:
        bank = AdapterBank(BASE, self._read, max_loaded)
        for name in names:
            bank.add(name, write_adapter(self.folder / name))
        return bank

    def _read(self, name: str, file: AdapterFile) -> LoraWeights:
        self.read.append(name)
        return LoraWeights(name, {"all": file.rank}, {}, {})


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture(scope="module")
def lasting_shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("adapters"))


def use(bank: AdapterBank, *names: str) -> list[LoraWeights]:
    return [bank.weights(bank.find(name)) for name in names]


@given(used=uses, max_loaded=st.integers(1, 5))
def test_the_most_recently_used_are_in_memory_and_the_others_are_read_again(
    lasting_shelf: Shelf, used: list[str], max_loaded: int
) -> None:
    bank = lasting_shelf.open(max_loaded)
    lasting_shelf.read.clear()
    recent: list[str] = []
    expected: list[str] = []
    for name in used:
        if name not in recent:
            expected.append(name)
        recent = [*(other for other in recent if other != name), name][-max_loaded:]
        [weights] = use(bank, name)
        assert weights.name == name
        assert bank.loaded == tuple(recent)
    assert lasting_shelf.read == expected
    assert bank.names == NAMES


def test_weights_are_read_when_they_are_first_used(shelf: Shelf) -> None:
    bank = shelf.open(4)
    assert (bank.names, bank.loaded, shelf.read) == (NAMES, (), [])
    bank.find("math")
    assert shelf.read == []
    first, second = use(bank, "math", "math")
    assert first is second
    assert (bank.loaded, shelf.read) == (("math",), ["math"])


def test_the_least_recently_used_makes_room(shelf: Shelf) -> None:
    bank = shelf.open(2)
    use(bank, "math", "law", "math", "coding")
    assert bank.loaded == ("math", "coding")
    assert bank.find("law").weights is None


def test_what_was_let_go_is_read_again(shelf: Shelf) -> None:
    bank = shelf.open(1)
    before, _, after = use(bank, "math", "law", "math")
    assert before is not after
    assert shelf.read == ["math", "law", "math"]


def test_a_row_keeps_the_weights_that_were_let_go(shelf: Shelf) -> None:
    bank = shelf.open(1)
    held, _ = use(bank, "math", "law")
    assert (held.name, held.widths) == ("math", {"all": 2})


def test_a_new_adapter_takes_the_place_of_one_of_its_name(shelf: Shelf) -> None:
    bank = shelf.open(4)
    [old] = use(bank, "math")
    before = bank.find("math")
    bank.add("math", write_adapter(shelf.folder / "better", factors(DOWN, 5, 12, 6), r=5))
    assert bank.loaded == ()
    assert bank.find("math") is not before
    [new] = use(bank, "math")
    assert (old.widths, new.widths) == ({"all": 2}, {"all": 5})
    assert sorted(bank.names) == sorted(NAMES)


def test_an_adapter_that_cannot_be_used_does_not_replace_one(shelf: Shelf) -> None:
    bank = shelf.open(4)
    [before] = use(bank, "math")
    with pytest.raises(AdapterError):
        bank.add("math", shelf.folder / "nowhere")
    assert use(bank, "math") == [before]


def test_an_adapter_that_cannot_be_used_is_not_added(shelf: Shelf) -> None:
    bank = shelf.open(4, [])
    with pytest.raises(AdapterError, match="nowhere: no such adapter folder"):
        bank.add("math", shelf.folder / "nowhere")
    assert bank.names == ()


def test_a_removed_adapter_is_gone_from_memory(shelf: Shelf) -> None:
    bank = shelf.open(4)
    use(bank, "math", "law")
    bank.remove("math")
    assert (bank.names, bank.loaded) == (("law", "coding", "health"), ("law",))
    with pytest.raises(ModelNotFound):
        bank.find("math")


def test_a_row_that_waits_survives_the_removal_of_its_adapter(shelf: Shelf) -> None:
    """It was submitted before the removal and asks for the weights when it starts."""
    bank = shelf.open(4)
    waiting = bank.find("math")
    bank.remove("math")
    assert bank.weights(waiting).name == "math"
    assert (bank.loaded, waiting.weights) == ((), None)


def test_a_row_that_waits_gets_the_adapter_that_it_was_submitted_with(shelf: Shelf) -> None:
    bank = shelf.open(4)
    waiting = bank.find("math")
    bank.add("math", write_adapter(shelf.folder / "better", factors(DOWN, 5, 12, 6), r=5))
    assert bank.weights(waiting).widths == {"all": 2}
    assert use(bank, "math")[0].widths == {"all": 5}
    assert bank.loaded == ("math",)


def test_an_adapter_can_come_back_after_its_removal(shelf: Shelf) -> None:
    bank = shelf.open(4)
    bank.remove("math")
    bank.add("math", shelf.folder / "math")
    assert use(bank, "math")[0].name == "math"


@pytest.mark.parametrize("name", ["maths", "", "Math", "smollm2"])
def test_an_unknown_name_is_no_model(shelf: Shelf, name: str) -> None:
    bank = shelf.open(4)
    for ask in (bank.find, bank.remove):
        with pytest.raises(ModelNotFound) as refused:
            ask(name)
        assert repr(name) in refused.value.message
        assert (refused.value.param, refused.value.status) == ("model", 404)


def test_an_adapter_is_not_removed_twice(shelf: Shelf) -> None:
    bank = shelf.open(4)
    bank.remove("math")
    with pytest.raises(ModelNotFound):
        bank.remove("math")


def test_weights_that_cannot_be_read_are_tried_again(tmp_path: Path) -> None:
    attempts: list[str] = []

    def read_at_the_second_attempt(name: str, file: AdapterFile) -> LoraWeights:
        attempts.append(name)
        if len(attempts) == 1:
            raise OSError("the disk is away")
        return LoraWeights(name, {}, {}, {})

    bank = AdapterBank(BASE, read_at_the_second_attempt, 4)
    bank.add("math", write_adapter(tmp_path / "math"))
    with pytest.raises(OSError, match="the disk is away"):
        use(bank, "math")
    assert bank.loaded == ()
    assert use(bank, "math")[0].name == "math"


def test_several_threads_read_an_adapter_once(tmp_path: Path) -> None:
    reads: list[str] = []

    def read_slowly(name: str, file: AdapterFile) -> LoraWeights:
        reads.append(name)
        time.sleep(0.02)
        return LoraWeights(name, {}, {}, {})

    bank = AdapterBank(BASE, read_slowly, 4)
    bank.add("math", write_adapter(tmp_path / "math"))
    found: list[LoraWeights] = []
    threads = [threading.Thread(target=lambda: found.extend(use(bank, "math"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == ["math"]
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_an_adapter_of_a_module_that_the_network_leaves_out_is_refused(shelf: Shelf) -> None:
    """Else it would answer as the base model does, without a word."""
    folder = write_adapter(shelf.folder / "math")
    bank = AdapterBank(BASE, shelf._read, 4, modules=())
    with pytest.raises(AdapterError, match="cannot be adapted on the int8 path"):
        bank.add("math", folder)
    assert bank.names == ()

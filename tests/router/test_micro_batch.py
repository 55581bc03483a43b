"""Many threads, one encoder: every thread gets the vector of its own text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.router import SentenceEncoder
from polymath.router.micro_batch import CACHED_VECTORS, LONGEST_CACHED, MAX_BATCH, MicroBatcher
from tests.router.conftest import Floats

PATIENCE = 10
"""Seconds until a thread counts as stuck."""

THREADS = 24


def vector_of(text: str) -> Floats:
    """Different for different texts."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass")[:64].ljust(64), np.uint8).astype(
        np.float32
    )


class FakeEncoder:
    """Stands for the sentence encoder: remembers its batches, waits or fails when told to."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.inside = 0
        self.most_inside = 0
        self.error: Exception | None = None

    def encode(self, texts: Sequence[str]) -> Floats:
        self.batches.append(list(texts))
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.entered.set()
        assert self.free.wait(PATIENCE)
        self.inside -= 1
        if self.error is not None:
            raise self.error
        return np.stack([vector_of(text) for text in texts])

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def batcher(encoder: FakeEncoder) -> MicroBatcher:
    return MicroBatcher(encoder)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def queue_behind(
    batcher: MicroBatcher, encoder: FakeEncoder, pool: ThreadPoolExecutor, texts: Sequence[str]
) -> list[Future[list[Floats]]]:
    """One request keeps the encoder busy until the others stand in the queue."""
    encoder.free.clear()
    first = pool.submit(batcher.vectors, ["first"])
    assert encoder.entered.wait(PATIENCE)
    others = [pool.submit(batcher.vectors, [text]) for text in texts]
    wait_until(lambda: len(batcher._queue) == len(texts))
    return [first, *others]


def same(vector: Floats, text: str) -> bool:
    return bool(np.array_equal(vector, vector_of(text)))


def test_a_lone_request_is_encoded_at_once(batcher: MicroBatcher, encoder: FakeEncoder) -> None:
    (vector,) = batcher.vectors(["a"])
    assert same(vector, "a")
    assert encoder.batches == [["a"]]


def test_vectors_come_in_the_order_of_the_texts(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    texts = ["c", "a", "b"]
    assert all(map(same, batcher.vectors(texts), texts))
    assert encoder.batches == [texts]


def test_no_texts_do_not_wake_the_encoder(batcher: MicroBatcher, encoder: FakeEncoder) -> None:
    assert batcher.vectors([]) == []
    assert encoder.batches == []


@given(calls=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=20), max_size=6))
def test_whatever_was_asked_before_every_text_has_its_own_vector(calls: list[list[str]]) -> None:
    encoder = FakeEncoder()
    batcher = MicroBatcher(encoder)
    for texts in calls:
        vectors = batcher.vectors(texts)
        assert len(vectors) == len(texts)
        assert all(map(same, vectors, texts))
    assert sorted(encoder.texts) == sorted({text for texts in calls for text in texts})


def test_a_text_that_is_repeated_in_a_request_is_encoded_once(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    assert all(map(same, batcher.vectors(["a", "b", "a"]), ["a", "b", "a"]))
    assert encoder.batches == [["a", "b"]]


@pytest.mark.parametrize("texts", [1, MAX_BATCH, MAX_BATCH + 1, 3 * MAX_BATCH + 5])
def test_a_request_of_many_texts_is_split(
    batcher: MicroBatcher, encoder: FakeEncoder, texts: int
) -> None:
    names = [f"text {index}" for index in range(texts)]
    assert all(map(same, batcher.vectors(names), names))
    assert encoder.texts == names
    assert max(map(len, encoder.batches)) <= MAX_BATCH


def test_those_who_come_while_the_encoder_is_busy_form_a_batch(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    names = [f"text {index}" for index in range(10)]
    with ThreadPoolExecutor(THREADS) as pool:
        futures = queue_behind(batcher, encoder, pool, names)
        encoder.free.set()
        found = [future.result(PATIENCE)[0] for future in futures]
    assert all(map(same, found, ["first", *names]))
    assert encoder.batches[0] == ["first"]
    assert sorted(encoder.batches[1]) == sorted(names)
    assert len(encoder.batches) == 2


def test_a_queue_that_is_longer_than_a_batch_takes_several(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    names = [f"text {index}" for index in range(MAX_BATCH + 4)]
    with ThreadPoolExecutor(THREADS) as pool:
        futures = queue_behind(batcher, encoder, pool, names)
        encoder.free.set()
        found = [future.result(PATIENCE)[0] for future in futures]
    assert all(map(same, found, ["first", *names]))
    assert [len(batch) for batch in encoder.batches] == [1, MAX_BATCH, 4]


def test_every_thread_gets_the_vectors_of_its_own_texts(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    def ask(thread: int) -> bool:
        requests = [[f"{thread}/{call}/{text}" for text in range(call % 4)] for call in range(50)]
        return all(all(map(same, batcher.vectors(texts), texts)) for texts in requests)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(ask, range(THREADS), timeout=PATIENCE))
    assert encoder.most_inside == 1
    assert max(map(len, encoder.batches)) <= MAX_BATCH


def test_threads_that_ask_the_same_all_get_it(batcher: MicroBatcher) -> None:
    texts = ["a", "b", "c"]
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda _: batcher.vectors(texts), range(200), timeout=PATIENCE))
    assert all(all(map(same, vectors, texts)) for vectors in results)


def test_an_error_reaches_whoever_asked_and_the_next_call_works(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    encoder.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        batcher.vectors(["a"])
    encoder.error = None
    assert same(batcher.vectors(["a"])[0], "a")


def test_an_error_reaches_every_waiter_and_the_next_call_works(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    names = [f"text {index}" for index in range(MAX_BATCH + 2)]
    with ThreadPoolExecutor(THREADS) as pool:
        futures = queue_behind(batcher, encoder, pool, names)
        encoder.error = RuntimeError("out of memory")
        encoder.free.set()
        errors = [future.exception(PATIENCE) for future in futures]
        assert [str(error) for error in errors] == ["out of memory"] * len(futures)
        encoder.error = None
        assert same(batcher.vectors(["text 0"])[0], "text 0")


def test_an_encoder_that_gives_too_few_vectors_leaves_nobody_waiting() -> None:
    class Short(FakeEncoder):
        def encode(self, texts: Sequence[str]) -> Floats:
            return super().encode(texts)[1:]

    encoder = Short()
    batcher = MicroBatcher(encoder)
    with ThreadPoolExecutor(THREADS) as pool:
        futures = queue_behind(batcher, encoder, pool, ["a", "b", "c"])
        encoder.free.set()
        errors = [future.exception(PATIENCE) for future in futures]
    assert all(isinstance(error, ValueError) for error in errors)


def test_a_request_of_many_texts_fails_whole(batcher: MicroBatcher, encoder: FakeEncoder) -> None:
    encoder.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        batcher.vectors([f"text {index}" for index in range(2 * MAX_BATCH)])
    assert not batcher._queue


def test_a_text_of_late_is_not_encoded_again(batcher: MicroBatcher, encoder: FakeEncoder) -> None:
    (first,), (again,) = batcher.vectors(["a"]), batcher.vectors(["a"])
    np.testing.assert_array_equal(first, again)
    assert encoder.batches == [["a"]]


def test_only_what_is_new_is_encoded(batcher: MicroBatcher, encoder: FakeEncoder) -> None:
    batcher.vectors(["a", "b"])
    assert all(map(same, batcher.vectors(["a", "c", "b"]), ["a", "c", "b"]))
    assert encoder.batches == [["a", "b"], ["c"]]


def test_what_is_remembered_is_answered_while_the_encoder_is_busy(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    batcher.vectors(["a"])
    with ThreadPoolExecutor(2) as pool:
        encoder.entered.clear()
        encoder.free.clear()
        busy = pool.submit(batcher.vectors, ["b"])
        assert encoder.entered.wait(PATIENCE)
        assert same(pool.submit(batcher.vectors, ["a"]).result(PATIENCE)[0], "a")
        assert not busy.done()
        encoder.free.set()
        assert same(busy.result(PATIENCE)[0], "b")


@pytest.mark.parametrize(("characters", "calls"), [(LONGEST_CACHED, 1), (LONGEST_CACHED + 1, 2)])
def test_long_texts_are_not_remembered(
    batcher: MicroBatcher, encoder: FakeEncoder, characters: int, calls: int
) -> None:
    for _ in range(2):
        batcher.vectors(["x" * characters])
    assert len(encoder.batches) == calls


def test_the_texts_that_were_not_asked_for_longest_are_forgotten(
    batcher: MicroBatcher, encoder: FakeEncoder
) -> None:
    batcher.vectors(["kept", "old"])
    batcher.vectors([f"text {index}" for index in range(CACHED_VECTORS - 2)])
    batcher.vectors(["kept"])
    batcher.vectors(["one more"])
    encoder.batches.clear()
    batcher.vectors(["kept"])
    assert encoder.batches == []
    batcher.vectors(["old"])
    assert encoder.batches == [["old"]]
    assert len(batcher._cache) == CACHED_VECTORS


def test_an_error_is_not_remembered(batcher: MicroBatcher, encoder: FakeEncoder) -> None:
    encoder.error = RuntimeError("out of memory")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            batcher.vectors(["a"])
    assert encoder.batches == [["a"], ["a"]]


@given(texts=st.lists(st.text(st.characters(exclude_categories=())), max_size=20))
@settings(max_examples=20)
def test_threads_on_a_real_encoder_get_what_it_gives_alone(
    tiny: SentenceEncoder, texts: list[str]
) -> None:
    batcher = MicroBatcher(tiny)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: batcher.vectors([text])[0], texts, timeout=PATIENCE))
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(vector, tiny.encode([text])[0], atol=1e-6)

"""Streaming text: the pieces add up to what would be given at once, and nothing passes a stop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polymath.experts import AnswerText

fragments = st.lists(st.binary(max_size=6), max_size=12)
few_letters = st.text("abc", max_size=24)
stop_strings = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def pieces(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The data cut into pieces of the sizes given; what is left over comes last."""
    cut, start = [], 0
    for size in sizes:
        cut.append(data[start : start + size])
        start += size
    return [*cut, data[start:]]


def streamed(parts: Sequence[bytes], stop: Sequence[str] = (), *, strip_space: bool = False) -> str:
    text = AnswerText(stop, strip_space=strip_space)
    return "".join([*(text.push(part) for part in parts), text.finish()])


def before_first_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


@given(fragments)
def test_the_pieces_add_up_to_the_decoded_whole(parts: list[bytes]) -> None:
    assert streamed(parts) == b"".join(parts).decode("utf-8", "replace")


@given(st.text(), st.lists(st.integers(0, 5)))
def test_a_text_survives_any_cut(text: str, sizes: list[int]) -> None:
    assert streamed(pieces(text.encode(), sizes)) == text


@given(few_letters, stop_strings, st.lists(st.integers(0, 5)))
@example(text="abcd", stop=["abcd", "bc"], sizes=[1, 1, 1, 1])
@example(text="aabaa", stop=["ab", "b"], sizes=[1, 1, 1, 1])
def test_the_answer_ends_at_its_first_stop(text: str, stop: list[str], sizes: list[int]) -> None:
    assert streamed(pieces(text.encode(), sizes), stop) == before_first_stop(text, stop)


@given(few_letters, stop_strings, st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
@example(text="abca", stop=["abca", "bc"], sizes=[1, 1, 1], others=[])
def test_the_answer_does_not_depend_on_how_it_is_cut(
    text: str, stop: list[str], sizes: list[int], others: list[int]
) -> None:
    data = text.encode()
    assert streamed(pieces(data, sizes), stop) == streamed(pieces(data, others), stop)


@given(fragments, stop_strings)
def test_no_stop_is_ever_shown(parts: list[bytes], stop: list[str]) -> None:
    shown = streamed(parts, stop)
    assert not any(string in shown for string in stop)


@given(few_letters, stop_strings)
def test_what_was_shown_is_never_taken_back(text: str, stop: list[str]) -> None:
    answer = AnswerText(stop)
    shown = ""
    for character in text:
        shown += answer.push(character.encode())
        assert before_first_stop(text, stop).startswith(shown)


@given(few_letters, stop_strings)
def test_it_says_whether_it_was_stopped(text: str, stop: list[str]) -> None:
    answer = AnswerText(stop)
    answer.push(text.encode())
    answer.finish()
    assert answer.stopped == any(string in text for string in stop)


@given(fragments, stop_strings)
def test_nothing_comes_after_a_stop(parts: list[bytes], stop: list[str]) -> None:
    answer = AnswerText(["abc"])
    answer.push(b"x abc")
    assert [answer.push(part) for part in parts] == [""] * len(parts)
    assert answer.finish() == ""


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    answer = AnswerText(["END"])
    assert [answer.push(b) for b in (b"The E", b"N", b"t", b"E", b"ND")] == [
        "The ",
        "",
        "ENt",
        "",
        "",
    ]
    assert answer.stopped


def test_what_was_held_back_comes_at_the_end() -> None:
    answer = AnswerText(["END"])
    assert answer.push(b"The EN") == "The "
    assert answer.finish() == "EN"
    assert not answer.stopped


def test_a_character_comes_when_it_is_whole() -> None:
    answer = AnswerText()
    assert [answer.push(bytes([byte])) for byte in "é👍".encode()] == ["", "é", "", "", "", "👍"]


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    assert streamed(["👍".encode()[:3]]) == "\ufffd"


def test_a_stop_of_several_bytes_is_found_across_pieces() -> None:
    assert streamed([bytes([byte]) for byte in "ja 👍 nein".encode()], ["👍"]) == "ja "


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([b" Hello", b" you"], "Hello you"),
        ([b"Hello", b" you"], "Hello you"),
        ([b"", b" Hello"], "Hello"),
        ([b"  two"], " two"),
        ([b" ", b" two"], " two"),
        ([b" "], ""),
        ([], ""),
    ],
)
def test_one_space_at_the_beginning_is_stripped(parts: list[bytes], text: str) -> None:
    assert streamed(parts, strip_space=True) == text


def test_spaces_stay_unless_they_are_to_be_stripped() -> None:
    assert streamed([b" Hello"]) == " Hello"


@given(st.text("a ", max_size=8), st.lists(st.integers(0, 3)))
def test_stripping_is_the_same_however_it_is_cut(text: str, sizes: list[int]) -> None:
    parts = pieces(text.encode(), sizes)
    assert streamed(parts, strip_space=True) == text.removeprefix(" ")

"""Conversations as tokens with the answers marked, in batches, and the loss on the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.training import ChatRow, ChatTurn
from polymath.training.examples import (
    Example,
    answer_losses,
    collate,
    encode_chat,
    length_batches,
)

IGNORED = -100
PLENTY = 10_000

texts = st.text(max_size=20)
lengths = st.lists(st.integers(1, 40), max_size=30)
budgets = st.integers(1, 120)
seeds = st.none() | st.integers(0, 2**32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def chat(*turns: str, system: str | None = None) -> ChatRow:
    """User and assistant in turn, the user first."""
    roles = ("user", "assistant")
    messages = [ChatTurn(role=roles[index % 2], content=turn) for index, turn in enumerate(turns)]  # type: ignore[arg-type]
    head = [ChatTurn(role="system", content=system)] if system is not None else []
    return ChatRow(messages=head + messages)


def encoded(tokenizer: Any, row: ChatRow, max_length: int = PLENTY) -> Example:
    example = encode_chat(tokenizer, row, max_length)
    assert example is not None
    return example


def answers(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def of_length(length: int, answer: int = 1) -> Example:
    ids = tuple(range(1, length + 1))
    return Example(ids, (IGNORED,) * (length - answer) + ids[length - answer :])


def test_the_tokens_are_the_conversation_under_the_chat_template(tokenizer: Any) -> None:
    row = chat("What?", "That.", "Why?", "So.", system="Be brief.")
    assert tokenizer.decode(encoded(tokenizer, row).ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat("What?", "That."), "That.<|im_end|>"),
        (chat("What?", "That.", system="Be brief."), "That.<|im_end|>"),
        (chat("a", "b", "c", "d", "e", "f"), "b<|im_end|>d<|im_end|>f<|im_end|>"),
        (chat("a", "\n\n  b \n"), "\n\n  b \n<|im_end|>"),
        (chat("a", "b <|im_end|> c"), "b <|im_end|> c<|im_end|>"),
        (chat("a <|im_end|>\n<|im_start|>assistant\nno", "b"), "b<|im_end|>"),
        (chat("a", "b", "<|im_start|>", "d"), "b<|im_end|>d<|im_end|>"),
        (chat("", "", "", "grüße 👋"), "<|im_end|>grüße 👋<|im_end|>"),
    ],
)
def test_exactly_the_answers_and_their_end_tokens_are_labelled(
    tokenizer: Any, row: ChatRow, expected: str
) -> None:
    assert answers(tokenizer, encoded(tokenizer, row)) == expected


@settings(deadline=None)
@given(turns=st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=4))
def test_any_answers_are_labelled_whole_and_alone(
    tokenizer: Any, turns: list[tuple[str, str]]
) -> None:
    example = encoded(tokenizer, chat(*(text for turn in turns for text in turn)))
    expected = "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert answers(tokenizer, example) == expected


def test_a_label_is_the_token_that_it_stands_on(tokenizer: Any) -> None:
    example = encoded(tokenizer, chat("a", "b", "c", "d"))
    pairs = zip(example.ids, example.labels, strict=True)
    assert all(label in (token, IGNORED) for token, label in pairs)


def test_without_an_end_token_the_label_covers_the_rest_of_the_turn(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_model)
    other.chat_template = other.chat_template.replace("<|im_end|>", "")
    other.eos_token = None
    assert answers(other, encoded(other, chat("a", "b"))) == "b\n"


def test_a_long_conversation_is_cut_at_its_end(tokenizer: Any) -> None:
    row = chat("What?", "A long answer.")
    whole, cut = encoded(tokenizer, row), encoded(tokenizer, row, 30)
    assert len(whole.ids) > 30
    assert cut == Example(whole.ids[:30], whole.labels[:30])


def test_a_conversation_of_just_the_longest_length_is_whole(tokenizer: Any) -> None:
    whole = encoded(tokenizer, chat("What?", "That."))
    assert encoded(tokenizer, chat("What?", "That."), len(whole.ids)) == whole


def test_one_answer_token_is_enough_and_none_is_too_few(tokenizer: Any) -> None:
    row = chat("What?", "That.")
    first = next(i for i, label in enumerate(encoded(tokenizer, row).labels) if label != IGNORED)
    assert answers(tokenizer, encoded(tokenizer, row, first + 1)) == "T"
    assert encode_chat(tokenizer, row, first) is None


@settings(deadline=None)
@given(lengths=lengths, budget=budgets, seed=seeds)
def test_each_example_is_in_exactly_one_batch(
    lengths: list[int], budget: int, seed: int | None
) -> None:
    batches = list(length_batches([of_length(n) for n in lengths], budget, seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@settings(deadline=None)
@given(lengths=lengths, budget=budgets, seed=seeds)
def test_a_padded_batch_is_within_the_budget_unless_one_example_is_not(
    lengths: list[int], budget: int, seed: int | None
) -> None:
    for batch in length_batches([of_length(n) for n in lengths], budget, seed):
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= budget or len(batch) == 1


@settings(deadline=None)
@given(lengths=lengths, budget=budgets, seed=seeds)
def test_the_same_seed_gives_the_same_batches(
    lengths: list[int], budget: int, seed: int | None
) -> None:
    examples = [of_length(n) for n in lengths]
    first = list(length_batches(examples, budget, seed))
    assert first == list(length_batches(examples, budget, seed))


def test_without_a_seed_batches_go_from_short_to_long() -> None:
    examples = [of_length(n) for n in (5, 1, 3, 1, 4)]
    assert list(length_batches(examples, 6)) == [[1, 3], [2], [4], [0]]


def test_a_batch_may_fill_its_budget_to_the_last_token() -> None:
    assert list(length_batches([of_length(3)] * 4, 6)) == [[0, 1], [2, 3]]


def test_another_seed_gives_another_order() -> None:
    examples = [of_length(1 + n % 7) for n in range(50)]
    orders = {str(list(length_batches(examples, 20, seed))) for seed in range(5)}
    assert len(orders) == 5


def test_batches_leave_the_random_numbers_of_others_alone() -> None:
    import random

    random.seed(0)
    expected = random.random()
    random.seed(0)
    list(length_batches([of_length(3)] * 9, 6, seed=1))
    assert random.random() == expected


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate([of_length(3), of_length(1)], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 3], [1, IGNORED, IGNORED]]


@settings(deadline=None)
@given(lengths=lengths.filter(bool))
def test_every_tensor_of_a_batch_has_its_shape(lengths: list[int]) -> None:
    batch = collate((of_length(n) for n in lengths), pad_id=0)
    for tensor in batch.values():
        assert tensor.shape == (len(lengths), max(lengths))
        assert tensor.dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == lengths


def rows_of_different_lengths(tokenizer: Any) -> list[Example]:
    rows = (chat("a", "b"), chat("What?", "A longer answer.", "More?", "Yes."))
    return [*(encoded(tokenizer, row) for row in rows), of_length(20, answer=7)]


def test_the_mean_answer_loss_is_the_loss_of_transformers(model: Any, tokenizer: Any) -> None:
    batch = collate(rows_of_different_lengths(tokenizer), tokenizer.pad_token_id)
    with torch.inference_mode():
        ours, theirs = answer_losses(model, batch).mean(), model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_there_is_one_loss_for_each_answer_token(model: Any, tokenizer: Any) -> None:
    examples = rows_of_different_lengths(tokenizer)
    tokens = sum(label != IGNORED for example in examples for label in example.labels)
    with torch.inference_mode():
        losses = answer_losses(model, collate(examples, tokenizer.pad_token_id))
    assert losses.shape == (tokens,)
    assert (losses > 0).all()


def test_a_batch_gives_each_answer_the_losses_that_it_has_alone(model: Any, tokenizer: Any) -> None:
    examples, pad = rows_of_different_lengths(tokenizer), tokenizer.pad_token_id
    with torch.inference_mode():
        together = answer_losses(model, collate(examples, pad))
        alone = [answer_losses(model, collate([example], pad)) for example in examples]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_what_padding_is_made_of_changes_no_loss(model: Any, tokenizer: Any) -> None:
    examples = rows_of_different_lengths(tokenizer)
    with torch.inference_mode():
        first, second = (answer_losses(model, collate(examples, pad)) for pad in (0, 77))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)

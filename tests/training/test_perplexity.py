"""Perplexity of answers, against the sum that one writes down by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polymath.training import ChatRow, Perplexity, measure_perplexity
from polymath.training.examples import Example, encode_chat

PAD = 0
ANSWERS = ("yes", "It depends on the contract.", "4", "No, because x is not defined.", "42")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = []
    for answer in ANSWERS:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        example = encode_chat(tokenizer, ChatRow.model_validate({"messages": turns}), 512)
        assert example is not None
        encoded.append(example)
    return encoded


def losses_by_hand(model: Any, example: Example) -> list[float]:
    """-log p(token | the tokens before it) for every answer token, one at a time."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
    return [
        -log_probs[place - 1, token].item()
        for place, token in enumerate(example.labels)
        if token >= 0
    ]


def test_perplexity_is_the_exponential_of_the_mean_loss(
    model: Any, examples: list[Example]
) -> None:
    losses = [loss for example in examples for loss in losses_by_hand(model, example)]
    measured = measure_perplexity(model, examples, PAD)
    assert measured.tokens == len(losses)
    assert measured.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert measured.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_long_answers_weigh_more_than_short_ones(model: Any, examples: list[Example]) -> None:
    parts = [measure_perplexity(model, [example], PAD) for example in examples]
    tokens = sum(part.tokens for part in parts)
    weighted = sum(part.loss * part.tokens for part in parts) / tokens
    assert measure_perplexity(model, examples, PAD).loss == pytest.approx(weighted, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 70, 150, 100_000])
def test_perplexity_does_not_depend_on_the_size_of_the_batches(
    model: Any, examples: list[Example], batch_tokens: int
) -> None:
    usual = measure_perplexity(model, examples, PAD)
    other = measure_perplexity(model, examples, PAD, batch_tokens)
    assert other.tokens == usual.tokens
    assert other.loss == pytest.approx(usual.loss, abs=1e-5)


def test_perplexity_does_not_depend_on_the_order(model: Any, examples: list[Example]) -> None:
    forwards = measure_perplexity(model, examples, PAD)
    backwards = measure_perplexity(model, examples[::-1], PAD)
    assert backwards.loss == pytest.approx(forwards.loss, abs=1e-5)


def test_measuring_twice_gives_the_same_to_the_last_bit(
    model: Any, examples: list[Example]
) -> None:
    first = measure_perplexity(model, examples, PAD)
    assert measure_perplexity(model, examples, PAD) == first


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    tiny_model: Path, examples: list[Example]
) -> None:
    from transformers import AutoModelForCausalLM

    uniform = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    measured = measure_perplexity(uniform, examples, PAD)
    assert measured.value == pytest.approx(uniform.config.vocab_size, rel=1e-5)


def test_dropout_is_off_while_measuring(model: Any, examples: list[Example]) -> None:
    model.train()
    measure_perplexity(model, examples, PAD)
    assert not model.training


def test_measuring_leaves_no_gradients(model: Any, examples: list[Example]) -> None:
    measure_perplexity(model, examples, PAD)
    assert all(weight.grad is None for weight in model.parameters())


def test_progress_counts_every_example(model: Any, examples: list[Example]) -> None:
    steps: list[int] = []
    measure_perplexity(model, examples, PAD, batch_tokens=150, advance=steps.append)
    assert sum(steps) == len(examples)
    assert len(steps) > 1


def test_a_loss_of_zero_is_a_perplexity_of_one() -> None:
    assert Perplexity(loss=0.0, tokens=1).value == 1.0

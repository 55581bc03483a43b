"""Adapters that answer together: alone each is itself, and a mixture is the sum of its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.training import ChatRow, encode_chat
from polymath.training.ensemble_loss import AdapterEnsemble
from polymath.training.examples import IGNORED, Example, answer_losses, collate, padding_id
from tests.conftest import write_random_adapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANSWERS = ("blue", "No.", "It is 42, and always was.", "x = 3", "Perhaps.", "é")
TOLERANCE = 1e-3
"""In nats an answer, of which float32 keeps that much over the tokens of the longest."""

Weights = Mapping[str | None, float]

pytestmark = pytest.mark.usefixtures("one_thread")


def row(index: int, answer: str) -> ChatRow:
    question = {"role": "user", "content": f"Question {'?' * index}"}
    return ChatRow.model_validate(
        {"messages": [question, {"role": "assistant", "content": answer}]}
    )


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random ones, and the first under another name."""
    folder = tmp_path_factory.mktemp("adapters")
    one, two = (write_random_adapter(folder / f"{n}", tiny_model, seed=n) for n in (1, 2))
    return {"one": one, "two": two, "twin": one}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    encoded = [encode_chat(tokenizer, row(*place), 200) for place in enumerate(ANSWERS)]
    return [example for example in encoded if example is not None]


@pytest.fixture(scope="module")
def ensemble(tiny_model: Path, adapters: dict[str, Path], tokenizer: Any) -> AdapterEnsemble:
    return AdapterEnsemble(tiny_model, adapters, padding_id(tokenizer))


@pytest.fixture(scope="module")
def alone(tiny_model: Path, adapters: dict[str, Path]) -> dict[str | None, Any]:
    """The base model, and with each adapter a model that never had another."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    adapted: dict[str | None, Any] = {
        name: PeftModel.from_pretrained(base(), str(folder)).eval()
        for name, folder in adapters.items()
    }
    return {None: base().eval(), **adapted}


def losses_alone(model: Any, examples: Sequence[Example]) -> list[float]:
    with torch.inference_mode():
        return [answer_losses(model, collate([e], 0)).sum().item() for e in examples]


def by_hand(alone: Mapping[str | None, Any], example: Example, weights: Weights) -> float:
    """The loss of the weighted sum of what each model gives for the example alone."""
    with torch.inference_mode():
        ids = torch.tensor([example.ids])
        logits = sum(weight * alone[name](ids).logits[0] for name, weight in weights.items())
        likelihood = torch.log_softmax(logits.double(), dim=-1)
    places = [place for place, label in enumerate(example.labels) if place and label != IGNORED]
    return -sum(likelihood[place - 1, example.ids[place]].item() for place in places)


def check(found: NDArray[np.float64], expected: Sequence[float]) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["one", "two", "twin", None])
def test_an_ensemble_of_one_is_that_model(
    ensemble: AdapterEnsemble,
    alone: dict[str | None, Any],
    examples: list[Example],
    name: str | None,
) -> None:
    found = ensemble.losses(examples, [{name: 1.0}] * len(examples))
    check(found, losses_alone(alone[name], examples))


def test_the_models_are_different(ensemble: AdapterEnsemble, examples: list[Example]) -> None:
    found = [
        ensemble.losses(examples, [{name: 1.0}] * len(examples)) for name in (None, "one", "two")
    ]
    assert np.abs(np.diff(found, axis=0)).mean(axis=1).min() > 100 * TOLERANCE


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_an_adapter_beside_itself_is_that_adapter(
    ensemble: AdapterEnsemble, examples: list[Example], share: float
) -> None:
    both = ensemble.losses(examples, [{"one": share, "twin": 1 - share}] * len(examples))
    check(both, ensemble.losses(examples, [{"one": 1.0}] * len(examples)).tolist())


@pytest.mark.parametrize("other", ["two", None])
def test_weights_of_one_and_nought_are_the_first(
    ensemble: AdapterEnsemble, examples: list[Example], other: str | None
) -> None:
    first = ensemble.losses(examples, [{"one": 1.0}] * len(examples))
    found = ensemble.losses(examples, [{"one": 1.0, other: 0.0}] * len(examples))
    np.testing.assert_array_equal(found, first)


@settings(max_examples=25)
@given(parts=st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_a_mixture_is_the_weighted_sum_of_the_logits(
    ensemble: AdapterEnsemble,
    alone: dict[str | None, Any],
    examples: list[Example],
    parts: list[float],
) -> None:
    shares = [part / sum(parts) for part in parts]
    weights: Weights = dict(zip((None, "one", "two"), shares, strict=True))
    found = ensemble.losses(examples, [weights] * len(examples))
    check(found, [by_hand(alone, example, weights) for example in examples])


MIXED: list[Weights] = [
    {"one": 1.0},
    {"one": 0.3, "two": 0.7},
    {None: 1.0},
    {"two": 0.2, "one": 0.8},
    {None: 0.5, "two": 0.5},
    {"two": 1.0},
]


def test_each_example_is_answered_by_its_own_adapters(
    ensemble: AdapterEnsemble, alone: dict[str | None, Any], examples: list[Example]
) -> None:
    expected = [by_hand(alone, *pair) for pair in zip(examples, MIXED, strict=True)]
    check(ensemble.losses(examples, MIXED), expected)


@settings(max_examples=15)
@given(order=st.permutations(range(len(MIXED))))
def test_the_order_does_not_matter(
    ensemble: AdapterEnsemble, examples: list[Example], order: list[int]
) -> None:
    expected = ensemble.losses(examples, MIXED)
    found = ensemble.losses([examples[i] for i in order], [MIXED[i] for i in order])
    check(found, expected[order].tolist())


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_do_not_matter(
    ensemble: AdapterEnsemble,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    batch_tokens: int,
) -> None:
    weights: list[Weights] = [{"one": i / 10, "two": 1 - i / 10} for i in range(len(examples))]
    one_by_one = [
        ensemble.losses([example], [weight]).item()
        for example, weight in zip(examples, weights, strict=True)
    ]
    monkeypatch.setattr("polymath.training.ensemble_loss.BATCH_TOKENS", batch_tokens)
    check(ensemble.losses(examples, weights), one_by_one)


def test_no_examples_have_no_losses(ensemble: AdapterEnsemble) -> None:
    assert ensemble.losses([], []).shape == (0,)


def test_progress_ends_with_all_batches_done(
    ensemble: AdapterEnsemble, examples: list[Example]
) -> None:
    steps: list[tuple[int, int]] = []
    ensemble.losses(examples, MIXED, lambda *step: steps.append(step))
    total = len(steps)
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_measuring_leaves_the_adapters_as_they_were(
    ensemble: AdapterEnsemble, examples: list[Example]
) -> None:
    """Adapters are switched on and off on one model."""
    first = ensemble.losses(examples, MIXED)
    ensemble.losses(examples, [{None: 1.0}] * len(examples))
    np.testing.assert_array_equal(ensemble.losses(examples, MIXED), first)

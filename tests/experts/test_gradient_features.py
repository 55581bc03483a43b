"""Gradients of prompts one by one, all at once: each is what autograd gives for it alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polymath.experts import (
    AdamMoments,
    GradientFeatures,
    Prompt,
    SignProjection,
    encode_prompt,
    open_features,
)
from tests.conftest import write_random_adapter

DIMENSIONS = 256
TOLERANCE = 2e-5
MOST = 200
TEXTS = ("What is the capital of France?", "sort a list", "x" * 50, "é", "Is this law in force?")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on the tiny model, none of whose factors is zero."""
    return write_random_adapter(tmp_path_factory.mktemp("adapter"), tiny_model, seed=1)


def opened(model: Path, adapter: Path, layers: int | None = None) -> tuple[GradientFeatures, Any]:
    return open_features(model, adapter, DIMENSIONS, seed=5, layers=layers)


@pytest.fixture(scope="module")
def features(tiny_model: Path, adapter: Path) -> GradientFeatures:
    return opened(tiny_model, adapter)[0]


@pytest.fixture(scope="module")
def prompts(tiny_model: Path, adapter: Path) -> list[Prompt]:
    _, tokenizer = opened(tiny_model, adapter)
    return [encode_prompt(tokenizer, asked(text), MOST) for text in TEXTS]


@pytest.fixture(scope="module")
def moments(tiny_model: Path, adapter: Path) -> AdamMoments:
    """Random ones, of the shapes of the factors."""
    random = torch.Generator().manual_seed(3)
    model = peft_model(tiny_model, adapter)
    return {
        factor: (
            torch.randn(weight.shape, generator=random) * 1e-2,
            torch.rand(weight.shape, generator=random) * 1e-4,
        )
        for factor, weight in factors(model).items()
    }


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def peft_model(model: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()


def factors(model: Any) -> dict[str, Tensor]:
    """The factors by the names that the features give them."""
    return {
        name[name.index("layers.") :].removesuffix(".default.weight"): weight
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


def by_autograd(
    model: Path, adapter: Path, prompt: Prompt, moments: AdamMoments | None = None
) -> Tensor:
    """The projected gradient of one prompt, by the textbook."""
    trained = peft_model(model, adapter)
    ids = torch.tensor([prompt.ids])
    targets = [place for place in prompt.spoken if place > 0]
    logits = trained(input_ids=ids).logits[0, [place - 1 for place in targets]]
    torch.nn.functional.cross_entropy(logits, ids[0, targets]).backward()
    projection = SignProjection(DIMENSIONS, seed=5)
    sums = projection.zeros(1)
    for factor, weight in factors(trained).items():
        assert weight.grad is not None
        step = weight.grad
        if moments is not None:
            mean, square = moments[factor]
            mean, square = 0.9 * mean + 0.1 * step, 0.999 * square + 0.001 * step**2
            step = mean / (square + 1e-8).sqrt()
        projection.add(sums, factor, step.reshape(1, -1))
    result = projection.finish(sums)[0]
    return result / result.norm()


@pytest.mark.parametrize("preconditioned", [False, True])
def test_each_is_what_autograd_gives(
    features: GradientFeatures,
    prompts: list[Prompt],
    moments: AdamMoments,
    tiny_model: Path,
    adapter: Path,
    preconditioned: bool,
) -> None:
    given = moments if preconditioned else None
    found = features.of(prompts, given)
    for row, prompt in zip(found, prompts, strict=True):
        expected = by_autograd(tiny_model, adapter, prompt, given).numpy()
        np.testing.assert_allclose(row, expected, atol=TOLERANCE)


def test_a_batch_is_its_rows_one_by_one(
    features: GradientFeatures, prompts: list[Prompt], moments: AdamMoments
) -> None:
    for given in (None, moments):
        alone = np.concatenate([features.of([prompt], given) for prompt in prompts])
        np.testing.assert_allclose(features.of(prompts, given), alone, atol=TOLERANCE)
        np.testing.assert_allclose(features.of(prompts[::-1], given), alone[::-1], atol=TOLERANCE)


def test_they_are_of_unit_length(features: GradientFeatures, prompts: list[Prompt]) -> None:
    np.testing.assert_allclose(np.linalg.norm(features.of(prompts), axis=1), 1, atol=1e-5)


def test_a_prompt_that_predicts_nothing_pulls_nowhere(
    features: GradientFeatures, prompts: list[Prompt]
) -> None:
    silent = Prompt((5,), range(1))
    assert not features.of([silent]).any()
    found = features.of([silent, prompts[0]])
    assert not found[0].any()
    np.testing.assert_allclose(found[1], features.of([prompts[0]])[0], atol=TOLERANCE)


def test_fewer_layers_are_a_part_of_the_whole_gradient(
    tiny_model: Path, adapter: Path, prompts: list[Prompt]
) -> None:
    """The last layer alone: what autograd gives with the factors of the first left out."""
    last, _ = opened(tiny_model, adapter, layers=1)
    trained = peft_model(tiny_model, adapter)
    (prompt, *_) = prompts
    ids, targets = torch.tensor([prompt.ids]), [place for place in prompt.spoken if place > 0]
    logits = trained(input_ids=ids).logits[0, [place - 1 for place in targets]]
    torch.nn.functional.cross_entropy(logits, ids[0, targets]).backward()
    projection = SignProjection(DIMENSIONS, seed=5)
    sums = projection.zeros(1)
    for factor, weight in factors(trained).items():
        if factor.startswith("layers.1."):
            assert weight.grad is not None
            projection.add(sums, factor, weight.grad.reshape(1, -1))
    expected = projection.finish(sums)[0]
    np.testing.assert_allclose(
        last.of([prompt])[0], (expected / expected.norm()).numpy(), atol=TOLERANCE
    )


def test_more_layers_than_there_are_is_all(
    tiny_model: Path, adapter: Path, features: GradientFeatures, prompts: list[Prompt]
) -> None:
    many, _ = opened(tiny_model, adapter, layers=99)
    np.testing.assert_allclose(many.of(prompts), features.of(prompts), atol=TOLERANCE)


@pytest.mark.parametrize("text", TEXTS)
def test_the_words_of_the_user_are_marked(tiny_model: Path, adapter: Path, text: str) -> None:
    _, tokenizer = opened(tiny_model, adapter)
    prompt = encode_prompt(tokenizer, asked(text), MOST)
    assert tokenizer.decode([prompt.ids[place] for place in prompt.spoken]) == text


def test_only_the_last_user_turn_is_marked(tiny_model: Path, adapter: Path) -> None:
    _, tokenizer = opened(tiny_model, adapter)
    turns = [
        {"role": "system", "content": "Be brief."},
        *asked("one"),
        {"role": "assistant", "content": "two"},
        *asked("three"),
    ]
    prompt = encode_prompt(tokenizer, turns, MOST)
    assert tokenizer.decode([prompt.ids[place] for place in prompt.spoken]) == "three"
    assert "Be brief." in tokenizer.decode(prompt.ids)


@pytest.mark.parametrize(
    "messages", [asked(""), [{"role": "system", "content": "Be brief."}]], ids=["silence", "system"]
)
def test_without_words_of_the_user_everything_is_marked(
    tiny_model: Path, adapter: Path, messages: Sequence[dict[str, str]]
) -> None:
    _, tokenizer = opened(tiny_model, adapter)
    prompt = encode_prompt(tokenizer, messages, MOST)
    assert prompt.spoken == range(len(prompt.ids))


def test_a_long_prompt_keeps_its_end(tiny_model: Path, adapter: Path) -> None:
    _, tokenizer = opened(tiny_model, adapter)
    prompt = encode_prompt(tokenizer, asked("a" * 500 + "end"), 64)
    assert len(prompt.ids) == 64
    assert tokenizer.decode([prompt.ids[place] for place in prompt.spoken]).endswith("end")

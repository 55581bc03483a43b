"""Every expert on every domain: one base model under one adapter after another."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymath.errors import AdapterError, DataError
from polymath.training import (
    ChatRow,
    LoraRecipe,
    LoraTrainer,
    Perplexity,
    expert_matrix,
    measure_perplexity,
)
from polymath.training.examples import Example, encode_chat

RECIPE = LoraRecipe(
    lora_rank=4, learning_rate=1e-2, train_tokens=1500, batch_tokens=200, precision="float32"
)
ANSWERS = {"colours": ("blue", "red and green"), "numbers": ("42", "1 + 1 = 2")}

Matrix = dict[str, dict[str, Perplexity]]


def chat(answer: str) -> ChatRow:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return ChatRow.model_validate({"messages": turns})


DOMAINS = {domain: [chat(answer) for answer in answers] for domain, answers in ANSWERS.items()}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One expert for each domain, and one of a single module that was never trained."""
    folders = {}
    for domain, rows in DOMAINS.items():
        folders[domain] = tmp_path_factory.mktemp(domain)
        trainer = LoraTrainer(tiny_model, rows, RECIPE, folders[domain])
        trainer.train()
        trainer.save()
    folders["untrained"] = tmp_path_factory.mktemp("untrained")
    narrow = RECIPE.model_copy(update={"target_modules": ("q_proj",)})
    LoraTrainer(tiny_model, DOMAINS["colours"], narrow, folders["untrained"]).save()
    return folders


@pytest.fixture(scope="module")
def matrix(tiny_model: Path, adapters: dict[str, Path]) -> Matrix:
    return expert_matrix("base", tiny_model, adapters, DOMAINS)


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> dict[str, list[Example]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = {d: [encode_chat(tokenizer, row, 512) for row in rows] for d, rows in DOMAINS.items()}
    return {d: [example for example in rows if example] for d, rows in encoded.items()}


def test_the_first_row_is_the_bare_base_model(
    tiny_model: Path, matrix: Matrix, examples: dict[str, list[Example]]
) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert next(iter(matrix)) == "base"
    for domain, rows in examples.items():
        expected = measure_perplexity(base, rows, pad_id=0)
        assert matrix["base"][domain].tokens == expected.tokens
        assert matrix["base"][domain].loss == pytest.approx(expected.loss, abs=1e-6)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_row_of_an_expert_is_the_base_under_its_adapter(
    tiny_model: Path,
    adapters: dict[str, Path],
    matrix: Matrix,
    examples: dict[str, list[Example]],
    name: str,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expert = PeftModel.from_pretrained(base, str(adapters[name]))
    for domain, rows in examples.items():
        expected = measure_perplexity(expert, rows, pad_id=0)
        assert matrix[name][domain].loss == pytest.approx(expected.loss, abs=1e-6)


def test_an_adapter_that_was_not_trained_is_the_base_again(matrix: Matrix) -> None:
    """It comes last, so nothing of the adapters before it may be left in the base model."""
    assert list(matrix)[-1] == "untrained"
    assert matrix["untrained"] == matrix["base"]


def test_the_order_of_the_adapters_does_not_matter(
    tiny_model: Path, adapters: dict[str, Path], matrix: Matrix
) -> None:
    backwards = dict(reversed(adapters.items()))
    assert expert_matrix("base", tiny_model, backwards, DOMAINS) == matrix


def test_an_adapter_alone_is_what_it_is_among_others(
    tiny_model: Path, adapters: dict[str, Path], matrix: Matrix
) -> None:
    alone = expert_matrix("base", tiny_model, {"numbers": adapters["numbers"]}, DOMAINS)
    assert alone == {name: matrix[name] for name in ("base", "numbers")}


def test_one_adapter_under_two_names_has_two_equal_rows(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    twice = {"a": adapters["colours"], "b": adapters["colours"]}
    rows = expert_matrix("base", tiny_model, twice, DOMAINS)
    assert rows["a"] == rows["b"] != rows["base"]


def test_without_adapters_there_is_the_base_alone(tiny_model: Path, matrix: Matrix) -> None:
    assert expert_matrix("base", tiny_model, {}, DOMAINS) == {"base": matrix["base"]}


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_expert_knows_its_own_domain_best(matrix: Matrix, domain: str) -> None:
    losses = {name: row[domain].loss for name, row in matrix.items()}
    assert min(losses, key=lambda name: losses[name]) == domain


def test_every_expert_is_measured_on_every_domain(
    matrix: Matrix, adapters: dict[str, Path]
) -> None:
    assert list(matrix) == ["base", *adapters]
    assert all(list(row) == list(DOMAINS) for row in matrix.values())


def test_progress_counts_every_conversation_for_every_expert(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    steps: list[int] = []
    one = {"numbers": adapters["numbers"]}
    expert_matrix("base", tiny_model, one, DOMAINS, advance=steps.append)
    assert sum(steps) == 2 * sum(len(rows) for rows in DOMAINS.values())


def test_a_domain_without_conversations_is_named(tiny_model: Path) -> None:
    with pytest.raises(DataError, match="law: no conversation"):
        expert_matrix("base", tiny_model, {}, {**DOMAINS, "law": []})


def test_a_domain_whose_answers_come_too_late_is_named(tiny_model: Path) -> None:
    late = ChatRow.model_validate(
        {
            "messages": [
                {"role": "user", "content": "word " * 1000},
                {"role": "assistant", "content": "late"},
            ]
        }
    )
    with pytest.raises(DataError, match="law: no conversation has an answer within 1024 tokens"):
        expert_matrix("base", tiny_model, {}, {"law": [late]})


def test_an_adapter_that_does_not_exist_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such adapter folder") as failure:
        expert_matrix("base", tiny_model, {"law": tmp_path / "nowhere"}, DOMAINS)
    assert str(tmp_path / "nowhere") in failure.value.message


def test_an_adapter_named_like_the_base_is_refused(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    with pytest.raises(DataError, match="base: an adapter has the name of the base model"):
        expert_matrix("base", tiny_model, {"base": adapters["colours"]}, DOMAINS)

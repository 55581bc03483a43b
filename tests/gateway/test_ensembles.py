"""Several experts as one, over real HTTP: whose answer it is, token by token."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from polymath.experts import Engine
from polymath.gateway.app import Gateway
from tests.conftest import COMBINED
from tests.gateway.asking import (
    DEFAULTS,
    HELLO,
    ask,
    polymath_fields,
    scored_tokens,
    stream,
    streamed_polymath_fields,
    streamed_text,
    text,
    user,
)

APPLES = [user("Tom has 3 apples and buys 5 more. How many has he now?")]
SNAKE = [user("My python bit me, which medicine do I need and can I sue the zoo?")]
ENSEMBLES = {"both", "logits", "posterior", "first", "routed"}
MEMBERS = {
    "both": ["math", "general"],
    "routed": ["math", "coding", "general"],
    "steered": ["general", "math", "smollm2"],
    "twin": ["smollm2", "math"],
    "math": [],
}
ATTRIBUTION = {"polymath": {"attribution": True}}
ONE_ROW = [("first", "math"), ("unsteered", "general")]
"""Expert of which only one row counts, and the expert of that row."""


def attribution(client: OpenAI, **given: Any) -> list[dict[str, Any]]:
    fields = polymath_fields(ask(client, **{**given, "extra_body": ATTRIBUTION}))
    entries: list[dict[str, Any]] = fields["attribution"]
    return entries


def first_probabilities(
    client: OpenAI, model: str, messages: list[dict[str, Any]]
) -> dict[bytes, float]:
    """The likeliest first tokens of an answer."""
    given = {"messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    (first,) = scored_tokens(ask(client, model=model, **given))
    return {bytes(token.bytes or []): math.exp(token.logprob) for token in first.top_logprobs}


# --- whose answer it is --------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [HELLO, APPLES], ids=["moon", "apples"])
@pytest.mark.parametrize(("combined", "alone"), ONE_ROW)
def test_an_expert_of_which_one_row_counts_answers_as_that_row(
    client: OpenAI, combined: str, alone: str, messages: list[dict[str, Any]]
) -> None:
    """Weights (1, 0) are the first member; alpha = 0 is the large model."""
    given = {"messages": messages, "max_tokens": 12}
    assert text(ask(client, model=combined, **given)) == text(ask(client, model=alone, **given))


@pytest.mark.parametrize(("combined", "alone"), ONE_ROW)
def test_an_expert_of_which_one_row_counts_has_the_probabilities_of_that_row(
    client: OpenAI, combined: str, alone: str
) -> None:
    given = {"messages": APPLES, "logprobs": True, "top_logprobs": 3}
    of_row = scored_tokens(ask(client, model=alone, **given))
    assert scored_tokens(ask(client, model=combined, **given)) == of_row


@pytest.mark.parametrize(("combined", "alone"), ONE_ROW)
def test_an_expert_of_which_one_row_counts_is_drawn_as_that_row(
    client: OpenAI, combined: str, alone: str
) -> None:
    given = {"temperature": 1, "seed": 7}
    assert text(ask(client, model=combined, **given)) == text(ask(client, model=alone, **given))


@pytest.mark.parametrize("messages", [HELLO, APPLES], ids=["moon", "apples"])
def test_proxy_tuning_with_equal_base_is_the_expert(
    client: OpenAI, messages: list[dict[str, Any]]
) -> None:
    """M == M-, alpha = 1: s_M + (s_M+ - s_M-) is s_M+."""
    given = {"messages": messages, "max_tokens": 12}
    assert text(ask(client, model="twin", **given)) == text(ask(client, model="math", **given))


def test_proxy_tuning_with_equal_base_has_the_probabilities_of_the_expert(client: OpenAI) -> None:
    twin, expert = (
        scored_tokens(ask(client, model=model, messages=APPLES, logprobs=True))
        for model in ("twin", "math")
    )
    assert [token.bytes for token in twin] == [token.bytes for token in expert]
    assert [token.logprob for token in twin] == pytest.approx(
        [token.logprob for token in expert], abs=1e-4
    )


def test_a_mixture_gives_the_mean_of_the_probabilities(client: OpenAI) -> None:
    """Of the first token, before which all have the same text."""
    math_, general, both = (
        first_probabilities(client, model, APPLES) for model in ("math", "general", "both")
    )
    shared = math_.keys() & general.keys() & both.keys()
    assert len(shared) > 3
    for token in shared:
        mean = 0.3 * math_[token] + 0.7 * general[token]
        assert both[token] == pytest.approx(mean, rel=1e-4)


def test_an_ensemble_is_steered_by_all_its_members(client: OpenAI) -> None:
    answers = {
        model: text(ask(client, model=model, messages=APPLES, max_tokens=12))
        for model in ("math", "general", "logits", "steered")
    }
    assert len(set(answers.values())) > 2


async def test_ensembles_answer_together_what_they_answer_alone(
    base_url: str, client: OpenAI
) -> None:
    models = ["both", "twin", "math"]
    together = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)
    answers = await asyncio.gather(
        *(together.chat.completions.create(**{**DEFAULTS, "model": name}) for name in models)
    )
    assert list(map(text, answers)) == [text(ask(client, model=name)) for name in models]


@pytest.mark.parametrize("model", ["both", "posterior", "steered"])
def test_a_streamed_ensemble_gives_the_same_text(client: OpenAI, model: str) -> None:
    given = {"model": model, "temperature": 0.9, "seed": 3, "max_tokens": 12}
    assert streamed_text(stream(client, **given)) == text(ask(client, **given))


def test_the_decision_names_the_ensemble_and_not_its_members(client: OpenAI) -> None:
    completion = ask(client, model="both", max_tokens=1)
    decision = (completion.model_extra or {})["polymath"]
    assert completion.model == decision["expert"] == "both"
    assert (decision["source"], decision["weights"]) == ("explicit", {"both": 1.0})


# --- the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [APPLES, SNAKE], ids=["apples", "snake"])
def test_members_that_are_listed_get_their_weights_from_the_router(
    base_url: str, client: OpenAI, messages: list[dict[str, Any]]
) -> None:
    decision = httpx.post(f"{base_url}/v1/route", json={"messages": messages}).json()
    among = {name: decision["weights"].get(name, 0.0) for name in MEMBERS["routed"]}
    total = sum(among.values())
    wanted = {name: weight / total for name, weight in among.items()}
    for entry in attribution(client, model="routed", messages=messages, max_tokens=3):
        assert entry["weights"] == pytest.approx(wanted)


def test_fixed_weights_are_those_of_the_config(client: OpenAI) -> None:
    for model in ("both", "logits"):
        for entry in attribution(client, model=model, max_tokens=3):
            assert entry["weights"] == pytest.approx(COMBINED[model]["members"])


def test_the_weights_of_a_posterior_follow_the_text(client: OpenAI) -> None:
    weights = [entry["weights"] for entry in attribution(client, model="posterior")]
    assert weights[0] == {"math": 0.5, "general": 0.5}
    assert len({entry["math"] for entry in weights}) > 3
    for entry in weights:
        assert sum(entry.values()) == pytest.approx(1)


def test_the_posterior_is_that_of_the_members_own_probabilities(client: OpenAI) -> None:
    """Bayes' rule after one token: the prior is even, so the weights are as the probabilities."""
    first, second = attribution(client, model="posterior", max_tokens=2)
    likelihoods = {
        model: first_probabilities(client, model, HELLO)[bytes(first["bytes"])]
        for model in ("math", "general")
    }
    total = sum(likelihoods.values())
    wanted = {model: value / total for model, value in likelihoods.items()}
    assert second["weights"] == pytest.approx(wanted, abs=1e-4)


def test_the_weights_of_proxy_tuning_are_its_coefficients(client: OpenAI) -> None:
    for entry in attribution(client, model="steered", max_tokens=3):
        assert entry["weights"] == {"general": 1.0, "math": 0.5, "smollm2": -0.5}


def test_an_expert_behind_two_rows_has_the_sum_of_their_weights(client: OpenAI) -> None:
    for entry in attribution(client, model="twin", max_tokens=3):
        assert entry["weights"] == {"smollm2": 0.0, "math": 1.0}


# --- attribution ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["both", "logits", "posterior", "routed", "steered"])
def test_every_token_has_its_expert_and_weights(client: OpenAI, model: str) -> None:
    completion = ask(client, model=model, logprobs=True, extra_body=ATTRIBUTION)
    entries = polymath_fields(completion)["attribution"]
    assert [(entry["token"], entry["bytes"]) for entry in entries] == [
        (token.token, token.bytes) for token in scored_tokens(completion)
    ]
    members = MEMBERS.get(model, ["math", "general"])
    for entry in entries:
        assert list(entry["weights"]) == members
        assert entry["expert"] in members
        if model in ENSEMBLES:
            assert sum(entry["weights"].values()) == pytest.approx(1)
            assert min(entry["weights"].values()) >= 0


def test_the_bytes_of_the_attribution_are_the_text(client: OpenAI) -> None:
    completion = ask(client, model="both", extra_body=ATTRIBUTION)
    entries = polymath_fields(completion)["attribution"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text(completion)


def test_the_end_token_has_no_attribution(client: OpenAI) -> None:
    completion = ask(client, model="law", max_tokens=20, extra_body=ATTRIBUTION)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    entries = polymath_fields(completion)["attribution"]
    assert len(entries) == completion.usage.completion_tokens - 1


@pytest.mark.parametrize("model", ["both", "posterior", "twin"])
def test_the_streamed_attribution_is_the_same(client: OpenAI, model: str) -> None:
    whole = ask(client, model=model, extra_body=ATTRIBUTION)
    chunks = stream(client, model=model, extra_body=ATTRIBUTION)
    assert streamed_polymath_fields(chunks) == polymath_fields(whole)
    assert streamed_text(chunks) == text(whole)


def test_every_choice_has_its_own_attribution(client: OpenAI) -> None:
    given = {"model": "both", "n": 2, "temperature": 1, "seed": 5, "extra_body": ATTRIBUTION}
    whole, chunks = ask(client, **given), stream(client, **given)
    for index in (0, 1):
        entries = polymath_fields(whole, index)["attribution"]
        assert "".join(entry["token"] for entry in entries) == text(whole, index)
        assert streamed_polymath_fields(chunks, index) == polymath_fields(whole, index)


def test_attribution_and_log_probabilities_leave_each_other_alone(client: OpenAI) -> None:
    given = {"model": "both", "logprobs": True, "top_logprobs": 2}
    together = ask(client, **given, extra_body=ATTRIBUTION)
    assert together.choices[0].logprobs == ask(client, **given).choices[0].logprobs
    assert polymath_fields(together)["attribution"] == attribution(client, model="both")
    assert text(together) == text(ask(client, model="both"))


@pytest.mark.parametrize("body", [{}, {"polymath": {}}, {"polymath": {"attribution": False}}])
def test_nobody_gets_an_attribution_without_asking(client: OpenAI, body: dict[str, Any]) -> None:
    given = {"model": "both", "max_tokens": 2, "extra_body": body}
    assert polymath_fields(ask(client, **given)) == {}
    assert streamed_polymath_fields(stream(client, **given)) == {}


@pytest.mark.parametrize("model", ["math", "smollm2"])
def test_an_expert_alone_is_where_all_its_tokens_come_from(client: OpenAI, model: str) -> None:
    for entry in attribution(client, model=model, max_tokens=3):
        assert (entry["expert"], entry["weights"]) == (model, {model: 1.0})


def test_a_routed_answer_is_attributed_to_the_expert_that_was_chosen(client: OpenAI) -> None:
    for entry in attribution(client, model="polymath", messages=APPLES, max_tokens=3):
        assert (entry["expert"], entry["weights"]) == ("math", {"math": 1.0})


# --- counts and cards ----------------------------------------------------------------------------


def test_the_usage_of_an_ensemble_is_that_of_one_answer(client: OpenAI) -> None:
    """Not of its rows: the client gets one text."""
    assert ask(client, model="both").usage == ask(client, model="math").usage


def test_the_rows_of_an_ensemble_are_all_computed(client: OpenAI, engine: Engine) -> None:
    messages = [user("An unheard-of question, so that nothing of it is cached: zebra?")]
    before = engine.stats().prefix_queried
    usage = ask(client, model="both", messages=messages, max_tokens=2).usage
    assert usage is not None
    assert engine.stats().prefix_queried - before == 2 * usage.prompt_tokens


@pytest.mark.parametrize("name", MEMBERS)
def test_the_card_of_an_expert_lists_its_members(client: OpenAI, name: str) -> None:
    about = (client.models.retrieve(name).model_extra or {})["polymath"]
    assert about["members"] == MEMBERS[name]
    assert about["base_model"] == ("smollm2" if name == "math" else None)


def test_the_fingerprint_names_the_base_models(client: OpenAI, gateway: Gateway) -> None:
    assert ask(client, model="both", max_tokens=1).system_fingerprint == "polymath-smollm2"
    assert gateway.catalog["both"].settings.base_model is None

"""Answers of a given form: JSON Schema, regular expressions, choices and grammars."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from polymath.experts import Engine
from tests.gateway.asking import (
    DEFAULTS,
    ask,
    refusal,
    scored_tokens,
    stream,
    streamed_text,
    text,
    user,
)

TOM = [user("Describe Tom as JSON: he is 31 years old, in a good mood, and likes tea and jazz.")]
PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["good", "bad"]},
        "likes": {
            "type": "array",
            "items": {"type": "string", "maxLength": 6},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["age", "mood", "likes"],
    "additionalProperties": False,
}
MOODS = {"type": "array", "items": {"enum": ["good", "bad"]}, "minItems": 2, "maxItems": 3}
ENOUGH = 80
"""Tokens for the longest person, white space included."""


class Pet(BaseModel):
    """What the official client turns into a strict schema."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]
    tame: bool | None


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def person(client: OpenAI, **given: Any) -> openai.types.chat.ChatCompletion:
    values = {"messages": TOM, "max_tokens": ENOUGH, "response_format": of_schema(PERSON), **given}
    return ask(client, **values)


def guided(client: OpenAI, **given: Any) -> str:
    """The answer to a request with vLLM's fields."""
    completion = ask(client, max_tokens=24, extra_body=given)
    assert completion.choices[0].finish_reason == "stop"
    return text(completion)


def assert_person(answer: str) -> None:
    """What the schema says, by hand."""
    value = json.loads(answer)
    assert value.keys() == {"age", "mood", "likes"}
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 120
    assert value["mood"] in ("good", "bad")
    assert isinstance(value["likes"], list)
    assert 1 <= len(value["likes"]) <= 2
    assert all(isinstance(like, str) and len(like) <= 6 for like in value["likes"])


# --- JSON ----------------------------------------------------------------------------------------


def test_a_json_object_parses(client: OpenAI) -> None:
    completion = ask(
        client,
        messages=[user('Answer with the JSON object {"a": 1}')],
        max_tokens=40,
        response_format={"type": "json_object"},
    )
    assert completion.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(text(completion)), dict)


@pytest.mark.parametrize("model", ["smollm2", "math", "polymath", "both", "posterior", "steered"])
def test_the_answer_of_every_kind_of_expert_fits_the_schema(client: OpenAI, model: str) -> None:
    completion = person(client, model=model)
    assert completion.choices[0].finish_reason == "stop"
    assert_person(text(completion))


@pytest.mark.parametrize(
    ("model", "seed"), [("smollm2", 0), ("smollm2", 1), ("both", 2), ("steered", 3)]
)
def test_a_drawn_answer_fits_the_schema(client: OpenAI, model: str, seed: int) -> None:
    assert_person(text(person(client, model=model, temperature=1, seed=seed)))


def test_a_streamed_answer_is_the_whole_one(client: OpenAI) -> None:
    given = {
        "model": "both",
        "messages": TOM,
        "max_tokens": ENOUGH,
        "response_format": of_schema(PERSON),
    }
    chunks = stream(client, **given)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert streamed_text(chunks) == text(ask(client, **given))
    assert_person(streamed_text(chunks))


def test_every_choice_fits_the_schema(client: OpenAI) -> None:
    completion = person(client, n=2, temperature=1, seed=5)
    assert text(completion, 0) != text(completion, 1)
    for index in (0, 1):
        assert_person(text(completion, index))


def test_the_client_reads_an_answer_as_its_own_class(client: OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="general",
        messages=[{"role": "user", "content": "Invent a pet."}],
        response_format=Pet,
        max_tokens=60,
        temperature=0,
    )
    pet = completion.choices[0].message.parsed
    assert isinstance(pet, Pet)


def test_the_schema_may_be_given_by_the_field_of_vllm(client: OpenAI) -> None:
    given = {"messages": TOM, "max_tokens": 24}
    openais = ask(client, **given, response_format=of_schema(MOODS))
    assert text(ask(client, **given, extra_body={"guided_json": MOODS})) == text(openais)
    assert set(json.loads(text(openais))) <= {"good", "bad"}


def test_an_ensemble_of_one_weight_is_constrained_as_its_member_is(client: OpenAI) -> None:
    given = {"messages": TOM, "max_tokens": 24, "response_format": of_schema(MOODS)}
    assert text(ask(client, model="first", **given)) == text(ask(client, model="math", **given))


def test_an_answer_that_is_cut_is_the_beginning_of_the_whole_one(client: OpenAI) -> None:
    cut = person(client, max_tokens=6)
    assert cut.choices[0].finish_reason == "length"
    assert text(person(client)).startswith(text(cut))
    with pytest.raises(json.JSONDecodeError):
        json.loads(text(cut))


def test_any_text_is_what_no_format_is(client: OpenAI) -> None:
    assert text(ask(client, response_format={"type": "text"})) == text(ask(client))


# --- regular expressions, choices, grammars ------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[0-9]{4}", r"(ja|nein)!?", "ü[äö]{2}😀", r"a/b\n"])
def test_a_regular_expression_is_matched(client: OpenAI, pattern: str) -> None:
    assert re.fullmatch(pattern, guided(client, guided_regex=pattern))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_drawn_answer_matches_the_regular_expression(client: OpenAI, seed: int) -> None:
    pattern = r"[a-z]{2,6}(, [a-z]{2,6}){2}"
    drawn = ask(
        client, temperature=1.5, seed=seed, max_tokens=24, extra_body={"guided_regex": pattern}
    )
    assert re.fullmatch(pattern, text(drawn))


def test_a_choice_is_one_of_those_given(client: OpenAI) -> None:
    assert guided(client, guided_choice=["yes", "no"]) in ("yes", "no")


@pytest.mark.parametrize("only", ["a/b", 'say "no"', "back\\slash", "two\nlines", "Grüße 😀", " "])
def test_a_single_choice_comes_back_to_the_letter(client: OpenAI, only: str) -> None:
    assert guided(client, guided_choice=[only]) == only


def test_a_choice_may_begin_with_another(client: OpenAI) -> None:
    choices = ["moon", "moonlight"]
    drawn = {
        text(ask(client, temperature=2, seed=seed, extra_body={"guided_choice": choices}))
        for seed in range(8)
    }
    assert drawn == set(choices)


def test_a_bias_decides_between_choices(client: OpenAI, engine: Engine) -> None:
    """A mask leaves the preferences among what it allows as they are."""
    choices = ["4", "7"]
    tokenizer = engine.models["smollm2"].tokenizer
    for wanted in choices:
        (token,) = tokenizer.encode(wanted, add_special_tokens=False)
        bias = {str(token): 100}
        biased = ask(client, logit_bias=bias, extra_body={"guided_choice": choices})
        assert text(biased) == wanted


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('start: "a" ("b" | "c"){3}', "a[bc]{3}"),
        ('start: noun " is " ADJECTIVE\nnoun: "snow" | "ice"\nADJECTIVE: /[a-z]{3,5}/', None),
        ('root ::= "x" digit digit "."\ndigit ::= [0-9]', "x[0-9]{2}[.]"),
    ],
    ids=["Lark", "Lark of several rules", "GBNF"],
)
def test_a_grammar_is_followed(client: OpenAI, grammar: str, pattern: str | None) -> None:
    answer = guided(client, guided_grammar=grammar)
    assert re.fullmatch(pattern or "(snow|ice) is [a-z]{3,5}", answer)


def test_a_stop_string_still_ends_the_answer(client: OpenAI) -> None:
    completion = ask(client, stop=["e"], extra_body={"guided_choice": ["sleep"]})
    assert (text(completion), completion.choices[0].finish_reason) == ("sl", "stop")


def test_log_probabilities_are_those_before_the_constraint(client: OpenAI) -> None:
    """So that a client sees how little the model wanted what it had to say."""
    given = {"logprobs": True, "top_logprobs": 1}
    scored = scored_tokens(ask(client, **given, extra_body={"guided_choice": ["qqq"]}))
    free = scored_tokens(ask(client, **given))
    assert "".join(token.token for token in scored) == "qqq"
    assert scored[0].top_logprobs == free[0].top_logprobs
    assert scored[0].logprob < free[0].logprob


async def test_an_answer_without_a_form_is_what_it_is_alone(base_url: str, client: OpenAI) -> None:
    """Beside constrained answers of the same batch."""
    together = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)
    asking = [
        together.chat.completions.create(**DEFAULTS, extra_body=form)
        for form in ({}, {"guided_regex": "[0-9]{20}"}, {"guided_choice": ["a b c d e"]})
    ]
    plain, digits, letters = map(text, await asyncio.gather(*asking))
    assert plain == text(ask(client))
    assert digits.isdigit()
    assert letters == "a b c d e"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"not": {"type": "string"}}, "not"),
        ({"properties": {"a": {"type": "object", "dependentSchemas": {}}}}, "dependentSchemas"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"enum": []}, "anyOf is empty"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_and_what_it_asks_is_named(
    client: OpenAI, schema: dict[str, Any], named: str
) -> None:
    error = refusal(client, response_format=of_schema(schema))
    assert (error.status_code, error.code, error.param) == (400, "invalid_value", "response_format")
    assert named in error.message
    assert refusal(client, extra_body={"guided_json": schema}).param == "guided_json"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("guided_regex", "(", "unclosed group"),
        ("guided_regex", "a(?=b)", "look-around"),
        ("guided_regex", r"(a)\1", "backreferences"),
        ("guided_regex", "a{2,1}", "repetition"),
        ("guided_grammar", "start: nowhere", "nowhere"),
        ("guided_grammar", "start: (((", "Expected token"),
        ("guided_grammar", "start: /(/", "unclosed group"),
        ("guided_grammar", "root ::= (", "Expected ')'"),
        ("guided_grammar", "hello", "hello"),
        ("guided_grammar", "root ::= nowhere", "nowhere"),
        ("guided_grammar", 'x ::= "a"', "root"),
        ("guided_grammar", "# nothing", "grammar"),
        ("guided_grammar", f"root ::= {'(' * 999}", "recursion"),
    ],
)
def test_a_malformed_form_is_refused_and_what_is_wrong_is_named(
    client: OpenAI, field: str, value: str, named: str
) -> None:
    error = refusal(client, extra_body={field: value})
    assert (error.status_code, error.code, error.param) == (400, "invalid_value", field)
    assert named in error.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_json": {}, "guided_grammar": "start: /a/"}, "guided_grammar"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_json": "{}"}, "guided_json"),
        ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused_by_name(
    client: OpenAI, given: dict[str, Any], param: str
) -> None:
    error = refusal(client, extra_body=given)
    assert (error.status_code, error.param) == (400, param)


NOTHING_FITS = "start: start"


def test_a_grammar_that_nothing_fits_is_400(client: OpenAI) -> None:
    error = refusal(client, extra_body={"guided_grammar": NOTHING_FITS})
    assert (error.status_code, error.param) == (400, "guided_grammar")


def test_a_stream_of_a_grammar_that_nothing_fits_ends_with_the_error(client: OpenAI) -> None:
    with pytest.raises(openai.APIError) as caught:
        stream(client, extra_body={"guided_grammar": NOTHING_FITS})
    assert caught.value.param == "guided_grammar"

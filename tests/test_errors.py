"""Every failure is one OpenAI error body."""

from __future__ import annotations

import json

import pytest

from polymath import errors
from polymath.errors import ConfigError, NotReady, Overloaded, PolymathError

CLASSES: list[type[PolymathError]] = [getattr(errors, name) for name in errors.__all__]
OPENAI_TYPES = {
    "insufficient_quota",
    "invalid_request_error",
    "rate_limit_error",
    "requests",
    "server_error",
    "tokens",
}


def example(error: type[PolymathError]) -> PolymathError:
    """A message of two lines; a config error takes the lines apart."""
    return error(["first", "second"]) if error is ConfigError else error("first\nsecond")  # type: ignore[arg-type]


every_error = pytest.mark.parametrize("error", CLASSES, ids=errors.__all__)


@every_error
def test_a_body_has_exactly_the_keys_of_openai(error: type[PolymathError]) -> None:
    assert example(error).body() == {
        "error": {
            "message": "first\nsecond",
            "type": error.type,
            "param": None,
            "code": error.code,
        }
    }


@every_error
def test_a_body_is_json(error: type[PolymathError]) -> None:
    body = example(error).body()
    assert json.loads(json.dumps(body)) == body


@every_error
def test_an_error_has_a_status_a_type_and_a_code(error: type[PolymathError]) -> None:
    assert 400 <= error.status < 600
    assert error.type in OPENAI_TYPES
    assert error.code.replace("_", "").islower()


@every_error
def test_the_type_says_whose_fault_the_status_says_it_is(error: type[PolymathError]) -> None:
    assert (error.status >= 500) == (error.type == "server_error")


@every_error
def test_an_error_prints_as_its_message(error: type[PolymathError]) -> None:
    assert str(example(error)) == example(error).message == "first\nsecond"


@every_error
def test_headers_are_text(error: type[PolymathError]) -> None:
    assert all(isinstance(value, str) for value in example(error).headers.values())


def test_no_two_errors_share_a_code() -> None:
    assert len({error.code for error in CLASSES}) == len(CLASSES)


def test_all_errors_are_listed() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)


def test_all_errors_are_caught_as_one() -> None:
    assert all(issubclass(error, PolymathError) for error in CLASSES)


def test_the_field_at_fault_is_in_the_body() -> None:
    error = PolymathError("wrong", param="temperature")
    assert error.body()["error"]["param"] == "temperature"


@pytest.mark.parametrize(("seconds", "header"), [(1, "1"), (30, "30")])
def test_an_overloaded_server_says_when_to_come_back(seconds: int, header: str) -> None:
    assert Overloaded("full", retry_after=seconds).headers == {"retry-after": header}


def test_a_server_that_is_not_ready_says_when_to_come_back() -> None:
    assert NotReady("loading").headers == {"retry-after": "1"}


def test_an_ordinary_error_has_no_headers() -> None:
    assert PolymathError("wrong").headers == {}


def test_a_config_error_keeps_its_problems_apart() -> None:
    error = ConfigError(["router.path: missing", "port: too large"])
    assert error.problems == ("router.path: missing", "port: too large")
    assert error.message == "router.path: missing\nport: too large"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("InvalidRequest", 400),
        ("UnsupportedParameter", 400),
        ("ContextLengthExceeded", 400),
        ("ModelNotFound", 404),
        ("RequestTooLarge", 413),
        ("Overloaded", 429),
        ("PolymathError", 500),
        ("NotReady", 503),
    ],
)
def test_the_status_is_the_one_that_clients_act_upon(name: str, status: int) -> None:
    assert getattr(errors, name).status == status

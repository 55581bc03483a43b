"""Rules before the encoder: what they match, in what order, and that no text stalls them."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from polymath.router import Message, Rule, RuleSettings
from polymath.router.rules import LONGEST_TEXT, SEARCH_SECONDS, first_match

PATIENCE = 20 * SEARCH_SECONDS
"""Seconds; a search is given up after SEARCH_SECONDS, on two busy cores a little later."""

HOSTILE = {
    "nested repeats": ("(a+)+$", "a" * 5_000 + "b"),
    "words and spaces": (r"(\w+\s?)*$", "word " * 1_000 + "!"),
    "alternatives that overlap": ("(a|aa)+$", "a" * 5_000 + "b"),
    "a capital that never comes": ("^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 5_000),
}

any_text = st.text(st.characters(exclude_categories=()))


def rule(**conditions: Any) -> Rule:
    return Rule(RuleSettings.model_validate({"expert": "lawyer", **conditions}))


def matches(
    rule: Rule, user: str = "", system: str = "", headers: dict[str, str] | None = None
) -> bool:
    return rule.matches(user, system, headers or {})


@pytest.mark.parametrize(
    ("keyword", "text", "found"),
    [
        ("contract", "Is this contract void?", True),
        ("contract", "CONTRACT", True),
        ("contract", "contracts", False),
        ("contract", "subcontract", False),
        ("contract", "contract_law", False),
        ("contract", "(contract)", True),
        ("contract", "", False),
        ("c++", "I write C++.", True),
        ("c++", "c++11", False),
        (".net", "use .NET here", True),
        ("a.b", "axb", False),
        ("terms of service", "The Terms of Service say", True),
        ("terms of service", "terms  of service", False),
        ("straße", "STRASSE", False),
        ("ÄRZTE", "die ärzte", True),
        ("法律", "请问 法律 问题", True),
        ("👍", "ok 👍!", True),
    ],
)
def test_a_keyword_is_a_whole_word_in_any_case(keyword: str, text: str, found: bool) -> None:
    assert matches(rule(keyword=keyword), text) == found


def test_one_keyword_of_several_is_enough() -> None:
    several = rule(keyword=["contract", "lawsuit"])
    assert matches(several, "a lawsuit")
    assert matches(several, "a contract")
    assert not matches(several, "a list")


def test_a_lone_keyword_is_a_list_of_one() -> None:
    for text in ("a contract", "a list"):
        assert matches(rule(keyword="contract"), text) == matches(rule(keyword=["contract"]), text)


@given(keyword=st.text(min_size=1), before=any_text, after=any_text)
@settings(max_examples=200)
def test_a_keyword_between_spaces_is_found_in_any_text(
    keyword: str, before: str, after: str
) -> None:
    assert matches(rule(keyword=keyword), f"{before} {keyword} {after}")


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"§\s*\d+", "What does § 12 say?", True),
        (r"^law", "the law", False),
        (r"law", "LAW", False),
        (r"(?i)law", "LAW", True),
        (r"a.b", "a\nb", False),
        (r"(?s)a.b", "a\nb", True),
        (r"^$", "", True),
        (r"\p{Script=Cyrillic}", "закон", True),
    ],
)
def test_a_pattern_is_found_anywhere(pattern: str, text: str, found: bool) -> None:
    assert matches(rule(regex=pattern), text) == found


def test_user_and_system_texts_are_not_mixed_up() -> None:
    assert matches(rule(regex="law"), user="law", system="list")
    assert not matches(rule(regex="law"), user="list", system="law")
    assert matches(rule(system_prompt="law"), user="list", system="law")
    assert not matches(rule(system_prompt="law"), user="law", system="list")
    assert not matches(rule(keyword="law"), user="list", system="law")


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-team": "legal"}, True),
        ({"x-team": "legal", "x-other": "1"}, True),
        ({"x-team": "Legal"}, False),
        ({"x-team": "legal team"}, False),
        ({"x-team": ""}, False),
        ({}, False),
    ],
)
def test_a_header_has_exactly_the_value(headers: dict[str, str], found: bool) -> None:
    assert matches(rule(header={"X-Team": "legal"}), headers=headers) == found


def test_all_headers_must_be_there() -> None:
    both = rule(header={"x-team": "legal", "x-tier": "gold"})
    assert matches(both, headers={"x-team": "legal", "x-tier": "gold"})
    assert not matches(both, headers={"x-team": "legal"})


def test_a_header_may_have_to_be_empty() -> None:
    empty = rule(header={"x-team": ""})
    assert matches(empty, headers={"x-team": ""})
    assert not matches(empty)


@given(
    keyword=st.booleans(), pattern=st.booleans(), header=st.booleans(), system_prompt=st.booleans()
)
def test_all_conditions_must_hold(
    keyword: bool, pattern: bool, header: bool, system_prompt: bool
) -> None:
    strict = rule(keyword="law", regex=r"\d", header={"x": "1"}, system_prompt="terse")
    user = ("law " if keyword else "list ") + ("12" if pattern else "twelve")
    system = "be terse" if system_prompt else "be kind"
    headers = {"x": "1"} if header else {}
    expected = keyword and pattern and header and system_prompt
    assert strict.matches(user, system, headers) == expected


def test_the_first_rule_that_matches_decides() -> None:
    rules = [rule(regex="a", name="a"), rule(regex="ab", name="ab"), rule(regex="b", name="b")]
    for user, name in (("ab", "a"), ("a", "a"), ("b", "b")):
        found = first_match(rules, user, [], {})
        assert found is not None
        assert found.name == name
    reverse = first_match(rules[::-1], "ab", [], {})
    assert reverse is not None
    assert reverse.name == "b"


def test_no_rule_may_match() -> None:
    assert first_match([], "law", [], {}) is None
    assert first_match([rule(regex="law")], "list", [], {}) is None


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"role": "system", "content": "You know the law."}], True),
        ([{"role": "developer", "content": "You know the law."}], True),
        (
            [
                {"role": "system", "content": "Be terse."},
                {"role": "user", "content": "list"},
                {"role": "system", "content": "You know the law."},
            ],
            True,
        ),
        ([{"role": "assistant", "content": "the law"}], False),
        ([{"role": "user", "content": "the law"}], False),
        ([], False),
    ],
)
def test_system_prompts_are_all_system_and_developer_messages(
    messages: list[Message], found: bool
) -> None:
    rules = [rule(system_prompt="law")]
    assert (first_match(rules, "list", messages, {}) is not None) == found


def test_the_user_text_is_the_one_that_is_handed_over() -> None:
    earlier: list[Message] = [{"role": "user", "content": "law"}]
    assert first_match([rule(keyword="law")], "list", earlier, {}) is None


@pytest.mark.parametrize(("pattern", "text"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pattern_that_would_backtrack_for_minutes_is_given_up(
    pattern: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow = rule(regex=pattern, name="slow")
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        assert not matches(slow, text)
    assert time.perf_counter() - started < PATIENCE
    assert "rule 'slow': the search took too long" in caplog.text


def test_a_system_prompt_is_given_up_as_well() -> None:
    started = time.perf_counter()
    assert not matches(rule(system_prompt="(a+)+$"), system="a" * 5_000 + "b")
    assert time.perf_counter() - started < PATIENCE


def test_a_rule_that_was_given_up_leaves_the_others_their_turn() -> None:
    rules = [rule(regex="(a+)+$"), rule(regex="b$", name="second")]
    found = first_match(rules, "a" * 5_000 + "b", [], {})
    assert found is not None
    assert found.name == "second"


def test_a_rule_that_was_given_up_still_matches_other_texts() -> None:
    pattern = rule(regex="(a+)+$")
    assert not matches(pattern, "a" * 5_000 + "b")
    assert matches(pattern, "aaa")


def test_only_the_start_of_a_long_text_is_searched() -> None:
    assert matches(rule(regex="law"), "x" * (LONGEST_TEXT - 3) + "law")
    assert not matches(rule(regex="law"), "x" * (LONGEST_TEXT - 2) + "law")


@given(text=any_text)
def test_any_text_is_searched(text: str) -> None:
    every = rule(regex=r"(?s)^.*$", system_prompt=r"(?s)^.*$")
    assert matches(every, text, text)


@pytest.mark.parametrize("condition", ["regex", "system_prompt"])
@pytest.mark.parametrize(
    "pattern", ["(", "[z-a]", "*", "\\", "(?P<a>", "a{99999999999999999999}", r"\N{no}", "(" * 9000]
)
def test_a_bad_pattern_is_a_validation_error_that_says_why(condition: str, pattern: str) -> None:
    with pytest.raises(ValidationError, match="not a regular expression") as failure:
        rule(**{condition: pattern})
    assert failure.value.errors()[0]["loc"] == (condition,)


@given(pattern=st.text("()[]{}*+?|\\^$.-:<>=!PNRLpiae012,", min_size=1, max_size=12))
@settings(max_examples=300)
def test_whatever_is_accepted_as_a_pattern_can_be_searched(pattern: str) -> None:
    try:
        some = rule(regex=pattern)
    except ValidationError:
        return
    assert matches(some, "what is the law of large numbers?") in (True, False)


@pytest.mark.parametrize(
    "conditions", [{}, {"keyword": []}, {"header": {}}, {"regex": None}, {"name": "only a name"}]
)
def test_a_rule_without_a_condition_is_refused(conditions: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="a rule needs one of keyword, regex, header"):
        rule(**conditions)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keyword", ""),
        ("keyword", ["law", ""]),
        ("regex", ""),
        ("system_prompt", ""),
        ("header", {"": "x"}),
        ("header", {"x": 1}),
        ("expert", ""),
        ("keywords", ["law"]),
    ],
)
def test_a_bad_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as failure:
        rule(**{"keyword": "law", field: value})
    assert failure.value.errors()[0]["loc"][0] == field


def test_a_rule_needs_an_expert() -> None:
    with pytest.raises(ValidationError, match="expert"):
        RuleSettings.model_validate({"keyword": "law"})


def test_a_name_is_kept() -> None:
    named = rule(keyword="law", name="lawyers first")
    assert (named.name, named.expert) == ("lawyers first", "lawyer")


def test_a_rule_without_a_name_is_named_by_its_conditions() -> None:
    unnamed = rule(
        keyword=["law", "act"], regex=r"\d", header={"X-Team": "legal"}, system_prompt="terse"
    )
    assert unnamed.name == (
        r"keyword law, act and regex \d and header X-Team: legal and system_prompt terse"
    )
    assert rule(keyword="law").name == "keyword law"

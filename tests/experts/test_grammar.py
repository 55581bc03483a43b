"""Grammars: whatever is drawn from the allowed tokens matches, and ends only where it does."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.errors import InvalidRequest
from polymath.experts import Grammar, GrammarKind, GrammarSpec, Vocabulary
from polymath.experts.grammar import MAX_MESSAGE, GrammarCompiler, GrammarMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = 4
"""Logits beyond the tokenizer's vocabulary, as base models have them."""

MAX_STEPS = 4000
CLOSES = 0.05

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "size": {"type": "number", "minimum": -2, "maximum": 2},
        "tags": {"type": "array", "items": {"enum": ["a", "ü", 3, None]}, "maxItems": 3},
        "boss": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/boss"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"boss": {"type": "object", "properties": {"ok": {"type": "boolean"}}}},
}

SUMS = {
    "lark": 'start: term ("+" term)*\nterm: /[1-9][0-9]?/ | "(" start ")"',
    "gbnf": 'root ::= term ("+" term)*\nterm ::= [1-9] [0-9]? | "(" root ")"',
}

PATTERNS = [
    r"[0-9]{3}-[0-9]{4}",
    r"(yes|no)( maybe)?",
    r"[a-c]+é{1,3}",
    r"a.b",
    r"(?i:ok)\.?",
    r"https?://[a-z]+/[a-z/]*",
    r"[ab]\\\\",
    r"",
    r"^(\[[01]*\])*$",
]

UNSUPPORTED = {
    "not": {"type": "string"},
    "uniqueItems": True,
    "unevaluatedProperties": False,
    "dependentRequired": {"a": ["b"]},
    "contains": {"type": "string"},
    "propertyNames": {"pattern": "a"},
    "if": {"type": "string"},
}

seeds = st.integers(0, 2**32)


class Toolbox:
    """A compiler over the tiny model's tokenizer, of which every token is a byte."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self.size = len(self.vocabulary) + PADDING
        self.eos: int = tokenizer.eos_token_id
        self.bos: int = tokenizer.bos_token_id
        self.tokenizer = tokenizer
        self.compiler = GrammarCompiler(tokenizer, frozenset({self.eos}))

    def compile(self, kind: GrammarKind, content: object, param: str = "guided") -> Grammar:
        return self.compiler.compile(GrammarSpec(kind, content, param))

    def refusal(self, kind: GrammarKind, content: object, param: str = "guided") -> InvalidRequest:
        with pytest.raises(InvalidRequest) as refused:
            self.compile(kind, content, param)
        return refused.value

    def allowed(self, matcher: GrammarMatcher) -> set[int]:
        return set(matcher.allowed(self.size).nonzero().flatten().tolist())

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def accepts(self, grammar: Grammar, text: str) -> bool:
        matcher = grammar.start()
        for token in self.tokens(text):
            if token not in self.allowed(matcher):
                return False
            matcher.take(token)
        return self.eos in self.allowed(matcher)

    def walk(
        self,
        grammar: Grammar,
        choose: Callable[[list[int]], int],
        visit: Callable[[bytes, bool], None] = lambda text, satisfied: None,
    ) -> str:
        """Take allowed tokens up to the end; `visit` sees every text on the way."""
        matcher, text = grammar.start(), b""
        for _ in range(MAX_STEPS):
            allowed = self.allowed(matcher)
            visit(text, self.eos in allowed)
            token = choose(sorted(allowed))
            matcher.take(token)
            if token == self.eos:
                return text.decode()
            text += self.vocabulary.piece(token)
        raise AssertionError(f"the answer does not end: {text[:200]!r}")

    def random_walk(self, grammar: Grammar, seed: int) -> str:
        return self.walk(grammar, self.drawing(seed))

    def drawing(self, seed: int) -> Callable[[list[int]], int]:
        """Any token, but one that closes what is open a little more often than by chance."""
        drawn = random.Random(seed)
        closing = {self.eos, *(token for end in '"}]' for token in self.tokens(end))}

        def choose(allowed: list[int]) -> int:
            ends = [token for token in allowed if token in closing]
            return drawn.choice(ends if ends and drawn.random() < CLOSES else allowed)

        return choose


@pytest.fixture(scope="module")
def tools(tiny_model: Path) -> Toolbox:
    from transformers import AutoTokenizer

    return Toolbox(AutoTokenizer.from_pretrained(tiny_model))


def is_person(value: Any) -> bool:
    boss = value.get("boss")
    return (
        {"name", "age"} <= value.keys() <= {"name", "age", "size", "tags", "boss"}
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 6
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and -2 <= value.get("size", 0) <= 2
        and len(value.get("tags", [])) <= 3
        and all(tag in ("a", "ü", 3, None) for tag in value.get("tags", []))
        and (boss is None or isinstance(boss.get("ok", True), bool))
    )


def is_sum(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return re.fullmatch(r"[()+0-9]+", text) is not None


def next_bytes(choices: Sequence[str], begun: bytes) -> set[int]:
    known = [choice.encode() for choice in choices]
    return {
        choice[len(begun)]
        for choice in known
        if choice.startswith(begun) and len(choice) > len(begun)
    }


@given(
    choices=st.lists(st.text('ab"\\\n/é👍 ', min_size=1, max_size=5), min_size=1, max_size=6),
    seed=seeds,
)
@settings(deadline=None)
def test_the_allowed_tokens_of_a_choice_are_its_next_bytes_exactly(
    tools: Toolbox, choices: list[str], seed: int
) -> None:
    grammar = tools.compile("choice", choices)
    matcher, begun, draw = grammar.start(), b"", random.Random(seed)
    while True:
        allowed = tools.allowed(matcher)
        assert (tools.eos in allowed) == (begun in [choice.encode() for choice in choices])
        pieces = {tools.vocabulary.piece(token)[0] for token in allowed - {tools.eos}}
        assert pieces == next_bytes(choices, begun)
        token = draw.choice(sorted(allowed))
        if token == tools.eos:
            break
        matcher.take(token)
        begun += tools.vocabulary.piece(token)
    assert begun.decode() in choices


@pytest.mark.parametrize(
    "choice",
    ["yes", 'say "no"', "a\\b", "two\nlines", "/regex/", "👍", "\x00", " %ignore", "A" * 999],
)
def test_every_choice_can_be_answered_and_nothing_beside_it(tools: Toolbox, choice: str) -> None:
    grammar = tools.compile("choice", [choice, "other"])
    assert tools.accepts(grammar, choice)
    assert not tools.accepts(grammar, choice + "x")
    assert not tools.accepts(grammar, choice[:-1])


@given(seeds)
@settings(deadline=None)
def test_whatever_is_drawn_from_a_json_schema_parses_and_fits(tools: Toolbox, seed: int) -> None:
    assert is_person(json.loads(tools.random_walk(tools.compile("json_schema", PERSON), seed)))


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_json_ends_only_where_it_is_whole(tools: Toolbox, seed: int) -> None:
    def visit(text: bytes, satisfied: bool) -> None:
        try:
            whole = isinstance(json.loads(text), dict)
        except ValueError:
            whole = False
        assert satisfied == whole

    grammar = tools.compile("json_schema", PERSON)
    tools.walk(grammar, random.Random(seed).choice, visit)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_whatever_is_drawn_from_a_regex_matches_and_ends_only_there(
    tools: Toolbox, pattern: str, seed: int
) -> None:
    def visit(text: bytes, satisfied: bool) -> None:
        try:
            whole = re.fullmatch(pattern, text.decode()) is not None
        except UnicodeDecodeError:
            whole = False
        assert satisfied == whole

    text = tools.walk(tools.compile("regex", pattern), random.Random(seed).choice, visit)
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("dialect", SUMS)
@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_whatever_is_drawn_from_a_grammar_is_of_its_language(
    tools: Toolbox, dialect: str, seed: int
) -> None:
    grammar = tools.compile("grammar", SUMS[dialect])
    draw = random.Random(seed)

    def visit(text: bytes, satisfied: bool) -> None:
        assert satisfied == is_sum(text.decode())

    assert is_sum(tools.walk(grammar, draw.choice, visit))


@given(seeds)
@settings(deadline=None, max_examples=25)
def test_gbnf_and_lark_of_one_language_accept_the_same(tools: Toolbox, seed: int) -> None:
    lark, gbnf = (tools.compile("grammar", SUMS[dialect]) for dialect in ("lark", "gbnf"))
    assert tools.accepts(lark, tools.random_walk(gbnf, seed))
    assert tools.accepts(gbnf, tools.random_walk(lark, seed))


@pytest.mark.parametrize(
    ("grammar", "text", "other"),
    [
        ('root ::= "a"? "b"* [c-e]{2}', "abbcd", "abb"),
        ('root ::= item+\nitem ::= "- " [^\\n]+ "\\n"', "- one\n- two\n", "- one"),
        ('# a comment\nroot ::= "/" [/] "\\""', '//"', '/"'),
        ('start: greeting NAME\ngreeting: "hello "i\nNAME: /[a-z]+/', "HELLO bob", "hello"),
        ('%llguidance {}\nstart: "a" "b"', "ab", "a"),
        ('start: %json {"type": "boolean"} "!"', "true!", "true"),
    ],
)
def test_both_dialects_are_understood(tools: Toolbox, grammar: str, text: str, other: str) -> None:
    compiled = tools.compile("grammar", grammar)
    assert tools.accepts(compiled, text)
    assert not tools.accepts(compiled, other)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, '[1, {"a": null}]'),
        ({"type": "object"}, '{"any": ["thing"]}'),
        ({"const": {"a": 1}}, '{"a": 1}'),
        ({"type": ["string", "null"]}, "null"),
        ({"type": "string", "pattern": "^a+$"}, '"aaa"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"'),
        ({"type": "string"}, '"é 👍 \\n \\""'),
        ({"$ref": "#/$defs/node", "$defs": {"node": PERSON["$defs"]["boss"]}}, '{"ok": true}'),
        ({"title": "t", "description": "d", "default": 3, "examples": [1], "type": "null"}, "null"),
    ],
    ids=str,
)
def test_what_a_schema_allows_can_be_answered(
    tools: Toolbox, schema: dict[str, Any], text: str
) -> None:
    grammar = tools.compile("json_schema", schema)
    assert tools.accepts(grammar, text)
    assert not tools.accepts(grammar, f"{text} ")


@pytest.mark.parametrize("space", ["", " ", "\n", "\n  ", "\n" + 16 * " "], ids=repr)
def test_json_may_be_indented(tools: Toolbox, space: str) -> None:
    grammar = tools.compile("json_schema", {"type": "object"})
    assert tools.accepts(grammar, f'{{{space}"a"{space}:{space}[{space}1{space},{space}2]{space}}}')


@pytest.mark.parametrize("space", ["  ", "\n\n", "\t", "\r\n", "\n" + 17 * " "], ids=repr)
def test_json_may_not_be_filled_with_white_space(tools: Toolbox, space: str) -> None:
    grammar = tools.compile("json_schema", {"type": "object"})
    assert not tools.accepts(grammar, f'{{"a":{space}1}}')


def test_a_model_that_wants_nothing_but_white_space_comes_to_an_end(tools: Toolbox) -> None:
    """Small models do, and JSON itself would let them go on for ever."""
    spaces = tools.tokens(" \n\t\r")
    draw = random.Random(0)

    def prefer_space(allowed: list[int]) -> int:
        return draw.choice([token for token in allowed if token in spaces] or allowed)

    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
    text = tools.walk(tools.compile("json_schema", schema), prefer_space)
    assert len(json.loads(text)) <= 3


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("json_schema", {"type": "string"}),
        ("regex", r"(.|\n)*"),
        ("grammar", r"start: /(.|\n)*/"),
        ("choice", ["<|im_start|>", "<other>"]),
    ],
)
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_neither_control_tokens_nor_padding_are_ever_allowed(
    tools: Toolbox, kind: GrammarKind, content: object, seed: int
) -> None:
    draw = random.Random(seed)

    def choose(allowed: list[int]) -> int:
        assert max({0, *allowed} - {tools.eos}) < tools.bos
        return draw.choice(allowed)

    tools.walk(tools.compile(kind, content), choose)


@pytest.mark.parametrize("text", ["<|im_start|>", "a<|im_end|>b"])
def test_text_that_spells_a_control_token_is_text(tools: Toolbox, text: str) -> None:
    """Byte by byte, and not as the control token itself, which has no text."""
    assert tools.random_walk(tools.compile("choice", [text]), seed=0) == text
    assert json.loads(tools.random_walk(tools.compile("json_schema", {"const": text}), 0)) == text


def test_a_grammar_that_is_satisfied_and_cannot_go_on_allows_the_end_alone(tools: Toolbox) -> None:
    matcher = tools.compile("choice", ["a"]).start()
    matcher.take(*tools.tokens("a"))
    assert tools.allowed(matcher) == {tools.eos}


def test_every_token_that_ends_an_answer_may_end_it(tools: Toolbox) -> None:
    compiler = GrammarCompiler(tools.tokenizer, frozenset({tools.eos, tools.bos}))
    matcher = compiler.compile(GrammarSpec("regex", "a?", "guided_regex")).start()
    assert tools.allowed(matcher) == {*tools.tokens("a"), tools.eos, tools.bos}


@given(seeds, seeds)
@settings(deadline=None, max_examples=20)
def test_two_answers_of_one_grammar_do_not_disturb_each_other(
    tools: Toolbox, seed: int, other: int
) -> None:
    grammar = tools.compile("json_schema", PERSON)
    alone = [tools.random_walk(grammar, one) for one in (seed, other)]
    walks = [(grammar.start(), tools.drawing(one), bytearray()) for one in (seed, other)]
    running = [*walks]
    while running:
        for walk in list(running):
            matcher, draw, text = walk
            token = draw(sorted(tools.allowed(matcher)))
            matcher.take(token)
            text += tools.vocabulary.piece(token)
            if token == tools.eos:
                running = [one for one in running if one is not walk]
    assert [text.decode() for _, _, text in walks] == alone


def test_threads_may_compile_at_the_same_time(tools: Toolbox) -> None:
    compiler = GrammarCompiler(tools.tokenizer, frozenset({tools.eos}))
    specs = [GrammarSpec("choice", [f"choice {index}"], "guided_choice") for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        grammars = list(pool.map(compiler.compile, specs))
    for index, grammar in enumerate(grammars):
        assert tools.accepts(grammar, f"choice {index}")


@pytest.mark.parametrize("nested", [False, True], ids=["at the top", "in a property"])
@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_a_keyword_that_is_not_supported_is_refused_by_name(
    tools: Toolbox, keyword: str, nested: bool
) -> None:
    schema: dict[str, Any] = {keyword: UNSUPPORTED[keyword]}
    if nested:
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    refused = tools.refusal("json_schema", schema, "response_format")
    assert keyword in refused.message
    assert refused.message.startswith("Unsupported or invalid json schema: ")
    assert (refused.param, refused.status) == ("response_format", 400)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "#/$defs/gone"}, "/$defs/gone"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}, "required": ["a"]}, "/$defs/gone"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-behind"),
        ({"type": "string", "format": "of-my-own"}, "of-my-own"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength (5)"),
        (True, "object schema"),
        ([1], "object schema"),
        (float("nan"), "line 1 column 1"),
        ({"const": "\ud800"}, "hex escape"),
    ],
    ids=str,
)
def test_a_malformed_schema_is_refused_with_the_place(
    tools: Toolbox, schema: object, named: str
) -> None:
    refused = tools.refusal("json_schema", schema, "guided_json")
    assert named in refused.message
    assert refused.param == "guided_json"


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("(", "unclosed group"),
        ("[a", "unclosed character class"),
        ("[z-a]", "invalid character class range"),
        ("a{2,1}", "invalid repetition"),
        ("*", "repetition"),
        ("a\\", "lone backslash"),
        ("a\\\\\\", "lone backslash"),
        ("(?<=a)b", "look-behind"),
        ("(?<!a)b", "look-behind"),
        ("(?=a)b", "look-ahead"),
        (r"(a)\1", "backreferences"),
        ("\ud800", "surrogates"),
    ],
)
def test_a_malformed_regex_is_refused_with_the_reason(
    tools: Toolbox, pattern: str, named: str
) -> None:
    refused = tools.refusal("regex", pattern, "guided_regex")
    assert named in refused.message
    assert refused.message.startswith("Unsupported or invalid regex: ")
    assert refused.param == "guided_regex"


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ("start: missing", "missing"),
        ('start: "a" )', "1("),
        ("start: /a(/", "unclosed group"),
        ("start: /(?<=a)b/", "look-behind"),
        ('start: "a"\n::= x', "::"),
        ("no grammar at all", "::="),
        ('other: "a"', "::="),
        ('root ::= "a" (', "Expected ')'"),
        ("root ::= missing", "missing"),
        ('other ::= "a"', "root"),
        ("", "root"),
        ('start: "\ud800"', "surrogates"),
    ],
)
def test_a_malformed_grammar_is_refused_with_the_reason(
    tools: Toolbox, grammar: str, named: str
) -> None:
    refused = tools.refusal("grammar", grammar, "guided_grammar")
    assert named in refused.message
    assert refused.message.startswith("Unsupported or invalid grammar: ")
    assert refused.param == "guided_grammar"


@pytest.mark.parametrize("depth", [200, 2_000])
def test_what_is_nested_too_deeply_is_refused(tools: Toolbox, depth: int) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    parentheses = depth * 10 * "(" + '"a"' + depth * 10 * ")"
    for kind, content in (
        ("json_schema", schema),
        ("grammar", f"root ::= {parentheses}"),
        ("grammar", f"start: {parentheses}"),
        ("regex", parentheses),
    ):
        assert tools.refusal(kind, content).param == "guided"


def test_a_refusal_is_one_line_and_not_as_long_as_the_grammar(tools: Toolbox) -> None:
    refused = tools.refusal("regex", "(a\n" * 5_000)
    assert "\n" not in refused.message
    assert len(refused.message) <= len("Unsupported or invalid regex: ") + MAX_MESSAGE


@pytest.mark.parametrize("grammar", ['start: start "a"', "root ::= root"])
def test_a_grammar_without_an_end_is_refused_when_it_is_followed(
    tools: Toolbox, grammar: str
) -> None:
    matcher = tools.compile("grammar", grammar, "guided_grammar").start()
    with pytest.raises(InvalidRequest) as refused:
        matcher.allowed(tools.size)
    assert refused.value.param == "guided_grammar"


def test_a_token_that_was_not_allowed_is_an_error(tools: Toolbox) -> None:
    matcher = tools.compile("choice", ["a"], "guided_choice").start()
    with pytest.raises(InvalidRequest) as refused:
        matcher.take(*tools.tokens("b"))
    assert refused.value.param == "guided_choice"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (
            "grammar",
            "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"',
        ),
        (
            "json_schema",
            {
                "$ref": "#/$defs/d0",
                "$defs": {
                    **{
                        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}}
                        for i in range(5000)
                    },
                    "d5000": {"type": "string"},
                },
            },
        ),
        ("json_schema", {"enum": ["a" * 300_000]}),
    ],
    ids=["rules", "references", "characters"],
)
def test_a_grammar_that_would_overflow_the_compiler_is_refused(
    tools: Toolbox, kind: GrammarKind, content: object
) -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        tools.compile(kind, content)

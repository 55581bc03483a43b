"""Grammar-constrained decoding (Geng et al. 2023): only tokens that keep the answer well-formed.

llguidance compiles JSON Schema, regular expressions and grammars to a mask over the vocabulary. The
mask lies on the combined distribution, so that an ensemble is constrained as one model is.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from polymath.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["Grammar", "GrammarCompiler", "GrammarKind", "GrammarMatcher", "GrammarSpec"]

WHITE_SPACE = r"(\x20|\n\x20{0,16})?"
"""One space, or a line break with its indentation: a small model may not fill the answer with
white space, which JSON allows without end."""

MAX_MESSAGE = 400
MAX_CHARACTERS = 256 * 1024
MAX_RULES = 500
"""Rules or references; llguidance follows chains of them on the native stack, which some thousands
overflow, and the process with it."""


GrammarKind = Literal["json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What a request asks for.

    Attributes:
        content: a JSON Schema, a regular expression, strings, or a grammar (Lark or GBNF).
        param: the request field that it came from.
    """

    kind: GrammarKind
    content: Any
    param: str


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next, [vocabulary], boolean.

        Raises:
            InvalidRequest: the grammar is too complex to go on.
        """
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.zeros(vocabulary, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[:vocabulary]
        allowed[: len(known)] = known
        return torch.from_numpy(allowed)

    def take(self, token: int) -> None:
        """Go on with a token that was allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0][:MAX_MESSAGE]
            raise InvalidRequest(f"The grammar cannot be followed: {reason}", param=self._param)


class Grammar:
    """A compiled grammar, to be followed by any number of answers."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param

    def start(self) -> GrammarMatcher:
        """A matcher at the beginning of an answer."""
        return GrammarMatcher(self._matcher.deep_copy(), self._param)


class GrammarCompiler:
    """Grammars over one tokenizer.

    Args:
        eos_ids: tokens that end an answer; allowed where the grammar is satisfied.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Compile a grammar; takes milliseconds, the first time half a second.

        Raises:
            InvalidRequest: it is malformed, or uses what is not supported, which is named.
        """
        from llguidance import LLMatcher

        try:
            text = _grammar_text(spec)
        except (ValueError, RecursionError) as error:
            raise _refusal(spec, str(error)) from error
        matcher = LLMatcher(self._opened(), text, log_level=0)
        if matcher.is_error():
            raise _refusal(spec, matcher.get_error())
        return Grammar(matcher, spec.param)

    def _opened(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                described = _without_control_text(self._hf_tokenizer)
                self._tokenizer = LLTokenizer(described, eos_token=self._eos_ids)
            return self._tokenizer


def _without_control_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as JSON, its control tokens under names that no text spells.

    Else llguidance, where a grammar forces the text `<|im_end|>`, allows the control token.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"padding": None, "truncation": None, "post_processor": None}
    names = {}
    for token in described["added_tokens"]:
        if token["special"]:
            names[token["content"]] = token["content"] = f"\ue0f2{token['id']}\ue0f3"
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = (
        {names.get(token, token): index for token, index in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else [[names.get(token, token), score] for token, score in vocabulary]
    )
    return json.dumps(described)


def _grammar_text(spec: GrammarSpec) -> str:
    from llguidance import LLMatcher

    if spec.kind == "json_schema":
        schema = json.dumps(spec.content)
        _check_size(schema, schema.count('"$ref"'))
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE}
        )
    if spec.kind == "regex":
        trailing = len(spec.content) - len(spec.content.rstrip("\\"))
        if trailing % 2:  # llguidance would drop it
            raise ValueError("the regular expression ends with a lone backslash")
        return LLMatcher.grammar_from_regex(spec.content)
    if spec.kind == "choice":
        choices = " | ".join(json.dumps(choice) for choice in spec.content)
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    _check_size(spec.content, spec.content.count(":"))
    return LLMatcher.grammar_from_lark(_lark(spec.content))


def _check_size(text: str, rules: int) -> None:
    if len(text) > MAX_CHARACTERS or rules > MAX_RULES:
        raise ValueError(
            f"{len(text)} characters and {rules} rules or references; "
            f"at most {MAX_CHARACTERS} and {MAX_RULES} are allowed"
        )


def _lark(grammar: str) -> str:
    """The grammar in llguidance's Lark, translated if it is llama.cpp's GBNF."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # it raises bare Exceptions for rules that are missing
        raise ValueError(str(error)) from error


def _refusal(spec: GrammarSpec, reason: str) -> InvalidRequest:
    lines = " ".join(line.strip() for line in reason.splitlines() if line.strip())
    what = spec.kind.replace("_", " ")
    return InvalidRequest(f"Unsupported or invalid {what}: {lines[:MAX_MESSAGE]}", param=spec.param)

"""Rules that are asked before the encoder: keyword, pattern, header or system prompt -> expert.

Patterns come from the config, but texts come from anyone, so a search has a time limit: a pattern
that would backtrack for minutes on a hostile text counts as not found.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from polymath.router.decision import Message

__all__ = ["Rule", "RuleSettings", "first_match"]

SEARCH_SECONDS = 0.02
LONGEST_TEXT = 20_000
"""Characters of a text that are searched."""

CONDITIONS = ("keyword", "regex", "header", "system_prompt")

log = logging.getLogger(__name__)


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]
Word = Annotated[str, Field(min_length=1)]


class RuleSettings(BaseModel):
    """Where all the conditions of a rule hold, its expert answers and the encoder is not asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str = Field(min_length=1, description="Who answers.")
    name: str = Field(default="", description="Shown in decisions; by default the conditions.")
    keyword: tuple[Word, ...] | Word = Field(
        default=(),
        description="One of these words or phrases stands in the last user turn, in any case.",
    )
    regex: Pattern | None = Field(
        default=None, description="A pattern that is found in the last user turn."
    )
    header: dict[Word, str] = Field(
        default_factory=dict, description="HTTP request headers with exactly these values."
    )
    system_prompt: Pattern | None = Field(
        default=None, description="A pattern that is found in a system message."
    )

    @model_validator(mode="after")
    def _has_a_condition(self) -> RuleSettings:
        if not any(getattr(self, condition) for condition in CONDITIONS):
            raise ValueError(f"a rule needs one of {', '.join(CONDITIONS)}")
        return self


class Rule:
    """A rule with its patterns compiled."""

    def __init__(self, settings: RuleSettings) -> None:
        keywords = settings.keyword
        words = (keywords,) if isinstance(keywords, str) else keywords
        self.expert = settings.expert
        self.name = settings.name or _described(settings, words)
        self._patterns = [
            (regex.compile(pattern), role)
            for pattern, role in (
                (_any_word(words) if words else None, "user"),
                (settings.regex, "user"),
                (settings.system_prompt, "system"),
            )
            if pattern is not None
        ]
        self._headers = {name.lower(): value for name, value in settings.header.items()}

    def matches(self, user: str, system: str, headers: Mapping[str, str]) -> bool:
        """Whether all conditions hold."""
        texts = {"user": user, "system": system}
        return all(headers.get(name) == value for name, value in self._headers.items()) and all(
            self._found(pattern, texts[role]) for pattern, role in self._patterns
        )

    def _found(self, pattern: regex.Pattern[str], text: str) -> bool:
        try:
            return pattern.search(text[:LONGEST_TEXT], timeout=SEARCH_SECONDS) is not None
        except TimeoutError:
            log.warning("rule %r: the search took too long and was given up", self.name)
            return False


def first_match(
    rules: Sequence[Rule], user: str, messages: Sequence[Message], headers: Mapping[str, str]
) -> Rule | None:
    """The first rule whose conditions all hold.

    Args:
        user: text of the last user turn.
    """
    if not rules:
        return None
    system = "\n".join(
        message["content"] for message in messages if message["role"] in ("system", "developer")
    )
    return next((rule for rule in rules if rule.matches(user, system, headers)), None)


def _any_word(words: Sequence[str]) -> str:
    alternatives = "|".join(regex.escape(word) for word in words)
    return rf"(?i)(?<!\w)(?:{alternatives})(?!\w)"


def _described(settings: RuleSettings, words: Sequence[str]) -> str:
    parts: list[str] = [f"keyword {', '.join(words)}"] if words else []
    parts += [f"regex {settings.regex}"] if settings.regex else []
    parts += [f"header {name}: {value}" for name, value in settings.header.items()]
    parts += [f"system_prompt {settings.system_prompt}"] if settings.system_prompt else []
    return " and ".join(parts)

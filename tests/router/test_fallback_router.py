"""Rules alone: a router without a model."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from polymath.router import Allowed, HasEmbedder, RouteDecision, RouterSettings, build_router

OWNERS = {"coding": "technician", "law": "lawyer"}
RULES = [{"expert": "lawyer", "keyword": "subpoena"}]


def settings(**values: Any) -> RouterSettings:
    return RouterSettings.model_validate({"kind": "rules", "fallback": "generalist", **values})


def ask(section: RouterSettings, text: str, allowed: Allowed = None) -> RouteDecision:
    router = build_router(section, OWNERS)
    return router.route([{"role": "user", "content": text}], None, allowed)


@pytest.mark.parametrize("rules", [[], RULES])
def test_what_no_rule_matches_goes_to_the_fallback(rules: list[dict[str, str]]) -> None:
    decision = ask(settings(rules=rules), "sort a list")
    assert (decision.weights, decision.domain) == ({"generalist": 1.0}, None)
    assert (decision.source, decision.confidence) == ("fallback", 0.0)


def test_a_rule_decides_and_names_the_domain() -> None:
    decision = ask(settings(rules=RULES), "What is a subpoena?")
    assert (decision.expert, decision.domain, decision.source) == ("lawyer", "law", "rule")


def test_an_expert_that_is_not_allowed_is_not_chosen() -> None:
    section = settings(rules=RULES)
    assert ask(section, "What is a subpoena?", {"generalist"}).expert == "generalist"
    assert ask(section, "sort a list", {"lawyer"}).weights == {"lawyer": 1.0}


def test_there_is_no_encoder() -> None:
    router = build_router(settings(rules=RULES), OWNERS)
    embedder = router.embedder if isinstance(router, HasEmbedder) else None
    assert embedder is None


@pytest.mark.parametrize(
    "key", ["path", "clusters", "min_confidence", "combine", "sticky", "top_k", "threads"]
)
def test_a_key_that_needs_a_model_is_refused(key: str) -> None:
    value = {"path": "router", "clusters": "clusters", "combine": "logits"}.get(key, 1)
    with pytest.raises(ValidationError, match=f"{key}.*means nothing"):
        settings(**{key: 0.5 if key == "sticky" else value})


@pytest.mark.parametrize("kind", ["encoder", "gradient", "hybrid"])
def test_other_kinds_need_a_path(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"'path' is missing.*{kind}"):
        settings(kind=kind)

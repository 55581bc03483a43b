"""The router of a config section, from a folder on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from polymath.errors import ModelSourceError, RouterArtifactError
from polymath.router import (
    Message,
    Reference,
    RouteDecision,
    RouterArtifact,
    RouterCard,
    RouterSettings,
    SentenceEncoder,
    build_router,
    halves,
)
from tests.router.conftest import TINY_TOKENS, TINY_WIDTH

PROMPTS = {"coding": "sort a list", "law": "what is the law"}
OWNERS = {"coding": "technician", "law": "lawyer"}
SHARPNESS = 50.0


@pytest.fixture
def folder(tiny_folder: Path, tiny: SentenceEncoder, tmp_path: Path) -> Path:
    """A router that tells the two prompts apart by the vectors of a real, if tiny, encoder."""
    target = Path(shutil.copytree(tiny_folder, tmp_path / "router"))
    read, likeness = halves(tiny.encode(list(PROMPTS.values())))
    middle = read.mean(axis=0)
    RouterArtifact(
        card=RouterCard(
            encoder="tiny",
            max_tokens=TINY_TOKENS,
            labels=tuple(PROMPTS),
            temperature=1.0,
            data_sha256="",
            rows={},
            metrics={},
        ),
        weight=SHARPNESS * read,
        bias=-SHARPNESS * read @ middle,
        vectors=likeness,
        references=tuple(
            Reference(id=domain, text=text, domain=domain) for domain, text in PROMPTS.items()
        ),
    ).save(target)
    return target


def settings(folder: Path, **values: Any) -> RouterSettings:
    return RouterSettings.model_validate({"path": folder, "fallback": "generalist", **values})


def ask(
    section: RouterSettings, text: str, examples: dict[str, list[str]] | None = None
) -> RouteDecision:
    messages: list[Message] = [{"role": "user", "content": text}]
    return build_router(section, OWNERS | {"chess": "player"}, examples).route(messages)


@pytest.mark.parametrize(("domain", "text"), PROMPTS.items())
def test_a_router_is_complete_in_its_folder(folder: Path, domain: str, text: str) -> None:
    decision = ask(settings(folder), text)
    assert (decision.domain, decision.expert) == (domain, OWNERS[domain])
    assert decision.why.nearest[0].text == text


def test_the_folder_may_be_moved(folder: Path) -> None:
    moved = folder.rename(folder.with_name("elsewhere"))
    assert ask(settings(moved), PROMPTS["law"]).expert == "lawyer"


@pytest.mark.parametrize("text", ["", "x" * 100_000, "\ud800", "word " * 20_000])
def test_any_text_is_routed(folder: Path, text: str) -> None:
    assert sum(ask(settings(folder), text).weights.values()) == pytest.approx(1.0)


def test_texts_are_cut_to_what_the_card_says(folder: Path) -> None:
    """The tiny encoder has no position beyond its 64th: a longer text would be an error."""
    artifact = RouterArtifact.load(folder)
    replace(artifact, card=artifact.card.model_copy(update={"max_tokens": 16})).save(folder)
    side = "sort a list " * 20
    first, second = (ask(settings(folder), side + word + side) for word in ("law ", "stock "))
    assert first.why == second.why


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"min_confidence": 1.0}, ("fallback", "select")),
        ({"rules": [{"keyword": "list", "expert": "poet"}]}, ("rule", "select")),
        ({"combine": "posterior", "margin": 1.0, "min_confidence": 0}, ("encoder", "posterior")),
        ({"combine": "ensemble", "margin": 0.0}, ("encoder", "select")),
        ({"out_of_scope": 1.0, "sticky": 0.5, "threads": 2}, ("encoder", "select")),
    ],
)
def test_every_key_of_the_section_has_its_effect(
    folder: Path, values: dict[str, Any], expected: tuple[str, str]
) -> None:
    text = "sort a list" if "posterior" not in values.values() else "is"
    decision = ask(settings(folder, **values), text)
    assert (decision.source, decision.combine) == expected


def test_the_stickiness_is_that_of_the_section(folder: Path) -> None:
    turns: list[Message] = [{"role": "user", "content": text} for text in (PROMPTS["law"], "is")]
    forgetful, faithful = (
        build_router(settings(folder, sticky=sticky), OWNERS).route(turns).why.domains["law"]
        for sticky in (0.0, 0.9)
    )
    assert forgetful == pytest.approx(ask(settings(folder), "is").why.domains["law"])
    assert faithful > forgetful


def test_the_limit_of_scope_is_that_of_the_section_before_the_cards(folder: Path) -> None:
    artifact = RouterArtifact.load(folder)
    replace(
        artifact,
        card=artifact.card.model_copy(update={"out_of_scope": 1e-12}),
        weight=np.concatenate([artifact.weight, np.zeros((1, TINY_WIDTH), dtype=np.float32)]),
        bias=np.append(artifact.bias, np.float32(0)),
    ).save(folder)
    assert ask(settings(folder), PROMPTS["law"]).source == "fallback"
    assert ask(settings(folder, out_of_scope=1.0), PROMPTS["law"]).source == "encoder"


def test_examples_make_a_domain(folder: Path) -> None:
    decision = ask(settings(folder), "proof 12345", {"chess": ["proof 12345"]})
    assert (decision.domain, decision.expert) == ("chess", "player")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("router.json", RouterArtifactError),
        ("head.safetensors", RouterArtifactError),
        ("references.jsonl", RouterArtifactError),
        ("model.onnx", ModelSourceError),
        ("tokenizer.json", ModelSourceError),
    ],
)
@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(b"{"), os.remove])
def test_a_missing_or_corrupt_file_is_named(
    folder: Path, name: str, error: type[Exception], spoil: Callable[[Path], object]
) -> None:
    spoil(folder / name)
    with pytest.raises((error, RouterArtifactError)) as failure:
        build_router(settings(folder), OWNERS)
    assert str(folder) in str(failure.value)


def test_a_head_for_another_encoder_is_refused(folder: Path) -> None:
    artifact = RouterArtifact.load(folder)
    wide = np.zeros((2, TINY_WIDTH + 1), dtype=np.float32)
    replace(artifact, weight=wide, vectors=wide).save(folder)
    with pytest.raises(RouterArtifactError, match="33 dimensions, but the encoder gives 32"):
        build_router(settings(folder), OWNERS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "oracle"),
        ("fallback", ""),
        ("min_confidence", 1.1),
        ("out_of_scope", 0),
        ("combine", "vote"),
        ("margin", -0.1),
        ("top_k", 0),
        ("sticky", 1.0),
        ("threads", 0),
        ("rules", [{"expert": "lawyer"}]),
        ("rule", []),
    ],
)
def test_a_bad_key_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ValidationError) as failure:
        settings(tmp_path, **{key: value})
    assert failure.value.errors()[0]["loc"][0] == key


@pytest.mark.parametrize("key", ["path", "fallback"])
def test_a_section_needs_a_folder_and_a_fallback(tmp_path: Path, key: str) -> None:
    values = {"path": tmp_path, "fallback": "generalist"}
    with pytest.raises(ValidationError, match=key):
        RouterSettings.model_validate({name: values[name] for name in values if name != key})

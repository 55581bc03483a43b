"""Clusters guessed from words: a router folder that learned what the gradients said."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from polymath.errors import ModelSourceError
from polymath.router import RouterArtifact, distilled_reader
from polymath.training import fingerprint
from polymath.training.data import PromptRow
from polymath.training.distillation import Agreement, distil
from tests.training import conftest
from tests.training.conftest import DOMAINS, WORDS, prompt_text, prompts, write_tiny_bert

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Weights = NDArray[np.float64]

LABELS = tuple(f"cluster-{index}" for index in range(len(DOMAINS)))
FILES = {"head.safetensors", "model.onnx", "references.jsonl", "router.json", "tokenizer.json"}
ROWS = prompts(80, *DOMAINS)
TEXTS = [row.text for row in ROWS]
SURE = 0.9

pytestmark = pytest.mark.usefixtures("one_thread")

Distil = Callable[..., Agreement]


def weights_of(rows: list[PromptRow], sure: float = SURE) -> Weights:
    """Most of the weight on the cluster of the prompt's domain, the rest on the others."""
    own = np.array([DOMAINS.index(row.domain) for row in rows])
    rest = (1 - sure) / (len(DOMAINS) - 1)
    return np.where(np.arange(len(DOMAINS)) == own[:, None], sure, rest)


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> Distil:
    """A distillation into the tiny BERT; to `tmp_path / "distilled"` unless told otherwise."""

    def distilled(texts: list[str], weights: Weights, **how: Any) -> Agreement:
        out = how.pop("out", tmp_path / "distilled")
        labels = LABELS[: weights.shape[1]]
        encoder = how.pop("encoder", str(tiny_bert))
        agreement, _ = distil(texts, weights, labels, encoder, out, 0, **how)
        return agreement

    return distilled


@pytest.fixture(scope="module")
def folder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled")
    distil(TEXTS, weights_of(ROWS), LABELS, str(tiny_bert), out, 0)
    return out


def guesses(folder: Path, texts: list[str]) -> Weights:
    read = distilled_reader(folder, 1, RouterArtifact.load(folder).card.labels)
    return np.stack([read([{"role": "user", "content": text}]) for text in texts])


def test_prompts_that_words_tell_apart_are_guessed(run: Distil) -> None:
    assert run(TEXTS, weights_of(ROWS)).top > 0.85


def test_clusters_that_words_do_not_tell_are_not_guessed(run: Distil) -> None:
    shuffled = np.random.default_rng(0).permutation(weights_of(ROWS))
    assert run(TEXTS, shuffled).top < 0.6


def test_prompts_not_seen_before_are_guessed(folder: Path) -> None:
    rng = random.Random(1)
    found = [
        guesses(folder, [prompt_text(rng, WORDS[domain]) for _ in range(20)]).argmax(axis=1)
        for domain in DOMAINS
    ]
    right = [(guessed == index).mean() for index, guessed in enumerate(found)]
    assert np.mean(right) > 0.85


def test_guesses_are_weights(folder: Path) -> None:
    found = guesses(folder, [*TEXTS[:5], "", "x" * 5000, "é 漢"])
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)
    assert found.min() >= 0


def test_weights_that_are_always_the_same_are_learned_as_they_are(
    run: Distil, tmp_path: Path
) -> None:
    """The best of all heads has no weight but its bias, which is not regularised."""
    always = np.tile([0.7, 0.2, 0.1], (len(TEXTS), 1))
    assert run(TEXTS, always).distance < 0.01
    found = guesses(tmp_path / "distilled", ["something else"])
    np.testing.assert_allclose(found, always[:1], atol=0.01)


def test_two_clusters_are_learned(run: Distil, tmp_path: Path) -> None:
    rows = prompts(80, *DOMAINS[:2])
    weights = weights_of(rows, sure=1.0)[:, :2]
    assert run([row.text for row in rows], weights).top > 0.9
    found = guesses(tmp_path / "distilled", [row.text for row in rows])
    assert (found.argmax(axis=1) == weights.argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_agreement_is_in_range(run: Distil, rows: int, seed: int) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(LABELS)), rows)
    agreement = run(TEXTS[:rows], weights)
    assert 0 <= agreement.top <= 1
    assert 0 <= agreement.distance <= 1


def test_agreement_is_measured_on_prompts_not_learned_from(run: Distil, tmp_path: Path) -> None:
    """Weights that follow from nothing can be learned by heart, but not guessed."""
    weights = np.random.default_rng(0).dirichlet(0.1 * np.ones(len(LABELS)), 12)
    agreement = run(TEXTS[::20], weights)
    by_heart = guesses(tmp_path / "distilled", TEXTS[::20])
    assert agreement.distance > np.abs(by_heart - weights).sum(axis=1).mean() / 2


def test_the_folder_is_a_router_folder(folder: Path, tiny_bert: Path) -> None:
    assert {file.name for file in folder.iterdir()} == FILES
    artifact = RouterArtifact.load(folder)
    assert artifact.card.labels == LABELS
    assert artifact.card.encoder == str(tiny_bert)
    assert artifact.card.out_of_scope is None
    assert artifact.weight.shape == (len(LABELS), 32)
    assert artifact.references == ()


def test_no_prompt_is_in_the_folder(folder: Path) -> None:
    content = b"".join(file.read_bytes() for file in folder.iterdir())
    assert not [text for text in TEXTS if text.encode() in content]


def test_the_card_says_how_well_it_guesses_and_from_what(run: Distil, tmp_path: Path) -> None:
    agreement = run(TEXTS, weights_of(ROWS))
    card = RouterArtifact.load(tmp_path / "distilled").card
    assert card.metrics == {"agreement": round(agreement.top, 4)}
    assert card.data_sha256 == fingerprint(
        [PromptRow(text=text, domain="cluster") for text in TEXTS]
    )


def test_the_same_seed_gives_the_same_folder(run: Distil, folder: Path, tmp_path: Path) -> None:
    run(TEXTS, weights_of(ROWS))
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "distilled" / file.name).read_bytes()


def test_prompts_without_words_are_no_fault(run: Distil) -> None:
    assert run(["", *TEXTS], weights_of([ROWS[0], *ROWS])).top > 0.85


def test_an_encoder_of_short_texts_reads_long_ones(
    run: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "POSITIONS", 16)
    encoder = write_tiny_bert(tmp_path / "short")
    texts = [f"{text} {text} {text}" for text in TEXTS]
    run(texts, weights_of(ROWS), encoder=str(encoder))
    assert RouterArtifact.load(tmp_path / "distilled").card.max_tokens == 16
    assert guesses(tmp_path / "distilled", texts[:3]).shape == (3, len(LABELS))


def test_an_encoder_that_does_not_exist_is_named(run: Distil, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="nowhere"):
        run(TEXTS, weights_of(ROWS), encoder=str(tmp_path / "nowhere"))

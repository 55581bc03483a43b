"""A linear head from labelled prompts, on an encoder whose vectors are known."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polymath.errors import DataError
from polymath.router import EncoderRouter, RouterArtifact, calibrated
from polymath.training import PromptRow, fingerprint, train_router_head
from polymath.training.router_head import INVERSE_REGULARISATION

DOMAINS = ("coding", "law", "math")
DIMENSIONS = 8
NOISE = 0.3


class FakeEncoder:
    """Stands for the sentence encoder: an axis a domain word, and noise that follows the text."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> NDArray[np.float32]:
        random = np.random.default_rng(zlib.crc32(text.encode()))
        vector = NOISE * random.normal(size=DIMENSIONS)
        for axis, domain in enumerate(DOMAINS):
            vector[axis] += text.count(domain)
        result: NDArray[np.float32] = (vector / np.linalg.norm(vector)).astype(np.float32)
        return result


def prompts(count: int, *domains: str, source: str | None = "made/train") -> list[PromptRow]:
    return [
        PromptRow(text=f"{domain} question {index} of {source}", domain=domain, source=source)
        for index in range(count)
        for domain in domains
    ]


def train(rows: Sequence[PromptRow], **how: Any) -> RouterArtifact:
    return train_router_head(rows, FakeEncoder(), "package:fake", **how)


def logits(artifact: RouterArtifact, texts: Sequence[str]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = FakeEncoder().encode(texts) @ artifact.weight.T + artifact.bias
    return result


def assert_same(first: RouterArtifact, second: RouterArtifact) -> None:
    assert first.card == second.card
    assert first.references == second.references
    for name in ("weight", "bias", "vectors"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.fixture(scope="module")
def artifact() -> RouterArtifact:
    return train(prompts(30, *DOMAINS), licence="CC0")


@pytest.mark.parametrize("domains", [DOMAINS[:2], DOMAINS])
def test_the_head_gives_the_probabilities_of_logistic_regression(domains: tuple[str, ...]) -> None:
    """Two classes come from scikit-learn as one row; their softmax must be its sigmoid."""
    from sklearn.linear_model import LogisticRegression

    rows = prompts(12, *domains)
    texts, targets = [row.text for row in rows], [row.domain for row in rows]
    reference = LogisticRegression(
        C=INVERSE_REGULARISATION, class_weight="balanced", max_iter=1000
    ).fit(FakeEncoder().encode(texts), targets)
    expected = reference.predict_proba(FakeEncoder().encode(texts))
    np.testing.assert_allclose(calibrated(logits(train(rows), texts), 1.0), expected, atol=1e-5)


def test_the_same_seed_gives_the_same_artifact() -> None:
    rows = prompts(80, *DOMAINS)
    assert_same(train(rows, seed=3), train(rows, seed=3))


def test_rows_of_no_domain_are_left_out(artifact: RouterArtifact) -> None:
    rows = prompts(30, *DOMAINS)
    outside = prompts(20, "none", source="clinc/oos")
    mixed = [row for pair in zip(outside, rows, strict=False) for row in pair] + rows[20:]
    assert_same(train(mixed, licence="CC0"), artifact)


@pytest.mark.parametrize("domains", [DOMAINS[:2], DOMAINS])
def test_eight_prompts_a_domain_are_enough(domains: tuple[str, ...]) -> None:
    trained = train(prompts(8, *domains))
    texts = [f"an unseen {domain} text" for domain in domains]
    assert logits(trained, texts).argmax(-1).tolist() == list(range(len(domains)))


def test_two_prompts_a_domain_are_the_least() -> None:
    trained = train(prompts(2, *DOMAINS))
    assert trained.weight.shape == (3, DIMENSIONS)


def test_a_rare_domain_is_not_drowned_by_a_common_one() -> None:
    """Without balanced class weights 77 of these texts are recognised."""
    trained = train([*prompts(300, "math"), *prompts(5, "law")])
    texts = [f"an unseen law text {index}" for index in range(100)]
    recognised = logits(trained, texts).argmax(-1) == trained.card.labels.index("law")
    assert recognised.sum() >= 90


@pytest.mark.parametrize("rows", [[], prompts(9, "law"), prompts(9, "law", "none")])
def test_fewer_than_two_domains_are_refused(rows: list[PromptRow]) -> None:
    with pytest.raises(DataError, match="at least two domains"):
        train(rows)


def test_a_single_prompt_of_a_domain_is_refused() -> None:
    with pytest.raises(DataError, match="at least two prompts of every domain"):
        train([*prompts(9, "law", "math"), *prompts(1, "coding")])


def test_labels_are_sorted_and_shapes_fit(artifact: RouterArtifact) -> None:
    assert artifact.card.labels == DOMAINS
    assert artifact.weight.shape == (len(DOMAINS), DIMENSIONS)
    assert artifact.bias.shape == (len(DOMAINS),)
    assert artifact.vectors.shape == (len(artifact.references), DIMENSIONS)
    assert artifact.weight.dtype == artifact.bias.dtype == artifact.vectors.dtype == np.float32


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31 - 1), count=st.integers(2, 12))
def test_any_training_gives_a_positive_temperature_and_shares(seed: int, count: int) -> None:
    card = train(prompts(count, *DOMAINS), seed=seed).card
    assert 0 < card.temperature < float("inf")
    assert all(0 <= card.metrics[name] <= 1 for name in ("accuracy", "ece"))


def test_labels_without_any_pattern_are_not_trusted() -> None:
    """Out of fold the head knows nothing, so calibration has to flatten it."""
    random = np.random.default_rng(0)
    rows = [
        PromptRow(text=f"text {index}", domain=str(random.choice(DOMAINS))) for index in range(90)
    ]
    trained = train(rows)
    confidence = calibrated(logits(trained, ["unseen"]), trained.card.temperature).max()
    assert trained.card.temperature > 1
    assert confidence < 0.5


def test_what_is_easy_to_tell_apart_is_measured_as_such(artifact: RouterArtifact) -> None:
    assert artifact.card.metrics["accuracy"] > 0.9
    assert artifact.card.metrics["ece"] < 0.1


def test_the_card_says_where_everything_comes_from() -> None:
    rows = [
        *prompts(4, *DOMAINS, source="squad/train"),
        *prompts(2, *DOMAINS, source="mbpp"),
        *prompts(1, *DOMAINS, source=None),
    ]
    card = train(rows, licence="CC0").card
    assert (card.encoder, card.licence) == ("package:fake", "CC0")
    assert card.rows == {"mbpp": 6, "squad": 12, "unnamed": 3}
    assert card.data_sha256 == fingerprint(rows)


def test_references_are_training_prompts_of_their_domain(artifact: RouterArtifact) -> None:
    known = {row.text: row.domain for row in prompts(30, *DOMAINS)}
    assert {known[reference.text] for reference in artifact.references} == set(DOMAINS)
    assert all(known[reference.text] == reference.domain for reference in artifact.references)


def test_references_have_ids_of_their_own(artifact: RouterArtifact) -> None:
    ids = [reference.id for reference in artifact.references]
    assert len(set(ids)) == len(ids)
    assert all(identity.startswith("made/train#") for identity in ids)


def test_the_vector_of_a_reference_is_the_one_of_its_prompt(artifact: RouterArtifact) -> None:
    texts = [reference.text for reference in artifact.references]
    np.testing.assert_array_equal(artifact.vectors, FakeEncoder().encode(texts))


@pytest.mark.parametrize(("prompts_each", "expected"), [(10, 10), (64, 64), (90, 64)])
def test_a_domain_has_at_most_64_references(prompts_each: int, expected: int) -> None:
    references = train(prompts(prompts_each, *DOMAINS)).references
    for domain in DOMAINS:
        found = sum(reference.domain == domain for reference in references)
        assert 0.8 * expected <= found <= expected


def test_a_reference_is_no_more_than_an_excerpt() -> None:
    rows = [
        PromptRow(text=f"{domain} {index} " + "x" * 1000, domain=domain)
        for domain in DOMAINS
        for index in range(4)
    ]
    assert {len(reference.text) for reference in train(rows).references} == {240}


def test_a_withheld_source_keeps_its_ids_but_not_its_texts() -> None:
    rows = prompts(6, *DOMAINS, source="private/train") + prompts(6, *DOMAINS, source="open/train")
    references = train(rows, withheld=["private"]).references
    hidden = [reference for reference in references if reference.id.startswith("private/train#")]
    shown = [reference for reference in references if reference.id.startswith("open/train#")]
    assert len(hidden) + len(shown) == len(references)
    assert {reference.text for reference in hidden} == {""}
    assert all(reference.text for reference in shown)


def test_withholding_a_source_changes_nothing_but_the_texts() -> None:
    rows = prompts(6, *DOMAINS, source="private/train")
    open_artifact, withheld = train(rows), train(rows, withheld=["private"])
    assert withheld.card == open_artifact.card
    np.testing.assert_array_equal(withheld.weight, open_artifact.weight)
    np.testing.assert_array_equal(withheld.vectors, open_artifact.vectors)
    assert [r.id for r in withheld.references] == [r.id for r in open_artifact.references]


def test_no_withheld_text_is_written_to_the_folder(tmp_path: Path) -> None:
    secret = [
        PromptRow(text=f"confidential {domain} matter {index}", domain=domain, source="private/a")
        for domain in DOMAINS
        for index in range(4)
    ]
    train([*secret, *prompts(4, *DOMAINS)], withheld={"private"}).save(tmp_path)
    assert all(b"confidential" not in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.filterwarnings("error:Number of distinct clusters")
def test_prompts_that_repeat_are_no_fault() -> None:
    rows = [PromptRow(text=domain, domain=domain) for domain in DOMAINS for _ in range(6)]
    assert {reference.text for reference in train(rows).references} == set(DOMAINS)


def test_progress_counts_every_prompt_that_is_trained_on() -> None:
    steps: list[int] = []
    train([*prompts(50, *DOMAINS), *prompts(7, "none")], advance=steps.append)
    assert sum(steps) == 150


def test_prompts_of_different_lengths_keep_their_own_vectors() -> None:
    """They are encoded in order of length and must come back in their own."""
    rows = [
        PromptRow(text=f"{domain} " + "word " * (index * 7 % 20), domain=domain)
        for index in range(20)
        for domain in DOMAINS
    ]
    trained = train(rows)
    texts = [row.text for row in rows]
    guesses = [trained.card.labels[index] for index in logits(trained, texts).argmax(-1)]
    assert guesses == [row.domain for row in rows]


def test_a_trained_head_routes_once_saved_and_loaded(
    artifact: RouterArtifact, tmp_path: Path
) -> None:
    artifact.save(tmp_path)
    experts = {domain: f"{domain} expert" for domain in DOMAINS}
    router = EncoderRouter(
        RouterArtifact.load(tmp_path), FakeEncoder(), experts, "general", min_confidence=0.4
    )
    for domain in DOMAINS:
        decision = router.route([{"role": "user", "content": f"an unseen {domain} text"}])
        assert (decision.domain, decision.expert) == (domain, f"{domain} expert")
        assert {neighbour.domain for neighbour in decision.why.nearest} == {domain}

"""The clusters of a prompt from its words: a head on the frozen encoder that learns the weights
which the gradients give (Hinton et al. 2015), so that traffic can be routed at encoder speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.router import (
    RouterArtifact,
    RouterCard,
    RouterHead,
    SentenceEncoder,
    calibrated,
    encoder_length,
    export_encoder,
    halves,
    locate_encoder,
)
from polymath.training.data import PromptRow, fingerprint
from polymath.training.linear_head import fit_head
from polymath.training.prompt_vectors import encode_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

__all__ = ["Agreement", "distil"]

CALIBRATION_TEXTS = 256
INVERSE_REGULARISATION = (1.0, 10.0, 100.0)
"""The one whose guesses are nearest out of fold is taken."""
TEMPERATURE = 1.0
"""The weights are learned as they are."""
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the guessed weights are from the gradients' own, on prompts that were held out.

    Attributes:
        top: share of the prompts whose likeliest cluster is the same.
        distance: mean total variation between the weights, 0 to 1.
    """

    top: float
    distance: float


def distil(
    texts: Sequence[str],
    weights: Floats,
    labels: Sequence[str],
    encoder: str,
    out: Path,
    seed: int,
) -> tuple[Agreement, NDArray[np.float32]]:
    """Write a router folder that guesses the weights, and say how well it does out of fold.

    Args:
        texts: the prompts.
        weights: [texts, clusters], each row summing to 1.
        encoder: `package:NAME` or a folder with a BERT model.
    Returns:
        How far they agree, and what the encoder makes of the texts, [texts, dimensions].
    """
    import numpy as np

    source = locate_encoder(encoder)
    some = np.random.default_rng(seed).permutation(len(texts))[:CALIBRATION_TEXTS]
    export_encoder(source, out, [texts[index] for index in some])
    rows = [PromptRow(text=text or " ", domain="cluster") for text in texts]
    length = encoder_length(source)
    vectors, _ = halves(encode_prompts(SentenceEncoder(out, 2, length), rows))
    agreements = {
        value: _out_of_fold(vectors, weights, value, seed) for value in INVERSE_REGULARISATION
    }
    best = min(agreements, key=lambda value: agreements[value].distance)
    agreement, head = agreements[best], _fit(vectors, weights, best)
    RouterArtifact(
        card=RouterCard(
            encoder=encoder,
            max_tokens=length,
            labels=tuple(labels),
            temperature=TEMPERATURE,
            data_sha256=fingerprint(rows),
            rows={"unnamed": len(rows)},
            metrics={"agreement": round(agreement.top, 4)},
        ),
        weight=head.weight,
        bias=head.bias,
        vectors=np.empty((0, vectors.shape[1]), dtype=np.float32),
    ).save(out)
    return agreement, vectors


def _out_of_fold(
    vectors: NDArray[np.float32], weights: Floats, inverse_regularisation: float, seed: int
) -> Agreement:
    import numpy as np
    from sklearn.model_selection import KFold

    guessed = np.empty_like(weights)
    folds = KFold(min(FOLDS, len(vectors)), shuffle=True, random_state=seed)
    for train, test in folds.split(vectors):
        head = _fit(vectors[train], weights[train], inverse_regularisation)
        guessed[test] = calibrated(head.logits(vectors[test]), TEMPERATURE)
    top = float((guessed.argmax(axis=1) == weights.argmax(axis=1)).mean())
    return Agreement(top, float(np.abs(guessed - weights).sum(axis=1).mean() / 2))


def _fit(
    vectors: NDArray[np.float32], weights: Floats, inverse_regularisation: float
) -> RouterHead:
    """Logistic regression on soft targets: each prompt once for each cluster, by its weight."""
    import numpy as np

    clusters = weights.shape[1]
    repeated = np.repeat(vectors, clusters, axis=0)
    targets = np.tile(np.arange(clusters), len(vectors))
    return fit_head(repeated, targets, weights.ravel().astype(np.float64), inverse_regularisation)

"""`polymath train router`: a linear head on the frozen encoder, calibrated out of fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from polymath.errors import DataError
from polymath.router import Encoder, Reference, RouterArtifact, RouterCard, calibrated
from polymath.training.data import OUT_OF_SCOPE, PromptRow, fingerprint
from polymath.training.metrics import accuracy, expected_calibration_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["train_router_head"]

ENCODE_BATCH = 64
FOLDS = 5
INVERSE_REGULARISATION = 10.0
REFERENCES_PER_DOMAIN = 64
REFERENCE_CHARACTERS = 240
SAME_VECTOR_DIGITS = 4
"""A text encoded in another batch differs by up to 1e-5."""


def train_router_head(
    rows: Sequence[PromptRow],
    encoder: Encoder,
    encoder_source: str,
    seed: int = 0,
    licence: str = "",
    withheld: Collection[str] = (),
    advance: Callable[[int], Any] = lambda prompts: None,
) -> RouterArtifact:
    """Fit logistic regression on the vectors of labelled prompts.

    Args:
        rows: prompts of at least two domains; those of domain `none` are left out.
        encoder_source: written into the artifact, so that the gateway finds the same encoder.
        withheld: sources whose texts stay out of the artifact (private, or not to be passed on);
            decisions then point at such a prompt by its id alone.
        advance: called with the number of prompts of each encoded batch.
    Raises:
        DataError: fewer than two domains.
    """
    from sklearn.linear_model import LogisticRegression

    rows = [row for row in rows if row.domain != OUT_OF_SCOPE]
    labels = sorted({row.domain for row in rows})
    if len(labels) < 2:
        raise DataError(f"a router needs prompts of at least two domains, found {labels}")
    vectors = _encode(rows, encoder, advance)
    targets = _targets(rows, labels)
    head = LogisticRegression(
        C=INVERSE_REGULARISATION, class_weight="balanced", max_iter=1000, random_state=seed
    )
    held_out = _out_of_fold_logits(head, vectors, targets, seed)
    temperature = _fit_temperature(held_out, targets)
    head.fit(vectors, targets)
    weight, bias = _multinomial(head)
    chosen = _references(rows, labels, vectors, seed)
    return RouterArtifact(
        card=RouterCard(
            encoder=encoder_source,
            labels=tuple(labels),
            temperature=temperature,
            data_sha256=fingerprint(rows),
            rows=_rows_by_source(rows),
            metrics=_metrics(held_out, targets, temperature),
            licence=licence,
        ),
        weight=weight,
        bias=bias,
        vectors=vectors[chosen],
        references=tuple(
            Reference(
                id=f"{rows[index].source or 'prompt'}#{index}",
                text="" if rows[index].family in withheld else _excerpt(rows[index]),
                domain=rows[index].domain,
            )
            for index in chosen
        ),
    )


def _encode(
    rows: Sequence[PromptRow], encoder: Encoder, advance: Callable[[int], Any]
) -> NDArray[np.float32]:
    """Vectors of the rows; batched by length, so that little is spent on padding."""
    import numpy as np

    order = sorted(range(len(rows)), key=lambda index: len(rows[index].text))
    blocks = []
    for start in range(0, len(order), ENCODE_BATCH):
        batch = order[start : start + ENCODE_BATCH]
        blocks.append(encoder.encode([rows[index].text for index in batch]))
        advance(len(batch))
    vectors = np.empty((len(rows), blocks[0].shape[1]), dtype=np.float32)
    vectors[order] = np.concatenate(blocks)
    return vectors


def _targets(rows: Sequence[PromptRow], labels: Sequence[str]) -> NDArray[np.int64]:
    import numpy as np

    position = {label: index for index, label in enumerate(labels)}
    return np.array([position[row.domain] for row in rows], dtype=np.int64)


def _out_of_fold_logits(
    head: Any, vectors: NDArray[np.float32], targets: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """Logits of every row from a head that has not seen it, [rows, labels]."""
    import numpy as np
    from sklearn.base import clone
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, int(np.bincount(targets).min()))
    if folds < 2:
        raise DataError("a router needs at least two prompts of every domain")
    logits = np.empty((len(targets), int(targets.max()) + 1))
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(vectors, targets):
        weight, bias = _multinomial(clone(head).fit(vectors[train], targets[train]))
        logits[test] = vectors[test] @ weight.T + bias
    return logits


def _multinomial(head: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [labels, dimensions] and bias [labels]; two classes come as one row from sklearn."""
    import numpy as np

    weight, bias = head.coef_, head.intercept_
    if len(weight) == 1:
        weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    return weight.astype(np.float32), bias.astype(np.float32)


def _fit_temperature(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017)."""
    import numpy as np
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        probabilities = calibrated(logits, float(np.exp(log_temperature)))
        return -float(np.log(probabilities[rows, targets] + 1e-12).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


def _metrics(
    logits: NDArray[np.float64], targets: NDArray[np.int64], temperature: float
) -> dict[str, float]:
    probabilities = calibrated(logits, temperature)
    correct = (probabilities.argmax(axis=1) == targets).tolist()
    confidence = probabilities.max(axis=1).tolist()
    return {
        "accuracy": round(accuracy(correct), 4),
        "ece": round(expected_calibration_error(confidence, correct), 4),
    }


def _references(
    rows: Sequence[PromptRow], labels: Sequence[str], vectors: NDArray[np.float32], seed: int
) -> list[int]:
    """For each domain the prompts nearest the centres of as many clusters: a spread-out sample."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    chosen: list[int] = []
    for label in labels:
        members = [index for index, row in enumerate(rows) if row.domain == label]
        distinct = len(np.unique(vectors[members].round(SAME_VECTOR_DIGITS), axis=0))
        clusters = min(REFERENCES_PER_DOMAIN, distinct)
        means = KMeans(clusters, n_init=1, random_state=seed).fit(vectors[members])
        nearest = pairwise_distances_argmin(means.cluster_centers_, vectors[members])
        chosen += sorted({members[index] for index in nearest})
    return chosen


def _excerpt(row: PromptRow) -> str:
    return row.text[:REFERENCE_CHARACTERS]


def _rows_by_source(rows: Sequence[PromptRow]) -> dict[str, int]:
    counts = Counter(row.family for row in rows)
    return dict(sorted(counts.items()))

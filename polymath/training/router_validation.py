"""How a router's head does on prompts that it has not seen, and what was measured so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.training.labelled import LabelledPrompts
from polymath.training.linear_head import fit_head, out_of_fold_logits
from polymath.training.metrics import accuracy
from polymath.training.source_folds import SourceFold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["FoldJournal", "domain_accuracy", "mean_score", "some_rows", "validated_head"]

HEAD_ROWS = 6000
"""A head that is only to be validated is fitted on at most so many prompts."""


class FoldJournal:
    """Scores of finished folds, kept on disk so that a killed run goes on.

    Args:
        key: what was trained; scores of anything else are forgotten.
    """

    def __init__(self, file: Path, key: str) -> None:
        self._file = file
        self._key = key
        self.scores: dict[str, float] = {}
        if file.exists():
            values = json.loads(file.read_text(encoding="utf-8"))
            self.scores = values["scores"] if values["key"] == key else {}

    def add(self, name: str, score: float) -> None:
        """Keep the score of one fold."""
        self.scores[name] = score
        partial = self._file.with_suffix(".tmp")
        values = {"key": self._key, "scores": self.scores}
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(self._file)


def validated_head(
    data: LabelledPrompts,
    vectors: Vectors,
    folds: Sequence[SourceFold],
    candidates: Sequence[float],
    seed: int,
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[float, dict[str, float]]:
    """The inverse regularisation of the best head, and its accuracy on each source left out.

    Without folds the candidates are compared out of fold, and no source is scored.
    """
    if not folds:
        return _best_out_of_fold(data, vectors, candidates, seed), {}
    scores: dict[float, dict[str, float]] = {}
    for done, value in enumerate(candidates):
        scores[value] = {
            fold.name: _fold_accuracy(data, vectors, fold, value, seed) for fold in folds
        }
        advance(done + 1, len(candidates))
    best = max(candidates, key=lambda value: mean_score(scores[value]))
    return best, scores[best]


def domain_accuracy(logits: Vectors, targets: NDArray[np.int64], labels: int) -> float:
    """Share of the in-scope rows whose domain is right."""
    inside = targets < labels
    guesses = logits[inside][:, :labels].argmax(axis=1)
    return accuracy((guesses == targets[inside]).tolist())


def mean_score(scores: Mapping[str, float]) -> float:
    """Their mean; 0 of none."""
    return sum(scores.values()) / len(scores) if scores else 0.0


def some_rows(
    data: LabelledPrompts, kept: NDArray[np.int64], most: int, seed: int
) -> NDArray[np.int64]:
    """Some of the rows by index, with all those of a class that would have none."""
    import numpy as np

    size = min(most, len(kept))
    some = np.random.default_rng(seed).choice(kept, size, replace=False)
    missing = np.isin(data.targets[kept], data.targets[some], invert=True)
    return np.concatenate([some, kept[missing]])


def _best_out_of_fold(
    data: LabelledPrompts, vectors: Vectors, candidates: Sequence[float], seed: int
) -> float:
    def score(value: float) -> float:
        logits = out_of_fold_logits(vectors, data.targets, data.weights, value, seed)
        return domain_accuracy(logits, data.targets, len(data.labels))

    return max(candidates, key=score)


def _fold_accuracy(
    data: LabelledPrompts, vectors: Vectors, fold: SourceFold, value: float, seed: int
) -> float:
    kept = some_rows(data, fold.kept(len(data.rows)), HEAD_ROWS, seed)
    train = data.take(kept)
    head = fit_head(vectors[kept], train.targets, train.weights, value)
    held_out = list(fold.held_out)
    return domain_accuracy(head.logits(vectors[held_out]), data.targets[held_out], len(data.labels))

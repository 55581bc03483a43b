"""How a router's head does on prompts that it has not seen, and what was measured so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.router import RouterHead
from polymath.training.labelled import LabelledPrompts
from polymath.training.linear_head import (
    find_centres,
    fit_head,
    out_of_fold_logits,
)
from polymath.training.metrics import accuracy
from polymath.training.source_folds import SourceFold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = [
    "FoldJournal",
    "SourceScores",
    "domain_accuracy",
    "mean_score",
    "some_rows",
    "validated_head",
]

LEAST_GAIN = 0.005
"""Mean accuracy that centres must win, or the linear part stands alone."""

HEAD_ROWS = 6000
"""A head that is only to be validated is fitted on at most so many prompts."""


@dataclass(frozen=True, slots=True)
class SourceScores:
    """Accuracy on each source when it is left out.

    Attributes:
        plain: of the linear part alone.
        centred: with centres beside it.
    """

    plain: dict[str, float] = field(default_factory=dict)
    centred: dict[str, float] = field(default_factory=dict)

    @property
    def keeps_centres(self) -> bool:
        """Whether the centres win enough; their worth shows on other sources alone."""
        return mean_score(self.centred) - mean_score(self.plain) >= LEAST_GAIN

    @property
    def kept(self) -> dict[str, float]:
        """Those of the better head."""
        return self.centred if self.keeps_centres else self.plain

    @property
    def mean(self) -> float:
        """Of the better head; 0 where no source was left out."""
        return mean_score(self.kept)

    def add(self, source: str, plain: float, centred: float) -> None:
        """Keep the scores of one source."""
        self.plain[source] = plain
        self.centred[source] = centred


class FoldJournal:
    """Scores of finished folds, kept on disk so that a killed run goes on.

    Args:
        key: what was trained; scores of anything else are forgotten.
    """

    def __init__(self, file: Path, key: str) -> None:
        self._file = file
        self._key = key
        self.scores = SourceScores()
        if file.exists():
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["key"] == key:
                self.scores = SourceScores(**values["scores"])

    def add(self, source: str, plain: float, centred: float) -> None:
        """Keep the scores of one fold."""
        self.scores.add(source, plain, centred)
        partial = self._file.with_suffix(".tmp")
        values = {"key": self._key, "scores": asdict(self.scores)}
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(self._file)


def validated_head(
    data: LabelledPrompts,
    vectors: Vectors,
    folds: Sequence[SourceFold],
    candidates: Sequence[float],
    seed: int,
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[float, SourceScores]:
    """The best of some inverse regularisations of the linear part, and its accuracies.

    Returns:
        The value, and its accuracy on each source when it is left out. Without folds values are
        compared out of fold.
    """
    if not folds:
        return max(
            candidates, key=partial(_out_of_fold_accuracy, data, vectors, seed)
        ), SourceScores()
    scores = {value: SourceScores() for value in candidates}
    for done, fold in enumerate(folds):
        for value, pair in _fold_accuracies(data, vectors, fold, candidates, seed).items():
            scores[value].add(fold.name, *pair)
        advance(done + 1, len(folds))
    best = max(candidates, key=lambda value: mean_score(scores[value].plain))
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


def _out_of_fold_accuracy(
    data: LabelledPrompts, vectors: Vectors, seed: int, inverse_regularisation: float
) -> float:
    logits = out_of_fold_logits(
        vectors, data.targets, data.weights, inverse_regularisation, centred=False, seed=seed
    )
    return domain_accuracy(logits, data.targets, len(data.labels))


def _fold_accuracies(
    data: LabelledPrompts,
    vectors: Vectors,
    fold: SourceFold,
    candidates: Sequence[float],
    seed: int,
) -> dict[float, tuple[float, float]]:
    """Accuracy of each value on what the fold leaves out, without and with centres."""
    kept = some_rows(data, fold.kept(len(data.rows)), HEAD_ROWS, seed)
    train = data.take(kept)
    held_out = list(fold.held_out)
    targets, labels = data.targets[held_out], len(data.labels)
    centres = find_centres(vectors[kept], train.targets, seed)

    def score(head: RouterHead) -> float:
        return domain_accuracy(head.logits(vectors[held_out]), targets, labels)

    heads = {
        value: fit_head(vectors[kept], train.targets, train.weights, value) for value in candidates
    }
    return {
        value: (score(head), score(head.with_centres(*centres))) for value, head in heads.items()
    }

"""How a router's head does on prompts that it has not seen, and what was measured so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "HeadChoice",
    "domain_accuracy",
    "mean_score",
    "some_rows",
    "validated_head",
]

LEAST_GAIN = 0.01
"""Mean accuracy that centres must win, or the linear part stands alone."""

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


@dataclass(frozen=True, slots=True)
class HeadChoice:
    """How a head is fitted.

    Attributes:
        centred: whether centres stand beside the linear part.
    """

    inverse_regularisation: float
    centred: bool


def validated_head(
    data: LabelledPrompts,
    vectors: Vectors,
    folds: Sequence[SourceFold],
    candidates: Sequence[float],
    seed: int,
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[HeadChoice, dict[str, float]]:
    """The best of some inverse regularisations, with or without centres, and its accuracies.

    Returns:
        The choice, and its accuracy on each source when it is left out. Without folds there are no
        centres, whose worth shows on other sources alone, and the rest is compared out of fold.
    """
    choices = [HeadChoice(value, centred) for value in candidates for centred in (False, True)]
    if not folds:
        plain = [choice for choice in choices if not choice.centred]
        return max(plain, key=partial(_out_of_fold_accuracy, data, vectors, seed)), {}
    scores: dict[HeadChoice, dict[str, float]] = {choice: {} for choice in choices}
    for done, fold in enumerate(folds):
        for choice, score in _fold_accuracies(data, vectors, fold, choices, seed).items():
            scores[choice][fold.name] = score
        advance(done + 1, len(folds))

    def worth(choice: HeadChoice) -> float:
        return mean_score(scores[choice]) - LEAST_GAIN * choice.centred

    best = max(choices, key=worth)
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
    data: LabelledPrompts, vectors: Vectors, seed: int, choice: HeadChoice
) -> float:
    logits = out_of_fold_logits(
        vectors,
        data.targets,
        data.weights,
        choice.inverse_regularisation,
        choice.centred,
        seed,
    )
    return domain_accuracy(logits, data.targets, len(data.labels))


def _fold_accuracies(
    data: LabelledPrompts,
    vectors: Vectors,
    fold: SourceFold,
    choices: Sequence[HeadChoice],
    seed: int,
) -> dict[HeadChoice, float]:
    """Accuracy of each choice on what the fold leaves out."""
    kept = some_rows(data, fold.kept(len(data.rows)), HEAD_ROWS, seed)
    train = data.take(kept)
    held_out = list(fold.held_out)
    targets, labels = data.targets[held_out], len(data.labels)
    centres = find_centres(vectors[kept], train.targets, seed)
    fit = cache(partial(fit_head, vectors[kept], train.targets, train.weights))
    accuracies = {}
    for choice in choices:
        head = fit(choice.inverse_regularisation)
        head = head.with_centres(*centres) if choice.centred else head
        accuracies[choice] = domain_accuracy(head.logits(vectors[held_out]), targets, labels)
    return accuracies

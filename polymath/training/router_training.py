"""`polymath train router`: labelled prompts -> a router folder.

Two ways: a head on the frozen encoder (seconds), or fine-tuning the encoder with it (minutes). What
counts is accuracy on sources that the training did not see, so both are validated by leaving out
one data set at a time, and the better one is kept. Calibration is fitted on prompts held out.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from polymath.artifacts import Progress, no_progress
from polymath.router import (
    CARD_FILE,
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
from polymath.training.encoder_finetuning import EncoderFinetuner, FinetuneRecipe
from polymath.training.labelled import LabelledPrompts
from polymath.training.linear_head import (
    find_centres,
    fit_head,
    fit_temperature,
    out_of_fold_logits,
)
from polymath.training.metrics import accuracy, expected_calibration_error
from polymath.training.prompt_vectors import encode_prompts
from polymath.training.reference_prompts import choose_references
from polymath.training.router_validation import (
    FoldJournal,
    SourceScores,
    domain_accuracy,
    some_rows,
    validated_head,
)
from polymath.training.source_folds import source_folds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["RouterRecipe", "train_router"]

WORK_FOLDER = ".training"
CALIBRATION_TEXTS = 256
"""Prompts on which the ranges of int8 activations are found."""
PROBED_ROWS = 4000
"""Prompts on which the head starts before fine-tuning."""
CENTRED_ROWS = 8000
"""Prompts among which the centres are found where a source is left out."""
HELD_OUT_SHARE = 0.08
"""Prompts kept from fine-tuning, on which confidence is calibrated."""
MOST_HELD_OUT = 0.5
"""The same where there are few prompts a domain."""
LOST_SHARE = 0.02
"""In-scope prompts that may be taken for out of scope."""


class RouterRecipe(BaseModel):
    """How a router is trained; the same recipe and data give the same router.

    `finetune` is None for a head on the frozen encoder. `fold_prompts` is the budget of each
    leave-one-source-out run of fine-tuning; 0 skips the validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    finetune: FinetuneRecipe | None = None
    fold_prompts: int = Field(default=5_000, ge=0)
    inverse_regularisation: tuple[float, ...] = Field(default=(0.3, 1.0, 3.0), min_length=1)
    threads: int = Field(default=2, ge=1)
    seed: int = 0


def train_router(
    rows: Sequence[PromptRow],
    encoder: str,
    out: Path,
    recipe: RouterRecipe,
    licence: str = "",
    withheld: Collection[str] = (),
    progress: Progress = no_progress,
) -> RouterArtifact:
    """Train a router and write its folder.

    Args:
        rows: prompts of at least two domains; those of domain `none` teach what is out of scope.
        encoder: `package:NAME` or a folder with a BERT model.
        withheld: sources whose texts stay out of the folder (private, or not to be passed on);
            decisions then point at such a prompt by its id alone.
    Raises:
        DataError: fewer than two domains, or a domain of a single prompt.
        ModelSourceError: the encoder cannot be used.
    """
    training = _Training(rows, encoder, out, recipe, progress)
    return training.run(licence, withheld)


class _Training:
    def __init__(
        self,
        rows: Sequence[PromptRow],
        encoder: str,
        out: Path,
        recipe: RouterRecipe,
        progress: Progress,
    ) -> None:
        self._data = LabelledPrompts.of(rows)
        self._source = encoder
        self._folder = locate_encoder(encoder)
        self._out = out
        self._work = out / WORK_FOLDER
        self._checkpoint = self._work / "checkpoint.pt"
        self._max_tokens = encoder_length(self._folder)
        self._recipe = recipe
        self._progress = progress
        self._folds = source_folds(rows, recipe.seed)
        self._fingerprint = fingerprint(rows)

    def run(self, licence: str, withheld: Collection[str]) -> RouterArtifact:
        self._open_work_folder()
        encoding = partial(self._progress, "encoding prompts")
        vectors, _ = halves(encode_prompts(self._frozen(), self._data.rows, encoding))
        value, frozen = validated_head(
            self._data,
            vectors,
            self._folds,
            self._recipe.inverse_regularisation,
            self._recipe.seed,
            partial(self._progress, "frozen encoder: validation"),
        )
        scores, finetuned = frozen, False
        if self._recipe.finetune is not None:
            tuned = self._validated_finetuning(vectors, value)
            finetuned = not tuned.kept or tuned.mean >= frozen.mean
            scores = tuned if finetuned else frozen
        train = self._finetuned if finetuned else self._with_head
        head, held_out, targets = train(vectors, value, scores.keeps_centres)
        artifact = self._artifact(
            head, held_out, targets, scores.kept, finetuned, licence, withheld
        )
        artifact.save(self._out)
        shutil.rmtree(self._work, ignore_errors=True)
        return artifact

    def _open_work_folder(self) -> None:
        """Drop what an unfinished run of another encoder, other data or another seed left."""
        recipe = self._recipe.model_dump_json(include={"inverse_regularisation", "seed"})
        format_ = RouterCard.model_fields["format"].default
        key = f"{format_}:{self._source}:{self._fingerprint}:{recipe}"
        file = self._work / "key"
        if file.exists() and file.read_text(encoding="utf-8") != key:
            shutil.rmtree(self._work)
        self._work.mkdir(parents=True, exist_ok=True)
        file.write_text(key, encoding="utf-8")

    def _install(self, encoder: Path) -> None:
        """Put an encoder into the router folder; it must not meet the head of an older router."""
        (self._out / CARD_FILE).unlink(missing_ok=True)
        for file in encoder.iterdir():
            shutil.copyfile(file, self._out / file.name)

    def _frozen(self) -> SentenceEncoder:
        """The encoder as it came, in int8."""
        folder = self._work / "frozen"
        if not folder.exists():
            self._export(self._folder, folder)
        return self._open(folder)

    def _open(self, folder: Path) -> SentenceEncoder:
        return SentenceEncoder(folder, self._recipe.threads, self._max_tokens)

    def _export(self, source: Path, target: Path) -> None:
        import numpy as np

        size = min(CALIBRATION_TEXTS, len(self._data.rows))
        some = np.random.default_rng(self._recipe.seed).choice(
            len(self._data.rows), size, replace=False
        )
        self._progress("encoder: export to int8", 0, 1)
        staging = target.with_name(target.name + ".partial")
        export_encoder(source, staging, [self._data.rows[index].text for index in some])
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
        self._progress("encoder: export to int8", 1, 1)

    def _with_head(
        self, vectors: Vectors, inverse_regularisation: float, centred: bool
    ) -> tuple[RouterHead, Vectors, NDArray[np.int64]]:
        """A head on the frozen encoder, with out-of-fold logits and targets of all rows."""
        data, seed = self._data, self._recipe.seed
        logits = out_of_fold_logits(
            vectors, data.targets, data.weights, inverse_regularisation, centred, seed
        )
        self._install(self._work / "frozen")
        head = fit_head(vectors, data.targets, data.weights, inverse_regularisation)
        if centred:
            head = head.with_centres(*find_centres(vectors, data.targets, seed))
        return head, logits, data.targets

    def _validated_finetuning(
        self, vectors: Vectors, inverse_regularisation: float
    ) -> SourceScores:
        """Accuracy on each source when it is left out of a shorter fine-tuning."""
        assert self._recipe.finetune is not None
        if not self._recipe.fold_prompts:
            return SourceScores()
        recipe = self._recipe.finetune.model_copy(update={"prompts": self._recipe.fold_prompts})
        journal = FoldJournal(
            self._work / "folds.json", f"{self._fingerprint}:{recipe.model_dump_json()}"
        )
        rows = self._data.rows
        for fold in self._folds:
            if fold.name in journal.scores.plain:
                continue
            stage = f"fine-tuning without {fold.name}"
            kept = fold.kept(len(rows))
            tuned, head = self._finetune(kept, vectors, inverse_regularisation, recipe, stage)
            some = some_rows(self._data, kept, CENTRED_ROWS, recipe.seed)
            centred = self._with_centres(head, tuned, some, f"centres without {fold.name}")
            held_out = [rows[index] for index in fold.held_out]
            measuring = partial(self._progress, f"measuring on {fold.name}")
            encoded, _ = halves(encode_prompts(tuned, held_out, measuring))
            targets, labels = self._data.targets[list(fold.held_out)], len(self._data.labels)
            scores = [domain_accuracy(h.logits(encoded), targets, labels) for h in (head, centred)]
            journal.add(fold.name, *scores)
            self._checkpoint.unlink(missing_ok=True)
        return journal.scores

    def _finetune(
        self,
        kept: NDArray[np.int64],
        vectors: Vectors,
        inverse_regularisation: float,
        recipe: FinetuneRecipe,
        stage: str,
    ) -> tuple[SentenceEncoder, RouterHead]:
        """An encoder fine-tuned on some of the rows, in int8, and its head."""
        import torch

        torch.set_num_threads(self._recipe.threads)
        probed = some_rows(self._data, kept, PROBED_ROWS, recipe.seed)
        start = self._data.take(probed)
        head = fit_head(vectors[probed], start.targets, start.weights, inverse_regularisation)
        tuner = EncoderFinetuner(
            self._folder, self._data.take(kept), head, recipe, self._checkpoint
        )
        tuner.train(lambda done, total, loss: self._progress(stage, done, total))
        tuner.save(self._work / "tuned")
        self._export(self._work / "tuned", self._work / "tuned-int8")
        return self._open(self._work / "tuned-int8"), tuner.head()

    def _with_centres(
        self, head: RouterHead, encoder: SentenceEncoder, some: NDArray[np.int64], stage: str
    ) -> RouterHead:
        """The head with centres of some of the rows."""
        rows = [self._data.rows[index] for index in some]
        vectors, _ = halves(encode_prompts(encoder, rows, partial(self._progress, stage)))
        centres = find_centres(vectors, self._data.targets[some], self._recipe.seed)
        return head.with_centres(*centres)

    def _finetuned(
        self, vectors: Vectors, inverse_regularisation: float, centred: bool
    ) -> tuple[RouterHead, Vectors, NDArray[np.int64]]:
        """The encoder fine-tuned on all but a few rows, with logits and targets of those."""
        import numpy as np
        from sklearn.model_selection import train_test_split

        assert self._recipe.finetune is not None
        least = 2 * (len(self._data.labels) + 1) / len(self._data.rows)
        kept, held_out = train_test_split(
            np.arange(len(self._data.rows)),
            test_size=min(MOST_HELD_OUT, max(HELD_OUT_SHARE, least)),
            stratify=self._data.targets,
            random_state=self._recipe.seed,
        )
        tuned, head = self._finetune(
            kept,
            vectors,
            inverse_regularisation,
            self._recipe.finetune,
            "fine-tuning on all sources",
        )
        self._install(self._work / "tuned-int8")
        rows = [self._data.rows[index] for index in held_out]
        measuring = partial(self._progress, "measuring on held-out prompts")
        encoded, _ = halves(encode_prompts(tuned, rows, measuring))
        if centred:
            head = self._with_centres(head, tuned, kept, "centres of all sources")
        return head, head.logits(encoded), self._data.targets[held_out]

    def _artifact(
        self,
        head: RouterHead,
        held_out: Vectors,
        targets: NDArray[np.int64],
        scores: dict[str, float],
        finetuned: bool,
        licence: str,
        withheld: Collection[str],
    ) -> RouterArtifact:
        data = self._data
        temperature = fit_temperature(held_out, targets)
        probabilities = calibrated(held_out, temperature)
        references, vectors = choose_references(
            data,
            self._open(self._out),
            self._recipe.seed,
            withheld,
            partial(self._progress, "choosing reference prompts"),
        )
        recipe = self._recipe.model_dump(mode="json", exclude={"threads"})
        counts = Counter(row.family for row in data.rows)
        return RouterArtifact(
            card=RouterCard(
                encoder=self._source,
                finetuned=finetuned,
                max_tokens=self._max_tokens,
                labels=data.labels,
                temperature=temperature,
                out_of_scope=_threshold(probabilities, targets) if data.knows_none else None,
                data_sha256=self._fingerprint,
                rows=dict(sorted(counts.items())),
                metrics=_metrics(probabilities, targets, len(data.labels)),
                left_out={name: round(score, 4) for name, score in sorted(scores.items())},
                recipe=recipe,
                licence=licence,
            ),
            weight=head.weight,
            bias=head.bias,
            vectors=vectors,
            references=references,
            centres=head.centres,
            owners=head.owners,
        )


def _threshold(probabilities: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """The probability of "none" from which on few prompts of a domain are lost."""
    import numpy as np

    none = probabilities.shape[1] - 1
    inside = probabilities[targets < none, none]
    return float(np.clip(np.quantile(inside, 1 - LOST_SHARE), 1e-3, 1.0))


def _metrics(
    probabilities: NDArray[np.float64], targets: NDArray[np.int64], labels: int
) -> dict[str, Any]:
    inside = targets < labels
    domains = probabilities[inside][:, :labels]
    correct = (domains.argmax(axis=1) == targets[inside]).tolist()
    return {
        "accuracy": round(accuracy(correct), 4),
        "ece": round(expected_calibration_error(domains.max(axis=1).tolist(), correct), 4),
    }

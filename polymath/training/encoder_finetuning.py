"""Fine-tuning of a BERT encoder on labelled prompts, with the linear head on its unit vectors.

The head starts as logistic regression on the untouched encoder's vectors and the encoder follows
(linear probing, then fine-tuning: Kumar et al. 2022), which keeps what the encoder knows of sources
that are not in the data. Word embeddings stay as they are. The loss is cross entropy with label
smoothing plus the supervised contrastive loss (Khosla et al. 2020, eq. 2). The batches follow from
the data and the seed, so that a killed run goes on at its last checkpoint.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from polymath.errors import DataError
from polymath.experts import quiet_loading
from polymath.router import TOKENIZER_FILE, RouterHead, open_tokenizer, token_ids
from polymath.training.data import fingerprint
from polymath.training.labelled import LabelledPrompts
from polymath.training.prompt_styles import restyle

if TYPE_CHECKING:
    import torch

__all__ = ["EncoderFinetuner", "FinetuneRecipe"]

CHECKPOINT_SECONDS = 60.0
WARMUP_SHARE = 0.06
MAX_GRADIENT_NORM = 1.0
HEAD_RATE = 20
"""The head learns so many times faster: its weights are far larger than the encoder's."""
SORTED_BATCHES = 32
"""Batches whose prompts are sorted by length together, so that little is spent on padding."""

Advance = Callable[[int, int, float], Any]
"""Called with (steps done, steps in all, loss of the last step)."""


class FinetuneRecipe(BaseModel):
    """How an encoder is fine-tuned; the same recipe and data give the same encoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = Field(default=48_000, ge=1)
    """Prompts seen, drawn with the weights of the rows."""
    batch_size: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=2e-4, gt=0)
    frozen_layers: int = Field(default=3, ge=0)
    """Lowest layers that stay as they are, like the embeddings; the last layer always learns."""
    max_tokens: int = Field(default=128, ge=8)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    contrastive: float = Field(default=0.0, ge=0)
    """Weight of the supervised contrastive loss."""
    contrastive_temperature: float = Field(default=0.1, gt=0)
    restyling: float = Field(default=0.3, ge=0, le=1)
    """How often prompts are put into other clothes (`prompt_styles`)."""
    seed: int = 0


class EncoderFinetuner:
    """One encoder in training.

    Args:
        source: Hugging Face folder of a BERT model.
        data: the prompts; they are drawn by `draws`.
        head: where the head starts.
        checkpoint: file of the unfinished run; a run of the same data and recipe is gone on with.
    """

    def __init__(
        self,
        source: Path,
        data: LabelledPrompts,
        head: RouterHead,
        recipe: FinetuneRecipe,
        checkpoint: Path,
    ) -> None:
        import torch

        torch.manual_seed(recipe.seed)
        self._recipe = recipe
        self._checkpoint = checkpoint
        self._fingerprint = f"{fingerprint(data.rows)}:{recipe.model_dump_json()}"
        self._source = source
        self._bert = _bert(source, recipe.frozen_layers)
        self._head = torch.nn.Linear(head.weight.shape[1], head.weight.shape[0])
        with torch.no_grad():
            self._head.weight.copy_(torch.from_numpy(head.weight))
            self._head.bias.copy_(torch.from_numpy(head.bias))
        self._batches = _schedule(source, data, recipe)

    def train(self, advance: Advance = lambda done, total, loss: None) -> None:
        """Run to the end, from the checkpoint if there is one."""
        import torch

        trained = [weight for weight in self._bert.parameters() if weight.requires_grad]
        rate = self._recipe.learning_rate
        optimizer = torch.optim.AdamW(
            [
                {"params": trained, "lr": rate},
                {"params": list(self._head.parameters()), "lr": rate * HEAD_RATE},
            ],
            weight_decay=0.01,
        )
        total = len(self._batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
        first = self._resume(optimizer, schedule)
        saved = time.monotonic()
        self._bert.train()
        for step in range(first, total):
            loss = self._loss(*self._batches[step])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(step + 1, total, loss.item())
            if step + 1 == total or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save(optimizer, schedule, step + 1)
                saved = time.monotonic()
        self._bert.eval()

    def head(self) -> RouterHead:
        """The head as it is now."""
        return RouterHead(
            self._head.weight.detach().numpy().copy(), self._head.bias.detach().numpy().copy()
        )

    def save(self, folder: Path) -> None:
        """Write the encoder as a Hugging Face folder, tokenizer included."""
        import shutil

        with quiet_loading():
            self._bert.save_pretrained(folder)
        shutil.copyfile(self._source / TOKENIZER_FILE, folder / TOKENIZER_FILE)

    def _loss(self, rows: Sequence[Sequence[int]], targets: Sequence[int]) -> torch.Tensor:
        import torch

        recipe = self._recipe
        vectors = unit_vectors(self._bert, rows)
        wanted = torch.tensor(targets)
        loss = torch.nn.functional.cross_entropy(
            self._head(vectors), wanted, label_smoothing=recipe.label_smoothing
        )
        if recipe.contrastive:
            contrast = _supervised_contrast(vectors, wanted, recipe.contrastive_temperature)
            loss = loss + recipe.contrastive * contrast
        return loss

    def _save(self, optimizer: Any, schedule: Any, step: int) -> None:
        import torch

        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self._checkpoint.with_suffix(".tmp")
        state = {
            "fingerprint": self._fingerprint,
            "step": step,
            "bert": self._bert.state_dict(),
            "head": self._head.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),  # of the dropout
        }
        torch.save(state, partial)
        os.replace(partial, self._checkpoint)

    def _resume(self, optimizer: Any, schedule: Any) -> int:
        """The step to go on with; a checkpoint of something else is left behind."""
        import torch

        if not self._checkpoint.exists():
            return 0
        try:
            state = dict(torch.load(self._checkpoint, weights_only=True))
            if state["fingerprint"] != self._fingerprint:
                return 0
            self._bert.load_state_dict(state["bert"])
            self._head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["rng"])
        except Exception as error:  # damaged bytes fail in pickle, zipfile or torch
            raise DataError(
                f"{self._checkpoint}: corrupt checkpoint ({error}); delete it to start anew"
            ) from error
        return int(state["step"])


def unit_vectors(bert: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean of the last states of each row's tokens, to unit length, [rows, dimensions]."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    states = bert(input_ids=ids, attention_mask=mask)[0]
    kept = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * kept).sum(1), dim=-1)


def _supervised_contrast(
    vectors: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Supervised contrastive loss, averaged over the rows (Khosla et al. 2020, eq. 2)."""
    import torch

    itself = torch.eye(len(targets), dtype=torch.bool)
    logits = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)
    log_shares = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(itself, 0.0)
    alike = (targets[:, None] == targets[None]) & ~itself
    return -((log_shares * alike).sum(1) / alike.sum(1).clamp(min=1)).mean()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then linearly to zero."""
    return min(1.0, (step + 1) / (WARMUP_SHARE * steps)) * (1 - step / steps)


def _bert(source: Path, frozen_layers: int) -> Any:
    """The model, with its embeddings and lowest layers frozen."""
    import torch
    from transformers import AutoModel

    with quiet_loading():
        bert = AutoModel.from_pretrained(source, dtype=torch.float32)
    lowest = bert.encoder.layer[: min(frozen_layers, len(bert.encoder.layer) - 1)]
    for part in (bert.embeddings, *lowest):
        part.requires_grad_(False)
    return bert


def _schedule(
    source: Path, data: LabelledPrompts, recipe: FinetuneRecipe
) -> list[tuple[list[list[int]], list[int]]]:
    """Batches of token ids and targets, each of prompts of like length."""
    import numpy as np

    rng = random.Random(recipe.seed)
    drawn = np.random.default_rng(recipe.seed).choice(
        len(data.rows), recipe.prompts, p=data.draws / data.draws.sum()
    )
    texts = [restyle(data.rows[index].text, rng, recipe.restyling) for index in drawn]
    rows = token_ids(open_tokenizer(source), texts, recipe.max_tokens)
    prompts = [(ids, int(data.targets[index])) for ids, index in zip(rows, drawn, strict=True)]
    batches = []
    size = recipe.batch_size
    for start in range(0, len(prompts), size * SORTED_BATCHES):
        block = sorted(prompts[start : start + size * SORTED_BATCHES], key=lambda p: len(p[0]))
        some = [block[first : first + size] for first in range(0, len(block), size)]
        rng.shuffle(some)
        batches += some
    return [([ids for ids, _ in batch], [target for _, target in batch]) for batch in batches]

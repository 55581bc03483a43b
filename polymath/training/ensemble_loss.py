"""How well adapters that answer together expect what was said, by their weighted logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.experts import quiet_loading
from polymath.training.examples import IGNORED, Example, collate, length_batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AdapterEnsemble"]

BATCH_TOKENS = 768


class AdapterEnsemble:
    """Adapters on one base model.

    Args:
        model_folder: Hugging Face folder of the base model.
        adapters: name -> PEFT folder.
    """

    def __init__(self, model_folder: Path, adapters: Mapping[str, Path], pad_id: int) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._pad = pad_id
        with quiet_loading():
            base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
            (first, folder), *others = adapters.items()
            self._model: Any = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
            for name, folder in others:
                self._model.load_adapter(str(folder), adapter_name=name)
        self._model.eval()

    def losses(
        self,
        examples: Sequence[Example],
        weights: Sequence[Mapping[str | None, float]],
        advance: Callable[[int, int], Any] = lambda done, total: None,
    ) -> NDArray[np.float64]:
        """Summed negative log-likelihood of the answer of each example, [examples], in nats.

        Args:
            weights: for each example the adapters' weights, summing to 1; None is the bare base.
        """
        import numpy as np

        result = np.zeros(len(examples))
        batches = _batches(examples, weights)
        for done, batch in enumerate(batches):
            result[batch] = self._batch_losses(
                [examples[index] for index in batch], [weights[index] for index in batch]
            )
            advance(done + 1, len(batches))
        return result

    def _batch_losses(
        self, examples: Sequence[Example], weights: Sequence[Mapping[str | None, float]]
    ) -> NDArray[np.float64]:
        import numpy as np
        import torch

        batch = collate(examples, self._pad)
        targets = batch["labels"][:, 1:]
        rows, places = torch.nonzero(targets != IGNORED, as_tuple=True)
        total: Any = 0.0
        for name in dict.fromkeys(name for some in weights for name in some):
            share = torch.tensor([some.get(name, 0.0) for some in weights])
            total = total + share[rows, None] * self._logits(name, batch)[rows, places]
        losses = torch.nn.functional.cross_entropy(total, targets[rows, places], reduction="none")
        summed = np.zeros(len(examples))
        np.add.at(summed, rows.numpy(), losses.double().numpy())
        return summed

    def _logits(self, name: str | None, batch: Mapping[str, Any]) -> Any:
        """[rows, tokens - 1, vocabulary]"""
        import torch

        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            if name is None:
                with self._model.disable_adapter():
                    return self._model(**inputs, use_cache=False).logits[:, :-1]
            self._model.set_adapter(name)
            return self._model(**inputs, use_cache=False).logits[:, :-1]


def _batches(
    examples: Sequence[Example], weights: Sequence[Mapping[str | None, float]]
) -> list[list[int]]:
    """Examples of the same adapters and of like length together."""
    alike: dict[frozenset[str | None], list[int]] = {}
    for index, some in enumerate(weights):
        alike.setdefault(frozenset(some), []).append(index)
    return [
        [members[place] for place in batch]
        for members in alike.values()
        for batch in length_batches([examples[index] for index in members], BATCH_TOKENS)
    ]

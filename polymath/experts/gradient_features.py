"""Where a prompt pulls the weights of an adapter: its gradient, projected (ELREA, Li et al. 2025).

The loss is that of predicting the prompt's own words, as the answer is not known when a prompt has
to be routed. Its gradient with respect to the low-rank factors is taken for every prompt by itself:
for `y = B (A x)` it is an outer product of what goes into a factor and of what comes back out of it
(Goodfellow 2015), so that a batch costs one forward and one backward pass. No gradient of a whole
adapter is ever held: each factor's is added to the projection as it comes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymath.experts.chat import Message, render_chat
from polymath.experts.projection import SignProjection
from polymath.experts.quiet import quiet_loading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["AdamMoments", "GradientFeatures", "Prompt", "encode_prompt", "open_features"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""Of Adam, as adapters are trained."""

LEAST_NORM = 1e-30

AdamMoments = Mapping[str, tuple["Tensor", "Tensor"]]
"""Factor -> Adam's running means of the gradient and of its square, where training ended."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to a user turn: token ids, and which of them the user spoke in it."""

    ids: tuple[int, ...]
    spoken: range


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> Prompt:
    """The conversation under the chat template, with the words of the last user turn marked.

    A conversation without any has all its tokens marked. At most the last `max_length` are kept.

    Raises:
        InvalidRequest: the template refuses the conversation.
    """
    if not messages:
        return Prompt((), range(0))
    ids = render_chat(tokenizer, messages, add_generation_prompt=False)
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "user"), default=None)
    start, end = 0, len(ids)
    if last is not None and messages[last]["content"]:
        silent = [*messages[:last], {**messages[last], "content": ""}, *messages[last + 1 :]]
        frame = render_chat(tokenizer, silent, add_generation_prompt=False)
        start = _common(ids, frame)
        end -= min(_common(ids[::-1], frame[::-1]), len(ids) - start)
    cut = max(0, len(ids) - max_length)
    return Prompt(tuple(ids[cut:]), range(max(start - cut, 0), max(end - cut, 0)))


class GradientFeatures:
    """Projected gradients of prompts.

    Args:
        model: a causal language model with one LoRA adapter (PEFT); it is frozen by this.
        projection: of all its factors.
        layers: the last so many decoder layers count; None for all. The backward pass ends there.
    """

    def __init__(self, model: Any, projection: SignProjection, layers: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False).get_base_model()
        self._projection = projection
        self._lock = threading.Lock()
        self._sums: Tensor | None = None
        self._moments: AdamMoments | None = None
        decoder = self.model.get_decoder().layers
        first = 0 if layers is None else max(0, len(decoder) - layers)
        _merge_adapter(decoder[:first])
        decoder[first].register_forward_pre_hook(_start_here)
        for place in range(first, len(decoder)):
            for name, module in decoder[place].named_modules():
                if name.endswith(("lora_A.default", "lora_B.default")):
                    factor = f"layers.{place}.{name.removesuffix('.default')}"
                    module.register_forward_hook(self._watch(factor))

    @property
    def dimensions(self) -> int:
        """Length of the features."""
        return self._projection.dimensions

    def of(
        self, prompts: Sequence[Prompt], moments: AdamMoments | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors, [prompts, dimensions]; zeros for a prompt of fewer than two tokens.

        Args:
            moments: with them, the step that Adam would take next for each prompt alone (LESS, Xia
                et al. 2024, section 3.1) in place of the gradient.
        """
        import torch

        with self._lock, torch.enable_grad():
            self._sums, self._moments = self._projection.zeros(len(prompts)), moments
            loss = self._loss(prompts)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            features = self._projection.finish(self._sums)
        features /= features.norm(dim=1, keepdim=True).clamp(min=LEAST_NORM)
        result: NDArray[np.float32] = features.numpy()
        return result

    def _loss(self, prompts: Sequence[Prompt]) -> Tensor:
        """Sum over the prompts of the mean loss of their spoken tokens."""
        import torch

        longest = max(1, *(len(prompt.ids) for prompt in prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        shares = torch.zeros(len(prompts), longest)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids, dtype=torch.long)
            mask[row, : len(prompt.ids)] = 1
            targets = [place for place in prompt.spoken if place > 0]
            shares[row, targets] = 1 / max(1, len(targets))
        states = self.model.get_decoder()(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        counted = shares[:, 1:] > 0
        logits = self.model.get_output_embeddings()(states[:, :-1][counted])
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
        return (losses * shares[:, 1:][counted]).sum()

    def _watch(self, factor: str) -> Callable[..., None]:
        """A hook that catches what goes into a factor and what comes back out of it."""

        def forward(module: Any, inputs: tuple[Tensor], output: Any) -> None:
            if output.requires_grad:
                entered = inputs[0].detach()
                output.register_hook(lambda gradient: self._add(factor, gradient, entered))

        return forward

    def _add(self, factor: str, gradient: Tensor, entered: Tensor) -> None:
        """The gradient of each row's factor, [rows, outputs, inputs], into the projection."""
        assert self._sums is not None
        values = (gradient.transpose(1, 2) @ entered).flatten(1)
        if self._moments is not None:
            values = _adam_step(values, *self._moments[factor])
        self._projection.add(self._sums, factor, values)


def open_features(
    model_folder: Path, adapter: Path, dimensions: int, seed: int, layers: int | None = None
) -> tuple[GradientFeatures, PreTrainedTokenizerBase]:
    """Load a base model with its adapter, and its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_loading():
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(adapter))
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return GradientFeatures(model, SignProjection(dimensions, seed), layers), tokenizer


def _merge_adapter(layers: Any) -> None:
    """Layers that are only run forward need no factors of their own."""
    from peft.tuners.lora import LoraLayer

    for module in layers.modules():
        if isinstance(module, LoraLayer):
            module.merge()


def _start_here(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The backward pass ends at the states that enter the first layer that counts."""
    states, *others = inputs
    return (states.detach().requires_grad_(True), *others)


def _adam_step(gradient: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    mean = BETAS[0] * mean.flatten() + (1 - BETAS[0]) * gradient
    square = BETAS[1] * square.flatten() + (1 - BETAS[1]) * gradient.square()
    return mean / (square + EPSILON).sqrt()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common start."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return sum(1 for _ in shared)

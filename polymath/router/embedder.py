"""Texts as vectors whose cosine says how alike they are, by the encoder that the router has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from polymath.router.encoder import SentenceEncoder, halves
from polymath.router.micro_batch import MicroBatcher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Embedder", "HasEmbedder"]


class Embedder:
    """The half of the encoder's vectors that is made for likeness.

    Args:
        encoder: for one text after the other, and its micro-batches.
    """

    def __init__(self, encoder: SentenceEncoder, batches: MicroBatcher) -> None:
        self._encoder = encoder
        self._batches = batches

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, dimensions], of unit length."""
        import numpy as np

        return np.stack([halves(vector)[1] for vector in self._batches.vectors(texts)])

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens that are read of the texts."""
        return sum(len(ids) for ids in self._encoder.token_ids(texts))


@runtime_checkable
class HasEmbedder(Protocol):
    """A router that reads texts with a sentence encoder, or may."""

    @property
    def embedder(self) -> Embedder | None:
        """The encoder, if there is one."""
        ...

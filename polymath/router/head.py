"""From vectors to logits: a linear head, and what the nearest centres of the training prompts say.

A linear head draws one border for each domain, and prompts from a source that it has not seen fall
on the wrong side of it in whole groups. The centres (K-means of each domain's prompts) know groups:
a domain is as likely as the mean of `exp(SHARPNESS * cosine)` over its centres says, as in a soft
nearest-prototype classifier (Snell et al. 2017, with many prototypes a class). The two opinions are
multiplied (a product of experts, Hinton 2002): their logits add.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["RouterHead"]

SHARPNESS = 60.0
LEAST_SHARE = 1e-4
"""Of the votes; a domain without any is not ruled out by that alone."""


@dataclass(frozen=True, slots=True)
class RouterHead:
    """Logits are `weight @ vector + bias`, plus the logarithm of the centres' votes, if any.

    Attributes:
        weight: [labels, dimensions]; bias: [labels].
        centres: [centres, dimensions], unit length.
        owners: [centres], the row of `weight` that each centre is of.
        shares: [centres, labels], 1 by the number of its label's centres, else 0.
    """

    weight: Floats
    bias: Floats
    centres: Floats | None = None
    owners: NDArray[np.int64] | None = None
    shares: Floats | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        import numpy as np

        if self.owners is not None:
            one_hot = np.eye(len(self.weight), dtype=np.float32)[self.owners]
            counts = np.maximum(one_hot.sum(axis=0), 1)
            object.__setattr__(self, "shares", one_hot / counts)

    def with_centres(self, centres: Floats, owners: NDArray[np.int64]) -> RouterHead:
        """The same linear part with centres beside it."""
        return replace(self, centres=centres, owners=owners)

    def logits(self, vectors: Floats) -> Floats:
        """Of one vector or of many, [..., labels]."""
        import numpy as np

        linear: Floats = vectors @ self.weight.T + self.bias
        if self.centres is None or self.shares is None:
            return linear
        votes = SHARPNESS * (vectors @ self.centres.T)
        votes = np.exp(votes - votes.max(axis=-1, keepdims=True)) @ self.shares
        votes /= votes.sum(axis=-1, keepdims=True)
        result: Floats = linear + np.log(votes + np.float32(LEAST_SHARE))
        return result

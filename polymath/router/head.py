"""From vectors to logits: a linear head, and what the nearest centres of the training prompts say.

A linear head draws one border for each domain, and prompts from a source that it has not seen fall
on the wrong side of it in whole groups. The centres (K-means of each domain's prompts) know groups:
a domain is as likely as the mean of `exp(SHARPNESS * cosine)` over its centres says, as in a soft
nearest-prototype classifier (Snell et al. 2017, with many prototypes a class). The two opinions are
multiplied (a product of experts, Hinton 2002): their logits add.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        owners: [centres, labels], for each label its share of its centres: 1 by their number.
    """

    weight: Floats
    bias: Floats
    centres: Floats | None = None
    owners: Floats | None = None

    @classmethod
    def centred(
        cls, weight: Floats, bias: Floats, centres: Floats, owners: NDArray[np.int64]
    ) -> RouterHead:
        """A head with centres, given the label of each centre by its row of `weight`."""
        import numpy as np

        one_hot = np.eye(len(weight), dtype=np.float32)[owners]
        return cls(weight, bias, centres, one_hot / np.maximum(one_hot.sum(axis=0), 1))

    def logits(self, vectors: Floats) -> Floats:
        """Of one vector or of many, [..., labels]."""
        import numpy as np

        linear: Floats = vectors @ self.weight.T + self.bias
        if self.centres is None or self.owners is None:
            return linear
        votes = SHARPNESS * (vectors @ self.centres.T)
        votes = np.exp(votes - votes.max(axis=-1, keepdims=True)) @ self.owners
        shares = votes / votes.sum(axis=-1, keepdims=True)
        result: Floats = linear + np.log(shares + np.float32(LEAST_SHARE))
        return result

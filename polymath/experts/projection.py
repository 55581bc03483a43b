"""A random projection that is never built: each coordinate has a place and a sign.

Feature hashing (Weinberger et al. 2009) is the Johnson-Lindenstrauss transform of one non-zero a
column (Kane and Nelson 2014). For vectors x and y the product of their projections is unbiased,
with variance at most (|x|^2 |y|^2 + <x, y>^2) / dimensions, which is what a dense matrix of random
signs promises too. Here it costs one addition for each coordinate in place of `dimensions`.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SignProjection"]


class SignProjection:
    """Projects vectors that come in named parts, such as the gradients of a model's weights.

    Args:
        dimensions: of the result.
        seed: the same seed gives the same projection, whatever parts come and in what order.
    """

    def __init__(self, dimensions: int, seed: int) -> None:
        self.dimensions = dimensions
        self._seed = seed
        self._places: dict[tuple[str, int], Tensor] = {}

    def zeros(self, rows: int) -> Tensor:
        """Sums of no parts yet, [rows, 2 * dimensions]: of what counts plus, and what minus."""
        import torch

        return torch.zeros(rows, 2 * self.dimensions)

    def add(self, sums: Tensor, part: str, values: Tensor) -> None:
        """Add one part of each row.

        Args:
            sums: changed in place.
            part: name of the part.
            values: [rows, size of the part].
        """
        places = self._places_of(part, values.shape[1])
        for total, row in zip(sums, values, strict=True):
            total.index_add_(0, places, row)

    def finish(self, sums: Tensor) -> Tensor:
        """The projections, [rows, dimensions]."""
        return sums[:, : self.dimensions] - sums[:, self.dimensions :]

    def _places_of(self, part: str, size: int) -> Tensor:
        """Where each coordinate is added, the sign included: 4 bytes a coordinate, [size]."""
        import numpy as np
        import torch

        known = self._places.get((part, size))
        if known is None:
            random = np.random.default_rng([self._seed, zlib.crc32(part.encode())])
            drawn = random.integers(0, 2 * self.dimensions, size, dtype=np.int32)
            known = self._places[part, size] = torch.from_numpy(drawn)
        return known

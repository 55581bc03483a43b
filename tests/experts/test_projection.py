"""A projection that is never built keeps inner products as a dense one of random signs does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from polymath.experts import SignProjection

SIZE = 3_000
DIMENSIONS = 512


def project(projection: SignProjection, vectors: Tensor, parts: int = 1) -> Tensor:
    sums = projection.zeros(len(vectors))
    for index, part in enumerate(vectors.chunk(parts, dim=1)):
        projection.add(sums, f"part {index}", part.contiguous())
    return projection.finish(sums)


def vectors(rows: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, SIZE, generator=random)
    return values / values.norm(dim=1, keepdim=True)


def test_inner_products_are_kept_within_what_the_dimension_promises() -> None:
    """Over many seeds: no bias, and a variance of at most (1 + <x, y>^2) / dimensions."""
    x, y = vectors(2)
    y = (x + y) / (x + y).norm()
    exact = float(x @ y)
    found = []
    for seed in range(400):
        left, right = project(SignProjection(DIMENSIONS, seed), torch.stack([x, y]))
        found.append(float(left @ right))
    bound = (1 + exact**2) / DIMENSIONS
    assert abs(np.mean(found) - exact) < 4 * np.sqrt(bound / len(found))
    assert np.var(found) < 1.25 * bound


def test_it_is_linear() -> None:
    projection = SignProjection(DIMENSIONS, 1)
    x, y = vectors(2)
    both = project(projection, torch.stack([x, y, 2 * x - 3 * y]))
    torch.testing.assert_close(both[2], 2 * both[0] - 3 * both[1])


def test_a_row_is_the_same_alone_and_in_company() -> None:
    projection, rows = SignProjection(DIMENSIONS, 1), vectors(5)
    alone = torch.cat([project(projection, row[None], 3) for row in rows])
    torch.testing.assert_close(project(projection, rows, 3), alone, rtol=0, atol=0)


@pytest.mark.parametrize("parts", [[0, 1, 2], [2, 0, 1]])
def test_parts_come_in_any_order(parts: list[int]) -> None:
    values = vectors(1).chunk(3, dim=1)
    expected = SignProjection(DIMENSIONS, 7)
    known = expected.zeros(1)
    for index in range(3):
        expected.add(known, str(index), values[index])
    other = SignProjection(DIMENSIONS, 7)
    sums = other.zeros(1)
    for index in parts:
        other.add(sums, str(index), values[index])
    torch.testing.assert_close(other.finish(sums), expected.finish(known))


def test_another_seed_is_another_projection() -> None:
    rows = vectors(1)
    one, same, other = (project(SignProjection(DIMENSIONS, seed), rows) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_parts_of_like_size_go_to_different_places() -> None:
    projection, row = SignProjection(DIMENSIONS, 0), vectors(1)
    first, second = projection.zeros(1), projection.zeros(1)
    projection.add(first, "a", row)
    projection.add(second, "b", row)
    assert not torch.equal(first, second)

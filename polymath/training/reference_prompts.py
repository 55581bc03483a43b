"""The training prompts that go into a router folder, for decisions to point at."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from polymath.router import Encoder, Reference, halves
from polymath.training.data import PromptRow
from polymath.training.labelled import LabelledPrompts
from polymath.training.prompt_vectors import encode_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["REFERENCES_PER_DOMAIN", "REFERENCE_CHARACTERS", "choose_references"]

REFERENCES_PER_DOMAIN = 128
CANDIDATES_PER_DOMAIN = 512
REFERENCE_CHARACTERS = 240
SAME_VECTOR_DIGITS = 4
"""A text encoded in another batch may differ in the last digits."""


def choose_references(
    data: LabelledPrompts,
    encoder: Encoder,
    seed: int,
    withheld: Collection[str] = (),
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[tuple[Reference, ...], Vectors]:
    """For each domain the prompts nearest the centres of as many clusters: a wide sample.

    Args:
        withheld: sources whose texts are left out; the ids stand for them.
    Returns:
        The references and their inner unit vectors, [references, dimensions].
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    domains = [np.flatnonzero(data.targets == target) for target in range(len(data.labels))]
    candidates = np.concatenate(
        [
            np.sort(rng.choice(members, min(CANDIDATES_PER_DOMAIN, len(members)), replace=False))
            for members in domains
        ]
    )
    rows = [data.rows[index] for index in candidates]
    _, vectors = halves(encode_prompts(encoder, rows, advance))
    targets = data.targets[candidates]
    kept = [
        place
        for target in range(len(data.labels))
        for place in _spread(vectors, np.flatnonzero(targets == target), seed)
    ]
    references = [
        _reference(data.rows[candidates[place]], int(candidates[place]), withheld) for place in kept
    ]
    return tuple(references), vectors[kept]


def _spread(vectors: Vectors, members: NDArray[np.int64], seed: int) -> list[int]:
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    distinct = len(np.unique(vectors[members].round(SAME_VECTOR_DIGITS), axis=0))
    clusters = min(REFERENCES_PER_DOMAIN, distinct)
    means = KMeans(clusters, n_init=1, random_state=seed).fit(vectors[members])
    nearest = pairwise_distances_argmin(means.cluster_centers_, vectors[members])
    return sorted({int(members[index]) for index in nearest})


def _reference(row: PromptRow, index: int, withheld: Collection[str]) -> Reference:
    text = "" if row.family in withheld else row.text[:REFERENCE_CHARACTERS]
    return Reference(id=f"{row.source or 'prompt'}#{index}", text=text, domain=row.domain)

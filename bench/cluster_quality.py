"""What the layers, Adam's scaling, the algorithm and the projection do to clusters of gradients.

Clusters are compared with the domains, which the training does not see: mutual information, and how
often a held-out prompt, by its own gradient, is sent to a cluster that is mostly of its domain.
"""

from __future__ import annotations

import argparse
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.elrea import BASE, DOMAINS, Bench
from polymath.artifacts import no_progress
from polymath.experts import SignProjection, prepare_base_model
from polymath.router import cluster_weights
from polymath.training import ChatRow, InstructionGradients, centroids_of, cluster, read_chats

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Vectors = NDArray[np.float32]

CLUSTERS = 6
HELD_OUT = 30
"""Conversations of each domain."""
LAYERS = (None, 8, 4, 2)
FEW_DIMENSIONS = 1024
"""So that a dense matrix fits the memory."""
ALGORITHMS = ("birch", "kmeans", "spherical")


def main() -> None:
    """Print the table."""
    from sklearn.metrics import normalized_mutual_info_score

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="the folder of bench.elrea")
    arguments = parser.parse_args()
    bench = Bench(arguments.data, arguments.work, seed=0)
    moments = bench.training.train_base()
    folder = prepare_base_model(BASE)
    held_out = {
        domain: read_chats([arguments.data / "experts" / f"{domain}.eval.jsonl"])[-HELD_OUT:]
        for domain in DOMAINS
    }
    print("| layers | scaled by Adam | algorithm | NMI with the domains | held-out prompts right |")
    print("|---|---|---|---|---|")
    for layers in LAYERS:
        recipe = bench.recipe.model_copy(update={"layers": layers})
        gradients = InstructionGradients(folder, bench.base_folder, recipe, no_progress)
        asked = {domain: gradients.asked(rows) for domain, rows in held_out.items()}
        for given in (moments, None):
            scaled = "yes" if given else "no"
            file = arguments.work / "layers" / f"{layers or 'all'}-{scaled}.f16"
            known = gradients.kept(bench.rows, given, file, "gradients")
            for algorithm in ALGORITHMS:
                members = cluster(known, CLUSTERS, algorithm, seed=0)
                nmi = normalized_mutual_info_score(bench.domains, members)
                right = _share_right(asked, known, members, bench.domains)
                print(
                    f"| {layers or 'all'} | {scaled} | {algorithm} | {nmi:.3f} | {right:.3f} |",
                    flush=True,
                )

    _print_projections(bench, folder, held_out, arguments.work)


def _print_projections(
    bench: Bench, folder: Path, held_out: Mapping[str, Sequence[ChatRow]], work: Path
) -> None:
    """Feature hashing, which polymath uses, beside the dense matrix of the paper."""
    from sklearn.metrics import normalized_mutual_info_score

    moments = bench.training.train_base()
    print("\n| projection | dimensions | NMI with the domains | held-out prompts right |")
    print("|---|---|---|---|")
    recipe = bench.recipe.model_copy(update={"dimensions": FEW_DIMENSIONS})
    for name in ("feature hashing", "dense random signs"):
        gradients = InstructionGradients(folder, bench.base_folder, recipe, no_progress)
        if name.startswith("dense"):
            gradients._features._projection = DenseSigns(FEW_DIMENSIONS, seed=0)
        file = work / "layers" / f"{name.replace(' ', '-')}.f16"
        known = gradients.kept(bench.rows, moments, file, name)
        asked = {domain: gradients.asked(rows) for domain, rows in held_out.items()}
        members = cluster(known, CLUSTERS, "birch", seed=0)
        nmi = normalized_mutual_info_score(bench.domains, members)
        right = _share_right(asked, known, members, bench.domains)
        print(f"| {name} | {FEW_DIMENSIONS} | {nmi:.3f} | {right:.3f} |", flush=True)


class DenseSigns(SignProjection):
    """A matrix of random signs, kept whole as bytes."""

    def __init__(self, dimensions: int, seed: int) -> None:
        super().__init__(dimensions, seed)
        self._signs: dict[str, NDArray[np.int8]] = {}

    def add(self, sums: Tensor, part: str, values: Tensor) -> None:
        import torch

        if part not in self._signs:
            random = np.random.default_rng([1, zlib.crc32(part.encode())])
            bits = random.integers(0, 2, (values.shape[1], self.dimensions), dtype=np.int8)
            self._signs[part] = 2 * bits - 1
        signs = torch.from_numpy(self._signs[part]).float()
        sums[:, : self.dimensions] += values @ signs


def _share_right(
    asked: dict[str, Vectors],
    known: Vectors,
    members: NDArray[np.int64],
    domains: Sequence[str],
) -> float:
    centroids = centroids_of(known, members)
    majority = [
        Counter(d for d, m in zip(domains, members, strict=True) if m == c).most_common(1)[0][0]
        for c in range(len(centroids))
    ]
    right = [
        majority[int(nearest)] == domain
        for domain, vectors in asked.items()
        for nearest in cluster_weights(vectors, centroids).argmax(axis=1)
    ]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()

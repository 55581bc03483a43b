"""What the layers, Adam's scaling and the algorithm do to the clusters of gradients.

Clusters are compared with the domains, which the training does not see: mutual information, and how
often a held-out prompt, by its own gradient, is sent to a cluster that is mostly of its domain.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.elrea import BASE, DOMAINS, Bench
from polymath.experts import AdamMoments, Prompt, encode_prompt, open_features, prepare_base_model
from polymath.router import cluster_weights
from polymath.training import ChatRow, centroids_of, cluster, read_chats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

CLUSTERS = 6
HELD_OUT = 30
"""Conversations of each domain."""
LAYERS = (None, 8, 4, 2)
ALGORITHMS = ("birch", "kmeans", "spherical")
BATCH = 4


def main() -> None:
    """Print the table."""
    from sklearn.metrics import normalized_mutual_info_score

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="the folder of bench.elrea")
    arguments = parser.parse_args()
    bench = Bench(arguments.data, arguments.work, seed=0)
    moments = bench.training.train_base()
    held_out = {
        domain: read_chats([arguments.data / "experts" / f"{domain}.eval.jsonl"])[-HELD_OUT:]
        for domain in DOMAINS
    }
    print("| layers | scaled by Adam | algorithm | NMI with the domains | held-out prompts right |")
    print("|---|---|---|---|---|")
    for layers in LAYERS:
        measured = _Features(bench, layers)
        asked = {domain: measured.of(rows, None) for domain, rows in held_out.items()}
        for given in (moments, None):
            known = measured.of(bench.rows, given)
            for algorithm in ALGORITHMS:
                members = cluster(known, CLUSTERS, algorithm, seed=0)
                nmi = normalized_mutual_info_score(bench.domains, members)
                right = _share_right(asked, known, members, bench.domains)
                scaled = "yes" if given else "no"
                print(
                    f"| {layers or 'all'} | {scaled} | {algorithm} | {nmi:.3f} | {right:.3f} |",
                    flush=True,
                )


class _Features:
    def __init__(self, bench: Bench, layers: int | None) -> None:
        recipe = bench.recipe
        self._most = recipe.max_length
        self._features, self._tokenizer = open_features(
            prepare_base_model(BASE), bench.base_folder, recipe.dimensions, recipe.seed, layers
        )

    def of(self, rows: Sequence[ChatRow], moments: AdamMoments | None) -> Vectors:
        prompts: list[Prompt] = [
            encode_prompt(self._tokenizer, row.conversation()[:-1], self._most) for row in rows
        ]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        found = np.empty((len(prompts), self._features.dimensions), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            found[some] = self._features.of([prompts[index] for index in some], moments)
        return found


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

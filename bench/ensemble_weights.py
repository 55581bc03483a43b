"""How much weight the base adapter should have in an ensemble of clusters' experts.

ELREA (Li et al. 2025, eq. 8) gives the base adapter as much as all clusters together. Here the
weight, the number of clusters and the temperature are varied on conversations that neither the
training nor `bench.elrea` sees, with the adapters that `bench.elrea` has trained.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.elrea import BASE, CLUSTERS, DOMAINS, MAX_LENGTH, TRAIN_ROWS, Bench, chosen
from polymath.experts import EngineSettings, LoraModel, prepare_base_model
from polymath.router import cluster_weights
from polymath.training import IGNORED, ChatRow, encode_chat, read_chats

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 12
"""Conversations of each domain."""
BASE_WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0)
TOP_KS = (1, 2, 3, CLUSTERS)
TEMPERATURES = (0.25, 0.5, 1.0)


def main() -> None:
    """Print the mean loss of every combination, the best first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="the folder of bench.elrea")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bench = Bench(arguments.data, arguments.work, arguments.seed)
    rows = {
        domain: read_chats([arguments.data / "experts" / f"{domain}.train.jsonl"])[
            TRAIN_ROWS : TRAIN_ROWS + ROWS
        ]
        for domain in DOMAINS
    }
    losses = _losses(bench, rows)
    print("| base weight | top k | temperature | mean loss |\n|---|---|---|---|")
    for (base_weight, top_k, temperature), loss in sorted(losses.items(), key=lambda x: x[1]):
        print(f"| {base_weight} | {top_k} | {temperature} | {loss:.4f} |")


def _losses(
    bench: Bench, rows: Mapping[str, list[ChatRow]]
) -> dict[tuple[float, int, float], float]:
    import torch

    adapters, centroids = bench.elrea_experts()
    model = LoraModel(prepare_base_model(BASE), adapters, EngineSettings())
    combinations = list(itertools.product(BASE_WEIGHTS, TOP_KS, TEMPERATURES))
    sums = {combination: dict.fromkeys(DOMAINS, 0.0) for combination in combinations}
    tokens = dict.fromkeys(DOMAINS, 0)
    for domain, row, features in _asked(bench, rows):
        example = encode_chat(model.tokenizer, row, 2 * MAX_LENGTH)
        if example is None:
            continue
        labels = torch.tensor(example.labels[1:])
        answers = labels != IGNORED
        tokens[domain] += int(answers.sum())
        logits: dict[str, Tensor] = {
            name: model.all_logits(name, example.ids)[:-1][answers] for name in adapters
        }
        for combination in combinations:
            base_weight, top_k, temperature = combination
            (shares,) = chosen(
                cluster_weights(features[None], centroids, temperature), top_k, base_weight
            )
            combined = torch.stack([w * logits[str(name)] for name, w in shares.items()]).sum(0)
            loss = torch.nn.functional.cross_entropy(combined, labels[answers], reduction="sum")
            sums[combination][domain] += float(loss)
    return {
        combination: statistics.mean(by_domain[d] / tokens[d] for d in DOMAINS)
        for combination, by_domain in sums.items()
    }


def _asked(bench: Bench, rows: Mapping[str, list[ChatRow]]) -> Iterator[tuple[str, ChatRow, Any]]:
    flat = [(domain, row) for domain in DOMAINS for row in rows[domain]]
    features = bench.features([row for _, row in flat], "validated.f16")
    for (domain, row), vector in zip(flat, features, strict=True):
        yield domain, row, vector


if __name__ == "__main__":
    main()

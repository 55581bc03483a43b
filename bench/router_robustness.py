"""What must not change a decision, and what the router learns from a few examples.

Accuracy on the dev prompts as they are, misspelt, and in other frames; a seventh domain known by
examples alone; follow-up questions that carry no topic of their own; scores of being out of scope.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymath.router import (
    Router,
    RouterArtifact,
    RouterSettings,
    SentenceEncoder,
    build_router,
    calibrated,
    halves,
)
from polymath.training import (
    PromptRow,
    encode_prompts,
    read_prompts,
    route_prompts,
    with_typos,
)

ROUTER = Path("configs/demo/router")
DATA = Path("configs/demo/data")
EXAMPLES = 20
DRAWS = 6
LOST = 0.05
"""Share of the dev prompts that a score may lose."""
SHRUNK = 1e-3
"""Added to the variance of every dimension."""
TYPO_RATE = 0.1
SUBJECTS = {
    "math": "Mathematics",
    "coding": "Programming",
    "health": "Medicine",
    "law": "Law",
    "finance": "Finance",
    "science": "Science",
    "general": "General",
}
PREAMBLE = "Good morning! I hope this is not a bother, and thank you so much for your time. "
OPTIONS = "\n(1) the first statement\n(2) the second statement\n(3) both\n(4) neither"

Change = Callable[[PromptRow], str]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--router", type=Path, default=ROUTER)
    arguments = parser.parse_args()
    rows = read_prompts([arguments.data / "prompts" / "dev.jsonl"])
    router = _router(arguments.router, {})
    plain = _domains(router, [row.text for row in rows])
    print("| dev prompts | accuracy | points lost | same domain as before |\n|---|---|---|---|")
    for name, change in _changes().items():
        domains = _domains(router, [change(row) for row in rows])
        kept = sum(a == b for a, b in zip(domains, plain, strict=True)) / len(rows)
        lost = 100 * (_accuracy(rows, plain) - _accuracy(rows, domains))
        print(f"| {name} | {_accuracy(rows, domains):.4f} | {lost:.1f} | {kept:.4f} |")
    _print_seventh_domain(arguments.router, rows, plain)
    _print_follow_ups(router)
    _print_scope(arguments.router, rows)


def _changes() -> dict[str, Change]:
    rng = random.Random(0)
    return {
        "as they are": lambda row: row.text,
        "10 % of the words misspelt": lambda row: with_typos(row.text, rng, TYPO_RATE),
        "subject in front": lambda row: f"{SUBJECTS[row.domain]}: {row.text}",
        "polite preamble": lambda row: PREAMBLE + row.text,
        "last sentence first": lambda row: _last_first(row.text),
        "exam frame": lambda row: f"Choose the correct answer.\n\n{row.text}{OPTIONS}",
    }


def _last_first(text: str) -> str:
    sentences = re.split(r"(?<=[.?!])\s+", text.strip())
    return " ".join([sentences[-1], *sentences[:-1]])


def _print_seventh_domain(folder: Path, rows: Sequence[PromptRow], plain: Sequence[str]) -> None:
    cooking = read_prompts([DATA / "router.cooking.eval.jsonl"])
    found, lost = [], []
    for draw in range(DRAWS):
        drawn = cooking if draw == 0 else random.Random(draw).sample(cooking, len(cooking))
        examples, held_out = drawn[:EXAMPLES], drawn[EXAMPLES:]
        router = _router(folder, {"cooking": [row.text for row in examples]})
        found.append(_accuracy(held_out, _domains(router, [row.text for row in held_out])))
        domains = _domains(router, [row.text for row in rows])
        lost.append(100 * (_accuracy(rows, plain) - _accuracy(rows, domains)))
    print(
        f"cooking by {EXAMPLES} examples: {found[0]:.4f} of {len(cooking) - EXAMPLES} held-out "
        f"prompts, the others lose {lost[0]:.2f} points; over {DRAWS} draws of the examples "
        f"{statistics.mean(found):.4f} (least {min(found):.4f}) and {statistics.mean(lost):.2f}"
    )


def _print_scope(folder: Path, rows: Sequence[PromptRow]) -> None:
    """Four scores of being of no domain, at the same price: some of the dev prompts are lost."""
    artifact = RouterArtifact.load(folder)
    encoder = SentenceEncoder(folder, threads=2)
    outside = read_prompts([DATA / "router.oos.eval.jsonl"])
    scores = _scope_scores(artifact, encode_prompts(encoder, rows))
    others = _scope_scores(artifact, encode_prompts(encoder, outside))
    print("| score of being of no domain | out of scope kept from the specialists |\n|---|---|")
    for name, inside in scores.items():
        limit = np.quantile(inside, 1 - LOST)
        print(f"| {name} | {(others[name] > limit).mean():.4f} |")


def _scope_scores(artifact: RouterArtifact, vectors: Any) -> dict[str, Any]:
    """Larger is further out of scope."""
    read, likeness = halves(vectors)
    labels = len(artifact.card.labels)
    logits = (read @ artifact.weight.T + artifact.bias) / artifact.card.temperature
    domains = [reference.domain for reference in artifact.references]
    known = artifact.vectors
    means = np.stack([known[np.array(domains) == d].mean(axis=0) for d in artifact.card.labels])
    deviations = known - means[[artifact.card.labels.index(domain) for domain in domains]]
    precision = np.linalg.inv(np.cov(deviations.T) + SHRUNK * np.eye(known.shape[1]))
    away = likeness[:, None] - means[None]
    return {
        "probability of one more class, `none`": calibrated(logits, 1.0)[:, labels],
        "energy (Liu et al. 2020)": -np.logaddexp.reduce(logits[:, :labels], axis=1),
        "Mahalanobis distance (Lee et al. 2018)": np.einsum(
            "pci,ij,pcj->pc", away, precision, away, optimize=True
        ).min(axis=1),
        "nearest training prompt": -(likeness @ known.T).max(axis=1),
    }


def _print_follow_ups(router: Router) -> None:
    lines = (DATA / "router.follow_up.eval.jsonl").read_text(encoding="utf-8").splitlines()
    right = 0
    for values in map(json.loads, lines):
        messages = [
            {"role": "user", "content": values["first"]},
            {"role": "assistant", "content": "..."},
            {"role": "user", "content": values["follow_up"]},
        ]
        right += router.route(messages).domain == values["domain"]
    print(f"follow-ups that stay in their domain: {right} of {len(lines)}")


def _router(folder: Path, examples: Mapping[str, Sequence[str]]) -> Router:
    owners = {domain: domain for domain in (*SUBJECTS, *examples)}
    return build_router(RouterSettings(path=folder, fallback="general"), owners, examples)


def _domains(router: Router, texts: Sequence[str]) -> list[str]:
    rows = [PromptRow(text=text, domain="?") for text in texts]
    return [prompt.decision.domain or "" for prompt in route_prompts(router, rows)]


def _accuracy(rows: Sequence[PromptRow], domains: Sequence[str]) -> float:
    pairs = zip(rows, domains, strict=True)
    return sum(row.domain == domain for row, domain in pairs) / len(rows)


if __name__ == "__main__":
    main()

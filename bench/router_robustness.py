"""What must not change a decision, and what the router learns from a few examples.

Accuracy on the dev prompts as they are, misspelt, and in other frames; a seventh domain known by
examples alone; follow-up questions that carry no topic of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polymath.router import Router, RouterSettings, build_router
from polymath.training import PromptRow, read_prompts, route_prompts, with_typos

ROUTER = Path("configs/demo/router")
DATA = Path("configs/demo/data")
EXAMPLES = 20
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
    examples, held_out = cooking[:EXAMPLES], cooking[EXAMPLES:]
    router = _router(folder, {"cooking": [row.text for row in examples]})
    found = _domains(router, [row.text for row in held_out])
    domains = _domains(router, [row.text for row in rows])
    lost = 100 * (_accuracy(rows, plain) - _accuracy(rows, domains))
    print(
        f"cooking by {EXAMPLES} examples: {_accuracy(held_out, found):.4f} of {len(held_out)} "
        f"held-out prompts, the others lose {lost:.2f} points"
    )


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

"""What each judge of a cascade is worth on small sums, of which the cheap model gets some right.

The bare base model is cheap, the general expert strong. The references of Meta Ranking are the
cheap model's own answers to other sums. `make bench-cascade`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.demo import BASE, POLYMATH, demo_text, load_demo
from polymath.gateway import open_service
from polymath.proxy import answer_text
from polymath.training import is_right

STRONG = "general"
QUESTIONS, REFERENCES = 200, 20
MAX_TOKENS = 64
LARGEST = 30
JUDGES = {
    "mean log-probability": "{kind: logprob, threshold: -0.2}",
    "Meta Ranking, 6 references": "{kind: meta_ranking, threshold: 0, pairs: 6, "
    "references: references.jsonl}",
    "difficulty": "{kind: difficulty, threshold: 0.9}",
}

Question = tuple[str, int]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="folder for a report of each judge")
    arguments = parser.parse_args()
    questions = _questions(QUESTIONS + REFERENCES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asyncio.run(_write_references(folder, questions[QUESTIONS:]))
        _write_questions(folder, questions[:QUESTIONS])
        _write_config(folder)
        print("| judge | nobody escalated | everybody | area | at random | accuracy at most |")
        print("|---|---|---|---|---|---|")
        for place, judge in enumerate(JUDGES):
            _print(judge, _evaluated(folder, f"cascade-{place}", arguments.report))


def _questions(count: int) -> list[Question]:
    """Sums, differences and products of one and two digits, plain and told."""
    draw = random.Random(0)
    questions: dict[str, int] = {}
    while len(questions) < count:
        more, less = sorted((draw.randint(2, LARGEST), draw.randint(2, LARGEST)), reverse=True)
        rows, seats = draw.randint(2, 9), draw.randint(2, 9)
        questions |= draw.choice(
            (
                {f"What is {more} + {less}?": more + less},
                {f"What is {more} - {less}?": more - less},
                {f"What is {rows} times {seats}?": rows * seats},
                {f"Tom has {more} apples and buys {less}. How many has he now?": more + less},
                {f"There are {rows} rows of {seats} seats. How many seats?": rows * seats},
            )
        )
    return list(questions.items())


async def _write_references(folder: Path, questions: Sequence[Question]) -> None:
    service = open_service(load_demo())
    lines = []
    for prompt, number in questions:
        body = {
            "model": BASE,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        answer = answer_text(await service.ask(BASE).whole(body))
        score = float(is_right(answer, str(number), "number"))
        lines.append(json.dumps({"prompt": prompt, "answer": answer, "score": score}))
    await service.close()
    (folder / "references.jsonl").write_text("\n".join(lines))


def _write_questions(folder: Path, questions: Sequence[Question]) -> None:
    rows = (
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(number)}]
        for prompt, number in questions
    )
    lines = (json.dumps({"messages": messages}) for messages in rows)
    (folder / "questions.jsonl").write_text("\n".join(lines))


def _write_config(folder: Path) -> None:
    cascades = "".join(
        f"  cascade-{place}: {{kind: cascade, cheap: {BASE}, strong: {STRONG}, judge: {judge}}}\n"
        for place, judge in enumerate(JUDGES.values())
    )
    (folder / "polymath.yaml").write_text(
        demo_text().replace("experts:\n", f"experts:\n{cascades}")
    )


def _evaluated(folder: Path, cascade: str, report: Path | None) -> dict[str, Any]:
    command = [POLYMATH, "eval", "cascade", "--config", str(folder / "polymath.yaml")]
    command += ["--expert", cascade, "--data", str(folder / "questions.jsonl"), "--json"]
    command += ["--match", "number", "--max-tokens", str(MAX_TOKENS)]
    if report is not None:
        command += ["--report", str(report / cascade)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return found


def _print(judge: str, found: Mapping[str, Any]) -> None:
    _, escalated, best = max(found["points"], key=lambda point: point[2], default=(0, 0, 0))
    print(
        f"| {judge} | {found['accuracy_cheap']:.3f} | {found['accuracy_strong']:.3f} "
        f"| {found['area']:.3f} | {found['random_area']:.3f} "
        f"| {best:.3f} at {escalated:.0%} escalated |",
        flush=True,
    )


if __name__ == "__main__":
    main()

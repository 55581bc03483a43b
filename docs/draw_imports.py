"""Draws the import arrows between the packages into docs/architecture.md (`make docs`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import grimp

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- imports: begin -->\n", "<!-- imports: end -->\n"
ROOT = "polymath"


def drawn() -> str:
    """Mermaid text: an arrow for each pair of packages, labelled with the number of imports."""
    graph = grimp.build_graph(ROOT)
    arrows: Counter[tuple[str, str]] = Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = (_package(importer), _package(imported))
            if pair[0] != pair[1] and ROOT not in pair:
                arrows[pair] += 1
    lines = [f"    {one} -->|{count}| {other}" for (one, other), count in sorted(arrows.items())]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def page_with_drawing(page: str) -> str:
    """The page with the drawing between its marks renewed."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + drawn() + END + tail


def _package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ROOT


if __name__ == "__main__":
    PAGE.write_text(page_with_drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

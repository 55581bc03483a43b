"""Perplexity of the fast path against float32: what int8 costs, for every expert on its own domain.

`make bench-quality`; the bar is a ratio of at most 1.01 on each file.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from bench.demo import load_demo, open_model
from polymath.experts import LoraModel
from polymath.training import answer_perplexity, read_chats

BAR = 1.01


def main() -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/experts"))
    parser.add_argument("--limit", type=int, default=None, help="conversations a file")
    given = parser.parse_args()
    demo = load_demo()
    models: dict[str, LoraModel] = {
        "float32": open_model(demo, backend="torch"),
        "int8": open_model(demo, backend="onnx"),
    }
    table = Table("expert", "answer tokens", "float32", "int8", "int8 / float32", "bar 1.01")
    for expert in models["int8"].adapters.names:
        rows = read_chats([given.data / f"{expert}.eval.jsonl"])[: given.limit]
        found = {
            name: answer_perplexity(model, expert, track(rows, f"{expert} {name}", transient=True))
            for name, model in models.items()
        }
        ratio = math.exp(found["int8"].loss - found["float32"].loss)
        table.add_row(
            expert,
            str(found["int8"].tokens),
            f"{found['float32'].value:.4f}",
            f"{found['int8'].value:.4f}",
            f"{ratio:.4f}",
            "met" if ratio <= BAR else "missed",
        )
        Console().print(table)


if __name__ == "__main__":
    main()

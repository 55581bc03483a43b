"""`polymath eval`: numbers for routers and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polymath.cli.options import DEFAULT_CONFIG, AsJson, ConfigOption, DataFiles, ManyFiles

if TYPE_CHECKING:
    from polymath.training import Perplexity

__all__ = ["app"]

GENERAL_DOMAIN = "general"

app = typer.Typer(help="Measure routers and experts.", no_args_is_help=True)


@app.command("router", cls=ManyFiles)
def eval_router(
    data: DataFiles,
    config: ConfigOption = DEFAULT_CONFIG,
    router: Annotated[
        Path | None, typer.Option(help="A router folder instead of the config's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, calibration and latency on labelled prompts (text, domain)."""
    from dataclasses import replace

    from polymath.cli.progress import bars
    from polymath.gateway import load_config, open_router
    from polymath.training import evaluate_router, read_prompts

    rows = read_prompts(data)
    file = load_config(config)
    if router is not None:
        chosen = file.settings.router.model_copy(update={"path": router})
        file = replace(file, settings=file.settings.model_copy(update={"router": chosen}))
    generalist = file.settings.domains().get(GENERAL_DOMAIN)
    generalists = [file.settings.router.fallback] + ([generalist] if generalist else [])
    opened = open_router(file)
    with bars() as progress:
        task = progress.add_task("routing", total=len(rows))
        report = evaluate_router(
            opened, rows, generalists, lambda prompts: progress.advance(task, prompts)
        )
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print_router_report(report)


@app.command("experts", cls=ManyFiles)
def eval_experts(
    data: DataFiles,
    config: ConfigOption = DEFAULT_CONFIG,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many conversations a file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of every expert on every file; DOMAIN is the file name up to its first dot."""
    from functools import partial

    from polymath.cli.progress import bars, conversion_progress
    from polymath.experts import adapters_on
    from polymath.gateway import load_config, prepare
    from polymath.training import expert_matrix, read_chats

    domains = {path.name.split(".")[0]: read_chats([path])[:limit] for path in data}
    with conversion_progress() as converting:
        prepared = prepare(load_config(config), converting)
    experts = prepared.settings.experts
    matrix: dict[str, dict[str, Perplexity]] = {}
    with bars() as progress:
        rows = sum(len(members) for members in domains.values())
        for name, folder in prepared.folders.items():
            adapters = adapters_on(name, experts)
            task = progress.add_task(name, total=rows * (1 + len(adapters)))
            advance = partial(progress.advance, task)
            matrix |= expert_matrix(name, folder, adapters, domains, advance)
    if as_json:
        typer.echo(json.dumps(_matrix_values(matrix)))
    else:
        _print_matrix(matrix, list(domains))


def _matrix_values(matrix: dict[str, dict[str, Perplexity]]) -> dict[str, Any]:
    tokens = {domain: cell.tokens for row in matrix.values() for domain, cell in row.items()}
    perplexity = {
        expert: {domain: round(cell.value, 4) for domain, cell in row.items()}
        for expert, row in matrix.items()
    }
    return {"perplexity": perplexity, "answer_tokens": tokens}


def _print_matrix(matrix: dict[str, dict[str, Perplexity]], domains: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("expert", *domains, title="perplexity of the answers")
    best = {domain: min(row[domain].value for row in matrix.values()) for domain in domains}
    for expert, row in matrix.items():
        cells = []
        for domain in domains:
            value = row[domain].value
            cells.append(f"[bold]{value:.3f}[/]" if value == best[domain] else f"{value:.3f}")
        table.add_row(expert, *cells)
    Console().print(table)


def _print_router_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, value in report.items():
        if name != "per_domain":
            typer.echo(f"{name}: {value}")
    if "per_domain" in report:
        table = Table("domain", "n", "accuracy", "precision", "f1")
        for domain, score in report["per_domain"].items():
            table.add_row(domain, *(f"{value:g}" for value in score.values()))
        Console().print(table)

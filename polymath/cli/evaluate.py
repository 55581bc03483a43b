"""`polymath eval`: numbers for routers and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polymath.cli.evaluate_cascade import eval_cascade
from polymath.cli.options import DEFAULT_CONFIG, AsJson, ConfigOption, DataFiles, ManyFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polymath.gateway import ConfigFile
    from polymath.training import ConversationRow, Perplexity, PromptRow, RoutedPrompt

__all__ = ["app"]

GENERAL_DOMAIN = "general"

app = typer.Typer(help="Measure routers, experts and cascades.", no_args_is_help=True)
app.command("cascade", cls=ManyFiles)(eval_cascade)


@app.command("router", cls=ManyFiles)
def eval_router(
    data: DataFiles,
    config: ConfigOption = DEFAULT_CONFIG,
    router: Annotated[
        Path | None, typer.Option(help="A router folder instead of the config's.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for an HTML report of the evaluation.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two router folders: McNemar's test on the same prompts."),
    ] = None,
    conversations: Annotated[
        bool,
        typer.Option("--conversations", help="The rows are conversations (turns, domains)."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy, calibration and latency on labelled prompts (text, domain)."""
    from polymath.training import read_conversations, read_prompts

    file = _with_router(config, router)
    if conversations:
        _print_values(_evaluate_conversations(file, read_conversations(data)), as_json)
    elif compare is not None:
        _print_values(_compare(config, compare, read_prompts(data)), as_json)
    else:
        _evaluate_prompts(file, read_prompts(data), report, as_json)


def _with_router(config: Path, folder: Path | None) -> ConfigFile:
    """The config, with another router folder if one is named."""
    from dataclasses import replace

    from polymath.gateway import load_config

    file = load_config(config)
    if folder is None:
        return file
    router = file.settings.router
    kind = "encoder" if router.kind == "rules" else router.kind
    chosen = router.model_copy(update={"path": folder, "kind": kind})
    return replace(file, settings=file.settings.model_copy(update={"router": chosen}))


def _evaluate_prompts(
    file: ConfigFile, rows: Sequence[PromptRow], report: Path | None, as_json: bool
) -> None:
    from polymath.training import summarise_routing, write_router_report

    settings = file.settings
    generalist = settings.domains().get(GENERAL_DOMAIN)
    generalists = [settings.router.fallback] + ([generalist] if generalist else [])
    routed = _routed(file, rows)
    summary = summarise_routing(routed, generalists)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print_router_summary(summary)
    if report is not None:
        written = write_router_report(
            report, routed, summary, f"Router {settings.router.path or settings.router.kind}"
        )
        typer.echo(f"report: {written}", err=True)


def _routed(file: ConfigFile, rows: Sequence[PromptRow]) -> list[RoutedPrompt]:
    from polymath.cli.progress import bars
    from polymath.gateway import open_router
    from polymath.training import route_prompts

    router = open_router(file)
    with bars() as progress:
        task = progress.add_task("routing", total=len(rows))
        return route_prompts(router, rows, lambda prompts: progress.advance(task, prompts))


def _compare(config: Path, folders: tuple[Path, Path], rows: Sequence[PromptRow]) -> dict[str, Any]:
    """Accuracy of both routers and McNemar's test, over the prompts in scope."""
    from polymath.training import mcnemar

    correct = [
        [
            prompt.correct
            for prompt in _routed(_with_router(config, folder), rows)
            if prompt.in_scope
        ]
        for folder in folders
    ]
    test = mcnemar(*correct)
    return {
        "n": len(correct[0]),
        "accuracy": {
            str(folder): round(sum(right) / max(1, len(right)), 4)
            for folder, right in zip(folders, correct, strict=True)
        },
        "only_first_right": test.only_first,
        "only_second_right": test.only_second,
        "p_value": test.p_value,
    }


def _evaluate_conversations(file: ConfigFile, rows: Sequence[ConversationRow]) -> dict[str, Any]:
    from polymath.cli.progress import bars
    from polymath.gateway import open_router
    from polymath.training import evaluate_conversations

    router = open_router(file)
    with bars() as progress:
        task = progress.add_task("routing", total=len(rows))
        return evaluate_conversations(router, rows, lambda n: progress.advance(task, n))


def _print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values))
        return
    for name, value in values.items():
        typer.echo(f"{name}: {value}")


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


def _print_router_summary(report: dict[str, Any]) -> None:
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

"""`polymath check`, `polymath schema` and `polymath experts`: the config file itself."""

import json
from typing import Any

import typer

from polymath.cli.options import DEFAULT_CONFIG, AsJson, ConfigOption

__all__ = ["check", "experts_app", "schema"]

experts_app = typer.Typer(help="The experts of a config.", no_args_is_help=True)


def check(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Check the config, the adapters and the router, as `serve` does before it listens."""
    from polymath.cli.progress import conversion_progress
    from polymath.gateway import load_config, prepare

    with conversion_progress() as progress:
        prepared = prepare(load_config(config), progress)
    experts = ", ".join(prepared.settings.experts)
    typer.echo(f"{config}: in order; experts: {experts}")


def schema() -> None:
    """Print the JSON Schema of the config file, for editors."""
    from polymath.gateway import config_schema

    typer.echo(json.dumps(config_schema(), indent=2))


@experts_app.command("list")
def list_experts(config: ConfigOption = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """List the experts and base models of a config."""
    from rich.console import Console
    from rich.table import Table

    from polymath.experts import build_catalog
    from polymath.gateway import load_config

    settings = load_config(config).settings
    catalog = build_catalog(settings.base_models, settings.experts)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": expert.settings.kind,
            "base_model": expert.settings.base_model or "",
            "members": list(expert.settings.parts()),
            "domains": list(expert.domains),
            "description": expert.settings.description,
        }
        for name, expert in catalog.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "kind", "stands on", "domains", "description")
    for row in rows:
        table.add_row(
            row["name"],
            row["kind"],
            row["base_model"] or " + ".join(row["members"]),
            ", ".join(row["domains"]),
            row["description"],
        )
    Console().print(table)

"""`polymath check`, `polymath schema` and `polymath experts`: the config file itself."""

import json
import re
from typing import Annotated, Any

import typer

from polymath.cli.options import DEFAULT_CONFIG, AsJson, ConfigOption

__all__ = ["check", "experts_app", "schema"]

NOT_IN_NAMES = r"[^A-Za-z0-9._:/-]"
"""Characters that no expert's name may have."""
NOT_FIRST = "._:/-"
"""Characters that it may not begin with."""

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


@experts_app.command("import")
def import_experts(
    api_base: Annotated[str, typer.Option(help="URL in front of /models; usually ends in /v1.")],
    api_key: Annotated[
        str | None, typer.Option(help="Name of the environment variable with the key.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put before the names of the experts.")] = "",
) -> None:
    """Print every model of an OpenAI-compatible server as an expert, for the config.

    With vLLM these are its base model and its adapters.
    """
    import asyncio
    import os

    import yaml
    from pydantic import ValidationError

    from polymath.artifacts import first_problem
    from polymath.errors import UpstreamFailed
    from polymath.experts import ExpertSettings
    from polymath.proxy import Upstream

    if api_key is not None and not os.environ.get(api_key):
        raise typer.BadParameter(f"the environment variable {api_key} is not set")
    key = {} if api_key is None else {"api_key": os.environ[api_key]}
    try:
        settings = ExpertSettings.model_validate(
            {"kind": "upstream", "api_base": api_base, "model": "all", "timeout": 30, **key}
        )
    except ValidationError as error:  # its own text shows the key
        raise typer.BadParameter(first_problem(error)) from None

    async def listed() -> list[str]:
        upstream = Upstream("the import", settings)
        try:
            reply = await upstream.get("/models")
        finally:
            await upstream.close()
        try:
            return [str(model["id"]) for model in reply["data"]]
        except (KeyError, TypeError):
            raise UpstreamFailed(f"{api_base}/models lists no models.") from None

    shown = {} if api_key is None else {"api_key": f"${{{api_key}}}"}
    experts: dict[str, dict[str, str]] = {}
    for model in asyncio.run(listed()):
        name = _name(f"{prefix}{model}")
        if name in experts:
            name = f"{name}-{len(experts)}"
        experts[name] = {"kind": "upstream", "api_base": api_base, **shown, "model": model}
    typer.echo(yaml.safe_dump({"experts": experts}, sort_keys=False), nl=False)


def _name(model: str) -> str:
    """What the config may call a model; vLLM names one by its path unless told otherwise."""
    return re.sub(NOT_IN_NAMES, "-", model).lstrip(NOT_FIRST)

"""`polymath keys`: make, list and revoke API keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import typer

from polymath.cli.options import DEFAULT_CONFIG, ConfigOption

__all__ = ["app"]

Result = TypeVar("Result")

ACTOR = "command line"

app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    experts: Annotated[
        str | None, typer.Option(help="Those it may ask, with commas; by default all.")
    ] = None,
    rpm: Annotated[int | None, typer.Option(min=0, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=0, help="Tokens a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=0, help="Requests at a time.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Dollars and period: 5.00/month, 0.5/day, or 20 for good.")
    ] = None,
    allowed_domains: Annotated[
        str | None, typer.Option(help="Router domains it may ask about, with commas.")
    ] = None,
    off_topic: Annotated[
        str | None, typer.Option(help="refuse, fallback or answer, for other prompts.")
    ] = None,
    keep_prompts: Annotated[
        bool, typer.Option(help="Keep prompts for feedback, to train the router.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Make a key; it is shown this once, only a hash of it is kept."""
    from pydantic import ValidationError

    from polymath.errors import DataError
    from polymath.gateway import AuditLog, KeyRing, Settings, Store, read_budget

    rights: dict[str, Any] = {
        "experts": _names(experts),
        "rpm": rpm,
        "tpm": tpm,
        "concurrent": concurrent,
        "budget": None if budget is None else read_budget(budget),
        "allowed_domains": _names(allowed_domains),
        "off_topic": off_topic,
        "keep_prompts": keep_prompts,
    }

    async def made(store: Store, settings: Settings) -> str:
        known = [*settings.experts, *settings.base_models]
        if unknown := [one for one in rights["experts"] or () if one not in known]:
            raise DataError(f"--experts: no expert {unknown[0]!r}; there are {', '.join(known)}")
        try:
            key, record = await KeyRing(store).create(name, **rights)
        except ValidationError as error:
            problem = error.errors()[0]
            place = "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            raise DataError(f"--{place}: {problem['msg']}") from error
        await AuditLog(store).write(ACTOR, "create key", record.id, name=name)
        return key

    key = _with_store(config, made)
    typer.echo(key)
    typer.secho("Keep it: it is not shown again.", err=True, dim=True)


@app.command("list")
def list_keys(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """All keys, also revoked ones, as JSON lines without what opens them."""
    import orjson

    from polymath.gateway import KeyRecord, KeyRing, Settings, Store

    async def found(store: Store, settings: Settings) -> list[KeyRecord]:
        return await KeyRing(store).all()

    for record in _with_store(config, found):
        typer.echo(orjson.dumps(record.about()).decode())


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Id or name of the key.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Make a key useless at once, for running servers too."""
    from polymath.gateway import AuditLog, KeyRecord, KeyRing, Settings, Store

    async def revoked(store: Store, settings: Settings) -> KeyRecord:
        record = await KeyRing(store).revoke(key)
        await AuditLog(store).write(ACTOR, "revoke key", record.id, name=record.name)
        return record

    record = _with_store(config, revoked)
    typer.echo(f"revoked {record.id} ({record.name})")


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _with_store(config: Any, work: Callable[[Any, Any], Coroutine[Any, Any, Result]]) -> Result:
    """What comes of working with the store that a config names."""
    from polymath.gateway import load_config, open_store

    settings = load_config(config).settings

    async def run() -> Result:
        store = open_store(settings)
        try:
            return await work(store, settings)
        finally:
            await store.close()

    return asyncio.run(run())

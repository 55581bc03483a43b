"""`polymath feedback export`: what clients said of answers, as training rows for the router."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from polymath.cli.options import DEFAULT_CONFIG, ConfigOption

__all__ = ["app"]

app = typer.Typer(help="Feedback of clients.", no_args_is_help=True)


@app.callback()
def feedback() -> None:
    """Feedback of clients."""


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Write labelled prompts for `polymath train router --data`."""
    import orjson

    from polymath.errors import DataError
    from polymath.gateway import FeedbackLog, load_config, open_store, training_rows

    settings = load_config(config).settings

    async def kept() -> list[dict[str, Any]]:
        store = open_store(settings)
        try:
            return await FeedbackLog(store).all()
        finally:
            await store.close()

    entries = asyncio.run(kept())
    domains = {expert: domain for domain, expert in reversed(settings.domains().items())}
    rows = list(training_rows(entries, domains))
    try:
        out.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    typer.echo(f"{out}: {len(rows)} rows of {len(entries)} pieces of feedback")

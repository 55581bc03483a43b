"""`polymath serve`."""

from typing import Annotated

import typer

from polymath.cli.options import DEFAULT_CONFIG, ConfigOption

__all__ = ["serve"]


def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Instead of server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of server.port.")] = None,
) -> None:
    """Check the config, prepare the models, then answer requests."""
    from polymath.cli.progress import conversion_progress
    from polymath.gateway import load_config, prepare
    from polymath.gateway import serve as run

    given = {"host": host, "port": port}
    changes: dict[tuple[str, ...], object] = {
        ("server", name): value for name, value in given.items() if value is not None
    }
    file = load_config(config, changes=changes)
    with conversion_progress() as progress:
        prepared = prepare(file, progress)
    run(prepared)

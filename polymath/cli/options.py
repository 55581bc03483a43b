"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["DEFAULT_CONFIG", "AsJson", "ConfigOption", "DataFiles", "ManyFiles"]

DEFAULT_CONFIG = Path("configs/polymath.yaml")

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="POLYMATH_CONFIG", help="The config file.")
]
DataFiles = Annotated[
    list[Path], typer.Option("--data", help="JSONL, CSV or Parquet; may be given several times.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class ManyFiles(TyperCommand):
    """Lets `--data` and `--eval-data` take several files at once, as in `--data *.jsonl`."""

    GREEDY = ("--data", "--eval-data")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further file, which is what click understands."""
        expanded: list[str] = []
        option = ""
        for arg in args:
            if arg.startswith("-"):
                option = ""
            elif option and expanded[-1] != option:
                expanded.append(option)
            if arg in self.GREEDY:
                option = arg
            expanded.append(arg)
        return super().parse_args(ctx, expanded)

"""Progress bars, on standard error so that standard output stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["bars", "conversion_progress"]


def bars() -> Progress:
    """Bars with counts and the time left."""
    import sys

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


@contextmanager
def conversion_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar that appears with the first stage of a conversion, one for each file."""
    progress = bars()
    tasks = {}

    def report(stage: str, done: int, total: int) -> None:
        file = stage.partition(":")[0]
        progress.start()
        if file not in tasks:
            tasks[file] = progress.add_task(stage, total=total)
        progress.update(tasks[file], description=stage, completed=done)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()

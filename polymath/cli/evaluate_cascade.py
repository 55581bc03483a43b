"""`polymath eval cascade`: what a cascade's judge is worth, over all thresholds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polymath.cli.options import DEFAULT_CONFIG, AsJson, ConfigOption, DataFiles

if TYPE_CHECKING:
    from polymath.gateway import ChatService, Settings
    from polymath.proxy import Cascade
    from polymath.training import ChatRow, JudgedAnswer

__all__ = ["eval_cascade"]

MAX_TOKENS = 256
PARALLEL = 8


class MatchBy(StrEnum):
    """When an answer counts as right."""

    exact = "exact"
    contains = "contains"
    number = "number"


def eval_cascade(
    expert: Annotated[str, typer.Option(help="An expert of kind cascade.")],
    data: DataFiles,
    match: Annotated[
        MatchBy, typer.Option(help="The whole reference answer, a part, or the last number.")
    ] = MatchBy.exact,
    max_tokens: Annotated[int, typer.Option(min=1)] = MAX_TOKENS,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for an HTML report.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Accuracy against cost over the threshold, and the area under it against random escalation.

    Rows are conversations (messages) whose last answer is the reference; every question is asked of
    the cheap and of the strong expert.
    """
    from polymath.cli.progress import conversion_progress
    from polymath.gateway import load_config, prepare
    from polymath.training import cascade_curve, read_chats, write_cascade_report

    rows = read_chats(data)[:limit]
    with conversion_progress() as progress:
        prepared = prepare(load_config(config), progress)
    settings = prepared.settings
    chosen = settings.experts.get(expert)
    if chosen is None or chosen.kind != "cascade":
        names = [name for name, other in settings.experts.items() if other.kind == "cascade"]
        raise typer.BadParameter(f"{expert!r} is no cascade; there are: {', '.join(names)}")

    async def judge_all() -> list[JudgedAnswer]:
        from polymath.gateway import open_service

        service = open_service(prepared)
        try:
            return await _judged(service, expert, rows, match.value, max_tokens)
        finally:
            await service.close()

    curve = cascade_curve(asyncio.run(judge_all()))
    if as_json:
        points = [[p.threshold, p.escalated, p.accuracy] for p in curve.points[1:-1]]
        typer.echo(json.dumps({**curve.summary(), "points": points}))
    else:
        for name, value in curve.summary().items():
            typer.echo(f"{name}: {value}")
    if report is not None:
        prices = _prices(settings, expert, max_tokens)
        typer.echo(f"written: {write_cascade_report(report, curve, f'Cascade {expert}', prices)}")


async def _judged(
    service: ChatService, name: str, rows: Sequence[ChatRow], match: Any, max_tokens: int
) -> list[JudgedAnswer]:
    from polymath.proxy import answer_text
    from polymath.training import JudgedAnswer, is_right

    cascade: Cascade = service.cascade(name)
    places = asyncio.Semaphore(PARALLEL)

    async def one(row: ChatRow) -> JudgedAnswer:
        turns = row.conversation()
        body = {"messages": turns[:-1], "temperature": 0, "max_tokens": max_tokens}
        async with places:
            score, cheap = await cascade.scored({"model": name, **body})
            strong = await service.ask(cascade.strong).whole({"model": cascade.strong, **body})
        wanted = turns[-1]["content"]
        return JudgedAnswer(
            score,
            is_right(answer_text(cheap), wanted, match),
            is_right(answer_text(strong), wanted, match),
        )

    return list(await asyncio.gather(*(one(row) for row in rows)))


def _prices(settings: Settings, name: str, max_tokens: int) -> Mapping[str, float]:
    """Dollars for a thousand requests by each expert's output price, at the longest; if known."""
    expert = settings.experts[name]
    prices = {
        kind: settings.experts[str(member)].price
        for kind, member in (("cheap", expert.cheap), ("strong", expert.strong))
        if str(member) in settings.experts
    }
    known = {kind: price for kind, price in prices.items() if price is not None}
    if len(known) < len(("cheap", "strong")):
        return {}
    return {kind: price.output * max_tokens / 1000 for kind, price in known.items()}

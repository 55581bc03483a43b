"""`polymath chat` and `polymath route`: the experts and the router without a server."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer

from polymath.cli.options import DEFAULT_CONFIG, AsJson, ConfigOption

if TYPE_CHECKING:
    from polymath.gateway import ChatService

__all__ = ["chat", "route"]

MAX_TOKENS = 512


def route(
    text: Annotated[str, typer.Argument(help="A prompt.")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Say which expert would answer a prompt, and why."""
    from polymath.gateway import load_config, open_router

    decision = open_router(load_config(config)).route([{"role": "user", "content": text}])
    if as_json:
        typer.echo(json.dumps(decision.to_dict(), ensure_ascii=False))
        return
    typer.echo(
        f"{decision.expert}  (domain {decision.domain}, confidence {decision.confidence:.2f}, "
        f"by {decision.source}, {decision.latency_ms:.1f} ms)"
    )
    if decision.why.rule is not None:
        typer.echo(f"  rule: {decision.why.rule}")
    for domain, share in decision.why.domains.items():
        typer.echo(f"  {share:6.1%}  {domain}")
    if decision.why.out_of_scope:
        typer.echo(f"  {decision.why.out_of_scope:6.1%}  of no domain")
    for near in decision.why.nearest:
        text = " ".join(near.text.split()) or f"({near.id})"
        typer.echo(f"  near {near.similarity:.2f}  [{near.domain}] {text}")


def chat(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; none starts a talk.")] = None,
    model: Annotated[str, typer.Option(help="polymath, an expert or a base model.")] = "polymath",
    max_tokens: Annotated[int, typer.Option(min=1)] = MAX_TOKENS,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Talk to the experts in the terminal; an empty line or Ctrl-D ends the talk."""
    asyncio.run(_chat(config, model, max_tokens, prompt))


async def _chat(config: ConfigOption, model: str, max_tokens: int, prompt: str | None) -> None:
    from polymath.cli.progress import conversion_progress
    from polymath.gateway import load_config, open_service, prepare

    with conversion_progress() as progress:
        prepared = prepare(load_config(config), progress)
    service = open_service(prepared)
    messages: list[dict[str, str]] = []
    try:
        while text := _readable(prompt) if prompt else _question():
            messages.append({"role": "user", "content": text})
            answer = await _answer(service, model, messages, max_tokens)
            messages.append({"role": "assistant", "content": answer})
            if prompt:
                return
    finally:
        await service.close()


def _question() -> str:
    try:
        return _readable(input("> ").strip())
    except EOFError:
        return ""


def _readable(text: str) -> str:
    """The text without the half characters that a terminal of another encoding leaves."""
    return text.encode("utf-8", "replace").decode("utf-8")


async def _answer(
    service: ChatService, model: str, messages: list[dict[str, str]], max_tokens: int
) -> str:
    request = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    decision = await service.decide(request, {})
    events = await service.answering(decision).stream(request)
    typer.secho(f"[{decision.expert}] ", dim=True, nl=False)
    pieces = []
    async for chunk in events:
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            typer.echo(piece, nl=False)
            pieces.append(piece)
    typer.echo()
    return "".join(pieces)

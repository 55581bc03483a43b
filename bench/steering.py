"""Calls to a remote model that one steered token takes: token by token, and in blocks.

The remote model is the general expert (so that M is not M-), steered by the math expert
(proxy-tuning, Liu et al. 2024). It runs in an engine of its own behind HTTP (`scoring_server.py`),
in llama.cpp's server, or it is any upstream that is named. `make bench-steering`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.demo import BASE, load_demo
from bench.gguf_adapter import write_gguf_adapter
from bench.scoring_server import ScoringServer
from bench.servers import llama_server
from polymath.artifacts import package_files
from polymath.experts import Engine, EngineSettings, ExpertSettings, LoraModel, adapters_on
from polymath.gateway import ChatService, Prepared, open_service

LARGE, TUNED = "general", "math"
TOKENS = 64
SUPPORT = 20
PREFIXES = 60_000
DRAFTS: dict[str, int | None] = {
    "token by token": 0,
    "blocks of 4": 4,
    "blocks of 8": 8,
    "blocks, length by what is accepted": None,
}


@dataclass(frozen=True, slots=True)
class Run:
    """All answers of one way."""

    texts: tuple[str, ...]
    calls: int
    tokens: int
    missing: float
    seconds: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llama", type=Path, help="Python with llama-cpp-python[server]")
    parser.add_argument("--upstream", help="URL of a server instead, up to /v1")
    parser.add_argument("--model", default="smollm2", help="what the server calls its model")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    arguments = parser.parse_args()
    lines = (arguments.data / "experts" / "math.gsm8k_test.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines[: arguments.questions]]
    with _upstream(arguments) as url:
        asyncio.run(_measure(url, arguments.model, questions, arguments.temperatures))


@contextmanager
def _upstream(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.upstream:
        yield arguments.upstream
        return
    from transformers import AutoConfig

    demo = load_demo()
    if arguments.llama is None:
        yield from _own_server(demo)
        return
    source = demo.settings.base_models[BASE].model
    gguf = next(file for file in package_files(source) if file.suffix == ".gguf")
    config = AutoConfig.from_pretrained(demo.folders[BASE])
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_gguf_adapter(
            adapters_on(BASE, demo.settings.experts)[LARGE],
            config.num_attention_heads,
            config.num_key_value_heads,
            Path(folder) / f"{LARGE}.gguf",
        )
        with llama_server(
            arguments.llama, gguf, adapter, 2, every_logit=True, one_by_one=True
        ) as url:
            yield f"{url}/v1"


def _own_server(demo: Prepared) -> Iterator[str]:
    settings = EngineSettings(prefix_cache_tokens=PREFIXES)
    adapters = {LARGE: adapters_on(BASE, demo.settings.experts)[LARGE]}
    engine = Engine({BASE: LoraModel(demo.folders[BASE], adapters, settings)}, settings)
    try:
        with ScoringServer(engine, by_id=True, adapter=LARGE).serving() as url:
            yield url
    finally:
        engine.close()


async def _measure(
    url: str, model: str, questions: Sequence[str], temperatures: Sequence[float]
) -> None:
    service = open_service(_with_steering(load_demo(), url, model))
    try:
        for temperature in temperatures:
            print(f"\ntemperature {temperature:g}, {len(questions)} questions\n")
            print("| way | calls a token | tokens | mean mass missing | s a token | same texts |")
            print("|---|---|---|---|---|---|")
            first: Run | None = None
            for place, name in enumerate(DRAFTS):
                run = await _run(service, f"steered-{place}", questions, temperature)
                first = first or run
                same = sum(a == b for a, b in zip(run.texts, first.texts, strict=True))
                print(
                    f"| {name} | {run.calls / run.tokens:.3f} | {run.tokens} "
                    f"| {run.missing:.4f} | {run.seconds / run.tokens:.3f} "
                    f"| {same} of {len(questions)} |",
                    flush=True,
                )
    finally:
        await service.close()


async def _run(
    service: ChatService, expert: str, questions: Sequence[str], temperature: float
) -> Run:
    """One answer after the other, as a client waits for it."""
    started = time.perf_counter()
    texts, calls, tokens, missing = [], 0, 0, 0.0
    for index, question in enumerate(questions):
        body: dict[str, Any] = {
            "model": expert,
            "messages": [{"role": "user", "content": question}],
            "temperature": temperature,
            "seed": index,
            "max_tokens": TOKENS,
        }
        (choice,) = (await service.ask(expert).whole(body))["choices"]
        steering = choice["polymath"]["steering"]
        texts.append(choice["message"]["content"])
        calls += steering["upstream_calls"]
        tokens += steering["tokens"]
        missing += steering["missing_mass"] * steering["tokens"]
    return Run(tuple(texts), calls, tokens, missing / tokens, time.perf_counter() - started)


def _with_steering(demo: Prepared, url: str, model: str) -> Prepared:
    """The demo with the upstream, steered in each way."""
    steered = {"kind": "proxy_tuned", "large": "big", "tuned": TUNED, "untuned": BASE}
    added = {
        "big": {"kind": "upstream", "api_base": url, "model": model},
        **{
            f"steered-{place}": {**steered, "support": SUPPORT, "draft": draft}
            for place, draft in enumerate(DRAFTS.values())
        },
    }
    experts = {name: ExpertSettings.model_validate(values) for name, values in added.items()}
    settings = demo.settings.model_copy(update={"experts": {**demo.settings.experts, **experts}})
    return replace(demo, config=replace(demo.config, settings=settings))


if __name__ == "__main__":
    main()

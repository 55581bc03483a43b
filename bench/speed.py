"""Speed of the engine against transformers + PEFT and the llama.cpp server, in one run.

Ours is asked over HTTP, PEFT in its own process without HTTP, llama.cpp through llama-cpp-python's
server on the GGUF file that our base model comes from, with the same adapters. Every figure is the
median of the ratios of runs that alternate with their peer. `make bench-speed`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.demo import BASE, CONFIG, load_demo
from bench.gguf_adapter import write_gguf_adapter
from bench.peft_peer import PeftPeer
from bench.servers import llama_server, polymath_server, read_stream
from polymath.artifacts import package_files
from polymath.experts import adapters_on, render_chat

MIXED = ("math", "health", "law", "general")
TOKENS = 64
THREADS = 2
REST = 0.5
"""Seconds between two runs."""

QUESTION = "Tell me a long story about a sailor who counts the stars and the fish of the sea."
TURNS = (
    "I want to keep bees in my garden. What do I need to begin, and what does it cost?",
    "How much time does that take in spring, and how much in winter, for two hives?",
    "Which flowers should I plant near the hives so that there is something all year?",
    "My neighbour is afraid of stings. What can I tell him, and what should I do?",
    "And when may I take the first honey?",
)


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    what: str
    ours: str
    peer: str
    ratio: float
    bar: float
    aim: float
    lower_is_better: bool = False

    @property
    def verdict(self) -> str:
        if self.lower_is_better:
            return (
                "aim" if self.ratio <= self.aim else "bar" if self.ratio <= self.bar else "missed"
            )
        return "aim" if self.ratio >= self.aim else "bar" if self.ratio >= self.bar else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", type=Path, help="python of an environment with llama_cpp.server")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(polymath_server(_config(folder / "with.yaml", {})))
        without = {"prefix_cache_tokens": 0}
        fresh = stack.enter_context(polymath_server(_config(folder / "without.yaml", without)))
        results = [
            *_against_peft(url, given.runs, "float32"),
            *_against_peft(url, given.runs, "bfloat16"),
            _ensemble(url, given.runs),
            _next_turn(url, fresh, given.runs),
        ]
        if given.llama:
            results += _against_llama(url, given.llama, folder, given.runs)
    _print(results)


def _config(target: Path, engine: dict[str, Any]) -> Path:
    """The demo's config with an ensemble, under other engine settings."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for expert in config["experts"].values():
        expert["adapter"] = str(CONFIG.parent / expert["adapter"])
    config["router"]["path"] = str(CONFIG.parent / config["router"]["path"])
    for combine in ("logits", "probabilities", "posterior"):
        config["experts"][f"four-{combine}"] = {
            "kind": "ensemble",
            "members": dict.fromkeys(MIXED, 0.25),
            "combine": combine,
        }
    config["engine"] |= engine
    target.write_text(yaml.safe_dump(config), encoding="utf-8")
    return target


def _asked(model: str, text: str = QUESTION) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


def _seconds(url: str, model: str) -> float:
    return read_stream(url, _asked(model)).seconds


def _concurrent(url: str) -> float:
    """Seconds for eight requests over four experts that come at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda model: _seconds(url, model), MIXED * 2))
    return time.perf_counter() - start


def _alternating(
    runs: int, ours: Callable[[], float], peer: Callable[[], float]
) -> tuple[float, float, float]:
    """Medians of ours, of the peer's, and of peer / ours run by run, after one run unseen."""

    def rested(run: Callable[[], float]) -> float:
        time.sleep(REST)  # threads of the other side that still spin would take a core
        return run()

    pairs = [(rested(ours), rested(peer)) for _ in range(runs + 1)][1:]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, theirs, statistics.median(other / one for one, other in pairs)


def _faster(
    what: str, tokens: int, measured: tuple[float, float, float], bar: float, aim: float
) -> Result:
    """Tokens a second of both, from what `_alternating` measured."""
    ours, peer, ratio = measured
    return Result(
        what, f"{tokens / ours:.1f} tokens/s", f"{tokens / peer:.1f} tokens/s", ratio, bar, aim
    )


def _against_peft(url: str, runs: int, dtype: str) -> list[Result]:
    from transformers import AutoTokenizer

    demo = load_demo()
    folder = demo.folders[BASE]
    adapters = adapters_on(BASE, demo.settings.experts)
    peer = PeftPeer(folder, {name: adapters[name] for name in MIXED}, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = render_chat(tokenizer, [{"role": "user", "content": QUESTION}])
    one = _alternating(
        runs, lambda: _seconds(url, "math"), lambda: peer.one("math", prompt, TOKENS)
    )
    eight = _alternating(
        runs,
        lambda: _concurrent(url),
        lambda: peer.mixed(MIXED * 2, [prompt] * 8, TOKENS),
    )
    name = f"transformers + PEFT, {dtype}"
    mixed = f"8 requests over 4 adapters, against {name}, mixed batch"
    return [
        _faster(f"one stream, one adapter, against {name}", TOKENS, one, 3, 5),
        _faster(mixed, 8 * TOKENS, eight, 3, 6),
    ]


def _against_llama(url: str, python: Path, folder: Path, runs: int) -> list[Result]:
    from transformers import AutoConfig

    demo = load_demo()
    model = next(
        file
        for file in package_files(demo.settings.base_models[BASE].model)
        if file.suffix == ".gguf"
    )
    config = AutoConfig.from_pretrained(demo.folders[BASE])
    adapters = adapters_on(BASE, demo.settings.experts)
    with ExitStack() as stack:
        servers = {}
        for name in MIXED:
            file = write_gguf_adapter(
                adapters[name],
                config.num_attention_heads,
                config.num_key_value_heads,
                folder / f"{name}.gguf",
            )
            servers[name] = stack.enter_context(llama_server(python, model, file, THREADS))
        bare = stack.enter_context(llama_server(python, model, None, THREADS))
        base = _alternating(runs, lambda: _seconds(url, BASE), lambda: _llama(bare))
        one = _alternating(runs, lambda: _seconds(url, "math"), lambda: _llama(servers["math"]))
        eight = _alternating(
            runs,
            lambda: _concurrent(url),
            lambda: sum(_llama(servers[name]) for name in MIXED * 2),
        )
    adapted = "one stream, one adapter, against llama.cpp Q4_1 + the adapter"
    mixed = "8 requests over 4 adapters, against llama.cpp (a server each, one request at a time)"
    return [
        _faster("one stream, bare base, against llama.cpp Q4_1", TOKENS, base, 0.5, 1),
        _faster(adapted, TOKENS, one, 0.5, 1),
        _faster(mixed, 8 * TOKENS, eight, 1.5, 3),
    ]


def _llama(url: str) -> float:
    """Seconds for TOKENS tokens, at the speed at which an answer came that may end earlier."""
    body = {**_asked("any"), "logit_bias": {"2": -100}}
    del body["ignore_eos"]
    stream = read_stream(url, body)
    return stream.seconds * TOKENS / len(stream.arrivals)


def _ensemble(url: str, runs: int) -> Result:
    def per_token(model: str) -> float:
        stream = read_stream(url, _asked(model))
        return (stream.seconds - stream.ttft) / (TOKENS - 1)

    four, one, _ = pair = _alternating(
        runs, lambda: per_token("four-logits"), lambda: per_token("math")
    )
    return Result(
        "ensemble of 4 experts, time per token, against one expert",
        f"{1e3 * four:.2f} ms",
        f"{1e3 * one:.2f} ms",
        1 / pair[2],
        1.8,
        1.3,
        lower_is_better=True,
    )


def _next_turn(url: str, fresh: str, runs: int) -> Result:
    """TTFT of the fifth turn, each time of another conversation."""
    found = []
    for run in range(runs + 1):
        messages: list[dict[str, str]] = []
        for turn in TURNS[:-1]:
            messages.append({"role": "user", "content": f"{turn} ({run})"})
            body = {**_asked("general"), "messages": messages, "ignore_eos": False}
            answer = read_stream(url, body).text
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": TURNS[-1]})
        body = {**_asked("general"), "messages": messages, "max_tokens": 4}
        found.append((read_stream(url, body).ttft, read_stream(fresh, body).ttft))
    reused, whole = (statistics.median(column) for column in zip(*found[1:], strict=True))
    return Result(
        "TTFT of turn 5 with prefix reuse, against without",
        f"{1e3 * reused:.0f} ms",
        f"{1e3 * whole:.0f} ms",
        statistics.median(one / other for one, other in found[1:]),
        0.35,
        0.2,
        lower_is_better=True,
    )


def _print(results: list[Result]) -> None:
    print("| what | ours | peer | ratio | bar | aim | |")
    print("|---|---|---|---|---|---|---|")
    for one in results:
        sign = "at most " if one.lower_is_better else ""
        print(
            f"| {one.what} | {one.ours} | {one.peer} | {one.ratio:.2f}x "
            f"| {sign}{one.bar}x | {sign}{one.aim}x | {one.verdict} |"
        )


if __name__ == "__main__":
    main()

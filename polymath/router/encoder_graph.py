"""A BERT sentence encoder as an ONNX graph, in float32 or with int8 weights and activations.

In int8 every linear layer multiplies uint8 activations by int8 weights. Each input channel has a
static scale, found on calibration prompts and folded into the weights (SmoothQuant, Xiao et al.
2023, with all of the difficulty moved to the weights); the weights have a scale for each output.
As no scale depends on what else is in the batch, a text has the same vector alone and in company.

The graph is built from the tensors themselves: neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["BertConfig", "Pooling", "activation_ranges", "encoder_graph"]

Pooling = Literal["mean", "cls"]

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
MICROSOFT = "com.microsoft"
LARGEST_CODE = 127
ZERO_POINT = 128
LEAST_RANGE = 1e-4
"""A channel that never fires must not get a scale of zero."""


class BertConfig(BaseModel):
    """What `config.json` says of a BERT model; other keys are left alone."""

    model_config = ConfigDict(frozen=True)

    model_type: Literal["bert"]
    hidden_act: Literal["gelu"]
    position_embedding_type: Literal["absolute"] = "absolute"
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    layer_norm_eps: float = Field(gt=0)


def encoder_graph(
    config: BertConfig,
    weights: Mapping[str, Floats],
    max_tokens: int,
    pooling: Pooling = "mean",
    ranges: Mapping[str, Floats] | None = None,
) -> Any:
    """The encoder as an ONNX model: `input_ids`, `attention_mask` -> `sentence_embedding`.

    Args:
        weights: BERT's tensors by their Hugging Face names, without a prefix.
        max_tokens: position embeddings that are kept.
        ranges: of the inputs of every linear layer (`activation_ranges`), for int8; without them
            the graph is in float32 and has those inputs as further outputs.
    Raises:
        KeyError: a tensor is missing.
    """
    return _Graph(config, weights, max_tokens, ranges).model(pooling)


def activation_ranges(model: Any, batches: Iterable[Sequence[int]]) -> dict[str, Floats]:
    """The largest absolute value of each input channel of each linear layer.

    Args:
        model: the float32 graph.
        batches: token ids of calibration texts, one text at a time.
    Returns:
        Name of the linear layer -> [inputs].
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()[1:]]
    ranges: dict[str, Floats] = {}
    for ids in batches:
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        for name, values in zip(names, session.run(names, inputs), strict=True):
            largest = np.abs(values).max(axis=(0, 1))
            ranges[name] = np.maximum(ranges.get(name, largest), largest)
    return ranges


class _Graph:
    """Collects nodes; every method adds some and returns the name of its output."""

    def __init__(
        self,
        config: BertConfig,
        weights: Mapping[str, Floats],
        max_tokens: int,
        ranges: Mapping[str, Floats] | None,
    ) -> None:
        self._config = config
        self._weights = weights
        self._max_tokens = max_tokens
        self._ranges = ranges
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._tapped: list[str] = []

    def model(self, pooling: Pooling) -> Any:
        import numpy as np
        from onnx import TensorProto, helper

        width = self._config.hidden_size
        self._constant("qkv.widths", np.array([width] * 3))
        if self._ranges is not None:
            self._constant("one", np.float32(1))
            self._constant("zero_point", np.uint8(ZERO_POINT))
        states = self._embeddings()
        self._node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        for layer in range(self._config.num_hidden_layers):
            states = self._layer(f"encoder.layer.{layer}", states)
        pooled = self._mean(states) if pooling == "mean" else self._first(states)
        self._node("LpNormalization", [pooled], "sentence_embedding", axis=-1, p=2)
        typed = helper.make_tensor_value_info
        inputs = [
            typed(name, TensorProto.INT64, ["batch", "tokens"])
            for name in ("input_ids", "attention_mask")
        ]
        outputs = [typed("sentence_embedding", TensorProto.FLOAT, ["batch", width])]
        outputs += [typed(name, TensorProto.FLOAT, None) for name in self._tapped]
        graph = helper.make_graph(self._nodes, "encoder", inputs, outputs, self._constants)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _embeddings(self) -> str:
        """Word, position and (first) segment embeddings, normalised; word rows are int8."""
        import numpy as np
        from onnx import TensorProto

        name = "embeddings"
        codes, scale = _rounded(self._weights[f"{name}.word_embeddings.weight"])
        positions = self._weights[f"{name}.position_embeddings.weight"][: self._max_tokens]
        segment = self._weights[f"{name}.token_type_embeddings.weight"][0]
        self._constant("words.codes", codes)
        self._constant("words.scale", scale[:, None])
        self._constant("positions", positions + segment)
        self._constant("start", np.array([0]))
        self._node("Gather", ["words.codes", "input_ids"], "words.int8")
        self._node("Cast", ["words.int8"], "words.float", to=TensorProto.FLOAT)
        self._node("Gather", ["words.scale", "input_ids"], "words.factor")
        self._node("Mul", ["words.float", "words.factor"], "words")
        self._node("Shape", ["input_ids"], "length", start=1, end=2)
        self._node("Slice", ["positions", "start", "length", "start"], "places")
        return self._norm(f"{name}.LayerNorm", "words", "places")

    def _layer(self, name: str, states: str) -> str:
        attended = self._dense(f"{name}.attention.output.dense", self._attention(name, states))
        states = self._norm(f"{name}.attention.output.LayerNorm", attended, states)
        inner = self._dense(f"{name}.intermediate.dense", states)
        active = self._node("Gelu", [inner], f"{name}.gelu", domain=MICROSOFT)
        return self._norm(
            f"{name}.output.LayerNorm", self._dense(f"{name}.output.dense", active), states
        )

    def _attention(self, layer: str, states: str) -> str:
        name = f"{layer}.attention.self"
        parts = [f"{name}.{part}" for part in ("query", "key", "value")]
        qkv = self._linear(
            f"{name}.qkv",
            states,
            self._joined([f"{part}.weight" for part in parts]),
            self._joined([f"{part}.bias" for part in parts]),
        )
        self._node("Split", [qkv, "qkv.widths"], parts, axis=-1)
        return self._node(
            "MultiHeadAttention",
            [*parts, "", "mask"],
            name,
            domain=MICROSOFT,
            num_heads=self._config.num_attention_heads,
        )

    def _norm(self, name: str, left: str, right: str) -> str:
        """Layer norm of a sum. (The fused operator of ONNX Runtime is slower than these two.)"""
        for part in ("weight", "bias"):
            self._constant(f"{name}.{part}", self._weights[f"{name}.{part}"])
        self._node("Add", [left, right], f"{name}.sum")
        inputs = [f"{name}.sum", f"{name}.weight", f"{name}.bias"]
        epsilon = self._config.layer_norm_eps
        return self._node("LayerNormalization", inputs, name, epsilon=epsilon, axis=-1)

    def _dense(self, name: str, inputs: str) -> str:
        return self._linear(
            name, inputs, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        )

    def _linear(self, name: str, inputs: str, weight: Floats, bias: Floats) -> str:
        self._constant(f"{name}.bias", bias)
        if self._ranges is None:
            self._constant(f"{name}.weight", weight.T)
            self._node("Identity", [inputs], f"{name}.in")
            self._tapped.append(f"{name}.in")
            product = self._node("MatMul", [f"{name}.in", f"{name}.weight"], f"{name}.product")
            return self._node("Add", [product, f"{name}.bias"], name)
        return self._int8_linear(name, inputs, weight, self._ranges[f"{name}.in"])

    def _int8_linear(self, name: str, inputs: str, weight: Floats, largest: Floats) -> str:
        import numpy as np

        scale = (np.maximum(largest, LEAST_RANGE) / LARGEST_CODE).astype(np.float32)
        codes, output_scale = _rounded(weight * scale)
        self._constant(f"{name}.inverse", (1 / scale).astype(np.float32))
        self._constant(f"{name}.codes", codes.T)
        self._constant(f"{name}.scale", output_scale)
        self._node("Mul", [inputs, f"{name}.inverse"], f"{name}.scaled")
        self._node("QuantizeLinear", [f"{name}.scaled", "one", "zero_point"], f"{name}.uint8")
        operands = [f"{name}.uint8", f"{name}.codes", "one", f"{name}.scale", "zero_point", ""]
        return self._node(
            "MatMulIntegerToFloat", [*operands, f"{name}.bias"], name, domain=MICROSOFT
        )

    def _mean(self, states: str) -> str:
        """The sum over the tokens that are not padding: the mean but for its length."""
        import numpy as np
        from onnx import TensorProto

        self._constant("axes.tokens", np.array([1]))
        self._constant("axes.width", np.array([2]))
        self._node("Cast", ["attention_mask"], "mask.float", to=TensorProto.FLOAT)
        self._node("Unsqueeze", ["mask.float", "axes.width"], "mask.wide")
        self._node("Mul", [states, "mask.wide"], "states.kept")
        return self._node("ReduceSum", ["states.kept", "axes.tokens"], "pooled", keepdims=0)

    def _first(self, states: str) -> str:
        import numpy as np

        self._constant("cls", np.array(0))
        return self._node("Gather", [states, "cls"], "pooled", axis=1)

    def _joined(self, names: Sequence[str]) -> Floats:
        import numpy as np

        return np.concatenate([self._weights[name] for name in names])

    def _node(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any
    ) -> str:
        from onnx import helper

        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0]

    def _constant(self, name: str, values: Any) -> None:
        import numpy as np
        from onnx import numpy_helper

        self._constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))


def _rounded(matrix: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Symmetric int8 with a scale for each row: codes of the matrix' shape, scales [rows]."""
    import numpy as np

    scale = np.maximum(np.abs(matrix).max(axis=1), LEAST_RANGE**2) / LARGEST_CODE
    codes = np.rint(matrix / scale[:, None]).astype(np.int8)
    return codes, scale.astype(np.float32)

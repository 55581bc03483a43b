"""A BERT sentence encoder as an ONNX graph, in float32 or with int8 weights and activations.

In int8 every linear layer multiplies uint8 activations by int8 weights. Each input channel has a
static scale, found on calibration prompts and folded into the weights (SmoothQuant, Xiao et al.
2023, with all of the difficulty moved to the weights); the weights have a scale for each output.
As no scale depends on what else is in the batch, and all texts of a batch are of one length (no
attention has to be masked), a text has the same vectors alone and in company.

The graph is built from the tensors themselves: neither torch nor transformers is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polymath.router.int8 import LARGEST_CODE, rounded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

__all__ = ["OUTPUTS", "BertConfig", "Pooling", "activation_ranges", "encoder_graph"]

Pooling = Literal["mean", "cls"]

OUTPUTS = ("sentence_embedding", "inner_embedding")
"""Unit vectors: of the last layer, and of the layer after two thirds of the way."""

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
MICROSOFT = "com.microsoft"
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
    """The encoder as an ONNX model: `input_ids` [batch, tokens] -> `OUTPUTS`, [batch, width] each.

    Args:
        weights: BERT's tensors by their Hugging Face names, without a prefix.
        max_tokens: position embeddings that are kept.
        pooling: of the last layer; the inner one is always averaged.
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
    names = [output.name for output in session.get_outputs()[len(OUTPUTS) :]]
    ranges: dict[str, Floats] = {}
    for ids in batches:
        found = session.run(names, {"input_ids": np.array([ids])})
        for name, values in zip(names, found, strict=True):
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
        self._constant("axis.tokens", np.array([1]))
        if self._ranges is not None:
            self._constant("one", np.float32(1))
            self._constant("zero_point", np.uint8(ZERO_POINT))
        states = [self._embeddings()]
        for layer in range(self._config.num_hidden_layers):
            states.append(self._layer(f"encoder.layer.{layer}", states[-1]))
        inner = states[_inner_layer(self._config.num_hidden_layers)]
        pool = self._mean if pooling == "mean" else self._first
        pooled = pool(states[-1], "last"), self._mean(inner, "inner")
        for source, name in zip(pooled, OUTPUTS, strict=True):
            self._node("LpNormalization", [source], name, axis=-1, p=2)
        typed = helper.make_tensor_value_info
        inputs = [typed("input_ids", TensorProto.INT64, ["batch", "tokens"])]
        outputs = [typed(name, TensorProto.FLOAT, ["batch", width]) for name in OUTPUTS]
        outputs += [typed(name, TensorProto.FLOAT, None) for name in self._tapped]
        graph = helper.make_graph(self._nodes, "encoder", inputs, outputs, self._constants)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _embeddings(self) -> str:
        """Word, position and (first) segment embeddings, normalised; word rows are int8."""
        import numpy as np
        from onnx import TensorProto

        name = "embeddings"
        words = self._weights[f"{name}.word_embeddings.weight"]
        if words.shape[1] != (width := self._config.hidden_size):
            raise ValueError(f"word embeddings of {words.shape[1]} dimensions, not {width}")
        codes, scale = rounded(words)
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
        attended = self._attention(f"{name}.attention", states)
        states = self._norm(f"{name}.attention.output.LayerNorm", attended, states)
        inner = self._dense(f"{name}.intermediate.dense", states)
        active = self._node("Gelu", [inner], f"{name}.gelu", domain=MICROSOFT)
        return self._norm(
            f"{name}.output.LayerNorm", self._dense(f"{name}.output.dense", active), states
        )

    def _attention(self, name: str, states: str) -> str:
        """Attention is linear in the values, so they carry the scales of the output layer."""
        output = f"{name}.output.dense"
        inputs = self._operand(f"{name}.self.in", states)
        parts = [self._product(f"{name}.self.{part}", inputs) for part in ("query", "key")]
        factor = None if self._ranges is None else self._inverse(f"{output}.in")
        parts.append(self._product(f"{name}.self.value", inputs, factor))
        heads = self._config.num_attention_heads
        mixed = self._node(
            "MultiHeadAttention", parts, f"{name}.self", domain=MICROSOFT, num_heads=heads
        )
        return self._product(output, self._operand(f"{output}.in", mixed, scaled=True))

    def _norm(self, name: str, left: str, right: str) -> str:
        """Layer norm of a sum. (The fused operator of ONNX Runtime is slower than these two.)"""
        for part in ("weight", "bias"):
            self._constant(f"{name}.{part}", self._weights[f"{name}.{part}"])
        self._node("Add", [left, right], f"{name}.sum")
        inputs = [f"{name}.sum", f"{name}.weight", f"{name}.bias"]
        epsilon = self._config.layer_norm_eps
        return self._node("LayerNormalization", inputs, name, epsilon=epsilon, axis=-1)

    def _dense(self, name: str, states: str) -> str:
        return self._product(name, self._operand(f"{name}.in", states))

    def _operand(self, name: str, states: str, scaled: bool = False) -> str:
        """The input of linear layers: as it is, or in uint8 with each channel scaled."""
        if self._ranges is None:
            self._tapped.append(name)
            return self._node("Identity", [states], name)
        if not scaled:
            self._constant(f"{name}.inverse", self._inverse(name))
            states = self._node("Mul", [states, f"{name}.inverse"], f"{name}.scaled")
        return self._node("QuantizeLinear", [states, "one", "zero_point"], name)

    def _product(self, name: str, operand: str, factor: Floats | None = None) -> str:
        """The operand times the weights, plus the bias; in int8 with a factor for each output."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        if self._ranges is None:
            self._constant(f"{name}.bias", bias)
            self._constant(f"{name}.weight", weight.T)
            product = self._node("MatMul", [operand, f"{name}.weight"], f"{name}.product")
            return self._node("Add", [product, f"{name}.bias"], name)
        codes, scale = rounded(weight * self._scale(operand))
        if factor is not None:
            scale, bias = scale * factor, bias * factor
        self._constant(f"{name}.codes", codes.T)
        self._constant(f"{name}.scale", scale)
        self._constant(f"{name}.bias", bias)
        operands = [operand, f"{name}.codes", "one", f"{name}.scale", "zero_point", ""]
        return self._node(
            "MatMulIntegerToFloat", [*operands, f"{name}.bias"], name, domain=MICROSOFT
        )

    def _scale(self, operand: str) -> Floats:
        """Of each channel in uint8 (int8 and an offset), [inputs]."""
        import numpy as np

        assert self._ranges is not None
        scale = np.maximum(self._ranges[operand], LEAST_RANGE) / LARGEST_CODE
        return scale.astype(np.float32)

    def _inverse(self, operand: str) -> Floats:
        import numpy as np

        return np.reciprocal(self._scale(operand))

    def _mean(self, states: str, name: str) -> str:
        return self._node("ReduceMean", [states, "axis.tokens"], name, keepdims=0)

    def _first(self, states: str, name: str) -> str:
        import numpy as np

        self._constant("cls", np.array(0))
        return self._node("Gather", [states, "cls"], name, axis=1)

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, name: str, values: Any) -> None:
        import numpy as np
        from onnx import numpy_helper

        self._constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))


def _inner_layer(layers: int) -> int:
    """The layer, counted from 1, whose states tell prompts apart most widely.

    The last layers of a fine-tuned encoder see little but the domains it was tuned for; two thirds
    of the way up a new domain still has a place of its own.
    """
    return max(1, 2 * layers // 3)

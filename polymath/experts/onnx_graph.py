"""A Llama decoder as an ONNX graph with int8 weights, a KV cache and low-rank updates as inputs.

Weights are quantised in blocks of 64 along the input (`MatMulNBits`, as in Frantar et al. 2022 and
GGUF's Q8 formats); activations are quantised to int8 inside the kernel. The low-rank factors of the
adapters in use come in as inputs, joined side by side, so that the base weights are multiplied once
for rows of different adapters: `y = W x + B (mask * (A x))`, where the mask of a row keeps the
columns of its own adapter (S-LoRA, Sheng et al. 2023, by masking in place of gathering).

A row gets the same bits in any company, and a prompt in any chunks of two tokens or more; a last
bit that differs would be amplified where activations are rounded. For that the low-rank products
are transposed, and tokens come in packs [packs, tokens, width] of at most PACK: so the order in
which ONNX Runtime sums depends neither on how many adapters nor on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from polymath.experts.int8 import BLOCK, quantise
from polymath.experts.lora_weights import Site

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

    Floats = NDArray[np.float32]

__all__ = ["PACK", "graph_sites", "supports", "write_graph"]

INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits that multiplies int8 by int8."""

PACK = 16
"""Tokens of a pack: the widest product whose sums ONNX Runtime (MLAS) does not split otherwise."""

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10
MODEL_TYPES = frozenset({"llama"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose frequencies do not depend on the length of the text."""
ALIGNMENT = 64
LEAST_EXTERNAL = 1024
"""Bytes from which a constant goes to the data file."""


def supports(config: PretrainedConfig) -> bool:
    """Whether the graph computes what this architecture computes."""
    if config.model_type not in MODEL_TYPES or config.attention_bias or config.mlp_bias:
        return False
    widths = (config.hidden_size, config.intermediate_size, _attention_width(config))
    return (
        config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in ROPE_TYPES
        and all(width % BLOCK == 0 for width in widths)
    )


def graph_sites(config: PretrainedConfig) -> tuple[Site, ...]:
    """The four matrix products of every layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = _attention_width(config), config.num_key_value_heads * config.head_dim
    groups: tuple[tuple[str, str, int, dict[str, int]], ...] = (
        ("qkv", "self_attn", hidden, {"q_proj": query, "k_proj": key, "v_proj": key}),
        ("o", "self_attn", query, {"o_proj": hidden}),
        ("gate_up", "mlp", hidden, {"gate_proj": inner, "up_proj": inner}),
        ("down", "mlp", inner, {"down_proj": hidden}),
    )
    return tuple(
        Site(
            name=f"model.layers.{layer}.{group}",
            group=group,
            modules=tuple(f"model.layers.{layer}.{block}.{name}" for name in outputs),
            inputs=inputs,
            outputs=tuple(outputs.values()),
        )
        for layer in range(config.num_hidden_layers)
        for group, block, inputs, outputs in groups
    )


def _attention_width(config: PretrainedConfig) -> int:
    return int(config.num_attention_heads * config.head_dim)


def write_graph(
    config: PretrainedConfig,
    weights: Mapping[str, Floats],
    rotary: tuple[Floats, Floats],
    file: Path,
) -> None:
    """Write the graph and, beside it, its weights (ONNX external data).

    Args:
        weights: the model's own tensors by their Hugging Face names.
        rotary: cosines and sines, [positions, head_dim / 2].
    """
    import onnx

    data = file.with_name(file.name + ".data")
    with data.open("wb") as stream:
        onnx.save(_Graph(config, weights, rotary, stream).model(data.name), str(file))


class _Graph:
    """Collects nodes; every method adds some and returns the name of its output.

    Constants go to `data` as they come, so that a large model is never in memory as a whole.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Mapping[str, Floats],
        rotary: tuple[Floats, Floats],
        data: IO[bytes],
    ) -> None:
        self._config = config
        self._weights = weights
        self._rotary = rotary
        self._data = data
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def model(self, location: str) -> Any:
        """The whole graph; `location` is the name of the data file."""
        from onnx import helper

        self._build()
        for constant in self._constants:
            if constant.external_data:
                constant.external_data.add(key="location", value=location)
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, self._constants
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _build(self) -> None:
        import numpy as np

        config = self._config
        self._input("embeddings", np.float32, ["packs", "tokens", config.hidden_size])
        self._input("row_shape", np.int64, [3])
        self._input("pack_shape", np.int64, [3])
        self._input("last_positions", np.int32, ["rows"])
        self._input("longest", np.int32, [1])
        self._input("wanted", np.int64, ["logits"])
        for name, table in zip(("cosines", "sines"), self._rotary, strict=True):
            self._constant(name, table)
        self._constant("flat", np.array([-1, config.hidden_size], dtype=np.int64))
        sites = graph_sites(config)
        for group in dict.fromkeys(site.group for site in sites):
            self._input(f"mask.{group}", np.float32, [f"rank.{group}", "tokens"])
        stream, change = "embeddings", ""
        for layer in range(config.num_hidden_layers):
            of_layer = [site for site in sites if site.name.startswith(f"model.layers.{layer}.")]
            stream, change = self._layer(layer, of_layer, stream, change)
        _, normed = self._norm("model.norm", stream, change)
        flat = self._node("Reshape", [normed, "flat"], "normed")
        kept = self._node("Gather", [flat, "wanted"], "kept", axis=0)
        tied = "lm_head.weight" not in self._weights
        head = self._weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        self._output(self._product("logits", kept, head), np.float32, ["logits", config.vocab_size])

    def _layer(
        self, layer: int, sites: Sequence[Site], stream: str, change: str
    ) -> tuple[str, str]:
        """One decoder layer: the residual stream and what is to be added to it, in and out."""
        name = f"model.layers.{layer}"
        qkv, out, gate_up, down = (self._adapted(site) for site in sites)
        stream, normed = self._norm(f"{name}.input_layernorm", stream, change)
        attended = self._attention(layer, qkv(normed))
        stream, normed = self._norm(f"{name}.post_attention_layernorm", stream, out(attended))
        return stream, down(self._gated(name, gate_up(normed)))

    def _norm(self, name: str, stream: str, change: str) -> tuple[str, str]:
        """RMS norm of `stream + change`: the sum and its norm."""
        self._constant(f"{name}.weight", self._weights[f"{name}.weight"])
        epsilon = self._config.rms_norm_eps
        if not change:
            attributes = {"epsilon": epsilon, "axis": -1, "stash_type": 1}
            inputs = [stream, f"{name}.weight"]
            return stream, self._node("SimplifiedLayerNormalization", inputs, name, **attributes)
        inputs = [stream, change, f"{name}.weight"]
        self._node(
            "SkipSimplifiedLayerNormalization",
            inputs,
            [name, "", "", f"{name}.sum"],
            domain="com.microsoft",
            epsilon=epsilon,
        )
        return f"{name}.sum", name

    def _adapted(self, site: Site) -> Callable[[str], str]:
        """The site's matrix product with the low-rank update of the adapters in use."""
        import numpy as np

        weight = np.concatenate([self._weights[f"{module}.weight"] for module in site.modules])
        name, rank = site.name, f"rank.{site.group}"

        def apply(inputs: str) -> str:
            self._input(f"{name}.A", np.float32, [rank, site.inputs])
            self._input(f"{name}.B", np.float32, [rank, sum(site.outputs)])
            whole = self._product(f"{name}.base", inputs, weight)
            low = self._matmul(f"{name}.low", f"{name}.A", inputs, transB=1)
            masked = self._node("Mul", [low, f"mask.{site.group}"], f"{name}.masked")
            update = self._matmul(f"{name}.update", masked, f"{name}.B", transA=1)
            return self._node("Add", [whole, update], name)

        return apply

    def _attention(self, layer: int, qkv: str) -> str:
        """Rotary attention of every row over its cache, which grows in place."""
        import numpy as np

        config = self._config
        cache = ["rows", config.num_key_value_heads, "capacity", config.head_dim]
        past = [f"past.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        for name in past:
            self._input(name, np.float32, cache)
        for name in present:
            self._output(name, np.float32, cache)
        name = f"model.layers.{layer}.attention"
        rows = self._node("Reshape", [qkv, "row_shape"], f"{name}.qkv")
        self._node(
            "GroupQueryAttention",
            [rows, "", "", *past, "last_positions", "longest", "cosines", "sines"],
            [f"{name}.rows", *present],
            domain="com.microsoft",
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
        )
        return self._node("Reshape", [f"{name}.rows", "pack_shape"], name)

    def _gated(self, layer: str, gate_up: str) -> str:
        """silu(gate) * up."""
        gate, up = f"{layer}.gate", f"{layer}.up"
        self._node("Split", [gate_up], [gate, up], axis=-1, num_outputs=2)
        swish = self._node("QuickGelu", [gate], f"{layer}.swish", domain="com.microsoft", alpha=1.0)
        return self._node("Mul", [swish, up], f"{layer}.gated")

    def _product(self, name: str, inputs: str, weight: Floats) -> str:
        outputs, width = weight.shape
        names = [f"{name}.{part}" for part in ("codes", "scale", "zero")]
        parts: tuple[NDArray[Any], ...] = quantise(weight)
        for part, values in zip(names, parts, strict=True):
            self._constant(part, values)
        return self._node(
            "MatMulNBits",
            [inputs, *names],
            name,
            domain="com.microsoft",
            K=width,
            N=outputs,
            bits=8,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _matmul(self, name: str, left: str, right: str, **transposed: int) -> str:
        return self._node("FusedMatMul", [left, right], name, domain="com.microsoft", **transposed)

    def _node(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any
    ) -> str:
        from onnx import helper

        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self._nodes.append(helper.make_node(kind, list(inputs), names, names[0], **attributes))
        return names[0]

    def _constant(self, name: str, values: NDArray[Any]) -> None:
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper

        if values.nbytes < LEAST_EXTERNAL:
            self._constants.append(numpy_helper.from_array(values, name))
            return
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="offset", value=str(self._data.tell()))
        tensor.external_data.add(key="length", value=str(values.nbytes))
        self._data.write(np.ascontiguousarray(values).data)
        self._constants.append(tensor)

    def _input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> None:
        self._inputs.append(_typed(name, dtype, shape))

    def _output(self, name: str, dtype: Any, shape: Sequence[int | str]) -> None:
        self._outputs.append(_typed(name, dtype, shape))


def _typed(name: str, dtype: Any, shape: Sequence[int | str]) -> Any:
    import numpy as np
    from onnx import helper

    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )

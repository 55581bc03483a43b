"""The int8 graph: what it rounds, how far, and which architectures it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from polymath.experts.int8 import BLOCK, quantise
from polymath.experts.onnx_graph import graph_sites, supports

Floats = NDArray[np.float32]

LEVELS = 256
HALF = 0.5001
"""Half a step, and what float32 loses in finding it."""


def normal(weight: Floats) -> Floats:
    """Without numbers so small that float32 cannot divide them by 255."""
    return np.where(np.abs(weight) > 1e-20, weight, 0).astype(np.float32)


weights = st.floats(-1000, 1000, width=32)
sparse = arrays(np.float32, (2, 2 * BLOCK), elements=weights).map(normal)
dense = st.integers(0, 10_000).map(
    lambda seed: np.random.default_rng(seed).standard_t(2, (2, 2 * BLOCK)).astype(np.float32)
)
matrices = sparse | dense
levels_of_block = arrays(np.int32, (2, BLOCK), elements=st.integers(0, LEVELS - 1))


def dequantised(
    parts: tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]],
) -> NDArray[np.float64]:
    """scale * (q - zero), in float64 and in the shape of the matrix."""
    codes, scale, zero = parts
    steps = codes.astype(np.float64) - zero[..., None]
    return (scale[..., None].astype(np.float64) * steps).reshape(len(codes), -1)


def llama(**values: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    return LlamaConfig(**{**sizes, **values})


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, **values}}


@given(matrices)
@settings(deadline=None)
def test_a_weight_is_off_by_at_most_half_a_step(weight: Floats) -> None:
    parts = quantise(weight)
    steps = np.repeat(parts[1], BLOCK, axis=1)
    assert (np.abs(weight - dequantised(parts)) <= HALF * steps).all()


@given(matrices)
@settings(deadline=None)
def test_a_zero_stays_a_zero(weight: Floats) -> None:
    weight[:, ::3] = 0
    assert not dequantised(quantise(weight))[:, ::3].any()


@given(matrices)
@settings(deadline=None)
def test_a_block_has_256_steps_from_its_lowest_to_its_highest_or_zero(weight: Floats) -> None:
    _, scale, _ = quantise(weight)
    blocks = weight.reshape(2, 2, BLOCK).astype(np.float64)
    spread = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)
    assert scale == pytest.approx(np.where(spread > 0, spread / (LEVELS - 1), 1), rel=1e-6)


@given(levels_of_block, st.integers(0, LEVELS - 1), st.integers(-12, 6))
@settings(deadline=None)
def test_256_equally_spaced_levels_with_zero_among_them_are_kept_exactly(
    levels: NDArray[np.int32], zero: int, exponent: int
) -> None:
    levels[:, 0], levels[:, 1] = 0, LEVELS - 1
    weight = ((levels - zero) * 2.0**exponent).astype(np.float32)
    codes, scale, zeros = quantise(weight)
    assert np.array_equal(dequantised((codes, scale, zeros)), weight)
    assert np.array_equal(codes[:, 0], levels)
    assert (scale == 2.0**exponent).all()
    assert (zeros == zero).all()


@given(
    st.sampled_from([1, 3, 5, 15, 17, 51, 85]),
    st.data(),
    st.floats(0.125, 1000, width=32),
)
@settings(deadline=None)
def test_fewer_levels_that_divide_the_range_are_kept_as_far_as_float32_goes(
    last: int, data: st.DataObject, step: float
) -> None:
    levels = data.draw(arrays(np.int32, (1, BLOCK), elements=st.integers(0, last)))
    levels[:, 0], levels[:, 1] = 0, last
    weight = ((levels - data.draw(st.integers(0, last))) * step).astype(np.float32)
    assert np.allclose(dequantised(quantise(weight)), weight, rtol=1e-5, atol=1e-6 * step)


@given(weights)
def test_a_constant_block_is_that_constant(value: float) -> None:
    weight = normal(np.full((1, BLOCK), value, dtype=np.float32))
    assert np.allclose(dequantised(quantise(weight)), weight, rtol=1e-6, atol=0)


def test_a_block_of_zeros_divides_by_nothing() -> None:
    codes, scale, zero = quantise(np.zeros((2, 2 * BLOCK), dtype=np.float32))
    assert not codes.any()
    assert not zero.any()
    assert (scale == 1).all()


@given(matrices, st.floats(1, 1e3, width=32))
@settings(deadline=None, max_examples=50)
def test_blocks_do_not_see_each_other(weight: Floats, factor: float) -> None:
    assume(weight[0, :BLOCK].any())
    other = weight.copy()
    other[0, :BLOCK] *= factor
    for before, after in zip(quantise(weight), quantise(other), strict=True):
        assert np.array_equal(before[0, 1], after[0, 1])
        assert np.array_equal(before[1], after[1])


@pytest.mark.parametrize("limit", [1.0, 0.1, 127.0])
def test_the_ends_of_a_symmetric_block_do_not_wrap_around(limit: float) -> None:
    """Zero lies between two codes there, and both ends are rounded away from it."""
    weight = np.linspace(-limit, limit, BLOCK, dtype=np.float32)[None]
    found = dequantised(quantise(weight))
    assert np.abs(found - weight).max() <= HALF * 2 * limit / (LEVELS - 1)


def test_parts_have_the_shapes_and_types_that_the_kernel_takes() -> None:
    codes, scale, zero = quantise(np.ones((3, 4 * BLOCK), dtype=np.float32))
    assert (codes.shape, codes.dtype) == ((3, 4, BLOCK), np.uint8)
    assert (scale.shape, scale.dtype) == ((3, 4), np.float32)
    assert (zero.shape, zero.dtype) == ((3, 4), np.uint8)


def test_the_kernel_multiplies_by_the_same_matrix() -> None:
    """Rows of the identity times W give its columns, as ONNX Runtime reads codes and scales."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(3, 2 * BLOCK)).astype(np.float32)
    parts = quantise(weight)
    names = ["codes", "scale", "zero"]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["y"],
        domain="com.microsoft",
        K=weight.shape[1],
        N=weight.shape[0],
        bits=8,
        block_size=BLOCK,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, weight.shape[0]])],
        [numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=True)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [columns] = session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float32)})
    assert np.allclose(columns.T, dequantised(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"head_dim": 64},
        rope("linear"),
        rope("yarn"),
        rope(
            "llama3",
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ],
    ids=str,
)
def test_a_llama_is_known(values: dict[str, Any]) -> None:
    assert supports(llama(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_size": 96},
        {"intermediate_size": 200},
        {"head_dim": 20},
        {"hidden_act": "gelu"},
        rope("dynamic"),
        rope("longrope", short_factor=[1.0] * 16, long_factor=[1.0] * 16),
    ],
    ids=str,
)
def test_a_llama_that_computes_something_else_is_not_known(values: dict[str, Any]) -> None:
    assert not supports(llama(**values))


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config, GemmaConfig, GPT2Config])
def test_another_architecture_is_not_known(config: type[PretrainedConfig]) -> None:
    assert not supports(config())


@pytest.mark.parametrize("values", [{}, {"head_dim": 64}, {"num_key_value_heads": 4}], ids=str)
def test_the_sites_are_the_matrices_of_the_layers_with_their_shapes(values: dict[str, Any]) -> None:
    import torch

    config = llama(**values)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    sites = graph_sites(config)
    assert len({site.name for site in sites}) == len(sites) == 4 * config.num_hidden_layers
    assert {
        module: (site.inputs, outputs)
        for site in sites
        for module, outputs in zip(site.modules, site.outputs, strict=True)
    } == matrices

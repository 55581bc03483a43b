"""The graph that is built from tensors, against transformers' BertModel on the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file

from polymath.router import halves, head_and_tail, open_tokenizer
from polymath.router.encoder_graph import (
    OUTPUTS,
    BertConfig,
    Pooling,
    activation_ranges,
    encoder_graph,
)
from polymath.router.int8 import rounded
from tests.router.conftest import (
    CALIBRATION,
    TINY_TOKENS,
    TINY_WIDTH,
    Floats,
    cosines,
    lengths,
    transformers_vectors,
    write_tiny_bert,
)

FLOAT_TOLERANCE = 1e-4
COMPANY_TOLERANCE = 1e-6
LEAST_COSINE = 0.999
LEAST_COSINE_UNSEEN = 0.98
LINEARS = 8
"""Of two layers, by their inputs: query-key-value, attention output, intermediate, output."""

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": TINY_WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": TINY_TOKENS,
    "layer_norm_eps": 1e-12,
}

Rows = list[list[int]]

id_rows = st.lists(
    st.lists(st.integers(0, 100), min_size=1, max_size=TINY_TOKENS), min_size=1, max_size=5
)
batches = st.integers(1, TINY_TOKENS).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, 100), min_size=length, max_size=length), min_size=1, max_size=5
    )
)


class Session:
    """A graph that is open."""

    def __init__(self, model: Any) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = {value.name: value.shape for value in self._session.get_outputs()}

    def __call__(self, rows: Rows) -> Floats:
        """Both vectors of each row, one behind the other; each row runs alone."""
        return np.concatenate([self.together([row]) for row in rows])

    def together(self, batch: Rows) -> Floats:
        """The same of rows of one length."""
        vectors = self._session.run(list(OUTPUTS), {"input_ids": np.array(batch)})
        return np.concatenate(vectors, axis=1)


@pytest.fixture(scope="module")
def config(tiny_bert: Path) -> BertConfig:
    return BertConfig.model_validate_json((tiny_bert / "config.json").read_bytes())


@pytest.fixture(scope="module")
def weights(tiny_bert: Path) -> dict[str, Floats]:
    return load_file(tiny_bert / "model.safetensors")


@pytest.fixture(scope="module")
def rows(tiny_bert: Path) -> Rows:
    tokenizer = open_tokenizer(tiny_bert)
    return [head_and_tail(tokenizer.encode(text).ids, TINY_TOKENS) for text in CALIBRATION]


@pytest.fixture(scope="module")
def ranges(config: BertConfig, weights: dict[str, Floats], rows: Rows) -> dict[str, Floats]:
    return activation_ranges(encoder_graph(config, weights, TINY_TOKENS), rows)


@pytest.fixture(scope="module")
def in_float32(config: BertConfig, weights: dict[str, Floats]) -> Session:
    return Session(encoder_graph(config, weights, TINY_TOKENS))


@pytest.fixture(scope="module")
def in_int8(config: BertConfig, weights: dict[str, Floats], ranges: dict[str, Floats]) -> Session:
    return Session(encoder_graph(config, weights, TINY_TOKENS, ranges=ranges))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_float32_graph_is_the_bert_of_transformers(
    config: BertConfig,
    weights: dict[str, Floats],
    tiny_bert: Path,
    rows: Rows,
    pooling: Pooling,
) -> None:
    """By both outputs; the rows of word embeddings of `tiny_bert` are exact in int8."""
    graph = Session(encoder_graph(config, weights, TINY_TOKENS, pooling))
    expected = transformers_vectors(tiny_bert, rows, pooling)
    np.testing.assert_allclose(graph(rows), expected, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize(("layers", "inner"), [(1, 1), (2, 1), (3, 2), (4, 2), (6, 4), (12, 8)])
def test_the_inner_layer_is_two_thirds_of_the_way_up(
    tmp_path: Path, rows: Rows, layers: int, inner: int
) -> None:
    """No layer above it has a say, and the one itself has."""
    folder = write_tiny_bert(tmp_path, layers=layers)
    config = BertConfig.model_validate_json((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    vectors = Session(encoder_graph(config, weights, TINY_TOKENS))(rows)
    np.testing.assert_allclose(vectors, transformers_vectors(folder, rows), atol=FLOAT_TOLERANCE)
    for layer in range(layers):
        changed = dict(weights)
        changed[f"encoder.layer.{layer}.output.dense.bias"] = weights["embeddings.LayerNorm.bias"]
        after = Session(encoder_graph(config, changed, TINY_TOKENS))(rows)
        moved = [np.abs(half).max() > FLOAT_TOLERANCE for half in halves(after - vectors)]
        assert moved == [True, layer < inner]


def test_pooling_is_of_the_last_layer_alone(
    config: BertConfig, weights: dict[str, Floats], rows: Rows
) -> None:
    mean, cls = (
        halves(Session(encoder_graph(config, weights, TINY_TOKENS, pooling))(rows))
        for pooling in get_args(Pooling)
    )
    assert np.abs(mean[0] - cls[0]).max(axis=1).min() > 0.01
    np.testing.assert_array_equal(mean[1], cls[1])


def test_every_parameter_is_used(
    config: BertConfig, weights: dict[str, Floats], in_float32: Session, rows: Rows
) -> None:
    """In the halves that it has a say in; but for the second segment embedding, which a lone text
    never has."""
    random, before = np.random.default_rng(0), in_float32(rows)
    key_bias = "attention.self.key.bias"  # the same for all keys: softmax takes it away
    for name, values in weights.items():
        if name.endswith(key_bias):
            continue
        changed = dict(weights) | {name: values + random.normal(size=values.shape).astype("f4")}
        after = Session(encoder_graph(config, changed, TINY_TOKENS))(rows)
        moved = [np.abs(half).max() > FLOAT_TOLERANCE for half in halves(after - before)]
        assert moved == [True, not name.startswith("encoder.layer.1")], name


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_int8_graph_points_where_the_bert_of_transformers_points(
    config: BertConfig,
    weights: dict[str, Floats],
    ranges: dict[str, Floats],
    tiny_bert: Path,
    rows: Rows,
    pooling: Pooling,
) -> None:
    graph = Session(encoder_graph(config, weights, TINY_TOKENS, pooling, ranges))
    assert cosines(graph(rows), transformers_vectors(tiny_bert, rows, pooling)).min() > LEAST_COSINE


def test_int8_is_near_on_texts_that_nobody_calibrated(
    config: BertConfig, weights: dict[str, Floats], in_float32: Session
) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(0, 100, random.integers(2, 40)).tolist() for _ in range(400)]
    seen, unseen = rows[:300], rows[300:]
    ranges = activation_ranges(encoder_graph(config, weights, TINY_TOKENS), seen)
    graph = Session(encoder_graph(config, weights, TINY_TOKENS, ranges=ranges))
    assert cosines(in_float32(unseen), graph(unseen)).min() > LEAST_COSINE_UNSEEN


@given(batch=batches)
@settings(max_examples=30)
def test_company_does_not_change_a_vector(in_int8: Session, batch: Rows) -> None:
    """No scale depends on what else is in the batch."""
    alone = in_int8(batch)
    np.testing.assert_allclose(in_int8.together(batch), alone, atol=COMPANY_TOLERANCE)


@given(rows=id_rows)
@settings(max_examples=30)
def test_vectors_have_unit_length(in_float32: Session, in_int8: Session, rows: Rows) -> None:
    for graph in (in_float32, in_int8):
        np.testing.assert_allclose(lengths(graph(rows)), 1.0, atol=1e-5)


def test_the_order_of_the_tokens_matters(in_int8: Session) -> None:
    there, back = in_int8([[2, 10, 20, 30, 3]]), in_int8([[2, 30, 20, 10, 3]])
    assert cosines(there, back).max() < 1 - 1e-3


def test_every_linear_layer_is_calibrated(ranges: dict[str, Floats]) -> None:
    widths = sorted(len(values) for values in ranges.values())
    assert widths == [TINY_WIDTH] * 6 + [2 * TINY_WIDTH] * 2
    assert len(ranges) == LINEARS


def test_ranges_are_the_largest_of_all_texts(
    config: BertConfig, weights: dict[str, Floats], ranges: dict[str, Floats], rows: Rows
) -> None:
    model = encoder_graph(config, weights, TINY_TOKENS)
    each = [activation_ranges(model, [row]) for row in rows]
    for name, largest in ranges.items():
        np.testing.assert_array_equal(largest, np.max([one[name] for one in each], axis=0))


def test_only_the_float32_graph_shows_the_inputs_of_its_layers(
    in_float32: Session, in_int8: Session, ranges: dict[str, Floats]
) -> None:
    assert list(in_int8.outputs) == list(OUTPUTS)
    assert list(in_float32.outputs) == [*OUTPUTS, *ranges]


def test_token_ids_are_all_that_goes_in_and_two_vectors_a_row_come_out(
    in_float32: Session, in_int8: Session
) -> None:
    for graph in (in_float32, in_int8):
        assert graph.inputs == ["input_ids"]
        assert [graph.outputs[name] for name in OUTPUTS] == [["batch", TINY_WIDTH]] * 2


def test_a_channel_that_never_fires_is_no_division_by_zero(
    config: BertConfig, weights: dict[str, Floats], ranges: dict[str, Floats], rows: Rows
) -> None:
    silent = {name: np.zeros_like(values) for name, values in ranges.items()}
    vectors = Session(encoder_graph(config, weights, TINY_TOKENS, ranges=silent))(rows)
    assert np.isfinite(vectors).all()


def test_only_so_many_positions_are_kept(
    config: BertConfig, weights: dict[str, Floats], in_float32: Session
) -> None:
    short = Session(encoder_graph(config, weights, 8))
    row = [2, 10, 11, 12, 13, 14, 15, 3]
    np.testing.assert_array_equal(short([row]), in_float32([row]))


def test_positions_that_are_not_kept_are_not_in_the_file(
    config: BertConfig, weights: dict[str, Floats]
) -> None:
    graph = encoder_graph(config, weights, 8).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes["positions"] == [8, TINY_WIDTH]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_no_tensor_is_unused(
    config: BertConfig, weights: dict[str, Floats], ranges: dict[str, Floats], pooling: Pooling
) -> None:
    for some in (None, ranges):
        graph = encoder_graph(config, weights, TINY_TOKENS, pooling, some).graph
        used = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= used


def test_a_graph_in_int8_is_smaller(
    config: BertConfig, weights: dict[str, Floats], ranges: dict[str, Floats]
) -> None:
    exact = encoder_graph(config, weights, TINY_TOKENS).ByteSize()
    assert encoder_graph(config, weights, TINY_TOKENS, ranges=ranges).ByteSize() < exact


def test_a_missing_tensor_is_named(config: BertConfig, weights: dict[str, Floats]) -> None:
    name = "encoder.layer.1.output.dense.weight"
    rest = {key: values for key, values in weights.items() if key != name}
    with pytest.raises(KeyError, match=name):
        encoder_graph(config, rest, TINY_TOKENS)


@given(matrix=st.lists(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), min_size=1))
def test_rounding_is_off_by_at_most_half_a_step(matrix: list[list[float]]) -> None:
    values = np.array(matrix, dtype=np.float32)
    codes, scale = rounded(values)
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    error = np.abs(codes * scale[:, None] - values)
    assert (error <= scale[:, None] / 2 * 1.001 + 1e-12).all()


@given(st.lists(st.integers(-127, 127), min_size=1), st.floats(2**-10, 2**10, width=32))
def test_what_is_on_the_grid_is_not_changed_by_rounding(codes: list[int], scale: float) -> None:
    row = np.array([[127, *codes]], dtype=np.float32) * np.float32(scale)
    found, _ = rounded(row)
    np.testing.assert_array_equal(found, [[127, *codes]])


def test_rows_of_zeros_stay_zeros() -> None:
    codes, scale = rounded(np.zeros((2, 3), dtype=np.float32))
    np.testing.assert_array_equal(codes * scale[:, None], np.zeros((2, 3)))


def test_keys_of_a_config_that_the_graph_does_not_need_are_left_alone() -> None:
    assert BertConfig.model_validate(CONFIG | {"gradient_checkpointing": False}).hidden_size == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("max_position_embeddings", None),
        ("layer_norm_eps", 0),
    ],
)
def test_a_model_that_the_graph_cannot_express_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        BertConfig.model_validate(CONFIG | {key: value})


@pytest.mark.parametrize("key", CONFIG)
def test_a_config_that_lacks_a_key_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        BertConfig.model_validate({name: CONFIG[name] for name in CONFIG if name != key})

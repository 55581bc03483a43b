"""Adapters on disk: what fits is described as PEFT would, what does not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from polymath.errors import AdapterError
from polymath.experts import read_adapter, weight_shapes

QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.norm"
BASE = {f"{QUERY}.weight": (8, 6), f"{DOWN}.weight": (6, 12), f"{NORM}.weight": (6,)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
WEIGHTS = "adapter_model.safetensors"

Tensors = dict[str, np.ndarray]


def factors(module: str, rank: int = 2, inputs: int = 6, outputs: int = 8) -> Tensors:
    return {
        f"base_model.model.{module}.lora_A.weight": np.zeros((rank, inputs), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.zeros((outputs, rank), np.float32),
    }


def write_adapter(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A PEFT folder; without `tensors` it fits `BASE`, without `config` it is as in `CONFIG`."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(factors(QUERY) if tensors is None else tensors, folder / WEIGHTS)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as refused:
        read_adapter(folder, BASE)
    return refused.value.message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "expert")


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 1, "layers.1.self_attn.v_proj": 2}},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 9}},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {".*proj": 1, r".*\.0\..*": 3}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 3}, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 2}},
    ],
    ids=str,
)
def test_ranks_and_scales_are_those_of_peft(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    trained.save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    adapter = read_adapter(tmp_path, weight_shapes(tiny_model))
    assert adapter.scales == pytest.approx({n: m.scaling["default"] for n, m in layers.items()})
    assert adapter.ranks == {name: module.r["default"] for name, module in layers.items()}


def test_an_adapter_that_fits_has_its_rank_and_scale(folder: Path) -> None:
    adapter = read_adapter(folder, BASE)
    assert (adapter.folder, adapter.ranks, adapter.scales) == (folder, {QUERY: 2}, {QUERY: 3.0})


@given(rank=st.integers(1, 6), alpha=st.floats(0.1, 100))
@settings(deadline=None, max_examples=25)
def test_the_scale_is_alpha_over_rank(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, factors(QUERY, rank), r=rank, lora_alpha=alpha)
    assert read_adapter(folder, BASE).scales[QUERY] == pytest.approx(alpha / rank)


def test_the_scale_of_rank_stabilised_lora_is_alpha_over_the_root(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(QUERY, 4), r=4, use_rslora=True)
    assert read_adapter(tmp_path, BASE).scales == {QUERY: 3.0}


def test_a_pattern_sets_alpha_for_its_modules_alone(tmp_path: Path) -> None:
    tensors = {**factors(QUERY), **factors(DOWN, 2, 12, 6)}
    write_adapter(tmp_path, tensors, alpha_pattern={"mlp.down_proj": 1})
    assert read_adapter(tmp_path, BASE).scales == {QUERY: 3.0, DOWN: 0.5}


def test_the_rank_of_an_adapter_is_its_largest(tmp_path: Path) -> None:
    tensors = {**factors(QUERY), **factors(DOWN, 5, 12, 6)}
    write_adapter(tmp_path, tensors, rank_pattern={"down_proj": 5})
    assert read_adapter(tmp_path, BASE).rank == 5


@pytest.mark.parametrize(
    "neutral",
    [
        {"bias": "none", "use_dora": False, "modules_to_save": None},
        {"modules_to_save": [], "layer_replication": None, "megatron_config": None},
        {"alpha_pattern": None, "fan_in_fan_out": False, "lora_bias": False},
        {"use_dora": None, "lora_dropout": 0.1, "inference_mode": True},
    ],
    ids=str,
)
def test_options_that_change_nothing_are_accepted(tmp_path: Path, neutral: dict[str, Any]) -> None:
    assert read_adapter(write_adapter(tmp_path, **neutral), BASE).rank == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_an_option_that_changes_the_arithmetic_is_refused_by_name(
    folder: Path, option: str, value: object
) -> None:
    write_adapter(folder, **{option: value})
    assert refusal(folder) == (
        f"{folder / 'adapter_config.json'}: {option}={value!r} is not supported"
    )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "maths") == f"{tmp_path / 'maths'}: no such adapter folder"


def test_a_file_is_no_adapter_folder(folder: Path) -> None:
    assert refusal(folder / WEIGHTS) == f"{folder / WEIGHTS}: no such adapter folder"


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'adapter_config.json'}: missing")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"{'r': 1}", b"[" * 100_000])
def test_a_config_that_is_not_json_is_named(folder: Path, text: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(text)
    assert refusal(folder).startswith(f"{folder / 'adapter_config.json'}: not JSON (")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"peft_type": "IA3"}'])
def test_only_lora_is_read(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert refusal(folder) == f"{folder / 'adapter_config.json'}: peft_type must be LORA"


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": "big"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"q_proj": "big"}},
    ],
    ids=str,
)
def test_a_config_with_values_of_the_wrong_kind_is_named(
    folder: Path, options: dict[str, Any]
) -> None:
    write_adapter(folder, **options)
    assert refusal(folder).startswith(f"{folder / 'adapter_config.json'}: ")


def test_a_config_that_names_another_rank_than_the_weights_is_refused(folder: Path) -> None:
    """PEFT builds its layers from the config and would fail at loading."""
    write_adapter(folder, r=4)
    assert str(folder) in refusal(folder)


def test_a_rank_of_nothing_is_refused(folder: Path) -> None:
    write_adapter(folder, factors(QUERY, 0), r=0)
    assert refusal(folder).startswith(str(folder))


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == f"{folder / WEIGHTS}: missing"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    message = refusal(folder)
    assert message.startswith(f"{folder / WEIGHTS}: missing; {name} is pickled")
    assert "safe_serialization=True" in message


def test_pickled_weights_beside_safetensors_are_never_opened(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert read_adapter(folder, BASE).rank == 2


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_weights_are_named(folder: Path, kept: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    assert refusal(folder).startswith(f"{folder / WEIGHTS}: corrupt or not safetensors (")


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=50)
def test_random_bytes_are_named(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("adapter"))
    (folder / WEIGHTS).write_bytes(data)
    assert refusal(folder).startswith(f"{folder / WEIGHTS}: ")


def test_weights_without_tensors_are_named(folder: Path) -> None:
    write_adapter(folder, {})
    assert refusal(folder) == f"{folder / WEIGHTS}: holds no LoRA factors"


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        f"base_model.model.{QUERY}.lora_magnitude_vector",
        f"base_model.model.{QUERY}.lora_A.bias",
        f"base_model.model.{QUERY}.lora_A.weight.more",
    ],
)
def test_a_strange_tensor_is_named(folder: Path, name: str) -> None:
    write_adapter(folder, {**factors(QUERY), name: np.zeros((1, 1), np.float32)})
    assert refusal(folder) == f"{folder / WEIGHTS}: tensor {name} is not a LoRA factor"


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(folder: Path, lost: str) -> None:
    write_adapter(folder, {name: t for name, t in factors(QUERY).items() if lost not in name})
    assert refusal(folder) == f"{folder / WEIGHTS}: module {QUERY} lacks lora_A or lora_B"


@pytest.mark.parametrize(
    "wrong",
    [
        factors(QUERY, inputs=7),
        factors(QUERY, outputs=9),
        factors(QUERY) | {f"base_model.model.{QUERY}.lora_B.weight": np.zeros((8, 3), np.float32)},
        factors(QUERY) | {f"base_model.model.{QUERY}.lora_A.weight": np.zeros(6, np.float32)},
    ],
    ids=["inputs", "outputs", "ranks differ", "a vector"],
)
def test_another_shape_means_another_base_model(folder: Path, wrong: Tensors) -> None:
    write_adapter(folder, wrong)
    message = refusal(folder)
    assert message.startswith(f"{folder / WEIGHTS}: module {QUERY} has lora_A ")
    assert message.endswith(
        "but the base model needs [r, 6] and [8, r]; the adapter was made for another base model"
    )


def test_an_unknown_module_means_another_architecture(folder: Path) -> None:
    write_adapter(folder, factors("transformer.h.0.attn.c_attn"), target_modules=["c_attn"])
    assert refusal(folder) == (
        f"{folder / WEIGHTS}: module transformer.h.0.attn.c_attn is no matrix of the base model; "
        "the adapter was made for another architecture"
    )


def test_a_module_that_is_no_matrix_is_refused(folder: Path) -> None:
    write_adapter(folder, factors(NORM, 2, 6, 6))
    assert refusal(folder).startswith(f"{folder / WEIGHTS}: module {NORM} ")


def test_a_module_that_the_config_does_not_target_is_refused(folder: Path) -> None:
    """PEFT would load such an adapter without a word, and without that module."""
    write_adapter(folder, target_modules=["v_proj"])
    assert refusal(folder).endswith("is not among target_modules of adapter_config.json")


@pytest.mark.parametrize("targets", ["all-linear", r".*\.q_proj", ["q_proj"], [QUERY], None])
def test_targets_are_matched_as_in_peft(folder: Path, targets: object) -> None:
    write_adapter(folder, target_modules=targets)
    assert read_adapter(folder, BASE).rank == 2

"""Experts by name: those of the config, and every base model under its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from polymath.errors import AdapterError
from polymath.experts import (
    BaseModelSettings,
    EngineSettings,
    Expert,
    ExpertSettings,
    Row,
    SamplingDefaults,
    build_catalog,
    expert_row,
    load_models,
    read_adapter,
    render_chat,
    weight_shapes,
)

BASES = {"tiny": BaseModelSettings(model="somewhere", description="A small one.")}
HELLO = [{"role": "user", "content": "Hello"}]


def lora(**values: Any) -> ExpertSettings:
    return ExpertSettings.model_validate({"base_model": "tiny", "adapter": "a", **values})


def instructed(**values: Any) -> ExpertSettings:
    return ExpertSettings.model_validate({"base_model": "tiny", "kind": "base", **values})


def test_a_base_model_is_an_expert_under_its_own_name() -> None:
    bare = ExpertSettings(kind="base", base_model="tiny", description="A small one.")
    assert build_catalog(BASES, {}) == {"tiny": Expert("tiny", bare, ())}


def test_experts_come_before_base_models_in_the_order_of_the_config() -> None:
    catalog = build_catalog(BASES, {"math": lora(), "law": lora()})
    assert list(catalog) == ["math", "law", "tiny"]
    assert [expert.name for expert in catalog.values()] == list(catalog)


def test_the_domains_of_an_expert_default_to_its_name() -> None:
    assert build_catalog(BASES, {"math": lora()})["math"].domains == ("math",)


def test_given_domains_replace_the_name() -> None:
    catalog = build_catalog(BASES, {"general": lora(domains=["chat", "science"])})
    assert catalog["general"].domains == ("chat", "science")


def test_a_bare_base_model_answers_no_domain() -> None:
    assert build_catalog(BASES, {"math": lora()})["tiny"].domains == ()


def test_an_expert_brings_its_own_sampling() -> None:
    catalog = build_catalog(BASES, {"math": lora(sampling={"temperature": 0.0})})
    assert catalog["math"].sampling == SamplingDefaults(temperature=0.0)
    assert catalog["tiny"].sampling == SamplingDefaults()


def test_an_adapter_is_held_against_the_weights_on_disk(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    fitting = {
        f"{module}.lora_A.weight": np.zeros((1, 32), np.float32),
        f"{module}.lora_B.weight": np.zeros((32, 1), np.float32),
    }
    save_file(fitting, tmp_path / "adapter_model.safetensors")
    read_adapter(tmp_path, weight_shapes(tiny_model))

    wide = {**fitting, f"{module}.lora_A.weight": np.zeros((1, 64), np.float32)}
    save_file(wide, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="another base model"):
        read_adapter(tmp_path, weight_shapes(tiny_model))


def test_an_expert_renders_its_framed_conversation(tiny_model: Path) -> None:
    examples = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    experts = {"brief": instructed(system_prompt="Be brief.", few_shot=examples)}
    models = load_models({"tiny": tiny_model}, BASES, experts, EngineSettings())
    framed = [{"role": "system", "content": "Be brief."}, *examples, *HELLO]
    expected = tuple(render_chat(models["tiny"].tokenizer, framed))
    catalog = build_catalog(BASES, experts)
    assert expert_row(catalog["brief"], models, HELLO) == Row("tiny", None, expected)


def test_the_row_of_a_base_model_is_the_conversation_as_it_is(tiny_model: Path) -> None:
    models = load_models({"tiny": tiny_model}, BASES, {}, EngineSettings())
    expected = tuple(render_chat(models["tiny"].tokenizer, HELLO))
    bare = build_catalog(BASES, {})["tiny"]
    assert expert_row(bare, models, HELLO) == Row("tiny", None, expected)


@pytest.mark.parametrize(("configured", "length"), [(None, 256), (64, 64)])
def test_the_context_is_that_of_the_model_unless_the_config_is_shorter(
    tiny_model: Path, configured: int | None, length: int
) -> None:
    bases = {"tiny": BaseModelSettings(model="somewhere", max_model_len=configured)}
    models = load_models({"tiny": tiny_model}, bases, {}, EngineSettings())
    assert models["tiny"].context_length == length

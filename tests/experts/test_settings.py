"""The config sections of the experts: defaults, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from polymath.experts import (
    BaseModelSettings,
    EngineSettings,
    ExpertSettings,
    Price,
    SamplingDefaults,
)

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def lora(**values: Any) -> ExpertSettings:
    return ExpertSettings.model_validate({"base_model": "tiny", "adapter": "a", **values})


def reasons(model: type[BaseModel], values: dict[str, Any]) -> list[tuple[str, str]]:
    """Place and message of each problem."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(values)
    return [(".".join(map(str, e["loc"])), e["msg"]) for e in refused.value.errors()]


def test_an_expert_is_an_adapter_unless_it_says_otherwise() -> None:
    expert = lora()
    assert (expert.kind, expert.adapter) == ("lora", Path("a"))


def test_what_an_expert_leaves_open_is_empty() -> None:
    expert = lora()
    assert expert == lora(
        kind="lora",
        description="",
        domains=[],
        system_prompt=None,
        few_shot=[],
        sampling=SamplingDefaults(),
        price=None,
    )


def test_an_expert_of_kind_lora_needs_an_adapter() -> None:
    assert reasons(ExpertSettings, {"base_model": "tiny"}) == [
        ("", "Value error, an expert of kind lora needs `adapter`; or say `kind: base`")
    ]


def test_an_expert_of_kind_base_refuses_an_adapter() -> None:
    assert reasons(ExpertSettings, {"kind": "base", "base_model": "tiny", "adapter": "a"}) == [
        ("", "Value error, an expert of kind base has no `adapter`")
    ]


def test_an_expert_of_kind_base_may_have_instructions() -> None:
    expert = ExpertSettings.model_validate(
        {"kind": "base", "base_model": "tiny", "system_prompt": "Be brief."}
    )
    assert (expert.adapter, expert.system_prompt) == (None, "Be brief.")


@pytest.mark.parametrize("turns", [[], [USER, ASSISTANT], [USER, ASSISTANT] * 3])
def test_examples_alternate(turns: list[dict[str, str]]) -> None:
    assert [turn.model_dump() for turn in lora(few_shot=turns).few_shot] == turns


@pytest.mark.parametrize(
    "turns",
    [[USER], [ASSISTANT, USER], [USER, USER], [USER, ASSISTANT, USER], [USER, USER, ASSISTANT]],
)
def test_examples_that_do_not_alternate_are_refused(turns: list[dict[str, str]]) -> None:
    values = {"base_model": "tiny", "adapter": "a", "few_shot": turns}
    assert reasons(ExpertSettings, values) == [
        ("", "Value error, few_shot must alternate user and assistant and end with assistant")
    ]


def test_a_system_turn_is_no_example() -> None:
    turns = [{"role": "system", "content": "x"}, ASSISTANT]
    values = {"base_model": "tiny", "adapter": "a", "few_shot": turns}
    assert reasons(ExpertSettings, values)[0][0] == "few_shot.0.role"


def test_sampling_defaults_leave_everything_open() -> None:
    given = SamplingDefaults().model_dump()
    assert given.pop("stop") == ()
    assert set(given.values()) == {None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("max_tokens", 0),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("temperature", float("nan")),
    ],
)
def test_sampling_defaults_keep_the_limits_of_openai(name: str, value: object) -> None:
    assert reasons(SamplingDefaults, {name: value})[0][0].startswith(name)


def test_the_engine_has_defaults() -> None:
    engine = EngineSettings()
    assert (engine.device, engine.dtype, engine.threads) == ("auto", "auto", None)
    assert (engine.max_num_seqs, engine.max_waiting, engine.max_tokens) == (8, 64, 512)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_the_engine_takes_the_names_of_devices(device: str) -> None:
    assert EngineSettings(device=device).device == device


@pytest.mark.parametrize(
    "values",
    [
        {"device": "gpu"},
        {"device": "cuda:"},
        {"device": "cpu\n"},
        {"dtype": "int8"},
        {"threads": 0},
        {"max_num_seqs": 0},
        {"max_waiting": -1},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_the_engine_refuses_what_it_cannot_run_on(values: dict[str, Any]) -> None:
    (problem,) = reasons(EngineSettings, values)
    assert [problem[0]] == list(values)


def test_a_base_model_needs_a_source() -> None:
    assert reasons(BaseModelSettings, {}) == [("model", "Field required")]
    assert reasons(BaseModelSettings, {"model": ""})[0][0] == "model"


def test_prices_are_free_and_never_negative() -> None:
    assert Price() == Price(input=0.0, output=0.0)
    assert reasons(Price, {"input": -1})[0][0] == "input"


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (BaseModelSettings, {"model": "m"}),
        (SamplingDefaults, {}),
        (Price, {}),
        (ExpertSettings, {"kind": "base", "base_model": "tiny"}),
        (EngineSettings, {}),
    ],
)
def test_every_section_refuses_an_unknown_key(
    model: type[BaseModel], values: dict[str, Any]
) -> None:
    assert reasons(model, {**values, "tempreature": 1}) == [
        ("tempreature", "Extra inputs are not permitted")
    ]


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        lora().base_model = "other"  # type: ignore[misc]

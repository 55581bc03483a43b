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
PROXY = {"large": "big", "tuned": "math", "untuned": "small"}


def lora(**values: Any) -> ExpertSettings:
    return ExpertSettings.model_validate({"base_model": "tiny", "adapter": "a", **values})


def combined(**values: Any) -> ExpertSettings:
    kind = "ensemble" if "members" in values else "proxy_tuned"
    return ExpertSettings.model_validate({"kind": kind, **values})


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
        ("", "Value error, an expert of kind base has no `adapter`; it belongs to lora")
    ]


def test_an_expert_of_kind_base_may_have_instructions() -> None:
    expert = ExpertSettings.model_validate(
        {"kind": "base", "base_model": "tiny", "system_prompt": "Be brief."}
    )
    assert (expert.adapter, expert.system_prompt) == (None, "Be brief.")


def test_an_ensemble_mixes_probabilities_unless_it_says_otherwise() -> None:
    expert = combined(members={"math": 1, "law": 0.5})
    assert (expert.combine, expert.top_k, expert.floor) == ("probabilities", None, 0.01)
    assert expert.members == {"math": 1.0, "law": 0.5}


@pytest.mark.parametrize(
    ("members", "by_router"), [(["math", "law"], True), ({"math": 1, "law": 2}, False)]
)
def test_listed_members_are_weighed_by_the_router(members: Any, by_router: bool) -> None:
    expert = combined(members=members)
    assert expert.weighs_by_router is by_router
    assert expert.parts() == {"math": "members", "law": "members"}


def test_proxy_tuning_steers_fully_unless_it_says_otherwise() -> None:
    expert = combined(**PROXY)
    assert (expert.alpha, expert.weighs_by_router) == (1.0, False)
    assert expert.parts() == {"big": "large", "math": "tuned", "small": "untuned"}


def test_an_expert_of_one_model_has_no_parts() -> None:
    assert lora().parts() == {}
    assert not lora().weighs_by_router


def test_an_expert_that_combines_others_may_have_sampling_and_domains() -> None:
    expert = combined(**PROXY, domains=["math"], sampling={"temperature": 0})
    assert expert.domains_of("steered") == ("math",)
    assert expert.sampling.temperature == 0


ENSEMBLE = {"kind": "ensemble", "members": ["math"]}
WANTING = [
    ({"kind": "ensemble"}, "needs `members`"),
    ({"kind": "ensemble", "members": None}, "needs `members`"),
    ({"kind": "base"}, "needs `base_model`"),
    ({}, "needs `base_model`"),
    *(
        ({**PROXY, "kind": "proxy_tuned", name: None}, f"needs `{name}`")
        for name in ("large", "tuned", "untuned")
    ),
]


@pytest.mark.parametrize(("values", "reason"), WANTING, ids=str)
def test_a_key_that_a_kind_needs_is_named(values: dict[str, Any], reason: str) -> None:
    kind = values.get("kind", "lora")
    assert reasons(ExpertSettings, values) == [
        ("", f"Value error, an expert of kind {kind} {reason}")
    ]


FOREIGN = [
    ({**ENSEMBLE, "base_model": "tiny"}, "base_model", "lora"),
    ({**ENSEMBLE, "adapter": "a"}, "adapter", "lora"),
    ({**ENSEMBLE, "large": "big"}, "large", "proxy_tuned"),
    ({**ENSEMBLE, "alpha": 0}, "alpha", "proxy_tuned"),
    ({**PROXY, "kind": "proxy_tuned", "members": ["math"]}, "members", "ensemble"),
    ({**PROXY, "kind": "proxy_tuned", "combine": "logits"}, "combine", "ensemble"),
    ({"base_model": "tiny", "adapter": "a", "tuned": "math"}, "tuned", "proxy_tuned"),
    ({"base_model": "tiny", "adapter": "a", "top_k": 40}, "top_k", "ensemble"),
    ({"kind": "base", "base_model": "tiny", "floor": 0.5}, "floor", "ensemble"),
]


@pytest.mark.parametrize(("values", "key", "owner"), FOREIGN, ids=str)
def test_a_key_of_another_kind_is_named_with_that_kind(
    values: dict[str, Any], key: str, owner: str
) -> None:
    """None is left without effect, whatever it may have been meant for."""
    kind = values.get("kind", "lora")
    assert reasons(ExpertSettings, values) == [
        ("", f"Value error, an expert of kind {kind} has no `{key}`; it belongs to {owner}")
    ]


@pytest.mark.parametrize("values", [ENSEMBLE, {**PROXY, "kind": "proxy_tuned"}], ids=str)
@pytest.mark.parametrize(
    ("key", "value"), [("system_prompt", "Be brief."), ("few_shot", [USER, ASSISTANT])]
)
def test_an_expert_that_combines_others_has_no_prompt_of_its_own(
    values: dict[str, Any], key: str, value: object
) -> None:
    ((_, reason),) = reasons(ExpertSettings, {**values, key: value})
    assert reason.endswith(f"has no `{key}`; its experts have their own")


@pytest.mark.parametrize("key", ["top_k", "floor"])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_what_only_a_posterior_has_is_refused_elsewhere(key: str, combine: str) -> None:
    values = {**ENSEMBLE, key: 0.5 if key == "floor" else 1}
    assert ExpertSettings.model_validate({**values, "combine": "posterior"})
    assert reasons(ExpertSettings, {**values, "combine": combine}) == [
        ("", f"Value error, `{key}` goes with `combine: posterior`, and only with it")
    ]


@pytest.mark.parametrize(
    ("weights", "total"), [((0,), "0"), ((0, 0.0), "0"), ((1e308, 1e308), "inf")], ids=str
)
def test_weights_without_a_usable_sum_are_refused(weights: tuple[float, ...], total: str) -> None:
    members = {f"expert{index}": weight for index, weight in enumerate(weights)}
    ((_, reason),) = reasons(ExpertSettings, {"kind": "ensemble", "members": members})
    assert f"the weights of `members` add up to {total}; give at least one" in reason


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "heavy"])
def test_a_weight_is_a_finite_number_that_is_not_negative(weight: object) -> None:
    values = {"kind": "ensemble", "members": {"math": 1, "law": weight}}
    assert reasons(ExpertSettings, values)[0][0].endswith(".law")


def test_settings_survive_being_written_and_read() -> None:
    for expert in (lora(), combined(members={"math": 1}), combined(**PROXY)):
        assert ExpertSettings.model_validate(expert.model_dump()) == expert


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
    assert (engine.device, engine.dtype, engine.backend) == ("auto", "auto", "auto")
    assert engine.threads is None
    assert (engine.max_num_seqs, engine.max_waiting, engine.max_tokens) == (16, 8, 512)
    assert (engine.kv_cache_tokens, engine.prefix_cache_tokens) == (32_768, 16_384)
    assert (engine.prefill_chunk, engine.max_loaded_adapters) == (64, 64)


@pytest.mark.parametrize("backend", ["auto", "onnx", "torch"])
def test_the_engine_takes_the_names_of_backends(backend: str) -> None:
    assert EngineSettings.model_validate({"backend": backend}).backend == backend


def test_the_engine_may_keep_no_prefix() -> None:
    assert EngineSettings(prefix_cache_tokens=0).prefix_cache_tokens == 0


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
        {"backend": "vllm"},
        {"max_num_seqs": 0},
        {"kv_cache_tokens": 15},
        {"prefix_cache_tokens": -1},
        {"prefill_chunk": 7},
        {"max_loaded_adapters": 0},
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

"""How an expert answers: which rows it has, and how they are combined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.errors import ModelNotFound
from polymath.experts import (
    BaseModelSettings,
    Combiner,
    EngineSettings,
    Expert,
    ExpertSettings,
    LoraModel,
    Mixture,
    Plan,
    Posterior,
    ProxyTuning,
    Row,
    Select,
    WeightedLogits,
    build_catalog,
    expert_row,
    load_models,
    plan_answer,
    vocabulary_conflicts,
)

HELLO = [{"role": "user", "content": "Hello"}]
ROUTED = {"math": 0.6, "law": 0.2, "health": 0.2}


def expert(**values: Any) -> ExpertSettings:
    return ExpertSettings.model_validate(values)


def ensemble(members: Any, **values: Any) -> ExpertSettings:
    return expert(kind="ensemble", members=members, **values)


def proxy(**values: Any) -> ExpertSettings:
    parts = {"large": "tiny", "tuned": "math", "untuned": "tiny"}
    return expert(kind="proxy_tuned", **{**parts, **values})


SIMPLE = {
    "math": expert(base_model="tiny", adapter="adapters/math"),
    "law": expert(base_model="tiny", adapter="adapters/law"),
    "brief": expert(kind="base", base_model="tiny", system_prompt="Be brief."),
}


def models_at(**folders: Path) -> dict[str, LoraModel]:
    bases = {name: BaseModelSettings(model="somewhere") for name in folders}
    return load_models(folders, bases, {}, EngineSettings(backend="torch"))


def catalog_with(combined: ExpertSettings, bases: tuple[str, ...] = ("tiny",)) -> dict[str, Expert]:
    """The simple experts, `combined` under the name `all`, and the base models."""
    settings = {name: BaseModelSettings(model="somewhere") for name in bases}
    return build_catalog(settings, {**SIMPLE, "all": combined})


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[str, LoraModel]:
    return models_at(tiny=tiny_model)


Models = Mapping[str, LoraModel]


def plan_of(
    name: str, models: Models, combined: ExpertSettings, weights: Mapping[str, float] = ROUTED
) -> Plan:
    catalog = catalog_with(combined)
    return plan_answer(catalog[name], catalog, models, HELLO, weights)


def combiner_of(
    models: Models, combined: ExpertSettings, weights: Mapping[str, float] = ROUTED
) -> Combiner:
    return plan_of("all", models, combined, weights).combiner


# --- one expert ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["math", "brief", "tiny"])
def test_an_expert_of_one_model_is_its_own_row(models: Models, name: str) -> None:
    catalog = catalog_with(ensemble(["math"]))
    row = expert_row(catalog[name], models, HELLO)
    assert plan_answer(catalog[name], catalog, models, HELLO, ROUTED) == Plan(
        (name,), (row,), Select()
    )


def test_only_an_adapter_makes_a_row_of_an_adapter(models: Models) -> None:
    rows = {
        name: plan_of(name, models, ensemble(["math"])).rows[0]
        for name in ("math", "brief", "tiny")
    }
    assert (rows["math"].adapter, rows["brief"].adapter, rows["tiny"].adapter) == (
        "math",
        None,
        None,
    )


# --- ensembles -----------------------------------------------------------------------------------


def test_the_members_are_the_rows_in_their_order(models: Models) -> None:
    plan = plan_of("all", models, ensemble({"law": 1, "tiny": 1, "math": 1}))
    assert plan.names == ("law", "tiny", "math")
    assert [row.adapter for row in plan.rows] == ["law", None, "math"]


def test_every_member_has_its_own_prompt(models: Models) -> None:
    catalog = catalog_with(ensemble(["math", "brief"]))
    plan = plan_answer(catalog["all"], catalog, models, HELLO, ROUTED)
    assert plan.rows == tuple(
        expert_row(catalog[name], models, HELLO) for name in ("math", "brief")
    )
    assert plan.rows[0].prompt != plan.rows[1].prompt


@pytest.mark.parametrize(
    ("values", "combiner"),
    [
        ({}, Mixture((0.25, 0.75))),
        ({"combine": "probabilities"}, Mixture((0.25, 0.75))),
        ({"combine": "logits"}, WeightedLogits((0.25, 0.75))),
        ({"combine": "posterior"}, Posterior((0.25, 0.75), None, 0.01)),
        (
            {"combine": "posterior", "top_k": 1, "floor": 0.2},
            Posterior((0.25, 0.75), top_k=1, floor=0.2),
        ),
    ],
    ids=["by default", "probabilities", "logits", "posterior", "posterior with limits"],
)
def test_the_way_to_combine_is_that_of_the_config(
    models: Models, values: dict[str, Any], combiner: Combiner
) -> None:
    """The weights are normalised; those of the router do not matter where they are given."""
    assert combiner_of(models, ensemble({"math": 1, "law": 3}, **values)) == combiner


def test_listed_members_share_what_the_router_gives_them(models: Models) -> None:
    """What it gives to others is left out, and the rest adds up to 1 again."""
    weights = {"math": 0.375, "law": 0.125, "health": 0.5}
    assert combiner_of(models, ensemble(["law", "math"]), weights) == Mixture((0.25, 0.75))


def test_a_listed_member_that_the_router_does_not_know_has_no_weight(models: Models) -> None:
    assert combiner_of(models, ensemble(["math", "brief"])) == Mixture((1.0, 0.0))


@pytest.mark.parametrize("weights", [{}, {"health": 1.0}, {"math": 0.0, "law": 0.0}], ids=str)
@pytest.mark.parametrize("combine", ["logits", "probabilities", "posterior"])
def test_members_are_alike_where_the_router_gives_none_of_them_any_weight(
    models: Models, weights: dict[str, float], combine: str
) -> None:
    combiner = combiner_of(models, ensemble(["math", "law"], combine=combine), weights)
    expected = {
        "logits": WeightedLogits((0.5, 0.5)),
        "probabilities": Mixture((0.5, 0.5)),
        "posterior": Posterior((0.5, 0.5)),
    }
    assert combiner == expected[combine]


def test_a_member_that_is_listed_twice_is_one_row(models: Models) -> None:
    plan = plan_of("all", models, ensemble(["math", "math", "law"]))
    assert plan.names == ("math", "law")


@given(
    weights=st.dictionaries(st.sampled_from(["math", "law", "brief", "health"]), st.floats(0, 1))
)
def test_the_shares_of_any_weights_add_up_to_one(models: Models, weights: dict[str, float]) -> None:
    combiner = combiner_of(models, ensemble(["math", "law", "brief"]), weights)
    assert isinstance(combiner, Mixture)
    assert sum(combiner.shares) == pytest.approx(1)
    assert min(combiner.shares) >= 0


# --- proxy-tuning --------------------------------------------------------------------------------


def test_proxy_tuning_has_the_rows_large_tuned_untuned(models: Models) -> None:
    plan = plan_of("all", models, proxy(large="brief", tuned="law", untuned="tiny"))
    assert plan.names == ("brief", "law", "tiny")
    assert [row.adapter for row in plan.rows] == [None, "law", None]
    assert plan.combiner == ProxyTuning(1.0)


@pytest.mark.parametrize("alpha", [0, 0.5, -1.0, 2.0])
def test_alpha_is_that_of_the_config(models: Models, alpha: float) -> None:
    assert combiner_of(models, proxy(alpha=alpha)) == ProxyTuning(alpha)


def test_a_model_that_is_large_and_untuned_has_two_rows(models: Models) -> None:
    plan = plan_of("all", models, proxy())
    assert plan.names == ("tiny", "math", "tiny")
    assert plan.rows[0] == plan.rows[2] == Row("tiny", None, plan.rows[0].prompt)


# --- what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combined",
    [ensemble(["math", "law"]), ensemble({"law": 1}), proxy(tuned="law")],
    ids=["list", "mapping", "proxy"],
)
def test_an_expert_that_is_gone_is_named(models: Models, combined: ExpertSettings) -> None:
    catalog = catalog_with(combined)
    del catalog["law"]
    with pytest.raises(ModelNotFound, match="'law'") as missing:
        plan_answer(catalog["all"], catalog, models, HELLO, ROUTED)
    assert missing.value.param == "model"


# --- vocabularies --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_models(tiny_model: Path, foreign_model: Path) -> dict[str, LoraModel]:
    """Two of one vocabulary and one of another."""
    return models_at(tiny=tiny_model, twin=tiny_model, foreign=foreign_model)


BASES = ("tiny", "twin", "foreign")


def conflicts(catalog: dict[str, Expert], models: Models) -> list[tuple[str, str]]:
    return list(vocabulary_conflicts(catalog, lambda base: models[base].vocabulary))


@pytest.mark.parametrize(
    "combined",
    [ensemble(["tiny", "twin", "math"]), ensemble(["foreign"]), proxy(large="twin")],
    ids=["ensemble", "alone", "proxy"],
)
def test_experts_of_one_vocabulary_can_be_combined(
    three_models: Models, combined: ExpertSettings
) -> None:
    assert conflicts(catalog_with(combined, BASES), three_models) == []


@pytest.mark.parametrize(
    ("combined", "pair"),
    [
        (ensemble(["tiny", "foreign"]), "tiny and foreign"),
        (ensemble({"math": 1, "brief": 1, "foreign": 0}), "tiny and foreign"),
        (proxy(large="foreign"), "foreign and tiny"),
    ],
    ids=["list", "weight 0", "proxy"],
)
def test_experts_of_different_vocabularies_cannot_be_combined(
    three_models: Models, combined: ExpertSettings, pair: str
) -> None:
    """Even of weight 0: a grammar and the sampled token would mean something else to them."""
    assert conflicts(catalog_with(combined, BASES), three_models) == [
        (
            "all",
            f"the base models {pair} have different vocabularies; "
            "only experts that share one can be combined",
        )
    ]


def test_every_expert_that_cannot_be_combined_is_named(three_models: Models) -> None:
    settings = {name: BaseModelSettings(model="somewhere") for name in BASES}
    mixed = {name: ensemble([name, "foreign"]) for name in ("tiny", "twin")}
    catalog = build_catalog(settings, {f"{name}s": each for name, each in mixed.items()})
    assert [name for name, _ in conflicts(catalog, three_models)] == ["tinys", "twins"]

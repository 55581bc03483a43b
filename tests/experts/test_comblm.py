"""CombLM: a learned share of a small model in a large one, from the formula to a served expert."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from torch import Tensor

from polymath.errors import CombinerError
from polymath.experts import (
    COMBINER_CARD,
    COMBINER_GRAPH,
    BaseModelSettings,
    CombinerKind,
    CombinerState,
    CombLM,
    DecodeGroup,
    Engine,
    EngineSettings,
    ExpertSettings,
    LoraModel,
    Mixture,
    Plan,
    SamplingParams,
    Select,
    build_catalog,
    load_models,
    mixing_features,
    open_combiner,
    plan_answer,
)
from polymath.experts.comblm import LEAST, LIKELIEST

KINDS: tuple[CombinerKind, ...] = get_args(CombinerKind)
STATE = CombinerState(torch.zeros(2), torch.zeros(2), 0)
LOGITS = 3 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
HELLO = [{"role": "user", "content": "Hello"}]
CARD = {
    "kind": "constant",
    "large": "big",
    "small": "math",
    "share": 0.25,
    "perplexity": {},
    "tokens": {},
    "data_sha256": "0",
}

logits_of_two = arrays(np.float32, (2, 12), elements=st.floats(-60, 60, width=32)).map(
    torch.from_numpy
)


def comblm(share: float, kind: CombinerKind = "constant") -> CombLM:
    return CombLM(lambda features: share, kind, share)


def combined(combiner: CombLM, logits: Tensor) -> Tensor:
    return combiner(logits, STATE)[0]


def write_card(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMBINER_CARD).write_text(json.dumps({**CARD, **values}), encoding="utf-8")
    return folder


# --- the mixture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_nothing_is_one_of_the_models_exactly(
    kind: CombinerKind, share: float
) -> None:
    found = combined(comblm(share, kind), LOGITS)
    assert torch.equal(found, LOGITS[int(share)].log_softmax(-1))


@given(logits_of_two)
def test_the_mean_is_the_mixture_of_both_in_equal_parts(logits: Tensor) -> None:
    expected = Mixture((0.5, 0.5))(logits, STATE)[0]
    assert torch.allclose(combined(comblm(0.5, "mean"), logits), expected, atol=1e-4)


@given(logits_of_two, st.floats(1e-6, 1 - 1e-6))
def test_any_share_is_the_mixture_of_its_weights(logits: Tensor, share: float) -> None:
    expected = Mixture((1 - share, share))(logits, STATE)[0]
    assert torch.allclose(combined(comblm(share), logits), expected, atol=1e-4)


@given(logits_of_two, st.floats(0, 1), st.sampled_from(KINDS))
def test_it_is_a_distribution(logits: Tensor, share: float, kind: CombinerKind) -> None:
    found = combined(comblm(share, kind), logits)
    assert found.double().exp().sum().item() == pytest.approx(1, abs=1e-4)


@given(logits_of_two, st.floats(0, 1))
def test_a_model_mixed_with_itself_is_that_model(logits: Tensor, share: float) -> None:
    logits[1] = logits[0]
    found = combined(comblm(share), logits)
    assert torch.allclose(found, logits[0].log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_lies_outside_a_support_does_no_harm(kind: CombinerKind, share: float) -> None:
    """An upstream tells its likeliest tokens alone; the others are minus infinity."""
    seen: list[Tensor] = []

    def noted(features: Tensor) -> float:
        seen.append(features)
        return share

    logits = LOGITS.clone()
    logits[0, 5:] = -math.inf
    found = combined(CombLM(noted, kind, share), logits)
    assert seen[0].isfinite().all()
    assert not found.isnan().any()
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert (found[5:] == -math.inf).all() == (share == 0.0)


def test_what_both_exclude_is_excluded() -> None:
    logits = LOGITS.clone()
    logits[:, 7] = -math.inf
    assert combined(comblm(0.4), logits)[7] == -math.inf


def test_it_leaves_the_state_and_the_logits_alone() -> None:
    before = LOGITS.clone()
    assert comblm(0.4, "full")(LOGITS, STATE)[1] is STATE
    assert torch.equal(LOGITS, before)


@given(st.floats(0, 1))
def test_the_weights_are_the_typical_shares(share: float) -> None:
    assert comblm(share).weights(STATE) == (1 - share, share)


# --- what a share may depend on -------------------------------------------------------------------


def features_of(kind: CombinerKind, logits: Tensor) -> Tensor:
    return mixing_features(kind, logits.log_softmax(-1))


@pytest.mark.parametrize(
    ("kind", "size"), [("mean", 0), ("constant", 0), ("entropy", 4), ("full", 6 + 2 * LIKELIEST)]
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 5)], ids=str)
def test_each_kind_has_so_many_features(
    kind: CombinerKind, size: int, shape: tuple[int, ...]
) -> None:
    assert features_of(kind, torch.randn(2, *shape, 40)).shape == (*shape, size)


@pytest.mark.parametrize("kind", ["entropy", "full"])
def test_the_features_of_many_tokens_are_those_of_each(kind: CombinerKind) -> None:
    """What a network was fitted on is what it is asked with, a token at a time."""
    many = torch.randn(2, 9, 40)
    alone = torch.stack([features_of(kind, many[:, place]) for place in range(9)])
    assert torch.allclose(features_of(kind, many), alone, atol=1e-6)


@given(logits_of_two)
def test_entropies_and_certainties_come_first(logits: Tensor) -> None:
    """p log p in float64; a token of less than e^-30 adds nothing that float32 keeps."""
    log_probs = logits.double().log_softmax(-1)
    expected = [*-(log_probs.exp() * log_probs).sum(-1), *log_probs.max(-1).values]
    for kind in ("entropy", "full"):
        found = features_of(kind, logits)[:4].tolist()
        assert found == pytest.approx([float(value) for value in expected], abs=1e-4)


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary() -> None:
    found = features_of("entropy", torch.stack([torch.zeros(40), LOGITS[1]]))
    assert found[0].item() == pytest.approx(math.log(40))
    assert found[2].item() == pytest.approx(-math.log(40))


def test_the_likeliest_of_each_model_come_in_order() -> None:
    log_probs = LOGITS.log_softmax(-1)
    found = features_of("full", LOGITS)[4 : 4 + 2 * LIKELIEST]
    expected = log_probs.sort(-1, descending=True).values[:, :LIKELIEST].flatten()
    assert torch.equal(found, expected)


def test_each_model_says_what_it_thinks_of_the_first_choice_of_the_other() -> None:
    log_probs = LOGITS.log_softmax(-1)
    first, second = log_probs.argmax(-1)
    assert features_of("full", LOGITS)[-2:].tolist() == [log_probs[1, first], log_probs[0, second]]


def test_a_token_that_is_impossible_is_told_as_the_least() -> None:
    logits = LOGITS.clone()
    logits[0, 1:] = -math.inf
    logits[1, 0] = -math.inf
    found = features_of("full", logits)
    assert found[-2:].tolist() == [LEAST, LEAST]
    assert found[5] == LEAST


# --- its folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_constant_is_read_from_its_folder(tmp_path: Path, share: float) -> None:
    opened = open_combiner(write_card(tmp_path, share=share))
    assert torch.equal(combined(opened, LOGITS), combined(comblm(share), LOGITS))
    assert opened.weights(STATE) == (1 - share, share)


def no_folder(folder: Path) -> Path:
    return folder / "none" / COMBINER_CARD


def cut_card(folder: Path) -> Path:
    file = write_card(folder) / COMBINER_CARD
    file.write_text(file.read_text()[:-9])
    return file


def binary_card(folder: Path) -> Path:
    file = folder / COMBINER_CARD
    file.write_bytes(b"\xff\xfe")
    return file


def missing_graph(folder: Path) -> Path:
    return write_card(folder, kind="entropy", share=None) / COMBINER_GRAPH


def unfit_card(**values: Any) -> Callable[[Path], Path]:
    return lambda folder: write_card(folder, **values) / COMBINER_CARD


@pytest.mark.parametrize(
    "damaged",
    [
        no_folder,
        cut_card,
        binary_card,
        missing_graph,
        unfit_card(share=1.5),
        unfit_card(share=math.nan),
        unfit_card(kind="median"),
        unfit_card(format=2),
        unfit_card(colour="blue"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_mend(
    tmp_path: Path, damaged: Callable[[Path], Path]
) -> None:
    file = damaged(tmp_path)
    with pytest.raises(CombinerError) as refused:
        open_combiner(file.parent)
    assert str(refused.value).startswith(f"{file} ")
    assert str(refused.value).endswith("; train the combiner again")


def test_a_graph_that_cannot_be_used_is_named_with_the_mend(tmp_path: Path) -> None:
    missing_graph(tmp_path).write_bytes(b"no graph")
    with pytest.raises(CombinerError) as refused:
        open_combiner(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert COMBINER_GRAPH in str(refused.value)
    assert "train the combiner again" in str(refused.value)


# --- the config -----------------------------------------------------------------------------------


def ensemble(**values: Any) -> ExpertSettings:
    return ExpertSettings.model_validate({"kind": "ensemble", **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"members": ["a", "b"], "combine": "comblm"}, "`combiner` goes with `combine: comblm`"),
        ({"members": ["a", "b"], "combiner": "c"}, "`combiner` goes with `combine: comblm`"),
        (
            {"members": ["a", "b"], "combine": "posterior", "combiner": "c"},
            "`combiner` goes with `combine: comblm`",
        ),
        *(
            ({"members": members, "combine": "comblm", "combiner": "c"}, "[LARGE, SMALL]")
            for members in ({"a": 1, "b": 1}, ["a"], ["a", "b", "c"])
        ),
        (
            {"members": ["a", "b"], "combine": "comblm", "combiner": "c", "top_k": 1},
            "`top_k` goes with `combine: posterior`",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ensemble(**values)
    assert reason in str(refused.value)


def test_the_router_does_not_weigh_what_is_learned() -> None:
    learned = ensemble(members=["a", "b"], combine="comblm", combiner="c")
    assert not learned.weighs_by_router
    assert ensemble(members=["a", "b"]).weighs_by_router


# --- an expert ------------------------------------------------------------------------------------

SETTINGS = EngineSettings(backend="torch")


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[str, LoraModel]:
    bases = {"tiny": BaseModelSettings(model="somewhere")}
    return load_models({"tiny": tiny_model}, bases, {}, SETTINGS)


def plan_of(models: Mapping[str, LoraModel], folder: Path) -> Plan:
    """The ensemble of two experts of the tiny model under different instructions."""
    experts = {
        name: ExpertSettings.model_validate(
            {"kind": "base", "base_model": "tiny", "system_prompt": name}
        )
        for name in ("small", "large")
    }
    experts["all"] = ensemble(members=["large", "small"], combine="comblm", combiner=folder)
    catalog = build_catalog({"tiny": BaseModelSettings(model="somewhere")}, experts)
    return plan_answer(catalog["all"], catalog, models, HELLO, {"small": 1.0})


def test_the_rows_are_large_and_small_whatever_the_router_thinks(
    models: dict[str, LoraModel], tmp_path: Path
) -> None:
    plan = plan_of(models, write_card(tmp_path))
    assert plan.names == ("large", "small")
    assert plan.remote is None
    decoded = [models["tiny"].tokenizer.decode(row.prompt) for row in plan.rows]
    assert ["large" in text for text in decoded] == [True, False]


@pytest.mark.parametrize(("share", "part"), [(0.0, 0), (1.0, 1)])
async def test_an_answer_of_one_part_alone_is_that_of_the_part(
    models: dict[str, LoraModel], tmp_path: Path, share: float, part: int
) -> None:
    plan = plan_of(models, write_card(tmp_path, share=share))
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, top_logprobs=2)
    engine = Engine(models, SETTINGS)
    try:
        both, alone = engine.submit(
            [
                DecodeGroup(plan.rows, plan.combiner, sampling),
                DecodeGroup(plan.rows[part : part + 1], Select(), sampling),
            ]
        )
        found = [chunk.token.id async for chunk in both if chunk.token]
        assert found == [chunk.token.id async for chunk in alone if chunk.token]
    finally:
        engine.close()
    assert len(found) == 12

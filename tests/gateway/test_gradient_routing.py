"""A config whose router goes by gradients: from its folder to the answer of several experts."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from polymath.errors import ConfigError
from polymath.experts import encode_prompt, open_features
from polymath.gateway import Prepared, load_config, open_router, prepare
from polymath.gateway.app import Gateway, create_app
from polymath.router import (
    ClusterArtifact,
    ClusterCard,
    ClusterPolicy,
    RouteDecision,
    RouterArtifact,
    RouterCard,
    SentenceEncoder,
    cluster_weights,
    export_encoder,
    halves,
)
from tests.conftest import write_random_adapter
from tests.gateway.asking import user
from tests.router.conftest import CALIBRATION, TINY_TOKENS, write_tiny_bert

TEXTS = ("What is the law?", "sort a list", "2 + 2 = ?")
"""The middle of each cluster."""

LABELS = tuple(f"cluster-{index}" for index in range(len(TEXTS)))
DIMENSIONS = 256
SEED = 5
MAX_LENGTH = 128
SHARPNESS = 50.0
FLOAT32_ERROR = 1e-4

CONFIG = """\
base_models:
  tiny: {model: TINY}
experts:
  everything: {base_model: tiny, adapter: clusters/base}
  cluster-0: {base_model: tiny, adapter: clusters/expert-0}
  cluster-1: {base_model: tiny, adapter: clusters/expert-1}
  cluster-2: {base_model: tiny, adapter: clusters/expert-2}
  plain: {kind: base, base_model: tiny}
  lawyer: {kind: base, base_model: tiny, domains: [law], system_prompt: Cite a statute.}
  halves-0: {kind: ensemble, combine: logits, members: {everything: 1, cluster-0: 1}}
  halves-1: {kind: ensemble, combine: logits, members: {everything: 1, cluster-1: 1}}
  halves-2: {kind: ensemble, combine: logits, members: {everything: 1, cluster-2: 1}}
router:
  kind: gradient
  path: clusters
  fallback: everything
engine: {backend: torch, dtype: float32, prefix_cache_tokens: 0}
"""
NEAREST = ("top_k: 1", "temperature: 1.0e-9")

Floats = NDArray[np.floating[Any]]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with its clusters, as `polymath train clusters` would leave them."""
    root = tmp_path_factory.mktemp("made")
    clusters = root / "clusters"
    for seed, name in enumerate(("base", *(f"expert-{index}" for index in range(len(TEXTS))))):
        write_random_adapter(clusters / name, tiny_model, seed)
    weights = (clusters / "base" / "adapter_model.safetensors").read_bytes()
    card = ClusterCard(
        base_model=str(tiny_model),
        base_sha256=hashlib.sha256(weights).hexdigest(),
        dimensions=DIMENSIONS,
        projection_seed=SEED,
        layers=1,
        max_length=MAX_LENGTH,
        algorithm="birch",
        sizes=(1,) * len(TEXTS),
        similarity=(1.0,) * len(TEXTS),
        data_sha256="",
    )
    gradients = gradients_of(tiny_model, clusters / "base", [[user(text)] for text in TEXTS])
    ClusterArtifact(card, gradients).save(clusters)
    bert = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    write_text_router(bert, clusters / "distilled", LABELS)
    write_text_router(bert, root / "router", ("law", *LABELS[1:]))
    (root / "polymath.yaml").write_text(CONFIG.replace("TINY", str(tiny_model)))
    return root / "polymath.yaml"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The config and its folders, free to be damaged."""
    return Path(shutil.copytree(made.parent, tmp_path / "copy")) / made.name


def gradients_of(
    model: Path, adapter: Path, conversations: Sequence[Sequence[dict[str, str]]]
) -> NDArray[np.float32]:
    features, tokenizer = open_features(model, adapter, DIMENSIONS, SEED, layers=1)
    prompts = [encode_prompt(tokenizer, turns, MAX_LENGTH) for turns in conversations]
    return np.concatenate([features.of([prompt]) for prompt in prompts])


def write_text_router(bert: Path, folder: Path, labels: Sequence[str]) -> None:
    """A router folder that knows each of the texts by its words, as one of the labels."""
    export_encoder(bert, folder, CALIBRATION)
    read, likeness = halves(SentenceEncoder(folder, max_tokens=TINY_TOKENS).encode(list(TEXTS)))
    read = read - read.mean(axis=0)
    RouterArtifact(
        card=RouterCard(
            encoder="tiny",
            max_tokens=TINY_TOKENS,
            labels=tuple(labels),
            temperature=1.0,
            data_sha256="",
            rows={},
            metrics={},
        ),
        weight=SHARPNESS * read,
        bias=np.zeros(len(labels), dtype=np.float32),
        vectors=likeness[:0],
    ).save(folder)


def rewrite(file: Path, *changes: tuple[str, str]) -> Path:
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    file.write_text(text)
    return file


def with_router(file: Path, *keys: str) -> Path:
    """The config with more keys in its router section."""
    lines = "".join(f"  {key}\n" for key in keys)
    return rewrite(file, ("  kind: gradient\n", f"  kind: gradient\n{lines}"))


def as_hybrid(file: Path, *keys: str) -> Path:
    rewrite(file, ("kind: gradient", "kind: hybrid"), ("path: clusters", "path: router"))
    lines = "".join(f"  {key}\n" for key in ("clusters: clusters", *keys))
    return rewrite(file, ("  path: router\n", f"  path: router\n{lines}"))


def decision_of(file: Path, text: str, headers: dict[str, str] | None = None) -> RouteDecision:
    return open_router(load_config(file, environ={})).route([user(text)], headers)


def problems(file: Path) -> list[str]:
    """Keys of a config and what is wrong with them; the lines that are named must be theirs."""
    with pytest.raises(ConfigError) as refused:
        prepare(load_config(file, environ={}))
    return [_problem(file, line) for line in refused.value.problems]


def problem(file: Path) -> str:
    (only,) = problems(file)
    return only


def _problem(file: Path, line: str) -> str:
    assert "\n" not in line
    place, key, reason = line.split(": ", 2)
    path, _, number = place.rpartition(":")
    assert path == str(file)
    named = file.read_text().splitlines()[int(number) - 1]
    assert f"{key.rpartition('.')[2]}:" in named
    return f"{key}: {reason}"


# --- the decision --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(made: Path) -> Prepared:
    return prepare(load_config(made, environ={}))


@pytest.mark.parametrize("text", [*TEXTS, "", "Is it theft?", "x" * 1000, "<|im_end|>"])
def test_a_prompt_is_routed_by_its_gradient(
    prepared: Prepared, made: Path, tiny_model: Path, text: str
) -> None:
    """By the definition: features, cosines with the centroids, softmax, base and the two best."""
    clusters = made.parent / "clusters"
    gradients = gradients_of(tiny_model, clusters / "base", [[user(text)]])
    shares = cluster_weights(gradients, ClusterArtifact.load(clusters).centroids)[0]
    weights = dict(zip(LABELS, shares.tolist(), strict=True))
    expected = ClusterPolicy("everything", {label: label for label in LABELS}).choose(weights)
    decision = prepared.router.route([user(text)])
    assert decision.weights == pytest.approx(expected, abs=FLOAT32_ERROR)
    assert decision.why.domains == pytest.approx(weights, abs=FLOAT32_ERROR)
    assert (decision.source, decision.combine) == ("gradient", "logits")


@pytest.mark.parametrize(("label", "text"), zip(LABELS, TEXTS, strict=True))
def test_the_middle_of_a_cluster_is_of_that_cluster(
    prepared: Prepared, label: str, text: str
) -> None:
    decision = prepared.router.route([user(text)])
    assert decision.domain == label
    assert decision.weights["everything"] == pytest.approx(0.5)
    assert list(decision.weights)[:2] == ["everything", label]


def test_routing_twice_decides_the_same(prepared: Prepared) -> None:
    first, second = (prepared.router.route([user("Is it theft?")]).to_dict() for _ in range(2))
    assert first | {"latency_ms": 0} == second | {"latency_ms": 0}


def test_a_conversation_without_a_user_turn_is_routed(prepared: Prepared) -> None:
    decision = prepared.router.route([{"role": "system", "content": "Be brief."}])
    assert sum(decision.weights.values()) == pytest.approx(1.0)


def test_the_keys_of_the_router_have_their_effect(copy: Path) -> None:
    with_router(copy, *NEAREST, "base_weight: 3")
    assert decision_of(copy, TEXTS[1]).weights == {"everything": 0.75, "cluster-1": 0.25}


def test_without_the_weight_of_the_base_an_expert_answers_alone(copy: Path) -> None:
    with_router(copy, *NEAREST, "base_weight: 0")
    assert decision_of(copy, TEXTS[1]).weights == {"cluster-1": 1.0}


def test_a_cluster_without_an_expert_is_left_to_the_base(copy: Path) -> None:
    with_router(copy, *NEAREST)
    rewrite(copy, ("clusters/expert-1}", "clusters/expert-1, domains: [nothing]}"))
    assert decision_of(copy, TEXTS[1]).weights == {"everything": 1.0}
    assert decision_of(copy, TEXTS[2]).weights == {"everything": 0.5, "cluster-2": 0.5}


def test_rules_stand_before_the_gradient(copy: Path) -> None:
    with_router(copy, "rules: [{name: team, expert: plain, header: {X-Team: arts}}]")
    decision = decision_of(copy, TEXTS[1], {"x-team": "arts"})
    assert (decision.expert, decision.source, decision.why.rule) == ("plain", "rule", "team")
    assert decision_of(copy, TEXTS[1]).source == "gradient"


# --- the answer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Loaded, with a router by which half of an answer is the base's, half the nearest expert's."""
    folder = shutil.copytree(made.parent, tmp_path_factory.mktemp("served") / "config")
    file = with_router(Path(folder) / made.name, *NEAREST)
    loaded = Gateway(prepare(load_config(file, environ={})))
    asyncio.run(loaded.load())
    yield loaded
    asyncio.run(loaded.close())


def post(gateway: Gateway, path: str, **body: Any) -> httpx.Response:
    async def posted() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    answer = asyncio.run(posted())
    assert answer.status_code == 200, answer.text
    return answer


def chat(gateway: Gateway, text: str, model: str = "polymath", **given: Any) -> dict[str, Any]:
    body = {"messages": [user(text)], "temperature": 0, "max_tokens": 8, "logprobs": True, **given}
    answer: dict[str, Any] = post(gateway, "/v1/chat/completions", model=model, **body).json()
    return answer


def scored(answer: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
    """The tokens of an answer, as bytes, and their log-probabilities."""
    tokens = answer["choices"][0]["logprobs"]["content"]
    return [token["bytes"] for token in tokens], [token["logprob"] for token in tokens]


@pytest.mark.parametrize("cluster", range(len(TEXTS)))
def test_the_answer_is_that_of_the_ensemble_of_the_same_weights(
    gateway: Gateway, cluster: int
) -> None:
    routed = chat(gateway, TEXTS[cluster])
    configured = chat(gateway, TEXTS[cluster], model=f"halves-{cluster}")
    assert routed["choices"] == configured["choices"]


@pytest.mark.parametrize("cluster", range(len(TEXTS)))
def test_the_answer_is_that_of_neither_expert_alone(gateway: Gateway, cluster: int) -> None:
    _, routed = scored(chat(gateway, TEXTS[cluster]))
    for model in ("everything", LABELS[cluster]):
        assert scored(chat(gateway, TEXTS[cluster], model=model))[1] != pytest.approx(routed)


def test_the_body_says_who_answered_and_why(gateway: Gateway) -> None:
    answer = chat(gateway, TEXTS[1])
    decision = answer["polymath"]
    assert (decision["source"], decision["combine"]) == ("gradient", "logits")
    assert (decision["domain"], decision["confidence"]) == ("cluster-1", 1.0)
    assert decision["weights"] == {"everything": 0.5, "cluster-1": 0.5}
    assert decision["why"]["domains"] == {"cluster-1": 1.0, "cluster-0": 0.0, "cluster-2": 0.0}
    assert answer["model"] == decision["expert"] == "everything"


def test_the_headers_say_it_too(gateway: Gateway) -> None:
    body = {"messages": [user(TEXTS[1])], "max_tokens": 1}
    headers = post(gateway, "/v1/chat/completions", model="polymath", **body).headers
    assert headers["x-polymath-source"] == "gradient"
    assert headers["x-polymath-expert"] == "everything"
    assert headers["x-polymath-domain"] == "cluster-1"


def test_every_token_has_the_weights_of_the_decision(gateway: Gateway) -> None:
    answer = chat(gateway, TEXTS[1], polymath={"attribution": True})
    for entry in answer["choices"][0]["polymath"]["attribution"]:
        assert entry["weights"] == answer["polymath"]["weights"]
        assert entry["expert"] in entry["weights"]


def test_the_decision_alone_is_the_one_that_answers(gateway: Gateway) -> None:
    alone = post(gateway, "/v1/route", messages=[user(TEXTS[1])]).json()
    whole = chat(gateway, TEXTS[1])["polymath"]
    assert alone | {"latency_ms": 0} == whole | {"latency_ms": 0}


def test_many_at_once_are_answered_as_one_by_one(gateway: Gateway) -> None:
    """The gradients share one model, whose hooks write to one place."""

    async def together() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            bodies = [{"messages": [user(text)]} for text in TEXTS * 4]
            return await asyncio.gather(*(client.post("/v1/route", json=b) for b in bodies))

    decisions = [answer.json()["domain"] for answer in asyncio.run(together())]
    assert decisions == list(LABELS) * 4


# --- by the words alone --------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "text"), zip(LABELS, TEXTS, strict=True))
def test_distilled_clusters_need_no_model(copy: Path, label: str, text: str) -> None:
    with_router(copy, "distil: true")
    rewrite(copy, ("tiny: {model: ", "tiny: {model: /nowhere"))
    decision = decision_of(copy, text)
    assert decision.domain == label
    assert decision.weights["everything"] == pytest.approx(0.5)
    assert (decision.source, decision.combine) == ("gradient", "logits")


def test_distilled_clusters_need_no_base_adapter(copy: Path) -> None:
    with_router(copy, "distil: true")
    rewrite(copy, ("fallback: everything", "fallback: plain"))
    assert decision_of(copy, TEXTS[1]).weights["plain"] == pytest.approx(0.5)


def test_clusters_that_were_not_distilled_are_named(copy: Path) -> None:
    folder = copy.parent / "clusters" / "distilled"
    shutil.rmtree(folder)
    with_router(copy, "distil: true")
    assert problem(copy).startswith(f"router.path: {folder / 'router.json'}: missing;")


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distil", ["false", "true"])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_hybrid_mixes_what_both_say(copy: Path, share: float, distil: str) -> None:
    gradient, words, both = (
        Path(shutil.copytree(copy.parent, copy.parent.with_name(name))) / copy.name
        for name in ("gradient", "words", "both")
    )
    with_router(gradient, f"distil: {distil}", "top_k: 9")
    rewrite(words, ("kind: gradient", "kind: encoder"), ("path: clusters", "path: router"))
    as_hybrid(both, f"share: {share}", f"distil: {distil}", "top_k: 9")
    pull, said, mixed = (decision_of(file, "Is it theft?") for file in (gradient, words, both))
    experts = {*pull.weights, *said.weights}
    expected = {
        name: share * pull.weights.get(name, 0.0) + (1 - share) * said.weights.get(name, 0.0)
        for name in experts
    }
    assert {name: mixed.weights.get(name, 0.0) for name in experts} == pytest.approx(
        expected, abs=FLOAT32_ERROR
    )
    assert (mixed.domain, mixed.source, mixed.combine) == (said.domain, said.source, "logits")


def test_a_hybrid_is_answered_by_the_experts_of_both(copy: Path) -> None:
    as_hybrid(copy, "top_k: 9", "temperature: 1.0e-9")
    gateway = Gateway(prepare(load_config(copy, environ={})))
    asyncio.run(gateway.load())
    try:
        decision = chat(gateway, TEXTS[0])["polymath"]
    finally:
        asyncio.run(gateway.close())
    assert decision["combine"] == "logits"
    assert decision["domain"] == "law"
    assert decision["weights"]["cluster-0"] == pytest.approx(0.25, abs=0.01)
    assert {"lawyer", "everything", "cluster-0"} <= decision["weights"].keys()


def test_rules_stand_before_a_hybrid(copy: Path) -> None:
    as_hybrid(copy, "rules: [{expert: plain, keyword: theft}]")
    assert decision_of(copy, "Is it theft?").weights == {"plain": 1.0}


# --- what cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["plain", "tiny", "halves-0"])
def test_a_fallback_without_an_adapter_is_refused(copy: Path, fallback: str) -> None:
    rewrite(copy, ("fallback: everything", f"fallback: {fallback}"))
    assert problem(copy) == (
        f"router.fallback: the fallback {fallback!r} of a gradient router must be an expert with "
        f"the clusters' base adapter: `adapter: {copy.parent / 'clusters'}/base`"
    )


def test_a_fallback_with_another_adapter_is_refused(copy: Path) -> None:
    rewrite(copy, ("fallback: everything", "fallback: cluster-0"))
    clusters = copy.parent / "clusters"
    assert problem(copy) == (
        f"router.fallback: {clusters / 'expert-0'}, the adapter of the fallback 'cluster-0', is "
        f"not the base adapter that the clusters were found with: {clusters}/base"
    )


def test_a_copy_of_the_base_adapter_will_do(copy: Path) -> None:
    base = copy.parent / "clusters" / "base"
    base.rename(copy.parent / "elsewhere")
    rewrite(copy, ("clusters/base", "elsewhere"))
    assert decision_of(copy, TEXTS[1]).domain == "cluster-1"


def test_a_missing_folder_is_named_with_its_nearest_sibling(copy: Path) -> None:
    rewrite(copy, ("path: clusters", "path: cluster"))
    folder = copy.parent
    assert problem(copy) == (
        f"router.path: {folder / 'cluster'} does not exist; did you mean {folder / 'clusters'}?"
    )


def test_a_missing_folder_of_a_hybrid_is_named(copy: Path) -> None:
    as_hybrid(copy)
    rewrite(copy, ("clusters: clusters", "clusters: cluster"))
    assert problem(copy).startswith(f"router.clusters: {copy.parent / 'cluster'} does not exist")


def test_a_hybrid_needs_clusters(copy: Path) -> None:
    rewrite(copy, ("kind: gradient", "kind: hybrid"))
    assert problem(copy) == "router: 'clusters' is missing; a router of kind 'hybrid' needs it"


@pytest.mark.parametrize("name", ["clusters.json", "centroids.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [(Path.unlink, "missing"), (lambda file: file.write_bytes(b"{"), "corrupt (")],
)
def test_a_damaged_folder_is_named(
    copy: Path, name: str, spoil: Callable[[Path], object], what: str
) -> None:
    file = copy.parent / "clusters" / name
    spoil(file)
    assert problem(copy).startswith(f"router.path: {file}: {what}")


def test_a_damaged_folder_of_a_hybrid_is_named(copy: Path) -> None:
    as_hybrid(copy)
    file = copy.parent / "clusters" / "clusters.json"
    file.unlink()
    assert problem(copy).startswith(f"router.clusters: {file}: missing")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"{")])
def test_a_damaged_base_adapter_is_named(
    copy: Path, name: str, spoil: Callable[[Path], object]
) -> None:
    """Even where its sum is the one that the clusters were found with."""
    file = copy.parent / "clusters" / "base" / name
    spoil(file)
    clusters = ClusterArtifact.load(copy.parent / "clusters")
    weights = copy.parent / "clusters" / "base" / "adapter_model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes() if weights.exists() else b"").hexdigest()
    card = clusters.card.model_copy(update={"base_sha256": sha256})
    replace(clusters, card=card).save(copy.parent / "clusters")
    found = problems(copy)
    assert any(line.startswith(f"experts.everything.adapter: {file}: ") for line in found)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_base_model_is_named(copy: Path, tiny_model: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_model, copy.parent / "broken"))
    (folder / name).write_bytes(b"{")
    rewrite(copy, (str(tiny_model), "broken"))
    assert any(str(folder) in line for line in problems(copy))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": LABELS[::-1]},
        {"labels": LABELS[:2], "rows": 2},
        {"out_of_scope": 0.5, "rows": 4},
        {"width": 5},
    ],
    ids=["order", "number", "scope", "width"],
)
def test_a_distilled_folder_of_other_clusters_is_refused(
    copy: Path, changes: dict[str, Any]
) -> None:
    folder = copy.parent / "clusters" / "distilled"
    artifact = RouterArtifact.load(folder)
    shape = changes.pop("rows", len(LABELS)), changes.pop("width", artifact.dimensions)
    replace(
        artifact,
        card=artifact.card.model_copy(update=changes),
        weight=np.zeros(shape, dtype=np.float32),
        bias=np.zeros(shape[0], dtype=np.float32),
        vectors=np.empty((0, shape[1]), dtype=np.float32),
    ).save(folder)
    with_router(copy, "distil: true")
    assert problem(copy).startswith(f"router.path: {folder}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "gradients"),
        ("base_weight", "-1"),
        ("base_weight", ".inf"),
        ("temperature", "0"),
        ("temperature", ".nan"),
        ("top_k", "0"),
        ("share", "1.1"),
        ("distil", "perhaps"),
        ("clusters", "3"),
        ("basis_weight", "1"),
    ],
)
def test_a_bad_key_is_named(copy: Path, key: str, value: str) -> None:
    if key == "kind":
        rewrite(copy, ("kind: gradient", f"kind: {value}"))
    else:
        with_router(copy, f"{key}: {value}")
    assert problem(copy).startswith(f"router.{key}: ")


def test_experts_of_different_vocabularies_cannot_be_routed_by_gradients(
    copy: Path, foreign_model: Path
) -> None:
    foreign = f"  foreign: {{model: {foreign_model}}}\nexperts:\n"
    stranger = "  stranger: {kind: base, base_model: foreign}\nrouter:\n"
    rewrite(copy, ("experts:\n", foreign), ("router:\n", stranger))
    with pytest.raises(ConfigError, match=r"router\.kind: .* tiny and foreign have different"):
        prepare(load_config(copy, environ={}))

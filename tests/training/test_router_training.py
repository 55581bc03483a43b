"""From labelled prompts to a router folder that routes, on a tiny random BERT."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymath.errors import DataError, ModelSourceError, RouterArtifactError
from polymath.router import (
    RouteDecision,
    Router,
    RouterArtifact,
    RouterSettings,
    SentenceEncoder,
    build_router,
    halves,
)
from polymath.training import (
    FinetuneRecipe,
    PromptRow,
    RouterRecipe,
    encoder_finetuning,
    fingerprint,
    router_training,
    train_router,
)
from polymath.training.encoder_finetuning import EncoderFinetuner
from polymath.training.labelled import LabelledPrompts
from polymath.training.linear_head import fit_head
from polymath.training.prompt_vectors import encode_prompts
from polymath.training.reference_prompts import choose_references
from polymath.training.router_validation import SourceScores
from tests.training.conftest import (
    DOMAINS,
    WORDS,
    Killed,
    Progress,
    prompt_text,
    prompts,
    write_tiny_bert,
)

FROZEN = RouterRecipe(threads=1)
FINETUNE = FinetuneRecipe(
    prompts=800, batch_size=16, learning_rate=6e-3, frozen_layers=0, restyling=0.1
)
TUNED = RouterRecipe(finetune=FINETUNE, fold_prompts=800, threads=1)
LEARNED = TUNED.model_copy(update={"fold_prompts": 0})
BRIEF = LEARNED.model_copy(update={"finetune": FINETUNE.model_copy(update={"prompts": 64})})
"""Fine-tuning that has not learned much."""
FOLDED = BRIEF.model_copy(update={"fold_prompts": 48})
FILES = {"head.safetensors", "model.onnx", "references.jsonl", "router.json", "tokenizer.json"}
LIMIT = 128
"""References of a domain."""

ROWS = [
    *prompts(40, *DOMAINS, source="first/train"),
    *prompts(40, *DOMAINS, source="second/train"),
]
OUTSIDE = prompts(40, "none", source="other")
both_ways = pytest.mark.parametrize("recipe", [FROZEN, BRIEF], ids=["frozen", "finetune"])

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., RouterArtifact]


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path) -> Run:
    """A training of the tiny BERT; the folder is `tmp_path / "router"` unless another is named."""

    def train(
        rows: Sequence[PromptRow] = ROWS, recipe: RouterRecipe = FROZEN, **how: Any
    ) -> RouterArtifact:
        out = how.pop("out", tmp_path / "router")
        encoder = how.pop("encoder", str(tiny_bert))
        return train_router(rows, encoder, out, recipe, **how)

    return train


@pytest.fixture(scope="module")
def frozen(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    train_router([*ROWS, *OUTSIDE], str(tiny_bert), folder, FROZEN, licence="CC0")
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    train_router([*ROWS, *OUTSIDE], str(tiny_bert), folder, TUNED, licence="CC0")
    return folder


@pytest.fixture(params=["frozen", "tuned"])
def either(request: pytest.FixtureRequest) -> Path:
    """The folder of either way to train."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def opened(folder: Path) -> Router:
    owners = {domain: f"{domain} expert" for domain in DOMAINS}
    return build_router(RouterSettings(path=folder, fallback="general", min_confidence=0), owners)


def ask(router: Router, text: str) -> RouteDecision:
    return router.route([{"role": "user", "content": text}])


def unseen(domain: str, count: int = 20) -> list[str]:
    rng = random.Random(f"unseen {domain}")
    return [prompt_text(rng, WORDS[domain]) for _ in range(count)]


def share_right(folder: Path, domains: Sequence[str] = DOMAINS) -> float:
    router = opened(folder)
    return float(
        np.mean(
            [ask(router, text).domain == domain for domain in domains for text in unseen(domain)]
        )
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def domains_of(artifact: RouterArtifact) -> dict[str, int]:
    found = [reference.domain for reference in artifact.references]
    return {domain: found.count(domain) for domain in sorted(set(found))}


def without_key(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != "key")


def test_a_router_folder_is_complete_and_holds_nothing_else(either: Path) -> None:
    assert {file.name for file in either.iterdir()} == FILES


def test_what_is_returned_is_what_is_in_the_folder(run: Run, tmp_path: Path) -> None:
    """Vectors are kept in float16."""
    artifact, loaded = run(), RouterArtifact.load(tmp_path / "router")
    assert (loaded.card, loaded.references) == (artifact.card, artifact.references)
    np.testing.assert_array_equal(loaded.weight, artifact.weight)
    np.testing.assert_array_equal(loaded.bias, artifact.bias)
    np.testing.assert_allclose(loaded.vectors, artifact.vectors, atol=1e-3)


@both_ways
def test_the_same_seed_gives_the_same_files(run: Run, tmp_path: Path, recipe: RouterRecipe) -> None:
    for name in ("one", "two"):
        run(recipe=recipe, out=tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_gives_another_fine_tuning(run: Run, tmp_path: Path) -> None:
    for seed in (0, 1):
        finetune = FINETUNE.model_copy(update={"prompts": 64, "seed": seed})
        recipe = RouterRecipe(finetune=finetune, fold_prompts=0, threads=1, seed=seed)
        run(recipe=recipe, out=tmp_path / str(seed))
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert first["model.onnx"] != second["model.onnx"]
    assert first["head.safetensors"] != second["head.safetensors"]


def test_a_trained_router_routes_unseen_prompts(either: Path) -> None:
    assert share_right(either) > 0.85


def test_a_decision_names_the_expert_and_prompts_of_the_domain(either: Path) -> None:
    decision = ask(opened(either), "does the compiler loop python recursion?")
    assert decision.expert == "coding expert"
    assert {neighbour.domain for neighbour in decision.why.nearest} <= set(DOMAINS)
    assert len(decision.why.nearest) == 3


def test_prompts_of_no_domain_mostly_reach_the_fallback(either: Path) -> None:
    router = opened(either)
    inside = [ask(router, text).source for domain in DOMAINS for text in unseen(domain)]
    outside = [ask(router, text).source for text in unseen("none")]
    assert inside.count("fallback") / len(inside) < 0.2
    assert outside.count("fallback") / len(outside) > 0.6


@pytest.mark.parametrize("recipe", [FROZEN, LEARNED], ids=["frozen", "finetune"])
@pytest.mark.parametrize("domains", [DOMAINS[:2], DOMAINS])
def test_eight_prompts_a_domain_are_enough(
    run: Run, tmp_path: Path, recipe: RouterRecipe, domains: tuple[str, ...]
) -> None:
    run(prompts(8, *domains), recipe)
    assert share_right(tmp_path / "router", domains) > 0.7


@both_ways
@pytest.mark.parametrize("domains", [DOMAINS[:2], DOMAINS, (*DOMAINS, "none")])
@pytest.mark.parametrize("count", [2, 3])
def test_two_prompts_a_domain_are_the_least(
    run: Run, recipe: RouterRecipe, domains: tuple[str, ...], count: int
) -> None:
    artifact = run(prompts(count, *domains), recipe)
    assert artifact.weight.shape == (len(domains), 32)


@both_ways
@pytest.mark.parametrize("outside", [[], OUTSIDE], ids=["without none", "with none"])
def test_prompts_of_no_domain_give_a_row_and_a_threshold(
    run: Run, recipe: RouterRecipe, outside: list[PromptRow]
) -> None:
    artifact = run([*ROWS, *outside], recipe)
    assert artifact.card.labels == DOMAINS
    assert len(artifact.weight) == len(artifact.bias) == len(DOMAINS) + bool(outside)
    assert (artifact.card.out_of_scope is not None) == bool(outside)
    assert domains_of(artifact).keys() == set(DOMAINS)


def test_the_threshold_loses_few_prompts_of_a_domain() -> None:
    """Of 100 prompts in scope the two that look most like none are lost; the rest do not count."""
    none = np.concatenate([np.arange(100) / 100, np.ones(50)])
    probabilities = np.stack([1 - none, none], axis=1)
    targets = np.repeat([0, 1], [100, 50])
    limit = router_training._threshold(probabilities, targets)
    assert (none[:100] >= limit).sum() == 2


@pytest.mark.parametrize(("probability", "limit"), [(0.0, 1e-3), (1.0, 1.0)])
def test_the_threshold_is_a_probability_above_zero(probability: float, limit: float) -> None:
    probabilities = np.tile([1 - probability, probability], (5, 1))
    assert router_training._threshold(probabilities, np.zeros(5, np.int64)) == limit


def test_the_card_says_where_everything_comes_from(either: Path, tiny_bert: Path) -> None:
    card = RouterArtifact.load(either).card
    assert (card.encoder, card.licence) == (str(tiny_bert), "CC0")
    assert card.rows == {"first": 120, "other": 40, "second": 120}
    assert card.data_sha256 == fingerprint([*ROWS, *OUTSIDE])
    assert RouterRecipe.model_validate({**card.recipe, "threads": 1}) in (FROZEN, TUNED)


def test_the_card_says_whether_the_encoder_was_tuned(frozen: Path, tuned: Path) -> None:
    assert RouterArtifact.load(frozen).card.finetuned is False
    assert RouterArtifact.load(tuned).card.finetuned is True


def test_the_card_has_the_accuracy_on_each_source_left_out(either: Path) -> None:
    left_out = RouterArtifact.load(either).card.left_out
    assert list(left_out) == ["first", "second"]
    assert all(0.5 < accuracy <= 1 for accuracy in left_out.values())


@both_ways
def test_without_a_source_to_leave_out_the_card_has_none(run: Run, recipe: RouterRecipe) -> None:
    assert run(prompts(9, *DOMAINS, source=None), recipe).card.left_out == {}


def test_a_fine_tuning_without_validation_claims_none(run: Run) -> None:
    card = run(recipe=BRIEF).card
    assert (card.finetuned, card.left_out) == (True, {})


def test_a_fine_tuning_never_sees_the_rows_that_it_is_measured_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the source left out, and in the end those on which confidence is calibrated."""
    seen: list[set[int]] = []
    places = {id(row): place for place, row in enumerate(ROWS)}

    def noted(source: Path, data: LabelledPrompts, *rest: Any) -> EncoderFinetuner:
        seen.append({places[id(row)] for row in data.rows})
        return EncoderFinetuner(source, data, *rest)

    monkeypatch.setattr(router_training, "EncoderFinetuner", noted)
    progress = Progress()
    run(recipe=FOLDED, progress=progress)
    run(recipe=BRIEF, progress=progress)
    first, second, final = seen[0], seen[1], seen[-1]
    assert {ROWS[place].family for place in first} == {"second"}
    assert {ROWS[place].family for place in second} == {"first"}
    measured = {total for stage, _, total in progress.seen if "held-out prompts" in stage}
    assert measured == {len(ROWS) - len(final)}


def test_a_source_that_says_the_opposite_is_measured_as_such(run: Run) -> None:
    """`liar` calls law math and math law; left out, none of its rows is right."""
    honest = prompts(20, "law", "math", source="honest")
    swapped = {"law": "math", "math": "law"}
    lies = [
        row.model_copy(update={"domain": swapped[row.domain], "source": "liar"})
        for row in prompts(10, "law", "math", source="other")
    ]
    card = run([*honest, *lies]).card
    assert card.left_out["liar"] < 0.3
    assert card.metrics["accuracy"] > card.left_out["liar"]


@pytest.mark.parametrize(("better", "score"), [(True, 1.0), (False, 0.0)])
def test_the_better_of_both_ways_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool, score: float
) -> None:
    scores = {"first": score, "second": score}
    monkeypatch.setattr(
        router_training._Training,
        "_validated_finetuning",
        lambda *_: SourceScores(dict(scores), dict(scores)),
    )
    artifact = run(recipe=TUNED)
    run(recipe=FROZEN, out=tmp_path / "frozen")
    same = (
        contents(tmp_path / "router")["model.onnx"] == contents(tmp_path / "frozen")["model.onnx"]
    )
    assert artifact.card.finetuned is better
    assert same is not better
    assert (artifact.card.left_out == scores) is better


def test_of_several_regularisations_the_one_that_generalises_is_taken(run: Run) -> None:
    """With next to no weight everything is one class, so the choice is seen in the head."""
    best = run(recipe=FROZEN.model_copy(update={"inverse_regularisation": (1e-6, 3.0, 1e-7)}))
    alone = run(recipe=FROZEN.model_copy(update={"inverse_regularisation": (3.0,)}))
    np.testing.assert_array_equal(best.weight, alone.weight)


def test_metrics_and_temperature_are_in_range(either: Path) -> None:
    card = RouterArtifact.load(either).card
    assert 0 < card.temperature < 21
    assert card.metrics["accuracy"] > 0.8
    assert 0 <= card.metrics["ece"] < 0.3


def test_a_rare_domain_is_not_drowned_by_a_common_one(run: Run, tmp_path: Path) -> None:
    run([*prompts(200, "math"), *prompts(8, "law")])
    router = opened(tmp_path / "router")
    assert np.mean([ask(router, text).domain == "law" for text in unseen("law", 50)]) > 0.7


def test_a_domain_too_rare_for_the_probe_is_probed_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head starts on a sample of the rows; one of three domains is not in it."""
    monkeypatch.setattr(router_training, "PROBED_ROWS", 8)
    rows = [*prompts(100, "math", "law"), *prompts(4, "coding")]
    assert run(rows, BRIEF).card.labels == DOMAINS


def test_prompts_of_different_lengths_keep_their_own_vectors(run: Run, tmp_path: Path) -> None:
    """They are encoded in order of length and must come back in their own."""
    rows = [
        row.model_copy(update={"text": row.text + " the" * (index * 7 % 20)})
        for index, row in enumerate(prompts(20, *DOMAINS))
    ]
    artifact = run(rows)
    texts = [reference.text for reference in artifact.references]
    assert len(texts) == len(rows)
    _, vectors = halves(SentenceEncoder(tmp_path / "router").encode(texts))
    np.testing.assert_allclose(artifact.vectors, vectors, atol=1e-6)


def test_the_head_is_fitted_to_the_first_halves(run: Run, tmp_path: Path) -> None:
    artifact = run(recipe=FROZEN.model_copy(update={"inverse_regularisation": (3.0,)}))
    data = LabelledPrompts.of(ROWS)
    texts = [row.text for row in data.rows]
    read, _ = halves(SentenceEncoder(tmp_path / "router").encode(texts))
    head = fit_head(read, data.targets, data.weights, 3.0)
    np.testing.assert_allclose(artifact.weight, head.weight, atol=1e-3)
    np.testing.assert_allclose(artifact.bias, head.bias, atol=1e-3)


@pytest.mark.parametrize(("name", "recipe"), [("frozen", FROZEN), ("tuned", TUNED)])
def test_no_head_ever_reads_a_second_half(
    run: Run,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    recipe: RouterRecipe,
) -> None:
    """Neither where it is fitted nor where it is measured."""

    def spoilt(*how: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        vectors = encode_prompts(*how)
        halves(vectors)[1][:] = np.nan
        return vectors

    monkeypatch.setattr(router_training, "encode_prompts", spoilt)
    run([*ROWS, *OUTSIDE], recipe, licence="CC0")
    assert contents(tmp_path / "router") == contents(request.getfixturevalue(name))


def test_references_are_a_wide_sample_of_the_second_halves() -> None:
    """The first halves are all different, the second halves of three kinds."""

    class FakeEncoder:
        def encode(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
            kinds = [int(text.split("-")[1]) for text in texts]
            first = np.random.default_rng(0).normal(size=(len(texts), 4))
            return np.concatenate([first, np.eye(4)[kinds]], axis=1).astype(np.float32)

    rows = [
        PromptRow(text=f"{number}-{number % 3}", domain=domain)
        for domain in DOMAINS
        for number in range(30)
    ]
    references, vectors = choose_references(LabelledPrompts.of(rows), FakeEncoder(), seed=0)
    for domain in DOMAINS:
        kinds = [r.text.split("-")[1] for r in references if r.domain == domain]
        assert sorted(kinds) == ["0", "1", "2"]
    expected = [np.eye(4)[int(reference.text.split("-")[1])] for reference in references]
    np.testing.assert_array_equal(vectors, expected)


def test_references_are_training_prompts_of_their_domain(either: Path) -> None:
    known = {row.text: row.domain for row in ROWS}
    references = RouterArtifact.load(either).references
    assert all(known[reference.text] == reference.domain for reference in references)
    assert {reference.domain for reference in references} == set(DOMAINS)


def test_references_point_at_their_row_by_id(either: Path) -> None:
    rows = [*ROWS, *OUTSIDE]
    references = RouterArtifact.load(either).references
    places = [reference.id.rsplit("#") for reference in references]
    assert all(rows[int(place)].source == source for source, place in places)
    assert [rows[int(place)].text for _, place in places] == [r.text for r in references]
    assert len({reference.id for reference in references}) == len(references)


def test_a_prompt_without_a_source_has_an_id(run: Run) -> None:
    references = run(prompts(4, *DOMAINS, source=None)).references
    assert all(reference.id.startswith("prompt#") for reference in references)


def test_the_vector_of_a_reference_is_the_second_half_of_its_prompts(either: Path) -> None:
    artifact = RouterArtifact.load(either)
    texts = [reference.text for reference in artifact.references]
    read, likeness = halves(SentenceEncoder(either).encode(texts))
    np.testing.assert_allclose(artifact.vectors, likeness, atol=1e-3)
    assert np.abs(artifact.vectors - read).max(axis=1).min() > 2e-3


@pytest.mark.parametrize("count", [10, LIMIT, LIMIT + 30])
def test_a_domain_has_a_limited_number_of_references(run: Run, count: int) -> None:
    for found in domains_of(run(prompts(count, *DOMAINS))).values():
        assert 0.8 * min(count, LIMIT) <= found <= min(count, LIMIT)


@pytest.mark.filterwarnings("error:Number of distinct clusters")
def test_prompts_that_repeat_are_no_fault(run: Run) -> None:
    rows = [PromptRow(text=domain, domain=domain) for domain in DOMAINS for _ in range(6)]
    assert {reference.text for reference in run(rows).references} == set(DOMAINS)


def test_a_reference_is_no_more_than_an_excerpt(run: Run) -> None:
    rows = [
        row.model_copy(update={"text": row.text + " the" * 100}) for row in prompts(4, *DOMAINS)
    ]
    assert {len(reference.text) for reference in run(rows).references} == {240}


@both_ways
def test_no_withheld_text_is_in_the_folder(run: Run, tmp_path: Path, recipe: RouterRecipe) -> None:
    secret = [
        row.model_copy(update={"text": f"confidential {row.text}"})
        for row in prompts(9, *DOMAINS, source="private/a")
    ]
    run([*secret, *prompts(9, *DOMAINS, source="open/a")], recipe, withheld={"private"})
    lines = (tmp_path / "router" / "references.jsonl").read_text(encoding="utf-8").splitlines()
    shown = {json.loads(line)["id"].split("/")[0] for line in lines if json.loads(line)["text"]}
    assert shown == {"open"}
    assert len(lines) == 54
    assert all(b"confidential" not in content for content in contents(tmp_path / "router").values())


def test_withholding_a_source_changes_nothing_but_the_texts(run: Run) -> None:
    shown, hidden = run(), run(withheld=["first"])
    assert hidden.card == shown.card
    np.testing.assert_array_equal(hidden.weight, shown.weight)
    np.testing.assert_array_equal(hidden.vectors, shown.vectors)
    assert [r.id for r in hidden.references] == [r.id for r in shown.references]
    assert {r.text for r in hidden.references if r.id.startswith("first/")} == {""}


def test_progress_of_every_stage_ends_with_all_done(run: Run) -> None:
    progress = Progress()
    run(recipe=TUNED, progress=progress)
    last = {stage: (done, total) for stage, done, total in progress.seen}
    assert all(done == total for done, total in last.values())
    assert [stage for stage in progress.stages if stage.startswith("fine-tuning")] == [
        "fine-tuning without first",
        "fine-tuning without second",
        "fine-tuning on all sources",
    ]


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("encoding prompts", 64),
        ("fine-tuning without first", 3),
        ("fine-tuning without second", 3),
        ("measuring on second", 16),
        ("fine-tuning on all sources", 10),
        ("choosing reference prompts", 16),
    ],
)
def test_a_killed_training_gives_the_files_of_an_unbroken_one(
    run: Run,
    tmp_path: Path,
    tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    step: int,
) -> None:
    monkeypatch.setattr(encoder_finetuning, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Killed):
        run([*ROWS, *OUTSIDE], TUNED, licence="CC0", progress=Progress(stage, step))
    run([*ROWS, *OUTSIDE], TUNED, licence="CC0")
    assert contents(tmp_path / "router") == contents(tuned)


def test_a_killed_training_does_not_repeat_finished_folds(run: Run) -> None:
    with pytest.raises(Killed):
        run(recipe=FOLDED, progress=Progress("fine-tuning without second"))
    progress = Progress()
    run(recipe=FOLDED, progress=progress)
    assert progress.stages[0] != "encoder: export to int8"
    assert "fine-tuning without first" not in progress.stages
    assert "fine-tuning without second" in progress.stages


def test_folds_of_another_recipe_are_measured_again(run: Run) -> None:
    with pytest.raises(Killed):
        run(recipe=FOLDED, progress=Progress("fine-tuning without second"))
    progress = Progress()
    run(recipe=FOLDED.model_copy(update={"fold_prompts": 64}), progress=progress)
    assert "fine-tuning without first" in progress.stages


@pytest.mark.parametrize("change", ["encoder", "rows", "seed"])
def test_what_another_training_left_behind_is_not_used(
    run: Run, tmp_path: Path, change: str
) -> None:
    other: dict[str, dict[str, Any]] = {
        "encoder": {"encoder": str(write_tiny_bert(tmp_path / "other bert", seed=1))},
        "rows": {"rows": prompts(20, *DOMAINS, seed=1)},
        "seed": {"recipe": RouterRecipe(threads=1, seed=1)},
    }
    with pytest.raises(Killed):
        run(recipe=FOLDED, progress=Progress("fine-tuning without second"))
    run(**other[change])
    run(**other[change], out=tmp_path / "clean")
    assert contents(tmp_path / "router") == contents(tmp_path / "clean")


def test_a_killed_training_keeps_its_work_until_it_is_done(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(recipe=FOLDED, progress=Progress("fine-tuning without second"))
    work = tmp_path / "router" / ".training"
    assert without_key(work) == ["folds.json", "frozen", "tuned", "tuned-int8"]
    run(recipe=FOLDED)
    assert not work.exists()


@pytest.mark.parametrize("recipe", [FROZEN, BRIEF])
def test_a_router_half_replaced_does_not_load(
    run: Run, tmp_path: Path, recipe: RouterRecipe
) -> None:
    """The new encoder must not meet the old head."""
    run()
    with pytest.raises(Killed):
        run([*ROWS, *OUTSIDE], recipe, progress=Progress("choosing reference prompts"))
    with pytest.raises(RouterArtifactError, match=r"router\.json: missing"):
        RouterArtifact.load(tmp_path / "router")


def test_an_older_router_serves_until_the_new_one_is_there(run: Run, tmp_path: Path) -> None:
    run()
    with pytest.raises(Killed):
        run(recipe=FOLDED, progress=Progress("fine-tuning without second"))
    assert share_right(tmp_path / "router") > 0.8


@pytest.mark.parametrize("rows", [[], prompts(9, "law"), prompts(9, "law", "none")])
def test_fewer_than_two_domains_are_refused(
    run: Run, tmp_path: Path, rows: list[PromptRow]
) -> None:
    with pytest.raises(DataError, match="at least two domains"):
        run(rows)
    assert not (tmp_path / "router").exists()


def test_a_single_prompt_of_a_domain_is_refused(run: Run) -> None:
    with pytest.raises(DataError, match="at least two prompts of every domain: 'coding'"):
        run([*prompts(9, "law", "math"), *prompts(1, "coding")])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_encoder_that_lacks_a_file_is_named(run: Run, tmp_path: Path, missing: str) -> None:
    folder = write_tiny_bert(tmp_path / "bert")
    (folder / missing).unlink()
    with pytest.raises(ModelSourceError, match=missing):
        run(encoder=str(folder))
    assert not (tmp_path / "router").exists()


def test_an_encoder_that_does_not_exist_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="nowhere"):
        run(encoder=str(tmp_path / "nowhere"))


def test_an_unknown_package_is_named(run: Run) -> None:
    with pytest.raises(ModelSourceError, match="no-such-package"):
        run(encoder="package:no-such-package")


def test_a_model_that_is_no_bert_is_refused(run: Run, tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    with pytest.raises(ModelSourceError, match="must be BERT"):
        run(encoder=str(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"threads": 0},
        {"fold_prompts": -1},
        {"inverse_regularisation": []},
        {"finetune": {"prompts": 0}},
        {"finetune": {"label_smoothing": 1}},
        {"finetune": {"batch_size": 1}},
        {"epochs": 3},
    ],
)
def test_a_recipe_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        RouterRecipe.model_validate(values)

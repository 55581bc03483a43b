"""From conversations without labels to experts and what routes to them, on tiny random models."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymath.errors import DataError, ModelSourceError, RouterArtifactError
from polymath.gateway import load_config, prepare
from polymath.router import ClusterArtifact, RouterArtifact
from polymath.training import (
    ChatRow,
    ClusterRecipe,
    ClusterTraining,
    LoraRecipe,
    LoraTrainer,
    expert_folder,
    fingerprint,
    lora,
)
from tests.training import conftest
from tests.training.conftest import WORDS, Killed, Progress, prompt_text, write_tiny_bert

RNG = random.Random(0)


def row(question: str, answer: str) -> ChatRow:
    turns = (("user", question), ("assistant", answer))
    return ChatRow.model_validate(
        {"messages": [{"role": role, "content": content} for role, content in turns]}
    )


def law(count: int) -> list[ChatRow]:
    return [row(prompt_text(RNG, WORDS["law"]), "ask a judge") for _ in range(count)]


def sums(count: int) -> list[ChatRow]:
    return [row(f"{RNG.randint(10, 99)} + {RNG.randint(10, 99)} = ?", "= 42") for _ in range(count)]


LAW, SUMS = law(14), sums(9)
ROWS = [line for pair in zip(LAW, SUMS, strict=False) for line in pair] + LAW[len(SUMS) :]
LABELS = ["law" if line in LAW else "sums" for line in ROWS]
HELD_LAW, HELD_SUMS = law(3), sums(3)
HELD_OUT = [*HELD_LAW, *HELD_SUMS]
TOO_LONG = [row("x" * 300 + str(index), "y") for index in range(len(SUMS))]

LORA = LoraRecipe(
    lora_rank=2, learning_rate=1e-2, train_tokens=2_500, batch_tokens=300, precision="float32"
)
STAGES = [
    "base adapter",
    "gradient features",
    "expert 0",
    "expert 1",
    "gradients of requests",
    "distilling",
    "measuring base model",
    "measuring base adapter",
    "measuring own expert",
    "measuring ensemble",
]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FILES = {
    "centroids.safetensors",
    "clusters.json",
    "polymath.yaml",
    "report.html",
    "report.json",
    *(f"{folder}/{name}" for folder in ("base", "expert-0", "expert-1") for name in ADAPTER),
    *(
        f"distilled/{name}"
        for name in (
            "head.safetensors",
            "model.onnx",
            "references.jsonl",
            "router.json",
            "tokenizer.json",
        )
    ),
}

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., ClusterArtifact]


@pytest.fixture(scope="module")
def recipe(tiny_bert: Path) -> ClusterRecipe:
    return ClusterRecipe(
        clusters=2, algorithm="kmeans", lora=LORA, dimensions=128, encoder=str(tiny_bert)
    )


@pytest.fixture
def run(tiny_model: Path, recipe: ClusterRecipe, tmp_path: Path) -> Run:
    """A training without held-out rows; into `tmp_path / "found"` unless told otherwise."""

    def trained(
        rows: Sequence[ChatRow] = ROWS,
        change: dict[str, Any] | None = None,
        out: Path = tmp_path / "found",
        progress: Progress | None = None,
        held_out: Sequence[ChatRow] = (),
        labels: Sequence[str] | None = LABELS,
    ) -> ClusterArtifact:
        changed = recipe.model_copy(update=change or {})
        followed = progress or Progress()
        training = ClusterTraining(tiny_model, str(tiny_model), rows, changed, out, followed)
        return training.run(held_out, labels)

    return trained


@dataclass
class Unbroken:
    """What a training without a break gave."""

    folder: Path
    artifact: ClusterArtifact
    progress: Progress


@pytest.fixture(scope="module")
def unbroken(
    tiny_model: Path, recipe: ClusterRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Unbroken:
    out, progress = tmp_path_factory.mktemp("clusters") / "found", Progress()
    training = ClusterTraining(tiny_model, str(tiny_model), ROWS, recipe, out, progress)
    return Unbroken(out, training.run(HELD_OUT, LABELS), progress)


@pytest.fixture(scope="module")
def found(unbroken: Unbroken) -> Path:
    """The folder of a training without a break."""
    return unbroken.folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return values


def test_a_folder_is_complete_and_holds_nothing_else(found: Path) -> None:
    assert contents(found).keys() == FILES


def test_what_is_returned_is_what_is_in_the_folder(unbroken: Unbroken) -> None:
    loaded = ClusterArtifact.load(unbroken.folder)
    assert loaded.card == unbroken.artifact.card
    np.testing.assert_array_equal(loaded.centroids, unbroken.artifact.centroids)


def test_the_kinds_of_conversations_are_found(found: Path) -> None:
    assert report(found)["nmi"] == 1
    kinds = [cluster["labels"] for cluster in report(found)["clusters"]]
    assert kinds == [{"law": len(LAW)}, {"sums": len(SUMS)}]


@pytest.mark.parametrize("algorithm", ["birch", "spherical"])
def test_other_algorithms_find_them_too(run: Run, algorithm: str) -> None:
    assert run(change={"algorithm": algorithm}).card.sizes == (len(LAW), len(SUMS))


def test_the_card_says_where_everything_comes_from(
    found: Path, tiny_model: Path, recipe: ClusterRecipe
) -> None:
    card = ClusterArtifact.load(found).card
    assert (card.base_model, card.algorithm) == (str(tiny_model), "kmeans")
    assert (card.dimensions, card.projection_seed, card.layers) == (128, recipe.seed, None)
    assert card.max_length == recipe.max_length
    assert card.data_sha256 == fingerprint(ROWS)
    assert all(0 < cosine <= 1 for cosine in card.similarity)


def test_the_same_seed_gives_the_same_files(run: Run, tmp_path: Path, found: Path) -> None:
    run(held_out=HELD_OUT)
    assert contents(tmp_path / "found") == contents(found)


def test_another_seed_gives_other_adapters(run: Run, tmp_path: Path, found: Path) -> None:
    run(change={"seed": 1})
    first, second = contents(found), contents(tmp_path / "found")
    weights = [name for name in FILES if name.endswith("adapter_model.safetensors")]
    assert all(first[name] != second[name] for name in weights)


def test_labels_are_for_the_report_alone(run: Run, tmp_path: Path, found: Path) -> None:
    run(labels=None, held_out=HELD_OUT)
    assert report(tmp_path / "found")["nmi"] is None
    first, second = contents(found), contents(tmp_path / "found")
    assert {name for name in FILES if first[name] != second[name]} == {
        "report.html",
        "report.json",
    }


def test_the_losses_are_of_each_cluster_and_of_all_who_might_answer(found: Path) -> None:
    losses = report(found)["losses"]
    assert list(losses) == ["cluster-0", "cluster-1"]
    for row in losses.values():
        assert list(row) == ["base model", "base adapter", "own expert", "ensemble"]
        assert row["own expert"] < row["base adapter"] < row["base model"]


@pytest.mark.parametrize(("place", "rows"), enumerate((HELD_LAW, HELD_SUMS)))
def test_the_losses_are_those_of_the_adapters_alone(
    tiny_model: Path, found: Path, tmp_path: Path, place: int, rows: list[ChatRow]
) -> None:
    values = report(found)["losses"][f"cluster-{place}"]
    for name, folder in (("base adapter", "base"), ("own expert", f"expert-{place}")):
        trainer = LoraTrainer(tiny_model, ROWS, LORA, tmp_path, start=found / folder)
        base, adapted = trainer.evaluate(rows)
        assert values["base model"] == pytest.approx(base.loss, abs=1e-4)
        assert values[name] == pytest.approx(adapted.loss, abs=1e-4)


def test_without_held_out_answers_there_are_no_losses(run: Run, tmp_path: Path) -> None:
    run(held_out=TOO_LONG, change={"lora": LORA.model_copy(update={"max_length": 200})})
    assert report(tmp_path / "found")["losses"] == {}


def test_experts_go_on_from_the_base_adapter(run: Run, tmp_path: Path) -> None:
    """With next to nothing to learn they are the base adapter."""
    from safetensors.torch import load_file

    slow = LORA.model_copy(update={"learning_rate": 1e-7})
    run(change={"lora": slow})
    base, expert = (
        load_file(tmp_path / "found" / name / "adapter_model.safetensors")
        for name in ("base", "expert-0")
    )
    torch.testing.assert_close(expert, base, atol=1e-4, rtol=0)


def test_the_budget_is_of_all_adapters_together(run: Run) -> None:
    progress = Progress()
    run(change={"base_share": 0.25}, progress=progress)
    totals = {stage: total for stage, _, total in progress.seen}
    step = LORA.batch_tokens
    assert totals["base adapter"] == pytest.approx(0.25 * LORA.train_tokens, abs=step)
    share = 0.75 * LORA.train_tokens / len(ROWS)
    assert totals["expert 0"] == pytest.approx(share * len(LAW), abs=step)
    assert totals["expert 1"] == pytest.approx(share * len(SUMS), abs=step)


def test_progress_of_every_stage_ends_with_all_done(unbroken: Unbroken) -> None:
    assert unbroken.progress.stages == STAGES
    last = {stage: (done, total) for stage, done, total in unbroken.progress.seen}
    assert all(done == total for done, total in last.values())


def test_plain_gradients_are_computed_once(run: Run) -> None:
    """Without Adam's moments those of training are those of requests."""
    progress = Progress()
    run(change={"preconditioned": False}, progress=progress)
    assert len([stage for stage in progress.stages if "gradient" in stage]) == 1


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("base adapter", 600),
        ("gradient features", 12),
        ("expert 0", 300),
        ("gradients of requests", len(ROWS)),
        ("distilling", 1),
        ("measuring ensemble", 0),
    ],
)
def test_a_killed_training_gives_the_files_of_an_unbroken_one(
    run: Run,
    tmp_path: Path,
    found: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    step: int,
) -> None:
    monkeypatch.setattr(lora, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Killed):
        run(progress=Progress(stage, step), held_out=HELD_OUT)
    run(held_out=HELD_OUT)
    assert contents(tmp_path / "found") == contents(found)


def test_a_killed_training_does_not_repeat_what_is_done(run: Run) -> None:
    with pytest.raises(Killed):
        run(progress=Progress("expert 1"))
    progress = Progress()
    run(progress=progress)
    assert "base adapter" not in progress.stages
    assert "expert 0" not in progress.stages
    assert progress.stages == ["gradient features", *STAGES[3:6]]


@pytest.mark.parametrize("change", ["lora", "rows"])
def test_what_another_training_left_behind_is_not_used(
    run: Run, tmp_path: Path, change: str
) -> None:
    other: dict[str, dict[str, Any]] = {
        "lora": {"change": {"lora": LORA.model_copy(update={"lora_rank": 3})}},
        "rows": {"rows": ROWS[1:], "labels": LABELS[1:]},
    }
    with pytest.raises(Killed):
        run(progress=Progress("expert 1"))
    progress = Progress()
    run(**other[change], progress=progress)
    run(**other[change], out=tmp_path / "clean")
    assert progress.stages == STAGES[:6]
    assert contents(tmp_path / "found") == contents(tmp_path / "clean")


def test_experts_of_an_older_training_are_gone(run: Run, tmp_path: Path, found: Path) -> None:
    shutil.copytree(found, tmp_path / "found")
    shutil.copytree(found / "expert-1", expert_folder(tmp_path / "found", 2))
    run()
    assert contents(tmp_path / "found").keys() == FILES


def test_a_folder_half_replaced_does_not_load(run: Run, tmp_path: Path, found: Path) -> None:
    """The new experts must not meet the old centroids."""
    shutil.copytree(found, tmp_path / "found")
    with pytest.raises(Killed):
        run(change={"seed": 1}, progress=Progress("expert 1"))
    with pytest.raises(RouterArtifactError, match=r"clusters\.json: missing"):
        ClusterArtifact.load(tmp_path / "found")


def test_a_folder_of_something_else_is_left_alone(run: Run, tmp_path: Path) -> None:
    """`--out` may be where the base model lies, as `base`."""
    weights = tmp_path / "found" / "base" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"precious")
    with suppress(DataError):
        run()
    assert weights.read_bytes() == b"precious"


def test_the_config_in_the_folder_serves_it(found: Path, tiny_model: Path) -> None:
    settings = load_config(found / "polymath.yaml", environ={}).settings
    assert list(settings.experts) == ["clusters-base", "cluster-0", "cluster-1"]
    assert settings.base_models["base"].model == str(tiny_model)
    assert (settings.router.kind, settings.router.fallback) == ("gradient", "clusters-base")
    assert settings.router.path == found


def test_as_many_experts_answer_as_were_measured(found: Path, recipe: ClusterRecipe) -> None:
    settings = load_config(found / "polymath.yaml", environ={}).settings
    assert settings.router.top_k == recipe.top_k


def test_the_folder_may_be_moved(found: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(found, tmp_path / "moved")
    settings = load_config(moved / "polymath.yaml", environ={}).settings
    assert settings.experts["cluster-0"].adapter == moved / "expert-0"


def test_a_base_model_next_to_one_is_found_from_the_folder(
    tiny_model: Path, recipe: ClusterRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    out = tmp_path / "found"
    ClusterTraining(tiny_model, tiny_model.name, ROWS, recipe, out).run()
    settings = load_config(out / "polymath.yaml", environ={}).settings
    assert settings.base_models["base"].model == str(tiny_model)


def test_prompts_are_routed_to_the_expert_of_their_kind(found: Path) -> None:
    router = prepare(load_config(found / "polymath.yaml", environ={})).router
    for place, rows in enumerate((law(5), sums(5))):
        decisions = [router.route(line.conversation()[:-1]) for line in rows]
        assert [decision.domain for decision in decisions] == [f"cluster-{place}"] * 5
        assert all("clusters-base" not in decision.weights for decision in decisions)


def test_the_clusters_may_be_guessed_instead(found: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(found, tmp_path / "served")
    with (folder / "polymath.yaml").open("a", encoding="utf-8") as file:
        file.write("  distil: true\n")
    router = prepare(load_config(folder / "polymath.yaml", environ={})).router
    decision = router.route(LAW[0].conversation()[:-1])
    assert decision.weights.keys() == {"cluster-0", "cluster-1"}
    assert sum(decision.weights.values()) == pytest.approx(1)


def test_the_distilled_router_has_the_clusters_for_labels(found: Path) -> None:
    card = RouterArtifact.load(found / "distilled").card
    assert card.labels == ClusterArtifact.load(found).card.labels
    assert card.metrics["agreement"] == pytest.approx(report(found)["agreement"]["top"], abs=1e-4)


def test_the_report_shows_prompts_of_each_cluster(found: Path) -> None:
    page = (found / "report.html").read_text(encoding="utf-8")
    for cluster in report(found)["clusters"]:
        assert len(cluster["typical"]) == 5
        assert all(text in page for text in cluster["typical"])


def test_an_encoder_of_short_texts_reads_long_ones(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "POSITIONS", 16)
    encoder = write_tiny_bert(tmp_path / "short")
    rows = [row(f"{line.messages[0].content} " * 2, "yes") for line in ROWS]
    assert run(rows, change={"encoder": str(encoder)}).card.sizes == (len(LAW), len(SUMS))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_rows_than_clusters_are_refused(run: Run, tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=f"2 clusters need as many rows, found {count}"):
        run(ROWS[:count])
    assert not (tmp_path / "found").exists()


def test_conversations_without_an_answer_are_not_clustered(run: Run) -> None:
    """They would be a cluster that no expert can learn from."""
    short = {"lora": LORA.model_copy(update={"max_length": 200})}
    artifact = run([*LAW, *SUMS, *TOO_LONG], change={**short, "clusters": 3}, labels=None)
    assert sum(artifact.card.sizes) == len(LAW) + len(SUMS)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_conversations_that_all_pull_alike_are_refused(run: Run) -> None:
    with pytest.raises(DataError, match="all conversations pull alike"):
        run([LAW[0]] * 4, labels=None)


def test_an_encoder_that_does_not_exist_is_named_before_anything_is_trained(
    run: Run, tmp_path: Path
) -> None:
    progress = Progress()
    with pytest.raises(ModelSourceError, match="nowhere"):
        run(change={"encoder": str(tmp_path / "nowhere")}, progress=progress)
    assert progress.stages == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clusters", 0),
        ("clusters", 1),
        ("algorithm", "dbscan"),
        ("base_share", 0),
        ("base_share", 1),
        ("base_share", float("nan")),
        ("dimensions", 7),
        ("layers", 0),
        ("max_length", 7),
        ("top_k", 0),
        ("seed", 0.5),
        ("cluster", 3),
    ],
)
def test_a_recipe_out_of_range_names_the_field_and_the_value(field: str, value: object) -> None:
    with pytest.raises(DataError) as failure:
        ClusterRecipe.checked(**{field: value})
    assert failure.value.message.startswith(f"{field}: ")
    assert failure.value.message.endswith(f"found {value!r}")


def test_a_recipe_within_range_is_the_recipe(recipe: ClusterRecipe) -> None:
    assert ClusterRecipe.checked(**recipe.model_dump()) == recipe

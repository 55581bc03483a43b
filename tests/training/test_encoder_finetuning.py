"""Fine-tuning of a tiny random BERT: it learns, and goes on where it was killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polymath.errors import DataError
from polymath.router import RouterHead
from polymath.training import FinetuneRecipe, encoder_finetuning
from polymath.training.encoder_finetuning import EncoderFinetuner, unit_vectors
from polymath.training.labelled import LabelledPrompts
from tests.training.conftest import DOMAINS, Killed, prompts

RECIPE = FinetuneRecipe(prompts=200, batch_size=8, learning_rate=3e-3, frozen_layers=0)
STEPS = 25
DATA = LabelledPrompts.of(prompts(20, *DOMAINS))
UNTRAINED = RouterHead(np.zeros((3, 32), np.float32), np.zeros(3, np.float32))
TOLERANCE = 1e-6

Weights = dict[str, torch.Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Watch:
    """Follows a training, and kills it after some steps."""

    most: float = math.inf
    losses: list[float] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, done: int, total: int, loss: float) -> None:
        if len(self.steps) >= self.most:
            raise Killed
        self.steps.append((done, total))
        self.losses.append(loss)


def finetuner(
    source: Path, folder: Path, recipe: FinetuneRecipe = RECIPE, data: LabelledPrompts = DATA
) -> EncoderFinetuner:
    return EncoderFinetuner(source, data, UNTRAINED, recipe, folder / "work" / "checkpoint.pt")


def train(source: Path, folder: Path, **how: Any) -> Weights:
    """All weights after a training to its end: encoder and head."""
    tuner = finetuner(source, folder, **how)
    tuner.train()
    tuner.save(folder / "tuned")
    head = tuner.head()
    numbers = {"head.weight": head.weight, "head.bias": head.bias}
    weights = load_file(folder / "tuned" / "model.safetensors")
    return weights | {name: torch.from_numpy(values) for name, values in numbers.items()}


def kill(source: Path, folder: Path, steps: int = 10, **how: Any) -> None:
    with pytest.raises(Killed):
        finetuner(source, folder, **how).train(Watch(steps))


def resumed(source: Path, folder: Path, **how: Any) -> Watch:
    watch = Watch()
    finetuner(source, folder, **how).train(watch)
    return watch


def assert_same(first: Weights, second: Weights, tolerance: float = TOLERANCE) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        torch.testing.assert_close(second[name], values, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def trained(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """What an unbroken training gives."""
    return train(tiny_bert, tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_finetuning, "CHECKPOINT_SECONDS", 0)


def test_the_same_seed_gives_the_same_weights(
    tiny_bert: Path, tmp_path: Path, trained: Weights
) -> None:
    assert_same(train(tiny_bert, tmp_path), trained, tolerance=0)


def test_another_seed_gives_other_weights(
    tiny_bert: Path, tmp_path: Path, trained: Weights
) -> None:
    other = train(tiny_bert, tmp_path, recipe=RECIPE.model_copy(update={"seed": 1}))
    assert not torch.equal(other["head.weight"], trained["head.weight"])


def test_embeddings_stay_untouched_and_every_other_layer_moves(
    tiny_bert: Path, trained: Weights
) -> None:
    """The pooler is not part of a sentence vector."""
    assert untouched_parts(tiny_bert, trained) == {"embeddings", "pooler"}


@pytest.mark.parametrize("frozen", [1, 2, 9])
def test_frozen_layers_stay_untouched_but_the_last_one_always_learns(
    tiny_bert: Path, tmp_path: Path, frozen: int
) -> None:
    recipe = RECIPE.model_copy(update={"frozen_layers": frozen})
    weights = train(tiny_bert, tmp_path, recipe=recipe)
    assert untouched_parts(tiny_bert, weights) == {"embeddings", "pooler", "encoder.layer.0"}


@pytest.mark.parametrize("contrastive", [0.0, 0.5])
def test_the_loss_falls_on_an_easy_task(
    tiny_bert: Path, tmp_path: Path, contrastive: float
) -> None:
    recipe = RECIPE.model_copy(update={"prompts": 400, "contrastive": contrastive})
    watch = resumed(tiny_bert, tmp_path, recipe=recipe)
    assert np.mean(watch.losses[-8:]) < 0.8 * np.mean(watch.losses[:8])


def test_a_tuned_encoder_tells_domains_apart_with_its_head(tiny_bert: Path, tmp_path: Path) -> None:
    tuner = finetuner(tiny_bert, tmp_path, RECIPE.model_copy(update={"prompts": 1600}))
    tuner.train()
    tuner.save(tmp_path / "tuned")
    unseen = LabelledPrompts.of(prompts(20, *DOMAINS, seed=5))
    logits = tuner.head().logits(encoded(tmp_path / "tuned", [row.text for row in unseen.rows]))
    assert (logits.argmax(1) == unseen.targets).mean() > 0.9


def test_a_rate_near_zero_changes_next_to_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    weights = train(tiny_bert, tmp_path, recipe=RECIPE.model_copy(update={"learning_rate": 1e-12}))
    untouched = load_file(tiny_bert / "model.safetensors")
    assert_same({name: weights[name] for name in untouched}, untouched)


def test_the_head_starts_where_it_is_told(tiny_bert: Path, tmp_path: Path) -> None:
    start = RouterHead(np.random.default_rng(0).random((3, 32), np.float32), np.ones(3, np.float32))
    tuner = EncoderFinetuner(tiny_bert, DATA, start, RECIPE, tmp_path / "checkpoint.pt")
    np.testing.assert_array_equal(tuner.head().weight, start.weight)
    np.testing.assert_array_equal(tuner.head().bias, start.bias)


def test_a_head_that_was_read_does_not_follow_the_training(tiny_bert: Path, tmp_path: Path) -> None:
    tuner = finetuner(tiny_bert, tmp_path)
    before = tuner.head()
    tuner.train()
    np.testing.assert_array_equal(before.weight, UNTRAINED.weight)
    assert np.abs(tuner.head().weight).max() > 0


def test_every_step_is_reported(tiny_bert: Path, tmp_path: Path) -> None:
    watch = resumed(tiny_bert, tmp_path)
    assert watch.steps == [(done, STEPS) for done in range(1, STEPS + 1)]
    assert all(math.isfinite(loss) for loss in watch.losses)


@pytest.mark.parametrize(("seen", "steps"), [(1, 1), (8, 1), (9, 2), (300, 38)])
def test_the_budget_is_in_prompts(tiny_bert: Path, tmp_path: Path, seen: int, steps: int) -> None:
    recipe = RECIPE.model_copy(update={"prompts": seen})
    assert len(resumed(tiny_bert, tmp_path, recipe=recipe).steps) == steps


def test_prompts_are_drawn_with_their_weights(tiny_bert: Path) -> None:
    """90 prompts of one domain and 10 of another: three draws of the one for one of the other."""
    data = LabelledPrompts.of([*prompts(90, "math"), *prompts(10, "law")])
    recipe = RECIPE.model_copy(update={"prompts": 4000})
    batches = encoder_finetuning._schedule(tiny_bert, data, recipe)
    targets = [target for _, batch in batches for target in batch]
    assert len(targets) == 4000
    assert np.mean(targets) == pytest.approx(0.75, abs=0.03)


def test_long_prompts_are_cut_in_the_middle(tiny_bert: Path) -> None:
    rows = prompts(4, *DOMAINS)
    rows = [row.model_copy(update={"text": "court " * 100 + row.text}) for row in rows]
    recipe = RECIPE.model_copy(update={"max_tokens": 16})
    batches = encoder_finetuning._schedule(tiny_bert, LabelledPrompts.of(rows), recipe)
    rows_of_ids = [ids for batch, _ in batches for ids in batch]
    assert {len(ids) for ids in rows_of_ids} == {16}
    ends = {(ids[0], ids[-1]) for ids in rows_of_ids}
    assert ends == {(2, 3)}  # [CLS], [SEP]


def test_a_batch_holds_prompts_of_like_length(tiny_bert: Path) -> None:
    recipe = RECIPE.model_copy(update={"prompts": 256})
    batches = encoder_finetuning._schedule(tiny_bert, DATA, recipe)
    spread = [max(map(len, ids)) - min(map(len, ids)) for ids, _ in batches]
    lengths = [len(row) for ids, _ in batches for row in ids]
    assert np.mean(spread) < 0.25 * (max(lengths) - min(lengths))


def test_unit_vectors_are_the_mean_of_the_states(tiny_bert: Path) -> None:
    bert, row = loaded(tiny_bert), [2, 40, 50, 60, 3]
    with torch.no_grad():
        mean = bert(torch.tensor([row]))[0][0].mean(0)
        vector = unit_vectors(bert, [row])[0]
    torch.testing.assert_close(vector, mean / mean.norm())
    assert float(vector.norm()) == pytest.approx(1.0)


def test_company_does_not_change_a_vector(tiny_bert: Path) -> None:
    """Shorter rows are padded, and padding is neither attended to nor pooled."""
    bert, rows = loaded(tiny_bert), [[2, 40, 3], [2, *range(30, 80), 3], [2, 3]]
    with torch.no_grad():
        together = unit_vectors(bert, rows)
        alone = torch.cat([unit_vectors(bert, [row]) for row in rows])
    torch.testing.assert_close(together, alone)


def test_contrast_of_a_hand_computed_example() -> None:
    """Two rows alike, one across: -ln(e^1 / (e^1 + e^0)) for each of the two, then over three."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = encoder_finetuning._supervised_contrast(vectors, torch.tensor([0, 0, 1]), 1.0)
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)) / 3)


def test_contrast_has_finite_gradients_even_without_pairs() -> None:
    vectors = torch.eye(3, requires_grad=True)
    loss = encoder_finetuning._supervised_contrast(vectors, torch.tensor([0, 1, 2]), 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("steps", [1, 2, 17, 500])
def test_the_rate_rises_once_and_falls_to_nearly_nothing(steps: int) -> None:
    rates = [encoder_finetuning._rate(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(1 / steps)


@pytest.mark.usefixtures("frequent_checkpoints")
@pytest.mark.parametrize("steps", [1, 10, 24])
def test_a_killed_training_ends_like_an_unbroken_one(
    tiny_bert: Path, tmp_path: Path, trained: Weights, steps: int
) -> None:
    """The dropout goes on where it was, too."""
    kill(tiny_bert, tmp_path, steps)
    torch.manual_seed(99)
    assert_same(train(tiny_bert, tmp_path), trained)


@pytest.mark.usefixtures("frequent_checkpoints")
def test_a_training_killed_twice_ends_like_an_unbroken_one(
    tiny_bert: Path, tmp_path: Path, trained: Weights
) -> None:
    kill(tiny_bert, tmp_path, 5)
    kill(tiny_bert, tmp_path, 5)
    assert_same(train(tiny_bert, tmp_path), trained)


@pytest.mark.usefixtures("frequent_checkpoints")
def test_no_step_before_the_checkpoint_is_done_again(tiny_bert: Path, tmp_path: Path) -> None:
    kill(tiny_bert, tmp_path, 10)
    assert resumed(tiny_bert, tmp_path).steps[0] == (11, STEPS)


def test_without_a_checkpoint_a_killed_training_starts_anew(
    tiny_bert: Path, tmp_path: Path, trained: Weights
) -> None:
    kill(tiny_bert, tmp_path)
    assert not (tmp_path / "work").exists()
    assert_same(train(tiny_bert, tmp_path), trained)


@pytest.mark.usefixtures("frequent_checkpoints")
@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 1e-3}, {"prompts": 160}])
def test_a_checkpoint_of_another_recipe_is_ignored(
    tiny_bert: Path, tmp_path: Path, change: Mapping[str, float]
) -> None:
    kill(tiny_bert, tmp_path)
    watch = resumed(tiny_bert, tmp_path, recipe=RECIPE.model_copy(update=dict(change)))
    assert watch.steps[0][0] == 1


@pytest.mark.usefixtures("frequent_checkpoints")
def test_a_checkpoint_of_other_data_is_ignored(tiny_bert: Path, tmp_path: Path) -> None:
    kill(tiny_bert, tmp_path)
    other = LabelledPrompts.of(prompts(20, *DOMAINS, seed=1))
    assert resumed(tiny_bert, tmp_path, data=other).steps[0][0] == 1


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "something else": lambda content: b"not a checkpoint",
}


@pytest.mark.usefixtures("frequent_checkpoints")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_corrupt_checkpoint_is_named(
    tiny_bert: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    kill(tiny_bert, tmp_path)
    checkpoint = tmp_path / "work" / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(DataError, match="corrupt checkpoint") as failure:
        finetuner(tiny_bert, tmp_path).train()
    assert failure.value.message.startswith(f"{checkpoint}: ")
    assert "delete it" in failure.value.message


def test_a_checkpoint_that_lacks_a_part_is_named(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "work" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    torch.save({"step": 3}, checkpoint)
    with pytest.raises(DataError, match="fingerprint"):
        finetuner(tiny_bert, tmp_path).train()


@pytest.mark.usefixtures("frequent_checkpoints")
def test_a_finished_run_keeps_its_checkpoint_until_it_is_measured(
    tiny_bert: Path, tmp_path: Path, trained: Weights
) -> None:
    train(tiny_bert, tmp_path)
    assert len(list((tmp_path / "work").iterdir())) == 1
    assert_same(train(tiny_bert, tmp_path), trained, tolerance=0)


def test_a_saved_encoder_is_a_hugging_face_folder(
    tiny_bert: Path, tmp_path: Path, trained: Weights
) -> None:
    train(tiny_bert, tmp_path)
    state = loaded(tmp_path / "tuned").state_dict()
    assert_same({name: trained[name] for name in state}, dict(state), tolerance=0)
    tokenizers = [folder / "tokenizer.json" for folder in (tmp_path / "tuned", tiny_bert)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def untouched_parts(source: Path, weights: Weights) -> set[str]:
    """Parts of the encoder in which no weight has changed."""
    before = load_file(source / "model.safetensors")
    changed = {name for name, values in before.items() if not torch.equal(weights[name], values)}
    return {part_of(name) for name in before} - {part_of(name) for name in changed}


def part_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[0] == "encoder" else parts[0]


def loaded(folder: Path) -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(folder).eval()


def encoded(folder: Path, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    from polymath.router import open_tokenizer

    rows = [encoding.ids for encoding in open_tokenizer(folder).encode_batch_fast(texts)]
    with torch.no_grad():
        return unit_vectors(loaded(folder), rows).numpy()

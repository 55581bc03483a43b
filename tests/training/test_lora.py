"""Adapters from conversations: they learn, and the same recipe and data give the same adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polymath.errors import DataError
from polymath.training import ChatRow, LoraRecipe, LoraTrainer, fingerprint, lora

ANSWERS = ("blue", "No.", "It is 42, and always was.", "x = 3")
ROWS = [
    ChatRow.model_validate(
        {
            "messages": [
                {"role": "user", "content": f"Question {index}?"},
                {"role": "assistant", "content": answer},
            ]
        }
    )
    for index, answer in enumerate(ANSWERS)
]
RECIPE = LoraRecipe(
    lora_rank=2, learning_rate=1e-2, train_tokens=900, batch_tokens=100, precision="float32"
)
STOP_AFTER = 3
TOO_LONG = ChatRow.model_validate(
    {
        "messages": [
            {"role": "user", "content": "x" * 600},
            {"role": "assistant", "content": "y"},
        ]
    }
)


pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(Exception):
    """Stands for the end of the process."""


@dataclass
class KillAfter:
    """Follows the training and ends it after some steps."""

    steps: float
    seen: int = 0

    def __call__(self, done: int, total: int, loss: float) -> None:
        self.seen += 1
        if self.seen > self.steps:
            raise Killed


def train(model: Path, out: Path, recipe: LoraRecipe = RECIPE) -> dict[str, torch.Tensor]:
    trainer = LoraTrainer(model, ROWS, recipe, out)
    trainer.train()
    trainer.save()
    return load_file(out / "adapter_model.safetensors")


def train_and_kill(model: Path, out: Path, recipe: LoraRecipe = RECIPE) -> None:
    with pytest.raises(Killed):
        LoraTrainer(model, ROWS, recipe, out).train(KillAfter(STOP_AFTER))


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder, trained without a break."""
    out = tmp_path_factory.mktemp("unbroken")
    train(tiny_model, out)
    return out


@pytest.fixture
def killed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that was killed after a checkpoint."""
    monkeypatch.setattr(lora, "CHECKPOINT_SECONDS", 0)
    train_and_kill(tiny_model, tmp_path)
    return tmp_path


def test_an_adapter_that_was_not_trained_is_the_base(tiny_model: Path, tmp_path: Path) -> None:
    before, after = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path).evaluate(ROWS)
    assert before == after


def test_the_same_seed_gives_the_same_adapter_to_the_last_bit(
    tiny_model: Path, unbroken: Path, tmp_path: Path
) -> None:
    train(tiny_model, tmp_path)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes()


def test_another_seed_gives_another_adapter(
    tiny_model: Path, unbroken: Path, tmp_path: Path
) -> None:
    other = train(tiny_model, tmp_path, RECIPE.model_copy(update={"seed": 1}))
    first = load_file(unbroken / "adapter_model.safetensors")
    assert all(not torch.equal(first[name], tensor) for name, tensor in other.items())


def test_a_killed_run_ends_with_the_adapter_of_an_unbroken_one(
    tiny_model: Path, unbroken: Path, killed: Path
) -> None:
    expected = load_file(unbroken / "adapter_model.safetensors")
    torch.testing.assert_close(train(tiny_model, killed), expected, atol=1e-6, rtol=0)


def test_a_killed_run_goes_on_where_its_last_checkpoint_was(tiny_model: Path, killed: Path) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, killed)
    rest = KillAfter(steps=float("inf"))
    trainer.train(rest)
    assert rest.seen == len(trainer.schedule) - STOP_AFTER


def test_a_run_can_be_killed_more_than_once(tiny_model: Path, unbroken: Path, killed: Path) -> None:
    train_and_kill(tiny_model, killed)
    expected = load_file(unbroken / "adapter_model.safetensors")
    torch.testing.assert_close(train(tiny_model, killed), expected, atol=1e-6, rtol=0)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    tiny_model: Path, unbroken: Path, tmp_path: Path
) -> None:
    train_and_kill(tiny_model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    expected = load_file(unbroken / "adapter_model.safetensors")
    torch.testing.assert_close(train(tiny_model, tmp_path), expected, atol=0, rtol=0)


def test_a_run_killed_after_its_last_step_only_has_to_be_saved(
    tiny_model: Path, unbroken: Path, tmp_path: Path
) -> None:
    LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path).train()
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trainer.train(KillAfter(steps=0))
    trainer.save()
    expected = load_file(unbroken / "adapter_model.safetensors")
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected.keys()
    torch.testing.assert_close(load_file(tmp_path / "adapter_model.safetensors"), expected)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lora_rank": 3}, {"learning_rate": 1e-3}, {"train_tokens": 901}]
)
def test_a_checkpoint_of_another_recipe_is_refused(
    tiny_model: Path, killed: Path, change: dict[str, Any]
) -> None:
    other = LoraTrainer(tiny_model, ROWS, RECIPE.model_copy(update=change), killed)
    with pytest.raises(DataError, match="another recipe or other data") as failure:
        other.train()
    assert str(killed / ".checkpoint") in failure.value.message


def test_a_checkpoint_of_other_data_is_refused(tiny_model: Path, killed: Path) -> None:
    with pytest.raises(DataError, match="another recipe or other data"):
        LoraTrainer(tiny_model, ROWS[:-1], RECIPE, killed).train()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss_of_what_is_repeated(
    tiny_model: Path, tmp_path: Path, precision: str
) -> None:
    """The frozen random output layer (|w| = 0.11, |h| = 5.7) has about 0.64 nats to give."""
    recipe = RECIPE.model_copy(
        update={"precision": precision, "train_tokens": 5_000, "lora_rank": 8}
    )
    trainer = LoraTrainer(tiny_model, ROWS, recipe, tmp_path)
    losses: list[float] = []
    trainer.train(lambda done, total, loss: losses.append(loss))
    before, after = trainer.evaluate(ROWS)
    assert after.loss < before.loss - 0.4
    assert sum(losses[-5:]) < sum(losses[:5])


def test_training_leaves_the_base_model_alone(tiny_model: Path, tmp_path: Path) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    before, _ = trainer.evaluate(ROWS)
    trainer.train()
    base, adapted = trainer.evaluate(ROWS)
    assert base == before != adapted


def test_only_the_adapter_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_progress_ends_at_the_budget(tiny_model: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trainer.train(lambda done, total, loss: steps.append((done, total)))
    done = [step[0] for step in steps]
    assert done == sorted(set(done))
    assert steps[-1] == (trainer.total_tokens, trainer.total_tokens)
    assert done[-2] < RECIPE.train_tokens <= done[-1]


def test_an_adapter_folder_is_two_files_without_a_checkpoint(unbroken: Path) -> None:
    names = {file.name for file in unbroken.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {".checkpoint", "adapter_model.safetensors.tmp"} & names


def test_the_weights_are_finite_float16(unbroken: Path) -> None:
    tensors = load_file(unbroken / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_config_says_rank_and_alpha_and_no_path_of_this_machine(unbroken: Path) -> None:
    config = json.loads((unbroken / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (2, 4.0)
    assert config["base_model_name_or_path"] is None
    assert config["inference_mode"] is True


def test_what_is_measured_after_saving_is_what_was_saved(tiny_model: Path, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trainer.finish("tiny", ROWS, trainer.train())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kept = get_peft_model_state_dict(trainer.model)
    assert kept.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in kept.items())


def test_peft_loads_what_the_trainer_measured(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from polymath.training import measure_perplexity

    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    report = trainer.finish("tiny", ROWS, trainer.train())
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    measured = measure_perplexity(loaded, trainer.examples, 0)
    assert measured.loss == pytest.approx(report.loss_after, abs=1e-6)


def test_target_modules_are_the_only_ones_adapted(tiny_model: Path, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"target_modules": ("q_proj", "v_proj")})
    tensors = train(tiny_model, tmp_path, recipe)
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj"}


def test_the_report_says_what_was_done(tiny_model: Path, tmp_path: Path) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    report = trainer.finish("tiny", ROWS[:2], trainer.train())
    before, after = trainer.evaluate(ROWS[:2])
    assert (report.base_model, report.recipe) == ("tiny", RECIPE)
    assert (report.rows, report.data_sha256) == (len(ROWS), fingerprint(ROWS))
    assert (report.steps, report.tokens) == (len(trainer.schedule), trainer.total_tokens)
    assert (report.eval_rows, report.eval_tokens) == (2, after.tokens)
    assert (report.loss_before, report.loss_after) == (before.loss, after.loss)


def test_data_without_an_answer_within_the_length_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="first 8 tokens; raise max_length"):
        LoraTrainer(tiny_model, ROWS, RECIPE.model_copy(update={"max_length": 8}), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_rank", 0),
        ("lora_rank", "two"),
        ("lora_alpha", 0),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("train_tokens", 0),
        ("batch_tokens", -1),
        ("max_length", 7),
        ("precision", "float8"),
        ("seed", 0.5),
        ("rank", 3),
    ],
)
def test_a_recipe_out_of_range_names_the_field_and_the_value(field: str, value: object) -> None:
    with pytest.raises(DataError) as failure:
        LoraRecipe.checked(**{field: value})
    assert failure.value.message.startswith(f"{field}: ")
    assert failure.value.message.endswith(f"found {value!r}")


def test_a_recipe_within_range_is_the_recipe() -> None:
    assert LoraRecipe.checked(**RECIPE.model_dump()) == RECIPE


@pytest.mark.parametrize(("alpha", "expected"), [(None, 6.0), (1.5, 1.5)])
def test_alpha_is_twice_the_rank_unless_it_is_given(alpha: float | None, expected: float) -> None:
    assert LoraRecipe(lora_rank=3, lora_alpha=alpha).alpha == expected


@pytest.fixture
def other_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of the same shapes and file sizes with other weights."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("other") / "base")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_of_another_base_model_is_refused(other_base: Path, killed: Path) -> None:
    with pytest.raises(DataError, match="another base model"):
        LoraTrainer(other_base, ROWS, RECIPE, killed).train()


def test_a_copy_of_the_base_model_is_the_same_base_model(
    tiny_model: Path, killed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "base")
    rest = KillAfter(steps=float("inf"))
    trainer = LoraTrainer(copy, ROWS, RECIPE, killed)
    trainer.train(rest)
    assert rest.seen == len(trainer.schedule) - STOP_AFTER


def test_a_checkpoint_that_does_not_name_its_base_is_gone_on_with(
    tiny_model: Path, killed: Path
) -> None:
    file = killed / ".checkpoint" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["base_sha256"]
    torch.save(state, file)
    rest = KillAfter(steps=float("inf"))
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, killed)
    trainer.train(rest)
    assert rest.seen == len(trainer.schedule) - STOP_AFTER


@pytest.mark.parametrize("damage", ["no pickle", "cut off", "not a dict", "a key is missing"])
def test_a_corrupt_checkpoint_says_what_to_delete(
    tiny_model: Path, killed: Path, damage: str
) -> None:
    file = killed / ".checkpoint" / "state.pt"
    if damage == "no pickle":
        file.write_bytes(b"x")
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        torch.save([1] if damage == "not a dict" else {"step": 1}, file)
    with pytest.raises(DataError, match="corrupt checkpoint") as failure:
        LoraTrainer(tiny_model, ROWS, RECIPE, killed).train()
    assert f"delete {file.parent}" in failure.value.message


@pytest.mark.parametrize(
    ("targets", "named"),
    [((), "nothing"), (("q_proj", "nope"), "'nope'"), (("",), "''"), (("mlp",), "'mlp'")],
)
def test_target_modules_that_do_not_exist_are_named(
    tiny_model: Path, tmp_path: Path, targets: tuple[str, ...], named: str
) -> None:
    with pytest.raises(DataError, match=f"target_modules: {named} .*q_proj"):
        LoraTrainer(tiny_model, ROWS, LoraRecipe.checked(target_modules=targets), tmp_path)


def test_the_report_counts_the_conversations_that_were_used(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [*ROWS, TOO_LONG]
    trainer = LoraTrainer(tiny_model, rows, RECIPE, tmp_path)
    report = trainer.finish("tiny", rows, trainer.train())
    assert (report.rows, report.eval_rows) == (len(ROWS), len(ROWS))


def test_held_out_data_without_answers_is_refused_before_anything_is_saved(
    tiny_model: Path, tmp_path: Path
) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trainer.train()
    with pytest.raises(DataError, match="no held-out row has an answer"):
        trainer.finish("tiny", [TOO_LONG], 1.0)
    assert {file.name for file in tmp_path.iterdir()} == {".checkpoint"}


def factors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The factors of a saved adapter by the names that gradient features give them."""
    return {
        name[name.index("layers.") :].removesuffix(".weight"): weight
        for name, weight in load_file(folder / "adapter_model.safetensors").items()
    }


def test_before_its_first_step_it_is_the_adapter_that_it_starts_from(
    tiny_model: Path, unbroken: Path, tmp_path: Path
) -> None:
    LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path, start=unbroken).save()
    expected = load_file(unbroken / "adapter_model.safetensors")
    torch.testing.assert_close(
        load_file(tmp_path / "adapter_model.safetensors"), expected, atol=0, rtol=0
    )


def test_small_steps_stay_near_the_start(tiny_model: Path, unbroken: Path, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"learning_rate": 1e-6})
    trainer = LoraTrainer(tiny_model, ROWS, recipe, tmp_path, start=unbroken)
    trainer.train()
    expected = load_file(unbroken / "adapter_model.safetensors")
    new = train(tiny_model, tmp_path / "new", recipe)
    trainer.save()
    near = load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(near, expected, atol=1e-3, rtol=0)
    assert all((new[name] - weight).abs().max() > 5e-3 for name, weight in near.items())


def test_training_goes_on_from_the_start(tiny_model: Path, unbroken: Path, tmp_path: Path) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path, start=unbroken)
    _, before = trainer.evaluate(ROWS)
    trainer.train()
    base, after = trainer.evaluate(ROWS)
    assert after.loss < before.loss < base.loss


def test_another_start_gives_another_adapter(
    tiny_model: Path, unbroken: Path, tmp_path: Path
) -> None:
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path, start=unbroken)
    trainer.train()
    trainer.save()
    first = load_file(unbroken / "adapter_model.safetensors")
    other = load_file(tmp_path / "adapter_model.safetensors")
    assert all(not torch.equal(first[name], tensor) for name, tensor in other.items())


@pytest.fixture
def killed_start(
    tiny_model: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a training from `unbroken` that was killed after a checkpoint."""
    monkeypatch.setattr(lora, "CHECKPOINT_SECONDS", 0)
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path, start=unbroken)
    with pytest.raises(Killed):
        trainer.train(KillAfter(STOP_AFTER))
    return tmp_path


def test_a_killed_run_with_a_start_goes_on_where_it_was(
    tiny_model: Path, unbroken: Path, killed_start: Path
) -> None:
    rest = KillAfter(steps=float("inf"))
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, killed_start, start=unbroken)
    trainer.train(rest)
    assert rest.seen == len(trainer.schedule) - STOP_AFTER


@pytest.mark.parametrize("other", ["none", "another"])
def test_a_checkpoint_of_another_start_is_refused(
    tiny_model: Path, killed_start: Path, tmp_path_factory: pytest.TempPathFactory, other: str
) -> None:
    start = None
    if other == "another":
        start = tmp_path_factory.mktemp("another")
        LoraTrainer(tiny_model, ROWS, RECIPE, start).save()
    with pytest.raises(DataError, match="another recipe or other data"):
        LoraTrainer(tiny_model, ROWS, RECIPE, killed_start, start=start).train()


def test_a_checkpoint_without_a_start_is_refused_by_a_run_with_one(
    tiny_model: Path, unbroken: Path, killed: Path
) -> None:
    with pytest.raises(DataError, match="another recipe or other data"):
        LoraTrainer(tiny_model, ROWS, RECIPE, killed, start=unbroken).train()


def test_moments_are_those_of_every_factor(tiny_model: Path, tmp_path: Path) -> None:
    """Gradient features look them up by name and want them in the factors' shapes."""
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    assert trainer.moments == {}
    trainer.train()
    trainer.save()
    shapes = {factor: weight.shape for factor, weight in factors_of(tmp_path).items()}
    assert {factor: mean.shape for factor, (mean, _) in trainer.moments.items()} == shapes
    assert {factor: square.shape for factor, (_, square) in trainer.moments.items()} == shapes
    assert all((square >= 0).all() for _, square in trainer.moments.values())
    assert all(mean.any() and square.any() for mean, square in trainer.moments.values())


def test_gradient_features_take_the_moments(tiny_model: Path, tmp_path: Path) -> None:
    from polymath.experts import encode_prompt, open_features

    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trainer.train()
    trainer.save()
    features, tokenizer = open_features(tiny_model, tmp_path, 64, seed=0)
    prompts = [encode_prompt(tokenizer, row.conversation()[:-1], 99) for row in ROWS]
    taken = torch.from_numpy(features.of(prompts, trainer.moments))
    torch.testing.assert_close(taken.norm(dim=1), torch.ones(len(prompts)))
    assert not torch.allclose(taken, torch.from_numpy(features.of(prompts)), atol=0.1)


def test_moments_survive_the_end_of_the_process(tiny_model: Path, tmp_path: Path) -> None:
    """Killed between the last step and what is done with it."""
    trainer = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    trainer.train()
    again = LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path)
    again.train(KillAfter(steps=0))
    torch.testing.assert_close(again.moments, trainer.moments, atol=0, rtol=0)


def test_an_adapter_is_whole_as_soon_as_its_weights_are_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it is saved: who finds the weights takes the adapter for finished."""
    from peft import LoraConfig

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(LoraConfig, "save_pretrained", killed)
    with pytest.raises(Killed):
        LoraTrainer(tiny_model, ROWS, RECIPE, tmp_path).save()
    assert not (tmp_path / "adapter_model.safetensors").exists()

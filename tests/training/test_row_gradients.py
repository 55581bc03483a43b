"""Gradients of many prompts: each its own, and none computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from polymath.experts import AdamMoments, GradientFeatures, Prompt, encode_prompt, open_features
from polymath.training.row_gradients import row_gradients
from tests.conftest import write_random_adapter
from tests.training.conftest import Killed

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIMENSIONS = 64
HALF = 5e-4
"""The most that float16 rounds off a number below 1."""

LENGTHS = (9, 3, 14, 3, 7, 20, 5, 11, 2, 16)
PROMPTS = [Prompt(tuple(range(i, i + length)), range(length)) for i, length in enumerate(LENGTHS)]

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeFeatures(GradientFeatures):
    """A direction that follows from the ids; it notes for whom it was asked."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    @property
    def dimensions(self) -> int:
        return DIMENSIONS

    def of(
        self, prompts: Sequence[Prompt], moments: AdamMoments | None = None
    ) -> NDArray[np.float32]:
        self.asked += prompts
        return np.stack([direction(prompt) for prompt in prompts])


class KillAfter:
    """Ends the process when so many prompts are done."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts

    def __call__(self, done: int, total: int) -> None:
        if done >= self.prompts:
            raise Killed


def direction(prompt: Prompt) -> NDArray[np.float32]:
    vector = np.random.default_rng(list(prompt.ids)).normal(size=DIMENSIONS)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def directions(prompts: Sequence[Prompt] = PROMPTS) -> NDArray[np.float32]:
    return np.stack([direction(prompt) for prompt in prompts])


def stand(file: Path) -> Path:
    """What says how far the file is."""
    return file.with_suffix(".json")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymath.training.row_gradients.BATCH_TOKENS", 20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "work" / "features.f16"


@pytest.fixture
def killed(file: Path) -> Path:
    """The file of a run that was killed half-way."""
    with pytest.raises(Killed):
        row_gradients(FakeFeatures(), PROMPTS, None, file, "key", KillAfter(len(PROMPTS) // 2))
    return file


def gone_on_with(file: Path, key: str = "key") -> list[Prompt]:
    """For whom a second run asks, which must give what an unbroken one gives."""
    features = FakeFeatures()
    found = row_gradients(features, PROMPTS, None, file, key)
    np.testing.assert_allclose(found, directions(), atol=HALF)
    return features.asked


@pytest.mark.parametrize("preconditioned", [False, True])
def test_they_are_what_each_prompt_has_alone(
    tiny_model: Path, tmp_path: Path, file: Path, preconditioned: bool
) -> None:
    import torch

    adapter = write_random_adapter(tmp_path / "adapter", tiny_model, seed=1)
    features, tokenizer = open_features(tiny_model, adapter, DIMENSIONS, seed=0)
    texts = ["What is the capital of France?", "sort a list", "x" * 50, "é", "Is it in force?"]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": t}], 99) for t in texts]
    moments = {
        f"{name[name.index('layers.') :].removesuffix('.default.weight')}": (
            torch.full_like(weight, 1e-3),
            torch.full_like(weight, 1e-5),
        )
        for name, weight in features.model.named_parameters()
        if "lora_" in name
    }
    given = moments if preconditioned else None
    found = row_gradients(features, prompts, given, file, "key")
    alone = np.concatenate([features.of([prompt], given) for prompt in prompts])
    np.testing.assert_allclose(found, alone, atol=HALF)


def test_rows_keep_their_places(file: Path) -> None:
    found = row_gradients(FakeFeatures(), PROMPTS, None, file, "key")
    np.testing.assert_allclose(found, directions(), atol=HALF)


def test_they_are_float32_of_unit_length(file: Path) -> None:
    found = row_gradients(FakeFeatures(), PROMPTS, None, file, "key")
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_prompt_that_pulls_nowhere_stays_zero(file: Path) -> None:
    class FakeSilence(FakeFeatures):
        def of(
            self, prompts: Sequence[Prompt], moments: AdamMoments | None = None
        ) -> NDArray[np.float32]:
            return np.zeros((len(prompts), DIMENSIONS), dtype=np.float32)

    assert not row_gradients(FakeSilence(), PROMPTS, None, file, "key").any()


def test_no_pass_has_more_padded_tokens_than_allowed(file: Path) -> None:
    passes: list[int] = []

    class FakeWatched(FakeFeatures):
        def of(
            self, prompts: Sequence[Prompt], moments: AdamMoments | None = None
        ) -> NDArray[np.float32]:
            passes.append(len(prompts) * max(len(prompt.ids) for prompt in prompts))
            return super().of(prompts, moments)

    row_gradients(FakeWatched(), PROMPTS, None, file, "key")
    assert max(passes) <= 20
    assert len(passes) < len(PROMPTS)


def test_every_prompt_is_asked_for_once(file: Path) -> None:
    asked = gone_on_with(file)
    assert sorted(prompt.ids for prompt in asked) == sorted(prompt.ids for prompt in PROMPTS)


def test_a_finished_run_computes_nothing_again(file: Path) -> None:
    first = row_gradients(FakeFeatures(), PROMPTS, None, file, "key")
    again = FakeFeatures()
    np.testing.assert_array_equal(row_gradients(again, PROMPTS, None, file, "key"), first)
    assert again.asked == []


@pytest.mark.parametrize("done", range(1, len(PROMPTS) + 1))
def test_a_killed_run_computes_only_what_is_missing(file: Path, done: int) -> None:
    first = FakeFeatures()
    with pytest.raises(Killed):
        row_gradients(first, PROMPTS, None, file, "key", KillAfter(done))
    second = gone_on_with(file)
    assert len(first.asked) >= done
    assert not set(first.asked) & set(second)
    assert set(first.asked) | set(second) == set(PROMPTS)


def test_a_run_killed_in_a_pass_does_that_pass_again(file: Path) -> None:
    class FakeLightning(FakeFeatures):
        """Strikes at the third pass."""

        passes = 0

        def of(
            self, prompts: Sequence[Prompt], moments: AdamMoments | None = None
        ) -> NDArray[np.float32]:
            self.passes += 1
            if self.passes == 3:
                raise Killed
            return super().of(prompts, moments)

    first = FakeLightning()
    with pytest.raises(Killed):
        row_gradients(first, PROMPTS, None, file, "key")
    assert set(gone_on_with(file)) == set(PROMPTS) - set(first.asked)


def test_progress_rises_to_all_the_prompts(killed: Path) -> None:
    steps: list[tuple[int, int]] = []
    row_gradients(FakeFeatures(), PROMPTS, None, killed, "key", lambda *step: steps.append(step))
    done = [step[0] for step in steps]
    assert done == sorted(set(done))
    assert steps[-1] == (len(PROMPTS), len(PROMPTS))


def test_another_key_starts_anew(killed: Path) -> None:
    assert len(gone_on_with(killed, "another key")) == len(PROMPTS)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"1",
        b"{}",
        b'{"key": "key"}',
        b'{"key": "key", "batches": []}',
    ],
    ids=repr,
)
def test_a_damaged_stand_starts_anew(killed: Path, damage: bytes) -> None:
    stand(killed).write_bytes(damage)
    assert len(gone_on_with(killed)) == len(PROMPTS)


def test_without_its_stand_a_file_starts_anew(killed: Path) -> None:
    stand(killed).unlink()
    assert len(gone_on_with(killed)) == len(PROMPTS)


def test_without_its_file_a_stand_starts_anew(killed: Path) -> None:
    killed.unlink()
    assert len(gone_on_with(killed)) == len(PROMPTS)


@pytest.mark.parametrize("left", [0, 1, 100, len(PROMPTS) * DIMENSIONS * 2 - 1])
def test_a_file_that_was_cut_off_starts_anew(killed: Path, left: int) -> None:
    """Its stand speaks of rows that it has lost."""
    killed.write_bytes(killed.read_bytes()[:left])
    assert len(gone_on_with(killed)) == len(PROMPTS)

"""Which head is kept: scores of finished folds, and what centres must win."""

from __future__ import annotations

from pathlib import Path

import pytest

from polymath.training.router_validation import LEAST_GAIN, FoldJournal, SourceScores


@pytest.mark.parametrize(
    ("gain", "kept"),
    [(-0.1, False), (0.0, False), (LEAST_GAIN / 2, False), (2 * LEAST_GAIN, True), (0.3, True)],
)
def test_centres_are_kept_where_they_win_enough(gain: float, kept: bool) -> None:
    scores = SourceScores({"a": 0.5, "b": 0.7}, {"a": 0.5 + 2 * gain, "b": 0.7})
    assert scores.keeps_centres is kept
    assert scores.kept == (scores.centred if kept else scores.plain)
    assert scores.mean == pytest.approx(0.6 + gain * kept)


def test_without_a_source_left_out_the_linear_part_stands_alone() -> None:
    scores = SourceScores()
    assert not scores.keeps_centres
    assert (scores.kept, scores.mean) == ({}, 0.0)


def test_a_journal_remembers_finished_folds(tmp_path: Path) -> None:
    journal = FoldJournal(tmp_path / "folds.json", "key")
    journal.add("a", 0.5, 0.6)
    journal.add("b", 0.7, 0.4)
    again = FoldJournal(tmp_path / "folds.json", "key").scores
    assert again == SourceScores({"a": 0.5, "b": 0.7}, {"a": 0.6, "b": 0.4})


def test_a_journal_forgets_what_was_trained_otherwise(tmp_path: Path) -> None:
    FoldJournal(tmp_path / "folds.json", "key").add("a", 0.5, 0.6)
    assert FoldJournal(tmp_path / "folds.json", "another key").scores == SourceScores()

"""Combiners: what several rows say becomes one distribution."""

from __future__ import annotations

import pytest
import torch

from polymath.experts import Select

LOGITS = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_select_is_the_log_softmax_of_its_row(row: int) -> None:
    log_probs, _ = Select(row)(LOGITS, None)
    assert torch.equal(log_probs, LOGITS[row].log_softmax(-1))


def test_select_gives_a_distribution() -> None:
    log_probs, _ = Select(1)(LOGITS, None)
    assert log_probs.exp().sum().item() == pytest.approx(1.0)


def test_select_takes_the_first_row_unless_told_otherwise() -> None:
    assert torch.equal(Select()(LOGITS, None)[0], Select(0)(LOGITS, None)[0])


def test_select_does_not_see_the_other_rows() -> None:
    alone, _ = Select(0)(LOGITS[2:], None)
    among, _ = Select(2)(LOGITS, None)
    assert torch.equal(alone, among)


@pytest.mark.parametrize("state", [None, 3, {"step": 1}])
def test_select_hands_the_state_on(state: object) -> None:
    assert Select()(LOGITS, state)[1] is state


def test_select_leaves_the_logits_alone() -> None:
    before = LOGITS.clone()
    Select(1)(LOGITS, None)
    assert torch.equal(LOGITS, before)

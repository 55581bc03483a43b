"""`train combiner`: the best share of a small model, fitted on what both say of known answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from polymath.errors import DataError
from polymath.experts import (
    COMBINER_CARD,
    COMBINER_GRAPH,
    CombinerCard,
    CombinerKind,
    CombinerState,
    open_combiner,
)
from polymath.training import ChatRow, combiner_training, fingerprint, train_combiner
from polymath.training.combiner_training import HELD_OUT, UNKNOWN, fit_share
from polymath.training.examples import IGNORED, encode_chat
from tests.training.conftest import Progress

Floats = NDArray[np.float32]
STATE = CombinerState(torch.zeros(2), torch.zeros(2), 0)
VOCABULARY = 258
NAMES = ("big", "math")
NETWORKS: tuple[CombinerKind, ...] = ("entropy", "full")

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeScorer:
    """Stands for a model: it knows what follows some places of a text, and guesses elsewhere.

    Args:
        knows: whether it knows the token after a place.
        sure: logit of a token that it knows.
        seed: of its guesses; None guesses evenly, and so tells that it does not know.
        support: tokens that it tells, as an upstream does; the others are minus infinity.
    """

    def __init__(
        self,
        knows: Callable[[int], bool],
        sure: float = 9.0,
        seed: int | None = None,
        support: int | None = None,
    ) -> None:
        self.calls = 0
        self._knows, self._sure, self._seed, self._support = knows, sure, seed, support

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        self.calls += 1
        logits = torch.zeros(len(tokens), VOCABULARY)
        if self._seed is not None:
            random = torch.Generator().manual_seed(self._seed + sum(tokens))
            logits = 3 * torch.randn(logits.shape, generator=random)
        for place, token in enumerate(tokens[1:]):
            if self._knows(place):
                logits[place, token] = self._sure
        if self._support is not None:
            least = logits.topk(self._support).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        return logits


def even(place: int) -> bool:
    return place % 2 == 0


def odd(place: int) -> bool:
    return place % 2 == 1


def always(place: int) -> bool:
    return True


def never(place: int) -> bool:
    return False


def guesses() -> tuple[FakeScorer, FakeScorer]:
    """Two that know different places, and guess with as much certainty elsewhere."""
    return FakeScorer(even, 6.0, seed=1), FakeScorer(odd, 6.0, seed=2)


def honest() -> tuple[FakeScorer, FakeScorer]:
    """Two that know different places, and are uncertain elsewhere."""
    return FakeScorer(even), FakeScorer(odd)


def chats(count: int) -> list[ChatRow]:
    return [
        ChatRow.model_validate(
            {
                "messages": [
                    {"role": "user", "content": f"What is {number} times {number}?"},
                    {"role": "assistant", "content": f"It is {number * number}, I think."},
                ]
            }
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


Train = Callable[..., CombinerCard]


@pytest.fixture
def train(tokenizer: Any, tmp_path: Path) -> Train:
    """Trains on twelve conversations into `tmp_path`, unless told otherwise."""

    def trained(
        kind: CombinerKind,
        scorers: tuple[FakeScorer, FakeScorer] | None = None,
        rows: Sequence[ChatRow] | None = None,
        names: tuple[str, str] = NAMES,
        out: Path = tmp_path,
        **more: Any,
    ) -> CombinerCard:
        return train_combiner(
            chats(12) if rows is None else rows,
            tokenizer,
            names,
            scorers or honest(),
            kind,
            out,
            **more,
        )

    return trained


def answer_logits(
    tokenizer: Any, rows: Sequence[ChatRow], scorers: Sequence[FakeScorer]
) -> tuple[Tensor, Tensor]:
    """Logits of both before each answer token, [2, tokens, vocab], and the tokens."""
    logits, answers = [], []
    for row in rows:
        example = encode_chat(tokenizer, row, 1024)
        assert example is not None
        places = [p for p, label in enumerate(example.labels) if label != IGNORED]
        before = [place - 1 for place in places]
        logits.append(torch.stack([scorer(example.ids)[before] for scorer in scorers]))
        answers += [example.ids[place] for place in places]
    return torch.cat(logits, 1), torch.tensor(answers)


def perplexity(log_probs: Tensor, answers: Tensor) -> float:
    """Of distributions, [tokens, vocab]."""
    return math.exp(-log_probs.gather(-1, answers[:, None]).double().mean())


# --- a constant -----------------------------------------------------------------------------------


def likelihood(large: Floats, small: Floats, share: float) -> float:
    mixed = (1 - share) * np.exp(large, dtype=float) + share * np.exp(small, dtype=float)
    return float(np.log(mixed).mean())


nats = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=30)


@settings(max_examples=60)
@given(nats)
def test_no_share_of_a_grid_is_better(values: list[tuple[float, float]]) -> None:
    large, small = np.array(values, np.float32).T
    best = likelihood(large, small, fit_share(large, small))
    grid = [likelihood(large, small, share) for share in np.linspace(0, 1, 101)]
    assert best >= max(grid) - 1e-6


@given(nats)
def test_a_share_lies_between_nothing_and_all(values: list[tuple[float, float]]) -> None:
    large, small = np.array(values, np.float32).T
    assert 0 <= fit_share(large, small) <= 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_that_is_always_better_gets_everything(share: float) -> None:
    better, worse = np.full(9, -0.5, np.float32), np.linspace(-9, -1, 9, dtype=np.float32)
    assert fit_share(*((better, worse) if share == 0 else (worse, better))) == share


@given(nats)
def test_models_that_change_places_change_their_shares(values: list[tuple[float, float]]) -> None:
    """As good, not as large: where both say the same of every token any share is the best."""
    large, small = np.array(values, np.float32).T
    one, other = fit_share(large, small), fit_share(small, large)
    found = likelihood(large, small, 1 - other)
    assert found == pytest.approx(likelihood(large, small, one), abs=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.9])
def test_the_share_that_tokens_were_drawn_with_is_found(share: float) -> None:
    random = np.random.default_rng(0)
    large, small = random.dirichlet(np.full(20, 0.3), size=2)
    drawn = random.choice(20, size=20_000, p=(1 - share) * large + share * small)
    logs = np.log(np.stack([large, small]) + 1e-12).astype(np.float32)
    assert fit_share(logs[0, drawn], logs[1, drawn]) == pytest.approx(share, abs=0.02)


def test_the_mean_is_one_half_and_fits_nothing(train: Train) -> None:
    card = train("mean")
    assert (card.kind, card.share) == ("mean", 0.5)
    assert card.perplexity["fit"] == card.perplexity["mean"]


def test_a_constant_is_the_best_of_the_rows_that_it_is_fitted_on(
    train: Train, tokenizer: Any
) -> None:
    rows = chats(12)
    fitted = [row for index, row in enumerate(rows) if index % HELD_OUT != HELD_OUT - 1]
    logits, answers = answer_logits(tokenizer, fitted, guesses())
    chosen = logits.log_softmax(-1).gather(-1, answers[None, :, None].expand(2, -1, 1))[..., 0]
    expected = fit_share(*chosen.numpy())
    assert 0.05 < expected < 0.95
    assert train("constant", guesses()).share == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("knowing", "share"), [(0, 0.0), (1, 1.0)])
def test_the_one_that_knows_everything_gets_everything(
    train: Train, knowing: int, share: float
) -> None:
    scorers = [FakeScorer(never), FakeScorer(never)]
    scorers[knowing] = FakeScorer(always)
    card = train("constant", (scorers[0], scorers[1]))
    assert card.share == share
    assert card.perplexity["fit"] == card.perplexity[("large", "small")[knowing]]


# --- a network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_trusts_the_one_that_is_certain(train: Train, kind: CombinerKind) -> None:
    """One of both always knows; a constant of one half loses a bit a token."""
    constant, network = train("constant").perplexity["fit"], train(kind).perplexity["fit"]
    assert constant == pytest.approx(2, rel=0.1)
    assert network < 1.15


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_can_tell_nothing_is_like_the_constant(
    train: Train, kind: CombinerKind
) -> None:
    """The small model is the large one: no share is better than another."""
    same = (FakeScorer(even, seed=1), FakeScorer(even, seed=1))
    card = train(kind, same)
    assert card.perplexity["fit"] == pytest.approx(card.perplexity["large"], rel=1e-3)


def test_the_graph_says_what_the_network_said(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[Any] = []
    export = combiner_training._export

    def noted(network: Any, *rest: Any) -> None:
        networks.append(network)
        export(network, *rest)

    monkeypatch.setattr(combiner_training, "_export", noted)
    train("full", guesses())
    logits = 4 * torch.randn(50, 2, VOCABULARY, generator=torch.Generator().manual_seed(3))
    opened = open_combiner(tmp_path)
    for both in logits:
        features = combiner_training.mixing_features("full", both.log_softmax(-1))
        with torch.inference_mode():
            expected = float(networks[0](features[None]).sigmoid())
        assert opened.share(features) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_same_seed_gives_the_same_files(
    train: Train, tmp_path: Path, kind: CombinerKind, seed: int
) -> None:
    def files(out: Path) -> list[bytes]:
        train(kind, guesses(), out=out, seed=seed)
        return [(out / name).read_bytes() for name in (COMBINER_CARD, COMBINER_GRAPH)]

    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_another_seed_gives_another_network(train: Train, tmp_path: Path) -> None:
    graphs = []
    for seed in (0, 1):
        train("entropy", guesses(), seed=seed)
        graphs.append((tmp_path / COMBINER_GRAPH).read_bytes())
    assert graphs[0] != graphs[1]


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "constant", *NETWORKS])
def test_the_perplexities_are_those_of_the_rows_held_out(
    train: Train, tokenizer: Any, tmp_path: Path, kind: CombinerKind
) -> None:
    """Of the folder as it is served, token by token."""
    card = train(kind, guesses())
    held = chats(12)[HELD_OUT - 1 :: HELD_OUT]
    logits, answers = answer_logits(tokenizer, held, guesses())
    opened = open_combiner(tmp_path)
    mixed = torch.stack([opened(logits[:, place], STATE)[0] for place in range(len(answers))])
    large, small = logits.log_softmax(-1)
    mean = torch.logaddexp(large, small) - math.log(2)
    expected = {"large": large, "small": small, "mean": mean, "fit": mixed}
    assert card.perplexity == {
        name: pytest.approx(perplexity(log_probs, answers), rel=1e-4)
        for name, log_probs in expected.items()
    }
    assert card.tokens["held_out"] == len(answers)


def test_the_card_says_where_it_comes_from(train: Train, tmp_path: Path) -> None:
    card = train("entropy", names=("gpt", "law"))
    saved = json.loads((tmp_path / COMBINER_CARD).read_text(encoding="utf-8"))
    assert CombinerCard.model_validate(saved) == card
    assert (card.large, card.small, card.share) == ("gpt", "law", None)
    assert card.data_sha256 == fingerprint(chats(12))


def test_a_third_is_held_out(train: Train, tokenizer: Any) -> None:
    examples = [encode_chat(tokenizer, row, 1024) for row in chats(7)]
    sizes = [sum(label != IGNORED for label in one.labels) for one in examples if one]
    held = sum(sizes[HELD_OUT - 1 :: HELD_OUT])
    assert train("mean", rows=chats(7)).tokens == {"fitted": sum(sizes) - held, "held_out": held}


def test_a_constant_takes_the_place_of_a_network(train: Train, tmp_path: Path) -> None:
    train("entropy")
    assert (tmp_path / COMBINER_GRAPH).exists()
    share = train("constant").share
    assert not (tmp_path / COMBINER_GRAPH).exists()
    assert open_combiner(tmp_path).weights(STATE)[1] == share


def test_progress_counts_every_conversation(train: Train) -> None:
    progress = Progress()
    train("mean", progress=progress)
    assert [done for _, done, total in progress.seen if total == 12] == list(range(13))


# --- what is kept ---------------------------------------------------------------------------------


def test_another_kind_asks_nobody_again(train: Train) -> None:
    first = honest()
    again = honest()
    cards = [train("constant", first), train("entropy", again), train("full", again)]
    assert [scorer.calls for scorer in first] == [12, 12]
    assert [scorer.calls for scorer in again] == [0, 0]
    assert len({card.perplexity["mean"] for card in cards}) == 1


@pytest.mark.parametrize(
    "changed", [{"names": ("big", "law")}, {"names": ("huge", "math")}, {"rows": chats(9)}]
)
def test_other_data_or_models_are_scored_anew(train: Train, changed: dict[str, Any]) -> None:
    train("mean", guesses())
    scorers = honest()
    card = train("mean", scorers, **changed)
    assert [scorer.calls for scorer in scorers] == [len(changed.get("rows", chats(12)))] * 2
    train("mean", guesses(), **changed)
    assert train("mean", guesses(), **changed) == card


def test_nothing_is_kept_of_scores_that_broke_off(train: Train, tmp_path: Path) -> None:
    def breaks(tokens: Sequence[int]) -> Tensor:
        raise ConnectionError

    broken: Any = (breaks, breaks)
    with pytest.raises(ConnectionError):
        train("mean", broken)
    assert list(tmp_path.iterdir()) == []
    assert train("mean").tokens


# --- what cannot be fitted ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_conversations_are_refused(train: Train, tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match="at least 3 conversations with an answer"):
        train("constant", rows=chats(count))
    assert not (tmp_path / COMBINER_CARD).exists()


def test_three_conversations_are_enough(train: Train) -> None:
    assert train("constant", rows=chats(3)).tokens["held_out"] > 0


def test_answers_that_come_too_late_are_none(train: Train) -> None:
    turns = [{"role": "user", "content": "x" * 1100}, {"role": "assistant", "content": "y"}]
    late = ChatRow.model_validate({"messages": turns})
    with pytest.raises(DataError, match="no conversation has an answer"):
        train("mean", rows=[late] * 5)
    assert train("mean", rows=[*chats(3), late]).tokens == train("mean", rows=chats(3)).tokens


# --- an upstream, which tells its likeliest tokens alone ------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "constant", *NETWORKS])
def test_a_model_that_tells_a_few_tokens_can_be_mixed(
    train: Train, tmp_path: Path, kind: CombinerKind
) -> None:
    few = (FakeScorer(even, seed=1, support=4), FakeScorer(odd, seed=2))
    card = train(kind, few)
    assert all(math.isfinite(value) for value in card.perplexity.values())
    assert card.perplexity["fit"] < card.perplexity["large"]
    logits = torch.full((2, VOCABULARY), -math.inf)
    logits[0, :4] = logits[1] = 0.0
    found = open_combiner(tmp_path)(logits, STATE)[0]
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_an_answer_that_is_not_told_is_as_good_as_impossible(train: Train) -> None:
    """Its support is one token, which is wrong at every second place."""
    card = train("mean", (FakeScorer(even, seed=1, support=1), FakeScorer(never)))
    known = math.log(card.perplexity["large"]) / -UNKNOWN
    assert 0.3 < known < 0.7
    assert card.perplexity["small"] == pytest.approx(VOCABULARY, rel=1e-4)

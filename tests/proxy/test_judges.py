"""How the answer of a cheap expert is judged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymath.errors import DataError, UpstreamFailed
from polymath.experts import JudgeSettings
from polymath.proxy import Reference, read_references
from polymath.proxy.answering import Body
from polymath.proxy.judges import MetaRanking, answer_confidence, open_judge, weighted_votes
from tests.conftest import write_jsonl
from tests.proxy.fake_expert import FakeExpert, among, answer, request, scored

GOOD = Reference("What is 2 + 2?", "4", 1.0)
BAD = Reference("What is 3 + 3?", "7", 0.0)
MINE = answer("A civil wrong.")


def preference(**logprobs: float) -> dict[str, Any]:
    """An answer of one token with the log-probabilities of the likeliest ones."""
    top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    token = {"token": top[0]["token"] if top else "", "logprob": 0.0, "top_logprobs": top}
    return answer("A", logprobs={"content": [token]})


class FakeRanker(FakeExpert):
    """Stands for a judge model: prefers the answer that holds a text, wherever it stands."""

    def __init__(self, preferred: str) -> None:
        super().__init__()
        self._preferred = preferred

    async def whole(self, body: Body) -> dict[str, Any]:
        self.asked.append(body)
        prompt = body["messages"][0]["content"]
        first = prompt.index(self._preferred) < prompt.index("Question B")
        return preference(A=math.log(0.9 if first else 0.1), B=math.log(0.1 if first else 0.9))


async def ranked(judge: FakeExpert, *references: Reference) -> float:
    ranking = MetaRanking("judge", references, among(judge=judge))
    return await ranking(request("What is a tort?"), MINE)


def test_the_log_probability_of_an_answer_is_the_mean_of_its_tokens() -> None:
    assert answer_confidence(scored("x", -1.0, -0.5, 0.0)) == -0.5


@pytest.mark.parametrize("reply", [answer("x"), scored("x"), {"choices": [{"logprobs": None}]}])
def test_an_answer_without_log_probabilities_cannot_be_judged(reply: dict[str, Any]) -> None:
    with pytest.raises(UpstreamFailed, match="no log-probabilities"):
        answer_confidence(reply)


async def test_a_judge_who_prefers_my_answer_votes_for_it() -> None:
    assert await ranked(FakeRanker("A civil wrong."), GOOD) == pytest.approx(0.8)


async def test_a_judge_who_prefers_the_bad_reference_votes_against_it() -> None:
    assert await ranked(FakeRanker(BAD.answer), BAD) == pytest.approx(-0.8)


async def test_to_be_worse_than_a_good_reference_or_better_than_a_bad_one_says_nothing() -> None:
    assert await ranked(FakeRanker(GOOD.prompt), GOOD) == 0
    assert await ranked(FakeRanker("A civil wrong."), BAD) == 0


async def test_a_judge_who_prefers_a_place_has_no_vote() -> None:
    assert await ranked(FakeExpert(preference(A=-0.1, B=-3.0)), GOOD, BAD) == 0


async def test_each_pair_is_shown_in_both_orders_and_the_judge_says_one_token() -> None:
    judge = FakeRanker("A civil wrong.")
    await ranked(judge, GOOD)
    prompts = [body["messages"][0]["content"] for body in judge.asked]
    mine_first = [p.index("A civil wrong.") < p.index("What is 2 + 2?") for p in prompts]
    assert sorted(mine_first) == [False, True]
    assert {body["max_tokens"] for body in judge.asked} == {1}
    assert all(body["logprobs"] and body["top_logprobs"] == 20 for body in judge.asked)


async def test_places_within_the_texts_are_not_filled_in() -> None:
    judge = FakeExpert(preference(A=-1.0))
    await MetaRanking("judge", [GOOD], among(judge=judge))(
        request("Say {second_answer} and {first_answer}."), MINE
    )
    first = judge.asked[0]["messages"][0]["content"]
    assert "Say {second_answer} and {first_answer}." in first


async def test_long_texts_are_cut() -> None:
    judge = FakeExpert(preference(A=-1.0))
    await ranked(judge, Reference("x" * 10_000, "y" * 10_000, 1.0))
    assert len(judge.asked[0]["messages"][0]["content"]) < 4_000


@pytest.mark.parametrize(
    "reply",
    [
        answer("A"),
        preference(),
        preference(Yes=-0.1, No=-3.0),
        answer("A", logprobs={"content": []}),
        answer("A", logprobs={"content": None}),
        answer("A", logprobs={"content": [{"token": "A", "top_logprobs": None}]}),
    ],
)
async def test_a_judge_who_says_neither_has_no_vote(reply: dict[str, Any]) -> None:
    assert await ranked(FakeExpert(reply), GOOD) == 0


@pytest.mark.parametrize(
    "logprobs",
    [
        "text",
        [1],
        {"content": [3]},
        {"content": [{"top_logprobs": 3}]},
        {"content": [{"top_logprobs": [{"token": "A"}]}]},
        {"content": [{"top_logprobs": [{"token": "A", "logprob": 1e9}]}]},
    ],
)
async def test_a_judgement_of_another_form_is_a_failure(logprobs: Any) -> None:
    with pytest.raises(UpstreamFailed, match="judge's log-probabilities cannot be read"):
        await ranked(FakeExpert(answer("A", logprobs=logprobs)), GOOD)


async def test_that_the_judge_fails_is_a_failure() -> None:
    with pytest.raises(UpstreamFailed, match="Down"):
        await ranked(FakeExpert(UpstreamFailed("Down.")), GOOD, BAD)


@given(
    st.lists(
        st.tuples(st.floats(-1, 1, allow_subnormal=False), st.floats(0, 1, allow_subnormal=False))
    )
)
def test_the_score_lies_between_the_votes(pairs: list[tuple[float, float]]) -> None:
    votes, scores = [vote for vote, _ in pairs], [score for _, score in pairs]
    total = weighted_votes(votes, scores)
    assert min([0.0, *votes]) - 1e-9 <= total <= max([0.0, *votes]) + 1e-9


def test_a_vote_weighs_what_its_reference_says() -> None:
    assert weighted_votes([1, -1], [0.9, 0.9]) == pytest.approx(0.8)
    assert weighted_votes([1, -1], [0.1, 0.1]) == pytest.approx(-0.8)
    assert weighted_votes([1, -1], [0.5, 0.5]) == 0
    assert weighted_votes([], []) == 0


ROWS: list[dict[str, object]] = [
    {"prompt": f"q{index}", "answer": "a", "score": index / 10} for index in range(11)
]


def test_references_are_read(tmp_path: Path) -> None:
    file = tmp_path / "references.jsonl"
    write_jsonl(file, ROWS[:2])
    file.write_text(file.read_text() + "\n\n")
    assert read_references(file) == [Reference("q0", "a", 0.0), Reference("q1", "a", 0.1)]


@pytest.mark.parametrize(
    "row",
    [
        "no json",
        "[]",
        "3",
        "{}",
        '{"prompt": "a", "answer": "b"}',
        '{"prompt": "a", "answer": "b", "score": 2}',
        '{"prompt": "a", "answer": "b", "score": -0.1}',
        '{"prompt": "a", "answer": "b", "score": NaN}',
        '{"prompt": "a", "answer": "b", "score": null}',
        '{"prompt": "a", "answer": "b", "score": "much"}',
        '{"prompt": "a", "answer": 3, "score": 1}',
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "references.jsonl"
    file.write_text(f'{{"prompt": "a", "answer": "b", "score": 1}}\n{row}\n')
    with pytest.raises(DataError) as caught:
        read_references(file)
    assert caught.value.message.startswith(f"{file}:2: a row is ")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_references_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "references.jsonl"
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"references\.jsonl"):
        read_references(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        read_references(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("pairs", [1, 3, 50])
async def test_the_references_compared_are_spread_over_their_scores(
    tmp_path: Path, pairs: int
) -> None:
    settings = JudgeSettings(
        kind="meta_ranking",
        threshold=0,
        references=write_jsonl(tmp_path / "references.jsonl", list(reversed(ROWS))),
        pairs=pairs,
    )
    judge = FakeExpert(preference(A=-1.0))
    await open_judge(settings, "cheap", among(cheap=judge))(request(), MINE)
    prompts = " ".join(body["messages"][0]["content"] for body in judge.asked)
    shown = [index for index in range(11) if f"q{index}\n" in prompts]
    assert len(shown) == min(pairs, 11)
    if pairs == 3:
        assert shown == [0, 5, 10]


async def test_another_expert_may_judge() -> None:
    judge, cheap = FakeExpert(scored("x", -1.0)), FakeExpert()
    settings = JudgeSettings(kind="logprob", threshold=0)
    assert await open_judge(settings, "cheap", among(cheap=cheap))(request(), judge.said) == -1.0  # type: ignore[arg-type]

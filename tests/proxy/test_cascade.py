"""A cheap expert answers, a judge looks at it, a strong one answers if need be."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from polymath.errors import InvalidRequest, PolymathError, UpstreamFailed
from polymath.experts import ExpertSettings
from polymath.proxy import Body, Cascade, answer_text
from tests.proxy.fake_expert import FakeExpert, among, answer, request, scored

SURE = scored("Cheap.", -0.1, -0.3)
"""-0.2 a token."""
THRESHOLD = -0.5


def cascade(
    cheap: FakeExpert, strong: FakeExpert, confidence: float = 0.0, **judge: Any
) -> Cascade:
    given = {"kind": "logprob", "threshold": THRESHOLD, **judge}
    settings = ExpertSettings.model_validate(
        {"kind": "cascade", "cheap": "small", "strong": "big", "judge": given}
    )

    async def confident(body: Body) -> float:
        return confidence

    return Cascade(settings, among(small=cheap, big=strong), confident)


async def streamed(expert: Cascade, **more: Any) -> list[dict[str, Any]]:
    return [event async for event in await expert.stream(request(stream=True, **more))]


def streamed_text(events: list[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"].get("content", "") for event in events for choice in event["choices"]
    )


async def test_a_sure_answer_is_kept() -> None:
    strong = FakeExpert("Strong.")
    reply = await cascade(FakeExpert(SURE), strong).whole(request())
    assert answer_text(reply) == "Cheap."
    assert strong.asked == []
    assert reply["polymath"]["cascade"] == {
        "expert": "small",
        "trusted": True,
        "judge": "logprob",
        "score": pytest.approx(-0.2),
        "threshold": THRESHOLD,
        "failure": None,
    }


async def test_an_unsure_answer_is_replaced() -> None:
    strong = FakeExpert("Strong.")
    body = request(temperature=0.3)
    reply = await cascade(FakeExpert(scored("Cheap.", -0.1, -1.5)), strong).whole(body)
    assert answer_text(reply) == "Strong."
    assert strong.asked == [body]
    note = reply["polymath"]["cascade"]
    assert (note["expert"], note["trusted"], note["score"]) == ("big", False, pytest.approx(-0.8))


async def test_a_score_at_the_threshold_is_trusted() -> None:
    reply = await cascade(FakeExpert(scored("Cheap.", THRESHOLD)), FakeExpert()).whole(request())
    assert reply["polymath"]["cascade"]["trusted"] is True


@pytest.mark.parametrize("cheap", [SURE, scored("Cheap.", -2.0)])
async def test_streaming_gives_the_same_text(cheap: dict[str, Any]) -> None:
    expert = cascade(FakeExpert(cheap), FakeExpert("Strong."))
    whole, events = await expert.whole(request()), await streamed(expert)
    assert streamed_text(events) == answer_text(whole)
    assert events[0]["polymath"] == whole["polymath"]
    assert all("polymath" not in event for event in events[1:])


async def test_the_cheap_expert_is_asked_for_a_whole_answer_with_log_probabilities() -> None:
    cheap = FakeExpert(SURE)
    await streamed(cascade(cheap, FakeExpert()), stream_options={"include_usage": True}, n=1)
    (asked,) = cheap.asked
    assert asked == {**request(n=1), "stream": False, "logprobs": True}


@pytest.mark.parametrize("wanted", [True, False, None])
async def test_log_probabilities_are_shown_to_who_asked_for_them(wanted: bool | None) -> None:
    reply = await cascade(FakeExpert(SURE), FakeExpert()).whole(request(logprobs=wanted))
    shown = SURE["choices"][0]["logprobs"] if wanted else None
    assert reply["choices"][0]["logprobs"] == shown


@pytest.mark.parametrize(
    ("cheap", "failure"),
    [
        (UpstreamFailed("It is ill."), "It is ill."),
        (InvalidRequest("No tools here."), "No tools here."),
        (answer("Cheap."), "The cheap expert gave no log-probabilities to judge it by."),
        (scored("Cheap."), "The cheap expert gave no log-probabilities to judge it by."),
    ],
)
async def test_where_there_is_no_score_the_strong_expert_answers(
    cheap: dict[str, Any] | PolymathError, failure: str
) -> None:
    expert = cascade(FakeExpert(cheap), FakeExpert("Strong."))
    reply, events = await expert.whole(request()), await streamed(expert)
    assert answer_text(reply) == streamed_text(events) == "Strong."
    for said in (reply, events[0]):
        note = said["polymath"]["cascade"]
        assert (note["trusted"], note["score"], note["failure"]) == (False, None, failure)


@pytest.mark.parametrize(
    "logprobs",
    [
        "text",
        [1],
        3,
        {"content": "text"},
        {"content": [3]},
        {"content": [{}]},
        {"content": [{"logprob": None}]},
        {"content": [{"logprob": "high"}]},
        {"content": 3},
    ],
)
async def test_log_probabilities_of_another_form_are_none(logprobs: Any) -> None:
    cheap = FakeExpert(answer("Cheap.", logprobs=logprobs))
    reply = await cascade(cheap, FakeExpert("Strong.")).whole(request())
    assert answer_text(reply) == "Strong."
    assert reply["polymath"]["cascade"]["failure"]


async def test_a_stream_is_held_back_no_longer_than_the_judge_may_take() -> None:
    cheap = FakeExpert(SURE, delay=5)
    started = time.monotonic()
    events = await streamed(cascade(cheap, FakeExpert("Strong."), timeout=0.1))
    assert time.monotonic() - started < 1
    assert cheap.cancelled
    assert streamed_text(events) == "Strong."
    assert events[0]["polymath"]["cascade"]["failure"] == "no verdict within 0.1 seconds"


async def test_a_client_that_goes_away_stops_the_cheap_expert() -> None:
    cheap, strong = FakeExpert(SURE, delay=5), FakeExpert()
    asking = asyncio.create_task(cascade(cheap, strong).whole(request()))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    assert cheap.cancelled
    assert strong.asked == []


async def test_that_the_strong_expert_fails_is_an_error() -> None:
    ill = FakeExpert(UpstreamFailed("Down."))
    with pytest.raises(UpstreamFailed, match="Down"):
        await cascade(ill, ill).whole(request())


@pytest.mark.parametrize(("confidence", "chosen"), [(0.9, "Cheap."), (0.5, "Cheap."), (0.4, "S.")])
async def test_by_difficulty_one_of_them_is_asked_and_nobody_else(
    confidence: float, chosen: str
) -> None:
    cheap, strong = FakeExpert("Cheap."), FakeExpert("S.")
    expert = cascade(cheap, strong, confidence, kind="difficulty", threshold=0.5)
    body = request(stream_options={"include_usage": True}, stream=True)
    events = [event async for event in await expert.stream(body)]
    assert streamed_text(events) == chosen
    assert [*cheap.asked, *strong.asked] == [body]
    assert events[0]["polymath"]["cascade"]["score"] == confidence

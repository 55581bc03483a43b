"""A small expert writes background, and another one reads it."""

from __future__ import annotations

from typing import Any

import pytest

from polymath.errors import ModelNotFound, PolymathError, UpstreamFailed
from polymath.experts import ExpertSettings
from polymath.proxy import Guided
from tests.proxy.fake_expert import FakeExpert, among, request

BACKGROUND = "A tort is a civil wrong."


def guided(guide: FakeExpert, upstream: FakeExpert, **keys: Any) -> Guided:
    named = {"kind": "guided", "guide": "law", "upstream": "big"}
    settings = ExpertSettings.model_validate({**named, **keys})
    return Guided(settings, among(law=guide, big=upstream))


async def test_the_upstream_reads_what_the_guide_wrote() -> None:
    guide, upstream = FakeExpert(f"  {BACKGROUND}\n"), FakeExpert("It is a wrong.")
    body = request(temperature=1, tools=[{"type": "function"}])
    reply = await guided(guide, upstream, template="Know: {background}").whole(body)
    assert upstream.asked == [
        {**body, "messages": [{"role": "system", "content": f"Know: {BACKGROUND}"}]
         + body["messages"]}
    ]  # fmt: skip
    assert reply["choices"][0]["message"]["content"] == "It is a wrong."
    assert reply["polymath"]["guidance"] == {"expert": "law", "used": True, "failure": None}


async def test_the_guide_is_asked_the_question_alone() -> None:
    guide = FakeExpert(BACKGROUND)
    body = request(stream=True, logprobs=True)
    expert = guided(guide, FakeExpert(), guide_prompt="Facts for {question}?", guide_tokens=50)
    await expert.whole(body)
    assert guide.asked == [
        {
            "model": "law",
            "messages": [{"role": "user", "content": "Facts for What is a tort??"}],
            "max_tokens": 50,
            "temperature": 0,
        }
    ]


async def test_braces_in_the_texts_stay_as_they_are() -> None:
    guide, upstream = FakeExpert("{question} {background} {0}"), FakeExpert()
    await guided(guide, upstream).whole(request("{background} {x}"))
    assert guide.asked[0]["messages"][0]["content"].endswith("{background} {x}")
    assert "{question} {background} {0}" in upstream.asked[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("guide", "failure"),
    [
        (FakeExpert(UpstreamFailed("The guide is ill.")), "The guide is ill."),
        (FakeExpert(ModelNotFound("Nobody.")), "Nobody."),
        (FakeExpert(" \n"), "the background is empty"),
        (FakeExpert({"choices": []}), "the background is empty"),
        (FakeExpert(BACKGROUND, delay=5), "no background within 0.05 seconds"),
    ],
)
async def test_without_background_the_answer_goes_without_and_says_so(
    guide: FakeExpert, failure: str
) -> None:
    upstream = FakeExpert("It is a wrong.")
    body = request()
    expert = guided(guide, upstream, guide_timeout=0.05)
    reply = await expert.whole(body)
    (first, *_) = [event async for event in await expert.stream({**body, "stream": True})]
    assert upstream.asked == [body, {**body, "stream": True}]
    for answer in (reply, first):
        assert answer["polymath"]["guidance"] == {
            "expert": "law",
            "used": False,
            "failure": failure,
        }


async def test_a_late_guide_is_stopped() -> None:
    guide = FakeExpert(BACKGROUND, delay=5)
    await guided(guide, FakeExpert(), guide_timeout=0.05).whole(request())
    assert guide.cancelled


async def test_a_stream_has_the_same_background_and_says_so_in_its_first_chunk() -> None:
    upstream = FakeExpert("It is a wrong.")
    expert = guided(FakeExpert(BACKGROUND), upstream)
    first, *others = [event async for event in await expert.stream(request(stream=True))]
    assert BACKGROUND in upstream.asked[0]["messages"][0]["content"]
    assert first["polymath"]["guidance"]["used"] is True
    assert all("polymath" not in event for event in others)


async def test_that_the_upstream_fails_is_an_error() -> None:
    expert = guided(FakeExpert(BACKGROUND), FakeExpert(UpstreamFailed("Down.")))
    with pytest.raises(PolymathError, match="Down"):
        await expert.whole(request())
    with pytest.raises(PolymathError, match="Down"):
        await expert.stream(request())

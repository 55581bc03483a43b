"""The likeliest tokens of a model behind HTTP: read, named, compared, and refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.scoring_server import BASE, ScoringServer
from polymath.errors import ModelSourceError, UpstreamFailed, UpstreamRefused
from polymath.experts import BaseModelSettings, Engine, EngineSettings, LoraModel, load_models
from polymath.proxy import RemoteScores, Support
from polymath.proxy.remote_scores import PROBE
from tests.proxy.conftest import Connect
from tests.proxy.stand_in import Reply, StandInServer, failing, sends

TEXT = "<|im_start|>Tell me about the moon"
DRAFT = " and more"
SIZE = 6
CLOSE = 1e-4
ASCII = 94
"""Ids of the tiny model below this are characters."""


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> LoraModel:
    bases = {BASE: BaseModelSettings(model="somewhere")}
    return load_models({BASE: tiny_model}, bases, {}, EngineSettings(backend="torch"))[BASE]


@pytest.fixture(scope="module")
def tiny_engine(local: LoraModel) -> Iterator[Engine]:
    engine = Engine({BASE: local}, EngineSettings(backend="torch"))
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=[True, False], ids=["ids", "texts"])
def real(request: pytest.FixtureRequest, tiny_engine: Engine) -> Iterator[ScoringServer]:
    """The tiny model behind HTTP."""
    stand_in = ScoringServer(tiny_engine, by_id=request.param)
    with stand_in.serving() as url:
        stand_in.retold["url"] = url
        yield stand_in


@pytest.fixture
def scores(real: ScoringServer, connect: Connect, local: LoraModel) -> RemoteScores:
    real.requests.clear()
    return RemoteScores(connect(real.retold["url"], num_retries=0), local, SIZE)


def encoded(local: LoraModel, text: str) -> list[int]:
    return list(local.tokenizer.encode(text, add_special_tokens=False))


def log_probs(local: LoraModel, tokens: Sequence[int]) -> Tensor:
    """What the model behind HTTP says after every token."""
    return local.all_logits(None, tokens).log_softmax(-1)


def told(support: Support, expected: Tensor, by_id: bool) -> None:
    """The support is the likeliest tokens; of names by text, those that are whole characters.

    The end of the answer has the empty text, like many others: it is told, or unsure.
    """
    best = set(expected.topk(SIZE).indices.tolist())
    if by_id:
        assert support.log_probs.keys() == best
    named = {index for index in support.log_probs if by_id or index < ASCII}
    assert named >= {index for index in best if index < ASCII}
    values = {index: float(expected[index]) for index in named}
    assert {index: support.log_probs[index] for index in named} == pytest.approx(values, abs=CLOSE)


# --- a real model ---------------------------------------------------------------------------------


async def test_the_support_of_a_text_is_what_the_model_finds_likeliest(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    tokens = encoded(local, TEXT)
    scored = await scores.score(tokens, 0)
    assert scored.calls == 1
    told(scored.supports[0], log_probs(local, tokens)[-1], real.by_id)
    assert "echo" not in real.requests[-1]
    assert real.requests[-1]["max_tokens"] == 1


@pytest.mark.parametrize("token", ["<|im_end|>", "a"])
async def test_one_token_is_as_likely_as_the_model_says(
    scores: RemoteScores, local: LoraModel, token: str
) -> None:
    """However unlikely it is: it is read where it stands in the prompt."""
    tokens, (index,) = encoded(local, TEXT), encoded(local, token)
    expected = float(log_probs(local, tokens)[-1][index])
    assert await scores.nats(tokens, index) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("drafted", [1, 4, len(DRAFT)])
async def test_a_draft_has_a_support_at_each_token_and_after_it(
    scores: RemoteScores, real: ScoringServer, local: LoraModel, drafted: int
) -> None:
    """By texts up to where it cannot be seen whether the drafted token is one of the likeliest."""
    tokens = encoded(local, TEXT + DRAFT[:drafted])
    supports = (await scores.score(tokens, drafted)).supports
    assert len(supports) == drafted + 1 or (supports and not real.by_id)
    expected = log_probs(local, tokens)[-drafted - 1 :]
    for support, row in zip(supports, expected, strict=False):
        told(support, row, real.by_id)


async def test_a_text_is_sent_as_ids_or_as_text(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    tokens = encoded(local, TEXT)
    await scores.score(tokens, 0)
    assert real.requests[-1]["prompt"] == (tokens if real.by_id else TEXT)
    assert ("return_tokens_as_token_ids" in real.requests[-1]) == real.by_id


async def test_the_tokenizers_are_compared_once(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    for _ in range(3):
        await scores.score(encoded(local, TEXT), 0)
    await scores.check()
    probes = [request for request in real.requests if PROBE in str(request["prompt"])]
    assert len(probes) == (2 if real.by_id else 3)  # the one that knows ids not refused them first
    assert len(real.requests) == len(probes) + 3


async def test_every_token_has_its_support_with_the_token_that_follows(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    tokens = encoded(local, TEXT)
    supports = await scores.every(tokens)
    expected = log_probs(local, tokens)
    assert len(supports) == len(tokens)
    for support, row, following in list(zip(supports, expected, tokens[1:], strict=False))[1:]:
        assert support.log_probs[following] == pytest.approx(float(row[following]), abs=CLOSE)
        if real.by_id:
            best = {*row.topk(SIZE).indices.tolist(), following}
            assert support.log_probs.keys() == best


async def test_a_draft_that_is_cut_otherwise_has_one_support(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    """Half of a character is another text, and so other tokens; by ids it is the same."""
    tokens = encoded(local, f"{TEXT}é")[:-1]
    scored = await scores.score(tokens, 1)
    assert (len(scored.supports), scored.calls) == ((2, 1) if real.by_id else (1, 2))
    told(scored.supports[0], log_probs(local, tokens[:-1])[-1], real.by_id)


async def test_a_draft_of_whole_characters_has_all_its_supports(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    """Though each of their tokens is half of one."""
    tokens = encoded(local, f"{TEXT}é")
    supports = (await scores.score(tokens, 2)).supports
    assert len(supports) == 3
    told(supports[-1], log_probs(local, tokens)[-1], real.by_id)


async def test_a_text_that_is_cut_otherwise_cannot_be_measured(
    scores: RemoteScores, real: ScoringServer, local: LoraModel
) -> None:
    tokens = encoded(local, f"{TEXT}é")[:-1]
    if real.by_id:
        assert len(await scores.every(tokens)) == len(tokens)
    else:
        with pytest.raises(UpstreamFailed, match="cuts a text otherwise"):
            await scores.every(tokens)


# --- a support ------------------------------------------------------------------------------------


def test_the_logits_of_a_support_are_minus_infinity_elsewhere() -> None:
    row = Support({1: -0.5, 3: -1.5}).logits(5)
    assert row.tolist() == [-math.inf, -0.5, -math.inf, -1.5, -math.inf]


def test_ids_beyond_the_local_vocabulary_are_left_out() -> None:
    """Large models are often padded to a rounder number of tokens than small ones."""
    row = Support({1: -0.5, 9: -1.5}).logits(3)
    assert row.tolist() == [-math.inf, -0.5, -math.inf]


@pytest.mark.parametrize(
    ("log_probs", "missing"),
    [({0: 0.0}, 0.0), ({0: math.log(0.5), 4: math.log(0.25)}, 0.25), ({0: 1e-6}, 0.0)],
)
def test_the_missing_mass_is_that_of_all_other_tokens(
    log_probs: dict[int, float], missing: float
) -> None:
    assert Support(log_probs).missing_mass == pytest.approx(missing)


# --- replies that are made up ---------------------------------------------------------------------


class FakeVocabulary:
    """Stands for one in which two tokens have the same text, and one is half a character."""

    PIECES = (b"a", b"b", b"b", b"\xc3", b"", b" c")

    def __len__(self) -> int:
        return len(self.PIECES)

    def piece(self, index: int) -> bytes:
        return self.PIECES[index]


class FakeTokenizer:
    """Stands for one that cuts every text the same."""

    chat_template = None
    bos_token_id = None

    def encode(self, text: str, **options: Any) -> list[int]:
        return [0, 5, 0]

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        pieces = [b"</s>" if token == 4 else FakeVocabulary.PIECES[token] for token in tokens]
        return b"".join(pieces).decode("utf-8", "replace")


class FakeLocal:
    """Stands for the local model."""

    vocabulary = FakeVocabulary()
    tokenizer = FakeTokenizer()
    eos_ids = frozenset({4})


Likeliest = Mapping[str, float] | None


def reply(tokens: Sequence[str], likeliest: Sequence[Likeliest], **more: Any) -> Reply:
    logprobs = {"tokens": tokens, "top_logprobs": likeliest}
    return sends({"choices": [{"index": 0, "text": "", "logprobs": logprobs}], **more})


def ids(*indices: int) -> list[str]:
    return [f"token_id:{index}" for index in indices]


ENDED: dict[str, Any] = {"usage": {"completion_tokens": 0}}
AFTER_PROBE = {"a": -0.3, "b": -1.5}
BY_ID = reply(ids(1), [{"token_id:1": -0.3}])
BY_TEXT = reply(["a"], [AFTER_PROBE])
SAME_BY_ID = (BY_ID, reply(ids(0, 5, 0, 1), [None, {}, {}, {}]))
SAME_BY_TEXT = (BY_TEXT, reply(["a", " c", "a", "", "b"], [None, {}, {}, AFTER_PROBE, {}]))
"""What is said of the probe: after it, and of its tokens."""


@pytest.fixture
def fake(server: StandInServer, connect: Connect) -> RemoteScores:
    """Scores of a server that says what a test wants."""
    local: Any = FakeLocal()
    return RemoteScores(connect(num_retries=0), local, 3)


async def test_texts_of_several_tokens_and_of_none_are_left_out(
    server: StandInServer, fake: RemoteScores
) -> None:
    """The empty one may be the end."""
    likeliest = {"a": -0.5, "b": -1.0, "": -1.5, "zzz": -2.0, " c": -9.0}
    server.says(*SAME_BY_TEXT, reply(["a"], [likeliest]))
    (support,) = (await fake.score([0, 0], 0)).supports
    assert support == Support({0: -0.5}, unsure=frozenset({4}))


async def test_how_likely_a_token_is_is_read_where_it_stands(
    server: StandInServer, fake: RemoteScores
) -> None:
    """What is generated after it, if that is listed, is not read."""
    row = {"a": -0.5, "b": -1.0, "": -1.5}
    server.says(*SAME_BY_TEXT, reply(["a", "a", ""], [None, {}, row], **ENDED))
    assert await fake.nats([0, 0], 4) == -1.5
    assert server.requests[-1].body["prompt"] == "aa</s>"
    server.says(reply(["a", "a", "a"], [{}, row, {}]))
    assert await fake.nats([0], 0) == -0.5
    for cut in (reply(["aa", "a"], [row, {}]), reply(["a", ""], [row, row]), reply([], [])):
        server.says(cut)
        assert await fake.nats([0], 0) is None


async def test_a_name_of_several_tokens_is_unsure_where_a_list_is_short(
    server: StandInServer, fake: RemoteScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python gives the value of the last of them, which need not be the one of it."""
    monkeypatch.setattr(FakeVocabulary, "PIECES", (*FakeVocabulary.PIECES, b"a\xc3"))
    server.says(*SAME_BY_TEXT, reply([" c"], [{" c": -0.5, "a": -1.0}]))
    (support,) = (await fake.score([0, 0], 0)).supports
    assert support == Support({5: -0.5}, unsure=frozenset({0}))
    server.says(reply([" c"], [{" c": -0.5, "a": -1.0, "zzz": -2.0}]))
    (support,) = (await fake.score([0, 0], 0)).supports
    assert support == Support({5: -0.5, 0: -1.0})
    server.says(reply(["a"], [{" c": -0.5, "a": -1.0}]))
    (support,) = (await fake.score([0, 0], 0)).supports
    assert support == Support({5: -0.5, 0: -1.0})


async def test_where_nothing_is_listed_the_end_is_asked_for(
    server: StandInServer, fake: RemoteScores
) -> None:
    """llama-cpp-python lists no tokens of an answer that ends at once."""
    row = {"a": -2.5, "": -0.1}
    server.says(
        *SAME_BY_TEXT, reply([], [], **ENDED), reply(["a", "a", ""], [None, {}, row], **ENDED)
    )
    scored = await fake.score([0, 0], 0)
    assert (list(scored.supports), scored.calls) == ([Support({0: -2.5, 4: -0.1})], 2)


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"a": -0.5, " c": -1.0, "zzz": -2.0}, True),
        ({"a": -0.5, "": -1.0, " c": -2.0}, False),
        ({" c": -0.5, "": -1.0, "a": -2.0}, True),
        ({"a": -0.5, "": -1.0, "zzz": -1.5, " c": -2.0}, True),
        ({" c": -0.5, "a": -2.0}, True),
    ],
    ids=["nameless none", "one of three or a fourth", "the likeliest", "a fourth", "short"],
)
async def test_a_draft_counts_as_far_as_its_tokens_are_told_apart_from_the_likeliest(
    server: StandInServer, fake: RemoteScores, row: dict[str, float], whole: bool
) -> None:
    """Two tokens of no text stand as one, so that it may be unclear if ` c` is one of the three."""
    first, last = {"a": -0.1}, {"b": -0.1, "": -3.0, "a": -2.0}
    likeliest = [None, first, row, last, {}]
    server.says(*SAME_BY_TEXT, reply(["a", "a", " c", "", "b"], likeliest))
    scored = await fake.score([0, 0, 5], 2)
    assert (len(scored.supports), scored.calls) == (3 if whole else 1, 1)
    assert scored.supports[0] == Support({0: -0.1})


async def test_an_echo_that_is_off_by_one_is_told(
    server: StandInServer, fake: RemoteScores
) -> None:
    """llama-cpp-python's of a prompt that does not begin with its begin token."""
    for echo in (
        reply(["a", " c", "a", ""], [None, {}, AFTER_PROBE, {"b": -0.1}]),
        reply(["a", " c", "a", ""], [None, {}, AFTER_PROBE, {"b": -0.1}], **ENDED),
        reply(["a", " c", "a", ""], [None, {}, AFTER_PROBE, {"a": -1.9}], **ENDED),
        reply([], []),
    ):
        server.says(BY_TEXT, echo)
        with pytest.raises(
            ModelSourceError, match="the values of other places; it cannot be steered"
        ):
            await fake.check()


async def test_a_begin_token_that_is_not_listed_has_an_empty_support_before_it(
    server: StandInServer, fake: RemoteScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "bos_token_id", 0)
    rows: list[Likeliest] = [None, {"a": -0.1, "": -0.2}, {" c": -0.3}]
    server.says(*SAME_BY_TEXT, reply([" c", " c", ""], rows, **ENDED))
    supports = await fake.every([0, 5, 0, 5])
    assert supports[1:] == [
        Support({}),
        Support({0: -0.1}, unsure=frozenset({4})),
        Support({5: -0.3}),
    ]


async def test_only_the_likeliest_count(server: StandInServer, fake: RemoteScores) -> None:
    """A token that was generated may be listed beside them, in any order."""
    listed = dict(zip(ids(5, 0, 4, 1), [-9.0, -1.0, -0.5, -2.0], strict=True))
    server.says(*SAME_BY_ID, reply(ids(5), [listed]))
    (support,) = (await fake.score([0, 0], 0)).supports
    assert support.log_probs == {4: -0.5, 0: -1.0, 1: -2.0}


async def test_a_begin_token_of_the_upstream_does_no_harm(
    server: StandInServer, fake: RemoteScores
) -> None:
    row = {"token_id:0": -0.1}
    server.says(
        BY_ID,
        reply(ids(4, 0, 5, 0, 1), [None, {}, {}, {}, {}]),
        reply(ids(4, 0, 5, 1), [None, {"token_id:5": -3.0}, row, {"token_id:1": -0.2}]),
    )
    supports = (await fake.score([0, 5], 1)).supports
    assert [support.log_probs for support in supports] == [{0: -0.1}, {1: -0.2}]


async def test_a_server_that_knows_no_ids_is_asked_again_without(
    server: StandInServer, fake: RemoteScores
) -> None:
    server.says(failing(400), *SAME_BY_TEXT, reply(["b"], [{"a": -0.1}]))
    await fake.score([0, 5], 0)
    assert ["return_tokens_as_token_ids" in request.body for request in server.requests] == [
        True,
        False,
        False,
        False,
    ]
    assert server.requests[-1].body["prompt"] == "a c"


async def test_a_draft_that_comes_back_otherwise_is_asked_for_without_it(
    server: StandInServer, fake: RemoteScores
) -> None:
    row = {"token_id:0": -0.1}
    server.says(
        *SAME_BY_ID,
        reply(ids(0, 1, 5, 1), [None, row, row, row]),
        reply(ids(1), [{"token_id:5": -1}]),
    )
    scored = await fake.score([0, 5, 0], 2)
    assert [support.log_probs for support in scored.supports] == [{5: -1.0}]
    assert scored.calls == 2
    assert server.requests[-1].body["prompt"] == [0]
    assert "echo" not in server.requests[-1].body


@pytest.mark.parametrize(
    ("after", "probed", "reason"),
    [
        (BY_ID, reply(ids(0, 1, 0, 1), []), "at token 1 of the probe text it has 'token_id:1'"),
        (
            BY_TEXT,
            reply(["a", "b", "a", "", "b"], [AFTER_PROBE, {}]),
            "at token 1 of the probe text it has 'b'",
        ),
        (BY_ID, reply(ids(0, 5, 1), []), "2 tokens of the probe text, not 3"),
        (BY_ID, reply([], []), "0 tokens of the probe text, not 3"),
    ],
)
async def test_another_tokenizer_is_told_with_the_place(
    server: StandInServer, fake: RemoteScores, after: Reply, probed: Reply, reason: str
) -> None:
    server.says(after, probed)
    with pytest.raises(ModelSourceError) as refused:
        await fake.check()
    assert "upstream of big has another tokenizer" in str(refused.value)
    assert reason in str(refused.value)
    assert str(refused.value).endswith("; it cannot be steered.")


WITHOUT: list[Any] = [
    {},
    {"choices": []},
    {"choices": [{"text": "a"}]},
    {"choices": [{"logprobs": None}]},
    {"choices": [{"logprobs": {"content": []}}]},
    {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": None}}]},
    {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [["a", -1]]}}]},
    {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": None}]}}]},
    {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": "much"}]}}]},
]


@pytest.mark.parametrize("body", WITHOUT, ids=str)
async def test_a_reply_without_log_probabilities_is_named(
    server: StandInServer, fake: RemoteScores, body: Any
) -> None:
    """Before the first answer as a server that is unfit, after that as one that failed."""
    server.says(sends(body))
    with pytest.raises(ModelSourceError, match="gives no log-probabilities of completions; it"):
        await fake.check()
    server.says(*SAME_BY_ID, sends(body))
    with pytest.raises(UpstreamFailed, match="gives no log-probabilities of completions"):
        await fake.score([0, 0], 0)


@pytest.mark.parametrize("drafted", [0, 2])
async def test_fewer_log_probabilities_than_asked_are_told(
    server: StandInServer, fake: RemoteScores, drafted: int
) -> None:
    row = {"token_id:0": -0.1}
    server.says(*SAME_BY_ID, reply(ids(0, 5, 0, 1), [row] * drafted))
    with pytest.raises(UpstreamFailed, match="fewer log-probabilities than it was asked for"):
        await fake.score([0, 5, 0], drafted)


async def test_fewer_log_probabilities_than_tokens_are_told(
    server: StandInServer, fake: RemoteScores
) -> None:
    row = {"token_id:0": -0.1}
    server.says(*SAME_BY_ID, reply(ids(0, 5, 0, 1), [row, row]))
    with pytest.raises(UpstreamFailed, match="fewer log-probabilities than it was asked for"):
        await fake.every([0, 5, 0])


@pytest.mark.parametrize("likeliest", [{}, None, {"b": -1.0}, {"token_id:x": -1.0}], ids=str)
async def test_a_support_of_nothing_that_is_known_is_told(
    server: StandInServer, fake: RemoteScores, likeliest: Likeliest
) -> None:
    server.says(*SAME_BY_ID, reply(ids(1), [likeliest]))
    with pytest.raises(UpstreamFailed, match="names no token that is known here"):
        await fake.score([0, 0], 0)


async def test_a_server_that_refuses_twice_is_compared_the_next_time(
    server: StandInServer, fake: RemoteScores
) -> None:
    server.says(failing(400), failing(400))
    with pytest.raises(UpstreamRefused):
        await fake.check()
    server.says(*SAME_BY_ID)
    await fake.check()
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("support", "with_end"),
    [
        (
            Support({0: math.log(0.75)}, unsure=frozenset({4})),
            {0: math.log(0.75), 4: math.log(0.25)},
        ),
        (Support({0: math.log(0.75)}), {0: math.log(0.75)}),
        (Support({0: 1e-6}, unsure=frozenset({4})), {0: 1e-6}),
    ],
    ids=["unsure", "sure", "nothing left"],
)
def test_an_unsure_end_is_as_likely_as_it_can_be(
    support: Support, with_end: dict[int, float]
) -> None:
    assert support.with_unsure().log_probs == pytest.approx(with_end)


def test_the_whole_vocabulary_of_a_support_is_a_distribution() -> None:
    values = torch.randn(7).log_softmax(-1)
    support = Support(dict(enumerate(values.tolist())))
    assert support.missing_mass == pytest.approx(0, abs=1e-6)
    assert torch.allclose(support.logits(7).log_softmax(-1), values, atol=1e-6)

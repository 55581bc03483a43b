"""Groups that come and go while others run: who waits, who is refused, who is not disturbed."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polymath.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)
from polymath.experts import (
    Chunk,
    Completion,
    DecodeGroup,
    Engine,
    EngineSettings,
    LoraModel,
    Mixture,
    Row,
    SamplingParams,
    Select,
    render_chat,
)
from polymath.experts.lora_model import Feed
from tests.conftest import ROOT

LONG = "The sailor counts the stars and the fish of the sea, again and again. " * 16


@pytest.fixture
def model(engine: Engine) -> LoraModel:
    return engine.models["smollm2"]


@pytest.fixture
def opened(model: LoraModel) -> Iterator[Callable[..., Engine]]:
    """Opens engines on the session's model, under settings of their own."""
    engines: list[Engine] = []

    def opens(**settings: Any) -> Engine:
        engines.append(Engine({"smollm2": model}, EngineSettings(**settings)))
        return engines[-1]

    yield opens
    for one in engines:
        one.close()


def row(engine: Engine, expert: str | None = None, text: str = "Tell me about the moon.") -> Row:
    tokenizer = engine.models["smollm2"].tokenizer
    tokens = render_chat(tokenizer, [{"role": "user", "content": text}])
    return Row("smollm2", expert, tuple(tokens))


def group(*rows: Row, **sampling: Any) -> DecodeGroup:
    values = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}
    combiner = Select() if len(rows) == 1 else Mixture((1.0,) * len(rows))
    return DecodeGroup(rows, combiner, SamplingParams(**values))


async def whole(completion: Completion) -> list[Chunk]:
    return [chunk async for chunk in completion]


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token.id for chunk in chunks if chunk.token is not None]


async def until(reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not reached() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return reached()


# --- continuous batching --------------------------------------------------------------------------


async def test_a_short_request_joins_a_long_one_and_leaves_before_it(
    opened: Callable[..., Engine],
) -> None:
    engine = opened()
    (long,) = engine.submit([group(row(engine), max_tokens=200)])
    await anext(long)
    (short,) = engine.submit([group(row(engine, "math"), max_tokens=4)])
    assert len(tokens(await whole(short))) == 4
    assert await until(lambda: engine.stats().running == 1)
    long.close()
    assert await until(lambda: engine.active == 0)


async def test_rows_of_all_groups_are_fed_in_one_batch(
    opened: Callable[..., Engine], model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[str | None]] = []
    forward = model.forward

    def spied(feeds: list[Feed]) -> None:
        singles = [feed.sequence.adapter for feed in feeds if feed.count == 1]
        batches.append([adapter and adapter.name for adapter in singles])
        forward(feeds)

    monkeypatch.setattr(model, "forward", spied)
    engine = opened(prefix_cache_tokens=0)
    pair = group(row(engine, "math"), row(engine, "law"), max_tokens=12)
    alone = group(row(engine), max_tokens=12)
    await asyncio.gather(*(whole(one) for one in engine.submit([pair, alone])))
    assert ["math", "law", None] in batches


async def test_a_long_prompt_does_not_stall_an_answer(
    opened: Callable[..., Engine], model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[int, ...]] = []
    forward = model.forward

    def spied(feeds: list[Feed]) -> None:
        counts.append(tuple(feed.count for feed in feeds))
        forward(feeds)

    engine = opened(prefix_cache_tokens=0, prefill_chunk=32)
    (running,) = engine.submit([group(row(engine), max_tokens=200)])
    await anext(running)
    monkeypatch.setattr(model, "forward", spied)
    long = group(row(engine, "math", LONG), max_tokens=1)
    (waiting,) = engine.submit([long])
    await whole(waiting)
    running.close()
    chunks = [count for count in counts if max(count) > 1]
    assert len(chunks) >= len(long.rows[0].prompt) // 32
    assert all(1 in count and max(count) <= 32 for count in chunks)


async def test_a_short_prompt_is_answered_before_a_long_one_that_came_first(
    opened: Callable[..., Engine],
) -> None:
    engine = opened(prefix_cache_tokens=0)
    long, short = engine.submit(
        [group(row(engine, text=LONG * 2), max_tokens=1), group(row(engine), max_tokens=1)]
    )
    order: list[str] = []

    async def noted(name: str, completion: Completion) -> None:
        await whole(completion)
        order.append(name)

    await asyncio.gather(noted("long", long), noted("short", short))
    assert order == ["short", "long"]


async def test_closing_frees_the_rows_within_a_step(opened: Callable[..., Engine]) -> None:
    engine = opened()
    pair = group(row(engine, "math"), row(engine, "law"), max_tokens=500)
    (completion,) = engine.submit([pair])
    await anext(completion)
    assert engine.stats().rows == 2
    generated = engine.stats().generated_tokens
    completion.close()
    assert await until(lambda: engine.active == 0)
    assert engine.stats().generated_tokens - generated <= 2
    assert len(engine.models["smollm2"].slots) == 0


# --- admission ------------------------------------------------------------------------------------


async def test_what_does_not_fit_the_cache_waits_and_is_answered(
    opened: Callable[..., Engine],
) -> None:
    engine = opened(kv_cache_tokens=100)
    one = group(row(engine), max_tokens=40)
    completions = engine.submit([one, one])
    await anext(completions[0])
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    assert engine.stats().kv_tokens <= 100
    answers = await asyncio.gather(*(whole(completion) for completion in completions))
    assert tokens(answers[1])[1:] == tokens(answers[0])


async def test_what_can_never_fit_is_refused_with_both_numbers(
    opened: Callable[..., Engine],
) -> None:
    engine = opened(kv_cache_tokens=100, max_num_seqs=2)
    one = row(engine)
    with pytest.raises(ContextLengthExceeded, match=rf"{len(one.prompt) + 90} tokens.* 100"):
        engine.submit([group(one, max_tokens=90)])
    with pytest.raises(InvalidRequest, match=r"needs 3 rows.* at most 2"):
        engine.submit([group(one, one, one, max_tokens=1)])


async def test_a_full_queue_is_429_with_retry_after(opened: Callable[..., Engine]) -> None:
    engine = opened(max_num_seqs=2, max_waiting=1)
    pair = group(row(engine), row(engine, "math"), max_tokens=300)
    running = engine.submit([pair])
    await anext(running[0])
    running += engine.submit([group(row(engine), max_tokens=1)])
    with pytest.raises(Overloaded) as caught:
        engine.submit([group(row(engine), max_tokens=1)])
    assert caught.value.status == 429
    assert caught.value.headers == {"retry-after": "1"}
    for completion in running:
        completion.close()
    assert await until(lambda: engine.active == 0)


async def test_those_who_wait_are_served_in_order(opened: Callable[..., Engine]) -> None:
    engine = opened(max_num_seqs=1)
    order: list[int] = []

    async def noted(index: int, completion: Completion) -> None:
        await whole(completion)
        order.append(index)

    completions = engine.submit([group(row(engine), max_tokens=2)] * 4)
    await asyncio.gather(*(noted(*one) for one in enumerate(completions)))
    assert order == [0, 1, 2, 3]


# --- failures -------------------------------------------------------------------------------------


async def test_a_batch_that_fails_ends_only_the_row_that_is_to_blame(
    opened: Callable[..., Engine], model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def failing(feeds: list[Feed]) -> None:
        if any(f.sequence.adapter and f.sequence.adapter.name == "law" for f in feeds):
            raise RuntimeError("the weights are on fire")
        forward(feeds)

    engine = opened(prefix_cache_tokens=0)
    good, bad = group(row(engine, "math")), group(row(engine, "law"))
    expected = tokens(await whole(engine.submit([good])[0]))
    monkeypatch.setattr(model, "forward", failing)
    one, other = engine.submit([good, bad])
    answered, failed = await asyncio.gather(whole(one), whole(other), return_exceptions=True)
    assert isinstance(answered, list)
    assert tokens(answered) == expected
    assert isinstance(failed, GenerationFailed)
    assert "on fire" in failed.message
    assert await until(lambda: engine.active == 0)
    assert len(model.slots) == 0


async def test_an_adapter_that_is_gone_from_the_disk_fails_its_own_group(
    opened: Callable[..., Engine], model: LoraModel, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(ROOT / "configs/demo/adapters/law", folder)
    model.adapters.add("gone", folder)
    shutil.rmtree(folder)
    try:
        engine = opened()
        lost, fine = engine.submit([group(row(engine, "gone")), group(row(engine, "law"))])
        with pytest.raises(GenerationFailed):
            await whole(lost)
        assert len(tokens(await whole(fine))) == 8
    finally:
        model.adapters.remove("gone")


# --- hot adapters ---------------------------------------------------------------------------------


async def test_an_unloaded_adapter_answers_to_the_end_and_is_then_unknown(
    opened: Callable[..., Engine], model: LoraModel
) -> None:
    engine = opened(prefix_cache_tokens=0)
    law = row(engine, "law")
    model.adapters.add("hot", ROOT / "configs/demo/adapters/law")
    hot = Row(law.base_model, "hot", law.prompt)
    (expected,) = [tokens(await whole(one)) for one in engine.submit([group(law)])]
    (running,) = engine.submit([group(hot)])
    model.adapters.remove("hot")
    assert tokens(await whole(running)) == expected
    with pytest.raises(ModelNotFound, match="hot"):
        engine.submit([group(hot)])


async def test_more_adapters_than_may_be_loaded_are_all_served(
    engine: Engine, opened: Callable[..., Engine], model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.adapters, "_max_loaded", 2)
    experts = ("math", "law", "health", "finance")
    small = opened(prefix_cache_tokens=0)
    groups = [group(row(small, expert), max_tokens=4) for expert in experts]
    alone = [tokens(await whole(small.submit([one])[0])) for one in groups]
    assert len(model.adapters.loaded) <= 2
    together = await asyncio.gather(*(whole(one) for one in small.submit(groups)))
    assert [tokens(chunks) for chunks in together] == alone

"""Rows that are fed from outside: logits of blocks, tokens taken back, places given away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymath.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
)
from polymath.experts import (
    BaseModelSettings,
    Completion,
    DecodeGroup,
    Engine,
    EngineSettings,
    ExpertSettings,
    LoraModel,
    Mixture,
    Row,
    SamplingParams,
    ScoredRow,
    Select,
    load_models,
)
from polymath.experts.lora_model import Feed
from polymath.experts.running_batch import RunningBatch
from tests.conftest import write_random_adapter

PROMPT = tuple(b"Tell me about the moon")
CLOSE = 1e-5
"""Logits of a size up to 1 that float32 sums in another order."""

ASLEEP = 0.1
"""Seconds after which an engine without work sleeps."""

Open = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraModel:
    """The tiny model with the adapters `math` and `law`."""
    experts = {}
    for seed, name in enumerate(("math", "law")):
        folder = write_random_adapter(tmp_path_factory.mktemp(name), tiny_model, seed)
        experts[name] = ExpertSettings.model_validate({"base_model": "tiny", "adapter": folder})
    bases = {"tiny": BaseModelSettings(model="somewhere")}
    settings = EngineSettings(backend="torch")
    return load_models({"tiny": tiny_model}, bases, experts, settings)["tiny"]


@pytest.fixture
def opened(model: LoraModel) -> Iterator[Open]:
    """Opens engines on the model, under settings of their own."""
    engines: list[Engine] = []

    def opens(**settings: Any) -> Engine:
        engines.append(Engine({"tiny": model}, EngineSettings(backend="torch", **settings)))
        return engines[-1]

    yield opens
    for one in engines:
        one.close()


@pytest.fixture
def engine(opened: Open) -> Engine:
    return opened()


@pytest.fixture
async def row(engine: Engine) -> AsyncIterator[ScoredRow]:
    """A row of `math` after its prompt."""
    scored = engine.score(row_of("math"), 60)
    await scored.extend(())
    yield scored
    scored.close()


def row_of(adapter: str | None, prompt: tuple[int, ...] = PROMPT) -> Row:
    return Row("tiny", adapter, prompt)


def group(*rows: Row, max_tokens: int = 12) -> DecodeGroup:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    combiner = Select() if len(rows) == 1 else Mixture((1.0,) * len(rows))
    return DecodeGroup(rows, combiner, sampling)


async def tokens(completion: Completion) -> list[int]:
    return [chunk.token.id async for chunk in completion if chunk.token]


async def until(reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not reached() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    return reached()


async def in_time(waiting: Any) -> Any:
    return await asyncio.wait_for(waiting, 10)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=CLOSE)


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, "math", "law"])
async def test_the_first_block_is_empty_and_tells_what_follows_the_prompt(
    engine: Engine, model: LoraModel, adapter: str | None
) -> None:
    scored = engine.score(row_of(adapter), 10)
    assert_close(await scored.extend(()), model.all_logits(adapter, PROMPT)[-1:])
    scored.close()


@pytest.mark.parametrize("count", [1, 2, 3, 17, 50])
@pytest.mark.parametrize("adapter", [None, "math"])
async def test_a_block_tells_what_follows_each_of_its_tokens(
    engine: Engine, model: LoraModel, adapter: str | None, count: int
) -> None:
    block = tuple(range(count))
    scored = engine.score(row_of(adapter), count)
    await scored.extend(())
    assert_close(await scored.extend(block), model.all_logits(adapter, PROMPT + block)[-count:])
    scored.close()


@pytest.mark.parametrize("chunk", [16, 17])
async def test_a_block_may_be_longer_than_a_chunk_of_a_prompt(
    opened: Open, model: LoraModel, chunk: int
) -> None:
    block = tuple(range(50))
    scored = opened(prefill_chunk=chunk).score(row_of("law"), 50)
    await scored.extend(())
    assert_close(await scored.extend(block), model.all_logits("law", PROMPT + block)[-50:])
    scored.close()


@pytest.mark.parametrize("length", [1, 2, 3])
async def test_a_prompt_may_be_short(engine: Engine, model: LoraModel, length: int) -> None:
    prompt = PROMPT[:length]
    scored = engine.score(row_of("math", prompt), 4)
    found = [await scored.extend(()), await scored.extend((5, 6, 7))]
    assert_close(torch.cat(found), model.all_logits("math", (*prompt, 5, 6, 7))[-4:])
    scored.close()


async def test_tokens_one_by_one_are_a_block(row: ScoredRow, model: LoraModel) -> None:
    found = torch.cat([await row.extend([token]) for token in (7, 8, 9)])
    assert_close(found, model.all_logits("math", (*PROMPT, 7, 8, 9))[-3:])


@pytest.mark.parametrize("cut", [1, 2, 3])
async def test_what_is_taken_back_leaves_no_trace(
    row: ScoredRow, model: LoraModel, cut: int
) -> None:
    await row.extend((7, 8, 9))
    kept = (7, 8, 9)[: 3 - cut]
    found = await row.extend((20, 21), cut)
    assert_close(found, model.all_logits("math", (*PROMPT, *kept, 20, 21))[-2:])


@pytest.mark.parametrize("seed", range(3))
async def test_any_blocks_and_cuts_tell_what_the_text_tells(
    row: ScoredRow, model: LoraModel, seed: int
) -> None:
    rng = random.Random(seed)
    said: list[int] = []
    for _ in range(12):
        cut = rng.randint(0, min(len(said), 4))
        block = [rng.randrange(256) for _ in range(rng.randint(1, 5))]
        said = [*said[: len(said) - cut], *block]
        found = await row.extend(block, cut)
        assert_close(found, model.all_logits("math", [*PROMPT, *said])[-len(block) :])


async def test_the_prompt_cannot_be_taken_back(row: ScoredRow, model: LoraModel) -> None:
    await row.extend((7, 8))
    assert_close(await row.extend((9,), cut=50), model.all_logits("math", (*PROMPT, 9))[-1:])


async def test_an_answer_drawn_from_outside_is_that_of_the_engine(
    engine: Engine, row: ScoredRow
) -> None:
    (completion,) = engine.submit([group(row_of("math"))])
    expected = await tokens(completion)
    logits, said = await row.extend([0]), list[int]()
    logits = (await row.extend([1], cut=1))[-1:]  # what was tried before does not matter
    logits = await row.extend([expected[0]], cut=1)
    for _ in expected[1:]:
        said.append(int(logits[-1].argmax()))
        logits = await row.extend(said[-1:])
    assert said == expected[1:]


async def test_a_prompt_that_is_cached_tells_the_same(engine: Engine, model: LoraModel) -> None:
    found = []
    for _ in range(2):
        scored = engine.score(row_of("math"), 4)
        found.append(torch.cat([await scored.extend(()), await scored.extend((3, 4))]))
        scored.close()
    assert engine.stats().prefix_hit > 0
    assert_close(found[1], found[0])
    assert_close(found[1], model.all_logits("math", (*PROMPT, 3, 4))[-3:])


async def test_what_was_taken_back_is_not_kept_for_the_next_prompt(
    engine: Engine, model: LoraModel
) -> None:
    scored = engine.score(row_of("math"), 10)
    await scored.extend(())
    await scored.extend((3, 4, 5))
    await scored.extend((9,), cut=3)
    scored.close()
    assert await until(lambda: engine.active == 0)
    for said in ((3, 4, 5), (9,)):
        longer = engine.score(row_of("math", (*PROMPT, *said, 1)), 4)
        assert_close(await longer.extend(()), model.all_logits("math", (*PROMPT, *said, 1))[-1:])
        longer.close()


# --- beside others --------------------------------------------------------------------------------


async def test_rows_of_two_adapters_share_their_steps(
    engine: Engine, row: ScoredRow, model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = engine.score(row_of("law"), 10)
    await other.extend(())
    batches: list[list[str | None]] = []
    forward = model.forward

    def spied(feeds: list[Feed]) -> None:
        batches.append([feed.sequence.adapter and feed.sequence.adapter.name for feed in feeds])
        time.sleep(0.02)
        forward(feeds)

    monkeypatch.setattr(model, "forward", spied)
    for token in range(4):
        both = await asyncio.gather(row.extend([token]), other.extend([token]))
        assert len(both) == 2
    assert ["math", "law"] in batches
    assert len(batches) < 8
    other.close()


async def test_others_go_on_while_a_row_is_idle(engine: Engine, row: ScoredRow) -> None:
    alone, pair = engine.submit([group(row_of("law")), group(row_of("math"), row_of(None))])
    found = await in_time(asyncio.gather(tokens(alone), tokens(pair)))
    assert [len(each) for each in found] == [12, 12]
    assert await until(lambda: engine.stats().rows == 1)


async def test_others_do_not_change_what_a_row_tells(
    engine: Engine, row: ScoredRow, model: LoraModel
) -> None:
    completions = engine.submit([group(row_of(name), max_tokens=30) for name in ("law", None)])
    answers = [asyncio.ensure_future(tokens(one)) for one in completions]
    said = tuple(range(8))
    found = torch.cat([await row.extend((token,)) for token in said])
    assert [len(await answer) for answer in answers] == [30, 30]
    assert_close(found, model.all_logits("math", PROMPT + said)[-len(said) :])


async def test_the_engine_sleeps_while_a_row_is_idle(
    engine: Engine, row: ScoredRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    step = RunningBatch.step

    def counted(batch: RunningBatch) -> None:
        steps.append(None)
        step(batch)

    monkeypatch.setattr(RunningBatch, "step", counted)
    clock = time.pthread_getcpuclockid(int(engine._thread.ident or 0))
    before = time.clock_gettime(clock)
    await asyncio.sleep(0.3)
    assert steps == []
    assert time.clock_gettime(clock) - before < 0.05
    await row.extend([1])
    assert len(steps) == 1


# --- its place ------------------------------------------------------------------------------------


async def test_closing_a_row_gives_its_place_away(engine: Engine, row: ScoredRow) -> None:
    assert (engine.active, engine.stats().rows) == (1, 1)
    assert engine.stats().kv_tokens == len(PROMPT) + 60
    row.close()
    assert await until(lambda: engine.active == 0)
    assert (engine.stats().rows, engine.stats().kv_tokens) == (0, 0)


async def test_a_row_can_be_closed_while_a_block_is_computed(
    engine: Engine, row: ScoredRow, model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def slow(feeds: list[Feed]) -> None:
        time.sleep(0.1)
        forward(feeds)

    monkeypatch.setattr(model, "forward", slow)
    waiting = asyncio.ensure_future(row.extend((1, 2)))
    await asyncio.sleep(0.03)
    row.close()
    with pytest.raises(asyncio.CancelledError):
        await in_time(waiting)
    assert await until(lambda: engine.active == 0)
    assert engine.stats().rows == 0


async def test_a_row_can_be_closed_twice_and_before_it_began(engine: Engine) -> None:
    scored = engine.score(row_of(None), 4)
    scored.close()
    scored.close()
    assert await until(lambda: engine.active == 0)


async def test_a_closed_row_takes_nothing_more(row: ScoredRow) -> None:
    row.close()
    with pytest.raises(GenerationFailed, match="the row is closed"):
        await in_time(row.extend([1]))


async def test_a_row_that_waits_starts_when_there_is_a_place(
    opened: Open, model: LoraModel
) -> None:
    engine = opened(max_num_seqs=1)
    first, second = engine.score(row_of("math"), 4), engine.score(row_of("law"), 4)
    await first.extend(())
    waiting = asyncio.ensure_future(second.extend(()))
    await asyncio.sleep(0.05)
    assert (engine.stats().waiting, waiting.done()) == (1, False)
    first.close()
    assert_close(await in_time(waiting), model.all_logits("law", PROMPT)[-1:])
    second.close()


async def test_a_row_that_waits_can_be_closed_while_another_is_idle(opened: Open) -> None:
    engine = opened(max_num_seqs=1)
    first, second = engine.score(row_of("math"), 4), engine.score(row_of("law"), 4)
    await first.extend(())
    await asyncio.sleep(ASLEEP)
    second.close()
    assert await until(lambda: engine.active == 1)
    assert engine.stats().waiting == 0


async def test_nobody_waits_behind_a_group_that_is_not_wanted_any_more(opened: Open) -> None:
    """Two rows do not fit beside the idle one; the one behind them does."""
    engine = opened(max_num_seqs=2)
    idle = engine.score(row_of("math"), 4)
    await idle.extend(())
    (pair,) = engine.submit([group(row_of("math"), row_of("law"))])
    await asyncio.sleep(ASLEEP)
    pair.close()
    (alone,) = engine.submit([group(row_of("law"))])
    assert len(await in_time(tokens(alone))) == 12


# --- errors ---------------------------------------------------------------------------------------


async def test_what_does_not_fit_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceeded, match=rf"256 tokens.*{len(PROMPT) + 250}"):
        engine.score(row_of("math"), 250)
    assert engine.active == 0


async def test_what_does_not_fit_the_engine_is_refused(opened: Open) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"raise engine\.kv_cache_tokens"):
        opened(kv_cache_tokens=30).score(row_of("math"), 20)


async def test_an_adapter_that_is_not_known_is_named(engine: Engine) -> None:
    with pytest.raises(ModelNotFound, match="'maths'"):
        engine.score(row_of("maths"), 4)


async def test_a_full_queue_takes_no_row(opened: Open) -> None:
    engine = opened(max_num_seqs=1, max_waiting=1)
    rows = [engine.score(row_of("math"), 4) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.score(row_of("math"), 4)
    for one in rows:
        one.close()


async def test_a_closed_engine_takes_no_row(engine: Engine) -> None:
    engine.close()
    with pytest.raises(NotReady):
        engine.score(row_of("math"), 4)


@pytest.mark.parametrize("pending", [True, False])
async def test_rows_end_with_their_engine(
    engine: Engine,
    row: ScoredRow,
    model: LoraModel,
    monkeypatch: pytest.MonkeyPatch,
    pending: bool,
) -> None:
    monkeypatch.setattr(model, "forward", lambda feeds: time.sleep(0.1))
    waiting = asyncio.ensure_future(row.extend((1, 2))) if pending else None
    await asyncio.sleep(0.03)
    engine.close()
    with pytest.raises(NotReady):
        await in_time(waiting or row.extend((1, 2)))


async def test_answers_end_with_their_engine(opened: Open) -> None:
    engine = opened(max_num_seqs=1)
    running, waiting = engine.submit([group(row_of("math"), max_tokens=200)] * 2)
    await anext(running)
    engine.close()
    for one in (running, waiting):
        with pytest.raises(NotReady):
            await in_time(tokens(one))


async def test_a_row_that_failed_says_so_again_and_leaves(
    engine: Engine, row: ScoredRow, model: LoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(feeds: list[Feed]) -> None:
        raise RuntimeError("the network broke")

    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", broken)
        with pytest.raises(GenerationFailed, match="the network broke"):
            await in_time(row.extend([1]))
    with pytest.raises(GenerationFailed, match="the network broke"):
        await in_time(row.extend([1]))
    assert await until(lambda: engine.active == 0)


# --- rows that wait for each other ----------------------------------------------------------------


async def test_rows_that_wait_for_each_other_start_when_both_have_a_place(
    opened: Open, model: LoraModel
) -> None:
    engine = opened(max_num_seqs=2)
    (running,) = engine.submit([group(row_of("law"))])
    both = engine.score_together([row_of("math"), row_of(None)], 4)
    found = await in_time(asyncio.gather(*(one.extend(()) for one in both)))
    assert_close(found[0], model.all_logits("math", PROMPT)[-1:])
    assert_close(found[1], model.all_logits(None, PROMPT)[-1:])
    assert len(await tokens(running)) == 12
    for one in both:
        one.close()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"max_num_seqs": 1}, InvalidRequest),
        ({"kv_cache_tokens": 2 * len(PROMPT) + 7}, ContextLengthExceeded),
    ],
)
async def test_rows_that_could_never_run_together_are_refused(
    opened: Open, settings: dict[str, int], refused: type[Exception]
) -> None:
    """One of them would hold its place and wait for the other for ever."""
    engine = opened(**settings)
    with pytest.raises(refused):
        engine.score_together([row_of("math"), row_of("law")], 4)
    assert engine.active == 0
    engine.score(row_of("math"), 4).close()


async def test_a_full_queue_takes_both_rows_or_none(opened: Open) -> None:
    engine = opened(max_num_seqs=2, max_waiting=1)
    running = [engine.score(row_of("math"), 4) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.score_together([row_of("math"), row_of("law")], 4)
    assert engine.active == 2
    for one in running:
        one.close()

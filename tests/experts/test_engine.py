"""The engine on the real base model and the shipped experts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from polymath.errors import ContextLengthExceeded, GenerationFailed, Overloaded
from polymath.experts import (
    Chunk,
    Combiner,
    CombinerState,
    Completion,
    DecodeGroup,
    Engine,
    EngineSettings,
    Row,
    SamplingParams,
    Select,
    render_chat,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class FailsAtStep:
    """A combiner that raises at one step."""

    follows_text: ClassVar[bool] = False
    step: int

    def __call__(self, logits: Tensor, state: CombinerState) -> tuple[Tensor, CombinerState]:
        if state.answer_tokens + 1 == self.step:
            raise RuntimeError("the combiner broke")
        return logits[0].log_softmax(-1), state

    def weights(self, state: CombinerState) -> Sequence[float]:
        return (1.0,)


def row(engine: Engine, expert: str | None, text: str = "Tell me about the moon.") -> Row:
    tokenizer = engine.models["smollm2"].tokenizer
    return Row(
        "smollm2", expert, tuple(render_chat(tokenizer, [{"role": "user", "content": text}]))
    )


def group(
    rows: Row | tuple[Row, ...], combiner: Combiner | None = None, **sampling: Any
) -> DecodeGroup:
    values = {"max_tokens": 12, "temperature": 0.0, **sampling}
    rows = (rows,) if isinstance(rows, Row) else rows
    return DecodeGroup(rows, combiner or Select(), SamplingParams(**values))


async def chunks_of(completion: Completion) -> list[Chunk]:
    return [chunk async for chunk in completion]


async def run(engine: Engine, *groups: DecodeGroup) -> list[list[Chunk]]:
    return await asyncio.gather(*(chunks_of(one) for one in engine.submit(groups)))


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token.id for chunk in chunks if chunk.token is not None]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def settled(engine: Engine) -> bool:
    deadline = time.monotonic() + 10
    while engine.active and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return engine.active == 0


async def test_the_bare_base_model_is_untouched_by_the_adapters(engine: Engine) -> None:
    alone = await run(engine, group(row(engine, None)))
    mixed = await run(engine, group(row(engine, "law")), group(row(engine, None)))
    assert tokens(mixed[1]) == tokens(alone[0])
    assert tokens(mixed[0]) != tokens(mixed[1])


async def test_selecting_one_of_two_rows_is_that_row_alone(engine: Engine) -> None:
    rows = (row(engine, "math"), row(engine, None))
    first, second, base = await run(
        engine, group(rows, Select(0)), group(rows, Select(1)), group(rows[1])
    )
    assert tokens(second) == tokens(base)
    assert tokens(first) == tokens((await run(engine, group(rows[0])))[0])


async def test_the_same_seed_draws_the_same_answer_and_another_seed_another(
    engine: Engine,
) -> None:
    def one(seed: int) -> DecodeGroup:
        return group(row(engine, None), temperature=1.0, seed=seed)

    first, again, other = await run(engine, one(1), one(1), one(2))
    assert tokens(first) == tokens(again) != tokens(other)


async def test_the_last_chunk_alone_has_a_finish_reason(engine: Engine) -> None:
    (chunks,) = await run(engine, group(row(engine, None), max_tokens=4))
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    (whole,) = await run(engine, group(row(engine, None)))
    stop = text(whole)[5:11]
    (stopped,) = await run(engine, group(row(engine, None), stop=(stop,)))
    assert text(stopped) == text(whole)[:5]
    assert stopped[-1].finish_reason == "stop"


async def test_log_probabilities_are_those_of_the_combined_distribution(engine: Engine) -> None:
    (chunks,) = await run(engine, group(row(engine, None), top_logprobs=3, max_tokens=3))
    for chunk in chunks:
        assert chunk.token is not None
        assert chunk.token.top[0].id == chunk.token.id
        assert chunk.token.logprob == chunk.token.top[0].logprob <= 0
        assert len(chunk.token.top) == 3


async def test_a_failing_group_fails_alone(engine: Engine) -> None:
    broken = group(row(engine, None), FailsAtStep(2))
    good = group(row(engine, None))
    completions = engine.submit([broken, good])
    with pytest.raises(GenerationFailed, match="the combiner broke"):
        await chunks_of(completions[0])
    assert tokens(await chunks_of(completions[1])) == tokens((await run(engine, good))[0])


async def test_closing_a_completion_frees_its_place_within_a_step(engine: Engine) -> None:
    (completion,) = engine.submit([group(row(engine, None), max_tokens=2000)])
    await anext(completion)
    completion.close()
    assert await settled(engine)


async def test_a_group_that_waits_can_be_closed_before_it_runs(engine: Engine) -> None:
    small = Engine(engine.models, EngineSettings(max_num_seqs=1, max_waiting=1))
    first, second = small.submit([group(row(engine, None), max_tokens=2000)] * 2)
    await anext(first)
    second.close()
    first.close()
    assert await settled(small)
    small.close()


async def test_a_full_queue_takes_all_groups_of_a_request_or_none(engine: Engine) -> None:
    small = Engine(engine.models, EngineSettings(max_num_seqs=1, max_waiting=1))
    one = group(row(engine, None), max_tokens=1)
    with pytest.raises(Overloaded) as caught:
        small.submit([one, one, one])
    assert caught.value.headers == {"retry-after": "1"}
    assert small.active == 0
    assert len(await run(small, one, one)) == 2
    small.close()


async def test_what_does_not_fit_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    one = row(engine, None)
    with pytest.raises(ContextLengthExceeded, match=rf"8192 tokens.*{8192 + len(one.prompt)}"):
        engine.submit([group(one, max_tokens=8192)])

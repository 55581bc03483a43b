"""Identities of the engine that cannot be argued with, on both of its networks.

`int8` is the default of a CPU: the same bits in any company, held against its own single runs.
`float32` is the plain torch path: held against transformers and PEFT.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polymath.experts import (
    Attribution,
    Chunk,
    Combiner,
    DecodeGroup,
    Engine,
    EngineSettings,
    GrammarSpec,
    LoraModel,
    Mixture,
    Posterior,
    ProxyTuning,
    Row,
    SamplingParams,
    Select,
    WeightedLogits,
    adapters_on,
    render_chat,
    weight_shapes,
)
from polymath.experts.lora_model import Feed
from polymath.experts.sequence import Sequence as RowInProgress
from polymath.gateway import Prepared
from tests.conftest import EXPERTS, ROOT

FLOAT32_TOLERANCE = 2e-3
"""Largest difference of two logits (of a size up to 30) that float32 sums in another order."""

PROMPTS = (
    "Tom has 3 apples and buys 5 more. How many apples has he now?",
    "A train goes 60 miles in an hour. How far does it go in 4 hours?",
    "What is 12 times 11?",
    "Write a Python function that reverses a string.",
    "Write an SQL query that counts the rows of a table.",
    "How do I sort a list in JavaScript?",
    "What are the symptoms of asthma ?",
    "What causes high blood pressure ?",
    "How is a broken arm treated ?",
    "Does the clause say which law governs the contract?",
    "Is a verbal agreement binding?",
    "What is hearsay?",
    "Name the banking intent of this customer message: my card has not arrived",
    "Name the banking intent of this customer message: why was I charged twice",
    "What is a savings account?",
    "Give three tips for a good night's sleep.",
    "Write a short poem about the sea.",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Tell me about the moon.",
)

TEXTS = {
    "math": "Tom has 3 + 5 = <<3+5=8>>8 apples now. The answer is 8",
    "health": "The signs and symptoms of this disorder vary. They may include pain.",
    "finance": "card arrival",
    "law": "Yes",
}
"""Answers in the manner of each expert's training data, written for these tests."""

QUESTIONS = {
    "math": PROMPTS[0],
    "health": PROMPTS[6],
    "finance": PROMPTS[12],
    "law": PROMPTS[9],
}


@pytest.fixture(scope="module")
def float_model(demo: Prepared) -> LoraModel:
    settings = EngineSettings(backend="torch", dtype="float32")
    adapters = adapters_on("smollm2", demo.settings.experts)
    return LoraModel(demo.folders["smollm2"], adapters, settings)


@pytest.fixture(scope="module", params=["int8", "float32"])
def model(request: pytest.FixtureRequest, engine: Engine, float_model: LoraModel) -> LoraModel:
    return engine.models["smollm2"] if request.param == "int8" else float_model


@pytest.fixture
def exact(model: LoraModel) -> Iterator[Engine]:
    """An engine that keeps no prefixes, so that every run does the same work."""
    settings = EngineSettings(prefix_cache_tokens=0, max_num_seqs=24)
    with_own_cache = Engine({"smollm2": model}, settings)
    yield with_own_cache
    with_own_cache.close()


def tolerance(model: LoraModel) -> float:
    return 0.0 if type(model.network).__name__ == "OnnxNetwork" else FLOAT32_TOLERANCE


def prompt(model: LoraModel, text: str) -> tuple[int, ...]:
    return tuple(render_chat(model.tokenizer, [{"role": "user", "content": text}]))


def row(engine: Engine, expert: str | None, text: str = "Tell me about the moon.") -> Row:
    return Row("smollm2", expert, prompt(engine.models["smollm2"], text))


def group(rows: Sequence[Row], combiner: Combiner | None = None, **sampling: Any) -> DecodeGroup:
    attribution = sampling.pop("attribution", False)
    values = {"max_tokens": 8, "temperature": 0.0, **sampling}
    return DecodeGroup(tuple(rows), combiner or Select(), SamplingParams(**values), attribution)


async def answers(engine: Engine, *groups: DecodeGroup) -> list[list[Chunk]]:
    async def whole(completion: Any) -> list[Chunk]:
        return [chunk async for chunk in completion]

    return await asyncio.gather(*(whole(one) for one in engine.submit(groups)))


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token.id for chunk in chunks if chunk.token is not None]


def attributions(chunks: list[Chunk]) -> list[Attribution]:
    scored = [chunk.token for chunk in chunks if chunk.token is not None]
    return [token.attribution for token in scored if token.attribution is not None]


def started(model: LoraModel, expert: str | None, text: str, chunk: int = 64) -> RowInProgress:
    """A row with its prompt fed."""
    known = None if expert is None else model.adapters.find(expert)
    one = RowInProgress(Row("smollm2", expert, prompt(model, text)), known, 16)
    one.weights = None if known is None else model.adapters.weights(known)
    model.slots.join(one, one.longest)
    while one.pending:
        model.forward([Feed(one, min(chunk, one.pending), one.pending)])
    return one


def stepped(model: LoraModel, rows: list[RowInProgress], token: int) -> list[Tensor]:
    """The logits of rows that all take the same token together."""
    for one in rows:
        one.score(0.0)
        one.tokens.append(token)
    model.forward([Feed(one, 1, 1) for one in rows])
    logits = [one.logits for one in rows]
    return [one.clone() for one in logits if one is not None]


def released(model: LoraModel, rows: list[RowInProgress]) -> None:
    for one in rows:
        model.slots.leave(one)


# --- a row is the same alone and in company -------------------------------------------------------


def test_a_mixed_batch_gives_every_row_what_it_gets_alone(model: LoraModel) -> None:
    kinds = [*EXPERTS, None, "math"]
    steps = range(100, 128, 7)
    alone = []
    for index, expert in enumerate(kinds):
        one = started(model, expert, PROMPTS[index])
        alone.append([stepped(model, [one], token)[0] for token in steps])
        released(model, [one])
    rows = [started(model, expert, PROMPTS[index]) for index, expert in enumerate(kinds)]
    together = [stepped(model, rows, token) for token in steps]
    released(model, rows)
    for index, of_row in enumerate(alone):
        for step, expected in enumerate(of_row):
            difference = (together[step][index] - expected).abs().max().item()
            assert difference <= tolerance(model), f"row {index} ({kinds[index]}), step {step}"


def random_adapter(folder: Path, model: LoraModel, rank: int, targets: tuple[str, ...]) -> Path:
    """A PEFT folder whose adapter changes some projections of every layer, and visibly so."""
    generator = torch.Generator().manual_seed(rank)
    shapes = weight_shapes(Path(model.tokenizer.name_or_path))
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            prefix = f"base_model.model.{module}"
            a = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
            b = torch.randn(shape[0], rank, generator=generator) / 40
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_of_other_ranks_and_modules_share_a_batch(
    engine: Engine, float_model: LoraModel, tmp_path: Path
) -> None:
    """Bit for bit what each gets alone on int8, and close to what float32 gives."""
    fast = engine.models["smollm2"]
    kinds = {"narrow": (1, ("v_proj",)), "wide": (40, ("q_proj", "o_proj", "down_proj", "up_proj"))}
    names = [*kinds, "math", None]
    for name, (rank, targets) in kinds.items():
        folder = random_adapter(tmp_path / name, fast, rank, targets)
        fast.adapters.add(name, folder)
        float_model.adapters.add(name, folder)
    try:
        found = {}
        for kind, model in (("int8", fast), ("float32", float_model)):
            rows = [started(model, name, PROMPTS[3]) for name in names]
            found[kind] = stepped(model, rows, 100)
            released(model, rows)
        for name, together in zip(names, found["int8"], strict=True):
            one = started(fast, name, PROMPTS[3])
            assert torch.equal(stepped(fast, [one], 100)[0], together), name
            released(fast, [one])
    finally:
        for name in kinds:
            fast.adapters.remove(name)
            float_model.adapters.remove(name)
    for fine, coarse in zip(found["float32"], found["int8"], strict=True):
        assert torch.corrcoef(torch.stack([fine, coarse]))[0, 1] > 0.995
    bare = found["float32"][-1]
    assert all((changed - bare).abs().max() > 0.1 for changed in found["float32"][:-1])


async def test_sampled_answers_do_not_depend_on_the_company(exact: Engine) -> None:
    kinds = [*EXPERTS, None]
    groups = [
        group([row(exact, expert, PROMPTS[index])], temperature=0.9, top_p=0.95, seed=index)
        for index, expert in enumerate(kinds)
    ]
    alone = [(await answers(exact, one))[0] for one in groups]
    together = await answers(exact, *groups)
    assert [tokens(chunks) for chunks in together] == [tokens(chunks) for chunks in alone]


async def test_groups_and_single_requests_share_a_batch_without_a_trace(exact: Engine) -> None:
    pair = group([row(exact, "math"), row(exact, "law")], Mixture((0.5, 0.5)))
    single = group([row(exact, "health")])
    alone = [(await answers(exact, one))[0] for one in (pair, single)]
    together = await answers(exact, pair, single)
    assert [tokens(chunks) for chunks in together] == [tokens(chunks) for chunks in alone]


def test_prompts_in_chunks_are_prompts_at_once(model: LoraModel) -> None:
    text = " ".join(PROMPTS[:4])
    whole = started(model, "math", text)
    parts = started(model, "math", text, chunk=16)
    assert whole.logits is not None
    assert parts.logits is not None
    difference = (whole.logits - parts.logits).abs().max().item()
    released(model, [whole, parts])
    assert difference <= tolerance(model)


# --- combiners ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combiner", [WeightedLogits((1.0,)), Mixture((1.0,)), Posterior((1.0,))], ids=repr
)
async def test_a_group_of_one_is_the_single_row(exact: Engine, combiner: Combiner) -> None:
    one = row(exact, "math")
    single, alike = await answers(exact, group([one]), group([one], combiner))
    assert tokens(alike) == tokens(single)


@pytest.mark.parametrize(
    "combiner",
    [WeightedLogits((1.0, 0.0)), Mixture((1.0, 0.0)), Posterior((1.0, 0.0)), Select(0)],
    ids=repr,
)
async def test_weights_of_one_and_zero_are_the_first_expert(
    exact: Engine, combiner: Combiner
) -> None:
    rows = [row(exact, "math"), row(exact, "health")]
    single, pair = await answers(exact, group(rows[:1]), group(rows, combiner))
    assert tokens(pair) == tokens(single)


async def test_proxy_tuning_with_alpha_zero_is_the_base(exact: Engine) -> None:
    rows = [row(exact, None), row(exact, "math"), row(exact, "law")]
    base, steered = await answers(exact, group(rows[:1]), group(rows, ProxyTuning(0.0)))
    assert tokens(steered) == tokens(base)


async def test_proxy_tuning_with_equal_base_is_the_expert(exact: Engine) -> None:
    """M == M-, alpha = 1: s_M + (s_M+ - s_M-) is s_M+ to the last bit that float32 keeps."""
    base, expert = row(exact, None), row(exact, "math")
    single, steered = await answers(
        exact, group([expert]), group([base, expert, base], ProxyTuning(1.0))
    )
    assert tokens(steered) == tokens(single)


async def test_equal_rows_are_one_row_however_they_are_combined(exact: Engine) -> None:
    one = row(exact, "general")
    combiners = [WeightedLogits((0.25, 0.75)), Mixture((0.5, 0.5)), Posterior((0.9, 0.1))]
    single, *alike = await answers(
        exact, group([one]), *(group([one, one], combiner) for combiner in combiners)
    )
    assert [tokens(chunks) for chunks in alike] == [tokens(single)] * len(combiners)


async def test_rows_may_have_prompts_of_their_own(exact: Engine) -> None:
    rows = [row(exact, "math", PROMPTS[0]), row(exact, None, PROMPTS[19] * 3)]
    first, second, one, other = await answers(
        exact, group(rows, Select(0)), group(rows, Select(1)), group(rows[:1]), group(rows[1:])
    )
    assert tokens(first) == tokens(one)
    assert tokens(second) == tokens(other)


# --- the posterior --------------------------------------------------------------------------------


def forced(model: LoraModel, text: str) -> Any:
    """A grammar that allows one answer only, so that the text is given and the weights follow."""
    return model.grammars.compile(GrammarSpec("choice", [text], "guided_choice"))


@pytest.mark.parametrize("domain", TEXTS)
async def test_the_posterior_goes_to_the_expert_whose_domain_the_text_is(
    exact: Engine, domain: str
) -> None:
    experts = tuple(TEXTS)
    rows = [row(exact, expert, QUESTIONS[domain]) for expert in experts]
    grammar = forced(exact.models["smollm2"], TEXTS[domain])
    combiner = Posterior((0.25,) * 4, floor=0.0)
    (chunks,) = await answers(
        exact, group(rows, combiner, grammar=grammar, max_tokens=64, attribution=True)
    )
    weights = [one.weights for one in attributions(chunks)]
    assert all(sum(of_token) == pytest.approx(1.0, abs=1e-5) for of_token in weights)
    assert weights[0] == pytest.approx((0.25,) * 4)
    final = dict(zip(experts, weights[-1], strict=True))
    if len(weights) > 1:
        assert max(final, key=final.__getitem__) == domain, final


async def test_a_row_that_is_left_out_is_not_computed_and_catches_up_exactly(
    exact: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text turns from banking to arithmetic: the math row is dropped, then needed again."""
    model = exact.models["smollm2"]
    fed: list[tuple[str | None, int]] = []
    forward = model.forward

    def spied(feeds: list[Feed]) -> None:
        for feed in feeds:
            adapter = feed.sequence.adapter
            fed.append((adapter.name if adapter else None, feed.count))
        forward(feeds)

    monkeypatch.setattr(model, "forward", spied)
    text = "card arrival, card arrival. " + TEXTS["math"]
    rows = [row(exact, "finance", QUESTIONS["finance"]), row(exact, "math", QUESTIONS["finance"])]

    async def weights(floor: float) -> list[tuple[float, ...]]:
        grammar = forced(model, text)
        combiner = Posterior((0.5, 0.5), floor=floor)
        (chunks,) = await answers(
            exact, group(rows, combiner, grammar=grammar, max_tokens=64, attribution=True)
        )
        return [one.weights for one in attributions(chunks)]

    full = await weights(floor=0.0)
    everything = sum(count for name, count in fed if name == "math")
    fed.clear()
    sparse = await weights(floor=0.02)
    left_out = [index for index, of_token in enumerate(sparse) if of_token[1] == 0]
    assert left_out, "the math row was never dropped"
    assert sparse[-1][1] > 0.5, "the math row was not revived"
    assert any(name == "math" and 1 < count < 20 for name, count in fed), "it did not catch up"
    assert sum(count for name, count in fed if name == "math") <= everything
    assert sparse[-1] == pytest.approx(full[-1], abs=0.05)


# --- a cached prefix ------------------------------------------------------------------------------


async def test_a_cached_prompt_is_a_prompt_without_a_cache(model: LoraModel, exact: Engine) -> None:
    caching = Engine({"smollm2": model}, EngineSettings())
    one = group([row(exact, "math", PROMPTS[1])], top_logprobs=3, max_tokens=4)
    try:
        (fresh,) = await answers(exact, one)
        await answers(caching, one)
        before = caching.stats().prefix_hit
        (cached,) = await answers(caching, one)
        assert caching.stats().prefix_hit - before == len(one.rows[0].prompt) - 2
    finally:
        caching.close()
    assert tokens(cached) == tokens(fresh)
    for found, expected in zip(cached, fresh, strict=True):
        assert found.token is not None
        assert expected.token is not None
        assert found.token.logprob == pytest.approx(
            expected.token.logprob, abs=tolerance(model) or 1e-6
        )


async def test_the_next_turn_is_fed_from_where_the_last_one_ended(
    model: LoraModel, exact: Engine
) -> None:
    caching = Engine({"smollm2": model}, EngineSettings())
    first = row(exact, "general", PROMPTS[15])
    try:
        (answer,) = await answers(caching, group([first], ignore_eos=True))
        more = prompt(model, "And two more?")
        following = Row("smollm2", "general", (*first.prompt, *tokens(answer), *more))
        before = caching.stats()
        (cached,) = await answers(caching, group([following]))
        after = caching.stats()
    finally:
        caching.close()
    (fresh,) = await answers(exact, group([following]))
    known = len(first.prompt) + len(tokens(answer)) - 1  # the last token was never fed
    assert after.prefix_hit - before.prefix_hit == known
    assert after.prompt_tokens - before.prompt_tokens == len(following.prompt) - known
    if tolerance(model):  # int8 rounds what was decoded otherwise than what is prefilled
        assert tokens(cached) == tokens(fresh)


async def test_a_prefix_belongs_to_its_adapter(exact: Engine, model: LoraModel) -> None:
    caching = Engine({"smollm2": model}, EngineSettings())
    try:
        await answers(caching, group([row(exact, "math")]))
        (other,) = await answers(caching, group([row(exact, "health")]))
        assert caching.stats().prefix_hit == 0
    finally:
        caching.close()
    assert tokens(other) == tokens((await answers(exact, group([row(exact, "health")])))[0])


# --- transformers and PEFT ------------------------------------------------------------------------


@pytest.mark.parametrize("expert", EXPERTS)
async def test_greedy_output_is_that_of_transformers_with_peft(
    demo: Prepared, float_model: LoraModel, expert: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    engine = Engine({"smollm2": float_model}, EngineSettings(max_num_seqs=len(PROMPTS)))
    rows = [row(engine, expert, text) for text in PROMPTS]
    try:
        mine = await answers(engine, *(group([one], max_tokens=12) for one in rows))
    finally:
        engine.close()
    base = AutoModelForCausalLM.from_pretrained(demo.folders["smollm2"], dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(ROOT / "configs/demo/adapters" / expert)).eval()
    theirs = generated(peft, float_model, [one.prompt for one in rows], 12)
    assert [tokens(chunks) for chunks in mine] == theirs


def generated(
    peft: Any, model: LoraModel, prompts: list[tuple[int, ...]], count: int
) -> list[list[int]]:
    """What `generate` answers, up to the end token, padded on the left."""
    longest = max(map(len, prompts))
    pad = model.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    with torch.inference_mode():
        whole = peft.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=count
        )
    answers = whole[:, longest:].tolist()
    return [
        answer[: next((i for i, token in enumerate(answer) if token in model.eos_ids), count)]
        for answer in answers
    ]

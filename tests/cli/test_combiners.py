"""`train combiner` and `eval cascade`: on a tiny model, from the command to what is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from bench.scoring_server import BASE, ScoringServer
from polymath.cli.main import app
from polymath.errors import ConfigError, DataError
from polymath.experts import (
    BaseModelSettings,
    CombinerCard,
    Engine,
    EngineSettings,
    load_models,
)
from polymath.gateway import ChatService, load_config, open_service, prepare
from polymath.proxy import answer_text
from tests.cli.test_cli import DEMO
from tests.conftest import write_jsonl, write_random_adapter

ANSWERS = {
    "What is a loop?": "A loop runs again.",
    "What is 2 + 2?": "It is 4.",
    "Who are you?": "A small model.",
    "Why?": "So.",
    "What is a prime?": "Two and three are primes.",
    "Is it so?": "Yes, it is.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, foreign_model: Path) -> Path:
    """A config of two adapters, what they combine to, and a model of another vocabulary."""
    folder = tmp_path_factory.mktemp("combiners")
    experts: dict[str, Any] = {
        name: {
            "base_model": "tiny",
            "adapter": str(write_random_adapter(folder / name, tiny_model, seed)),
        }
        for seed, name in enumerate(("math", "law"))
    }
    experts["both"] = {"kind": "ensemble", "members": ["math", "law"]}
    experts["doubted"] = {
        "kind": "cascade",
        "cheap": "math",
        "strong": "law",
        "judge": {"kind": "logprob", "threshold": -1.0},
    }
    bases = {"tiny": tiny_model, "foreign": foreign_model}
    write_config(folder / "polymath.yaml", bases, experts)
    write_jsonl(folder / "chats.jsonl", [chat(*each) for each in ANSWERS.items()])
    return folder


def write_config(file: Path, bases: dict[str, Path], experts: dict[str, Any]) -> Path:
    values = {
        "base_models": {name: {"model": str(model)} for name, model in bases.items()},
        "experts": experts,
        "router": {"path": f"{DEMO}/router", "fallback": next(iter(experts))},
        "engine": {"backend": "torch"},
    }
    file.write_text(yaml.safe_dump(values))
    return file


def with_expert(folder: Path, name: str, **values: Any) -> Path:
    """Another config that has one expert more."""
    config = yaml.safe_load((folder / "polymath.yaml").read_text())
    config["experts"][name] = values
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def train(folder: Path, out: Path, *args: str, config: Path | None = None) -> Result:
    data, file = folder / "chats.jsonl", config or folder / "polymath.yaml"
    return run("train", "combiner", "--data", data, "--out", out, "--config", file, *args)


def card_of(folder: Path) -> CombinerCard:
    return CombinerCard.model_validate_json((folder / "combiner.json").read_text())


def with_service(config: Path, use: Callable[[ChatService], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        service = open_service(prepare(load_config(config, environ={})))
        try:
            return await use(service)
        finally:
            await service.close()

    return asyncio.run(run())


async def said(service: ChatService, expert: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": expert, "messages": messages, "temperature": 0, "max_tokens": 8}
    return answer_text(await service.ask(expert).whole(body))


# --- train combiner -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["constant", "full"])
def test_a_combiner_that_was_fitted_can_be_served(folder: Path, tmp_path: Path, kind: str) -> None:
    done = train(folder, tmp_path / "c", "--large", "tiny", "--small", "math", "--kind", kind)
    assert done.exit_code == 0, done.output
    card = card_of(tmp_path / "c")
    *perplexities, last = done.stdout.splitlines()
    assert perplexities == [f"{name}: perplexity {v:.4f}" for name, v in card.perplexity.items()]
    share = "a network" if card.share is None else f"{card.share:.4f}"
    assert last == f"{tmp_path / 'c'}: share of math: {share}"
    assert (card.kind, card.large, card.small) == (kind, "tiny", "math")

    learned = {"members": ["tiny", "math"], "combine": "comblm", "combiner": str(tmp_path / "c")}
    file = with_expert(folder, f"learned-{kind}", kind="ensemble", **learned)
    answers = with_service(
        file, lambda s: asyncio.gather(*(said(s, f"learned-{kind}", "Why?") for _ in range(2)))
    )
    assert answers[0] == answers[1] != ""


def test_the_share_depends_on_entropies_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    done = train(folder, tmp_path, "--large", "math", "--small", "law")
    assert done.stdout.endswith(f"{tmp_path}: share of law: a network\n")
    assert card_of(tmp_path).kind == "entropy"


@pytest.fixture(scope="module")
def upstream(tiny_model: Path) -> Iterator[str]:
    """The tiny model behind HTTP."""
    bases = {BASE: BaseModelSettings(model="somewhere")}
    settings = EngineSettings(backend="torch")
    engine = Engine(load_models({BASE: tiny_model}, bases, {}, settings), settings)
    with ScoringServer(engine, by_id=True).serving() as url:
        yield url
    engine.close()


def test_an_upstream_is_scored_like_the_model_behind_it(
    folder: Path, tmp_path: Path, upstream: str
) -> None:
    config = with_expert(folder, "far", kind="upstream", api_base=upstream, model="big")
    for large in ("tiny", "far"):
        who = ("--large", large, "--small", "math", "--kind", "mean", "--support", "258")
        done = train(folder, tmp_path / large, *who, config=config)
        assert done.exit_code == 0, done.output
    near, far = card_of(tmp_path / "tiny"), card_of(tmp_path / "far")
    assert far.perplexity == {
        name: pytest.approx(value, rel=1e-3) for name, value in near.perplexity.items()
    }


@pytest.mark.parametrize(
    ("large", "small", "reason"),
    [
        ("tiny", "maths", "no expert 'maths'; there are"),
        ("huge", "math", "no expert 'huge'; there are"),
        ("both", "math", "'both' is no single model; choose one as --large"),
        ("tiny", "both", "'both' is no model of the engine; choose one as --small"),
        ("foreign", "math", "'foreign' has another vocabulary than --small"),
    ],
)
def test_experts_that_cannot_be_mixed_are_named(
    folder: Path, tmp_path: Path, large: str, small: str, reason: str
) -> None:
    done = train(folder, tmp_path / "c", "--large", large, "--small", small)
    assert done.exit_code == 2
    assert reason in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "c").exists()


def test_too_few_conversations_are_one_line(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "two.jsonl", [chat("Why?", "So."), chat("Who?", "Me.")])
    who = ("--large", "tiny", "--small", "math", "--config", folder / "polymath.yaml")
    done = run("train", "combiner", "--data", file, "--out", tmp_path / "c", *who)
    assert isinstance(done.exception, DataError)
    assert "at least 3 conversations" in str(done.exception)


def test_a_config_names_the_combiner_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    learned = {"members": ["tiny", "math"], "combine": "comblm", "combiner": str(tmp_path)}
    file = with_expert(folder, "lost", kind="ensemble", **learned)
    with pytest.raises(ConfigError) as refused:
        prepare(load_config(file, environ={}))
    (problem,) = refused.value.problems
    assert "experts.lost.combiner: " in problem
    assert problem.endswith(
        f"{tmp_path / 'combiner.json'} cannot be used; train the combiner again"
    )


# --- eval cascade ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graded(folder: Path) -> Path:
    """Questions whose reference is what one of the two experts says: four of math, two of law."""
    questions = list(ANSWERS)
    owners = ["math"] * 4 + ["law"] * 2
    answers = with_service(
        folder / "polymath.yaml",
        lambda s: asyncio.gather(*(said(s, *each) for each in zip(owners, questions, strict=True))),
    )
    rows = [chat(*each) for each in zip(questions, answers, strict=True)]
    return write_jsonl(folder / "graded.jsonl", rows)


def evaluate(folder: Path, data: Path, *args: object, expert: str = "doubted") -> Result:
    where = ("--data", data, "--config", folder / "polymath.yaml", "--max-tokens", 8)
    return run("eval", "cascade", "--expert", expert, *where, *args)


def test_a_cascade_is_measured_over_all_thresholds(
    folder: Path, graded: Path, tmp_path: Path
) -> None:
    done = evaluate(folder, graded, "--json", "--report", tmp_path / "report")
    assert done.exit_code == 0, done.output
    printed, written = done.stdout.splitlines()
    measured = json.loads(printed)
    assert measured["n"] == 6
    assert measured["accuracy_cheap"] == pytest.approx(4 / 6, abs=1e-4)
    assert measured["accuracy_strong"] == pytest.approx(2 / 6, abs=1e-4)
    assert measured["random_area"] == pytest.approx(0.5, abs=1e-4)
    thresholds = [threshold for threshold, _, _ in measured["points"]]
    assert thresholds == sorted(thresholds)
    assert all(threshold < 0 for threshold in thresholds)
    page = (tmp_path / "report" / "cascade.html").read_text(encoding="utf-8")
    assert written == f"written: {tmp_path / 'report' / 'cascade.html'}"
    assert "Cascade doubted" in page
    assert f"<b>{measured['area']}</b>area" in page


def test_the_same_is_printed_for_people(folder: Path, graded: Path) -> None:
    done = evaluate(folder, graded, "--limit", 3, "--match", "contains")
    lines = done.stdout.splitlines()
    assert lines[:3] == ["n: 3", "accuracy_cheap: 1.0", "accuracy_strong: 0.0"]


@pytest.mark.parametrize("expert", ["math", "both", "nobody"])
def test_what_is_no_cascade_is_told_with_those_that_are(
    folder: Path, graded: Path, expert: str
) -> None:
    done = evaluate(folder, graded, expert=expert)
    assert done.exit_code == 2
    assert f"{expert!r} is no cascade; there are: doubted" in done.stderr

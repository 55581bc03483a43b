"""A gateway without any model of its own: rules decide, and what needs an encoder says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from polymath.errors import ConfigError
from polymath.gateway import load_config
from tests.gateway.asking import user
from tests.gateway.running import Running, running
from tests.proxy.stand_in import StandInServer

CONFIG = """\
server: {watch_config: false}
experts:
  big: &big {kind: upstream, api_base: URL, model: big-model, num_retries: 0}
  math: {<<: *big, model: math-model}
router: {kind: rules, fallback: big, rules: [{expert: math, keyword: sum}]}
"""
OPENED = """\
import sys
from pathlib import Path
from polymath.gateway import load_config, prepare
prepare(load_config(Path(sys.argv[1]), {}))
print({"onnxruntime", "tokenizers", "torch"} & sys.modules.keys())
"""


def write(folder: Path, server: StandInServer, more: str = "") -> Path:
    file = folder / "polymath.yaml"
    file.write_text(CONFIG.replace("URL", server.url) + more)
    return file


@pytest.fixture(scope="module")
def gate(upstream: StandInServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = write(tmp_path_factory.mktemp("rules"), upstream)
    with running(config, upstream) as gate:
        yield gate


@pytest.mark.parametrize(
    ("text", "expert", "source"),
    [("What is the sum of 1 and 2?", "math", "rule"), ("Hello.", "big", "fallback")],
)
def test_rules_decide_and_the_rest_goes_to_the_fallback(
    gate: Running, text: str, expert: str, source: str
) -> None:
    answer = gate.post({"messages": [user(text)]})
    decision = answer.raise_for_status().json()["polymath"]
    assert (decision["expert"], decision["source"]) == (expert, source)
    assert gate.server.requests[-1].body["model"] == f"{expert}-model"


def test_there_are_no_embeddings(gate: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        gate.client().embeddings.create(model="polymath-encoder", input="Hello.")


def test_no_library_of_models_is_loaded(upstream: StandInServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENED, str(write(tmp_path, upstream))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ("cache: {semantic: true}\n", "cache.semantic"),
        ("  law: {<<: *big, examples: [the law]}\n", "experts.law.examples"),
    ],
)
def test_what_needs_an_encoder_is_refused(
    upstream: StandInServer, tmp_path: Path, more: str, place: str
) -> None:
    file = write(tmp_path, upstream)
    text = file.read_text()
    file.write_text(text.replace("router:", more + "router:"))
    with pytest.raises(ConfigError, match=f"{place}: needs a router that has a sentence encoder"):
        load_config(file, {})

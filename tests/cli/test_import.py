"""`experts import`: the models of another server as experts of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from polymath.cli.main import app
from polymath.errors import UpstreamFailed
from polymath.gateway import load_config
from tests.cli.test_cli import DEMO, polymath
from tests.proxy.stand_in import StandInServer, failing, sends, unused_port

KEY = "sk-never-to-be-seen"
VARIABLE = "THEIR_KEY"
MODELS = ["Qwen/Qwen2.5-0.5B", "law adapter", "/models/llama", "gpt-4o:latest"]
NAMES = {
    "": ["Qwen/Qwen2.5-0.5B", "law-adapter", "models/llama", "gpt-4o:latest"],
    "-our vllm-": [
        "our-vllm-Qwen/Qwen2.5-0.5B",
        "our-vllm-law-adapter",
        "our-vllm-/models/llama",
        "our-vllm-gpt-4o:latest",
    ],
}
"""By prefix, what the models are called."""


def listed(*models: str) -> Any:
    data = [{"id": model, "object": "model", "owned_by": "them"} for model in models]
    return sends({"object": "list", "data": data})


def imported(url: str, *args: str, **environ: str) -> Result:
    return CliRunner().invoke(app, ["experts", "import", "--api-base", url, *args], env=environ)


def refusal(done: Result) -> str:
    """What a command that was used wrongly says, in one line."""
    assert (done.exit_code, done.stdout) == (2, "")
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(("prefix", "names"), NAMES.items())
def test_what_is_printed_are_experts_of_a_config(
    server: StandInServer, tmp_path: Path, prefix: str, names: list[str]
) -> None:
    server.says(listed(*MODELS))
    done = imported(server.url, "--prefix", prefix, "--api-key", VARIABLE, **{VARIABLE: KEY})
    assert done.exit_code == 0, done.output
    file = tmp_path / "polymath.yaml"
    router = yaml.safe_dump({"router": {"path": f"{DEMO}/router", "fallback": names[0]}})
    file.write_text(done.stdout + router)
    experts = load_config(file, environ={VARIABLE: KEY}).settings.experts
    assert list(experts) == names
    assert [expert.model for expert in experts.values()] == MODELS
    for expert in experts.values():
        assert (expert.kind, expert.api_base) == ("upstream", server.url)
        assert expert.api_key is not None
        assert expert.api_key.get_secret_value() == KEY


def test_the_key_is_sent_and_never_shown(server: StandInServer) -> None:
    server.says(listed("one"))
    done = imported(server.url, "--api-key", VARIABLE, **{VARIABLE: KEY})
    (request,) = server.requests
    assert (request.method, request.path) == ("GET", "/v1/models")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert f"${{{VARIABLE}}}" in done.stdout
    assert KEY not in done.output


def test_without_a_key_none_is_written(server: StandInServer) -> None:
    server.says(listed("one"))
    done = imported(server.url)
    assert "api_key" not in done.stdout
    assert "authorization" not in server.requests[0].headers


def test_a_server_without_models_has_no_experts(server: StandInServer) -> None:
    server.says(listed())
    assert yaml.safe_load(imported(server.url).stdout) == {"experts": {}}


@pytest.mark.parametrize("key", ["", None])
def test_a_variable_without_a_key_is_named(
    server: StandInServer, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    environ = {} if key is None else {VARIABLE: key}
    done = imported(server.url, "--api-key", VARIABLE, **environ)
    assert f"the environment variable {VARIABLE} is not set" in refusal(done)
    assert server.requests == []


def test_a_key_that_cannot_be_sent_is_not_shown(server: StandInServer) -> None:
    done = imported(server.url, "--api-key", VARIABLE, **{VARIABLE: f"{KEY}\N{EURO SIGN}"})
    assert "must be printable ASCII" in refusal(done)
    assert KEY not in done.output


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://a:b@localhost/v1"])
def test_what_is_no_url_is_told(url: str) -> None:
    assert "api_base: " in refusal(imported(url))


@pytest.mark.parametrize(
    "body", [{}, {"data": None}, {"data": ["one"]}, {"data": [{"name": "one"}]}], ids=str
)
def test_a_reply_that_lists_nothing_is_told(server: StandInServer, body: Any) -> None:
    server.says(sends(body))
    failed = imported(server.url).exception
    assert isinstance(failed, UpstreamFailed)
    assert str(failed) == f"{server.url}/models lists no models."


def test_a_server_that_refuses_is_one_line(server: StandInServer) -> None:
    """As a user runs it."""
    server.says(failing(401))
    done = polymath(
        "experts", "import", "--api-base", server.url, "--api-key", VARIABLE, **{VARIABLE: KEY}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymath.proxy.upstream.backoff", lambda tries: 0.0)
    failed = imported(f"http://127.0.0.1:{unused_port()}/v1").exception
    assert isinstance(failed, UpstreamFailed)
    assert "cannot be reached" in str(failed)

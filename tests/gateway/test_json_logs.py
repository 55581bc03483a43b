"""Log lines: as JSON, with the id of their request, and without prompts unless they are wanted."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymath.gateway.json_logs import REQUEST_ID, JsonFormatter
from tests.gateway.asking import user
from tests.gateway.running import write_config
from tests.gateway.test_server import ADDRESS, COMMAND
from tests.proxy.stand_in import StandInServer

PROMPT = "A prompt that is nobody's business."


def record(message: str, *args: Any, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("a.logger", logging.WARNING, "file", 1, message, args, None)
    made.__dict__.update(more)
    return made


def written(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return dict(json.loads(line))


def test_a_line_says_when_who_and_what() -> None:
    line = written(record("%s of %d", "one", 2))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "warning", "logger": "a.logger", "message": "one of 2"}


def test_a_line_of_a_request_has_its_id_and_fields_stand_beside() -> None:
    token = REQUEST_ID.set("req_1")
    try:
        line = written(record("x", fields={"expert": "law", "weights": {"law": 1.0}}))
    finally:
        REQUEST_ID.reset(token)
    assert (line["request_id"], line["expert"], line["weights"]) == ("req_1", "law", {"law": 1.0})


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = written(record("x", exc_info=sys.exc_info()))
    assert "ValueError: two\nlines" in line["exception"]


@pytest.mark.parametrize(
    "odd", ["a half character: \ud800", 'quotes " and \\ and \x00', "a line\nbreak", "\u2028"]
)
def test_any_text_is_one_line_that_can_be_read(odd: str) -> None:
    assert written(record(odd))["message"] == odd


@pytest.mark.parametrize("odd", [2**70, Path("/x"), object(), float("inf"), {"a": {1, 2}}])
def test_any_field_can_be_written(odd: Any) -> None:
    assert written(record("x", fields={"odd": odd}))["message"] == "x"


@pytest.mark.parametrize("prompts", [False, True])
def test_the_log_of_a_server_is_json_without_prompts_unless_they_are_wanted(
    tmp_path: Path, text_router: Path, upstream: StandInServer, prompts: bool
) -> None:
    keys = f"log_format: json, log_prompts: {str(prompts).lower()}"
    config = write_config(tmp_path, text_router, upstream, server_keys=keys)
    command = [*COMMAND, "0", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "ready:" in line:
            break
    url = next(match[1] for line in lines if (match := ADDRESS.search(line)))
    body = {"model": "law", "messages": [user(PROMPT)]}
    headers = {"x-request-id": "mine"}
    for model, status in (("law", 200), ("nobody", 404)):
        asked = {**body, "model": model}
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers)
        assert answer.status_code == status
    process.send_signal(signal.SIGTERM)
    log = "".join(lines) + process.stderr.read()
    process.wait(20)
    entries = [json.loads(line) for line in log.splitlines()]
    (entry,) = (one for one in entries if one["logger"] == "polymath.requests")
    assert (entry["request_id"], entry["expert"], entry["outcome"]) == ("mine", "law", "ok")
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (3, 2)
    assert (PROMPT in log) is prompts
    if prompts:
        assert entry["messages"] == body["messages"]

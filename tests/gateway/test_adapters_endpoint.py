"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters that come and go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from safetensors.numpy import save_file

from polymath.errors import InvalidRequest
from polymath.experts import BaseModelSettings, EngineSettings, build_catalog, load_models
from polymath.gateway import Prepared
from polymath.gateway.adapters import AdapterUpdates
from polymath.gateway.app import Gateway, create_app
from polymath.gateway.protocol import LoadAdapterRequest
from tests.conftest import DEMO_CONFIG
from tests.gateway.asking import ask, refusal, text, user

ADAPTERS = DEMO_CONFIG.parent / "demo" / "adapters"
QUESTION = [user("Is a verbal agreement to sell a house binding? Answer yes or no.")]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the adapter `law`."""
    return Path(shutil.copytree(ADAPTERS / "law", tmp_path / "adapter"))


@pytest.fixture
def extra(base_url: str, folder: Path) -> Iterator[str]:
    """A loaded copy of the adapter `law`; whether the test unloads it is left open."""
    assert load(base_url, "extra", folder).status_code == 200
    yield "extra"
    unload(base_url, "extra")


def load(base_url: str, name: str, folder: Path | str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder), **more}
    return httpx.post(f"{base_url}{LOAD}", json=body, timeout=60)


def unload(base_url: str, name: str) -> httpx.Response:
    return httpx.post(f"{base_url}{UNLOAD}", json={"lora_name": name})


def assert_refused(answer: httpx.Response, status: int, param: str, named: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]


# --- coming --------------------------------------------------------------------------------------


def test_a_loaded_adapter_answers_as_the_expert_it_is_a_copy_of(client: OpenAI, extra: str) -> None:
    given = {"messages": QUESTION, "logprobs": True, "max_tokens": 12}
    loaded, configured = ask(client, model=extra, **given), ask(client, model="law", **given)
    assert loaded.model == extra
    assert loaded.choices == configured.choices
    assert text(loaded) != text(ask(client, model="smollm2", **given))


def test_a_loaded_adapter_is_listed_and_has_a_card(client: OpenAI, extra: str) -> None:
    listed = [model.id for model in client.models.list()]
    assert extra in listed
    about = (client.models.retrieve(extra).model_extra or {})["polymath"]
    assert (about["kind"], about["base_model"], about["domains"]) == ("lora", "smollm2", [])


def test_the_answer_to_a_load_names_the_adapter(base_url: str, folder: Path) -> None:
    answer = load(base_url, "org/extra:2", folder, base_model="smollm2")
    assert answer.json() == {"status": "loaded", "lora_name": "org/extra:2"}
    assert unload(base_url, "org/extra:2").json() == {
        "status": "unloaded",
        "lora_name": "org/extra:2",
    }


def test_a_name_that_was_loaded_may_be_loaded_with_other_weights(
    base_url: str, client: OpenAI, extra: str
) -> None:
    """And nothing that the old ones cached is taken for the new ones'."""
    given = {"messages": QUESTION, "logprobs": True, "max_tokens": 6}
    before = ask(client, model=extra, **given).choices
    assert load(base_url, extra, ADAPTERS / "math").status_code == 200
    after = ask(client, model=extra, **given).choices
    assert after == ask(client, model="math", **given).choices
    assert after != before


# --- going ---------------------------------------------------------------------------------------


def test_an_adapter_that_was_unloaded_is_404(base_url: str, client: OpenAI, extra: str) -> None:
    assert unload(base_url, extra).status_code == 200
    error = refusal(client, model=extra)
    assert (error.status_code, error.code, error.param) == (404, "model_not_found", "model")
    assert extra not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(extra)


def test_an_unload_leaves_an_answer_in_progress_alone(
    base_url: str, client: OpenAI, extra: str
) -> None:
    given: dict[str, Any] = {
        "messages": QUESTION,
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    chunks = iter(client.chat.completions.create(model=extra, stream=True, **given))
    begun = next(chunks).choices[0].delta.content or ""
    assert unload(base_url, extra).status_code == 200
    assert refusal(client, model=extra).status_code == 404
    rest = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert begun + rest == text(ask(client, model="law", **given))


def test_an_adapter_that_was_unloaded_can_be_loaded_again(
    base_url: str, client: OpenAI, extra: str, folder: Path
) -> None:
    first = ask(client, model=extra, messages=QUESTION)
    unload(base_url, extra)
    assert load(base_url, extra, folder).status_code == 200
    assert text(ask(client, model=extra, messages=QUESTION)) == text(first)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["polymath", "auto", "law", "both", "smollm2"])
def test_a_name_that_is_reserved_or_taken_is_refused(
    base_url: str, client: OpenAI, folder: Path, name: str
) -> None:
    assert_refused(load(base_url, name, folder), 400, "lora_name", f"{name!r} is taken")
    assert client.models.retrieve(name).id == name


def test_a_name_that_cannot_be_a_model_is_refused(base_url: str, folder: Path) -> None:
    assert_refused(load(base_url, "two words", folder), 400, "lora_name", "lora_name")


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "/etc/passwd", "relative/nowhere", "\0", "x" * 5000], ids=ascii
)
def test_a_path_that_is_no_folder_is_refused(base_url: str, path: str) -> None:
    assert_refused(load(base_url, "extra", path), 400, "lora_path", "")


@pytest.mark.parametrize(
    ("file", "data", "named"),
    [
        ("adapter_model.safetensors", b"rubbish", "corrupt or not safetensors"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b'{"peft_type": "IA3"}', "peft_type must be LORA"),
        ("adapter_model.safetensors", None, "missing"),
    ],
)
def test_a_corrupt_adapter_is_refused_and_the_file_is_named(
    base_url: str, client: OpenAI, folder: Path, file: str, data: bytes | None, named: str
) -> None:
    if data is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data)
    answer = load(base_url, "extra", folder)
    assert_refused(answer, 400, "lora_path", named)
    assert str(folder / file) in answer.json()["error"]["message"]
    assert refusal(client, model="extra").status_code == 404


def test_a_corrupt_adapter_does_not_take_the_place_of_the_one_that_is_loaded(
    base_url: str, client: OpenAI, extra: str, tmp_path: Path
) -> None:
    before = ask(client, model=extra, messages=QUESTION)
    (tmp_path / "empty").mkdir()
    assert load(base_url, extra, tmp_path / "empty").status_code == 400
    assert text(ask(client, model=extra, messages=QUESTION)) == text(before)


def test_an_adapter_of_another_base_model_is_refused(base_url: str, tmp_path: Path) -> None:
    answer = load(base_url, "extra", tiny_adapter(tmp_path / "tiny"))
    assert_refused(answer, 400, "lora_path", "made for another base model")


@pytest.mark.parametrize("base_model", ["smollm3", "math", ""])
def test_an_unknown_base_model_is_refused_with_those_there_are(
    base_url: str, folder: Path, base_model: str
) -> None:
    answer = load(base_url, "extra", folder, base_model=base_model)
    assert_refused(answer, 400, "base_model", "smollm2")


def test_a_field_that_is_not_known_is_refused_by_name(base_url: str, folder: Path) -> None:
    answer = load(base_url, "extra", folder, load_inplace=True)
    assert_refused(answer, 400, "load_inplace", "not supported")


@pytest.mark.parametrize("name", ["law", "both", "smollm2"])
def test_what_the_config_names_cannot_be_unloaded(base_url: str, client: OpenAI, name: str) -> None:
    assert_refused(unload(base_url, name), 400, "lora_name", "belongs to the config file")
    assert client.models.retrieve(name).id == name


@pytest.mark.parametrize("name", ["nothing", "polymath", ""])
def test_what_is_not_loaded_cannot_be_unloaded(base_url: str, name: str) -> None:
    assert_refused(unload(base_url, name), 404, "lora_name", "not loaded")


def test_files_that_vanish_before_the_first_use_fail_that_answer_alone(
    base_url: str, client: OpenAI, extra: str, folder: Path
) -> None:
    shutil.rmtree(folder)
    error = refusal(client, model=extra)
    assert (error.status_code, error.code) == (500, "generation_failed")
    assert text(ask(client, model="law", messages=QUESTION, max_tokens=2))


# --- permission ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_without_permission_there_are_no_such_endpoints(shipped: Prepared, path: str) -> None:
    assert (await posted(Gateway(shipped), path)).status_code == 404


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_while_the_models_load_no_adapter_comes_or_goes(demo: Prepared, path: str) -> None:
    answer = await posted(Gateway(demo), path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


async def posted(gateway: Gateway, path: str) -> httpx.Response:
    body = {"lora_name": "extra"} | ({"lora_path": "folder"} if path == LOAD else {})
    transport = httpx.ASGITransport(create_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, json=body)


# --- several base models -------------------------------------------------------------------------


def tiny_adapter(folder: Path) -> Path:
    """An adapter of rank 1 for the model of the fixture `tiny_model`."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"A": np.ones((1, 32), np.float32), "B": np.ones((32, 1), np.float32)}
    save_file(
        {f"{module}.lora_{name}.weight": values for name, values in factors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


@pytest.fixture
def two_bases(tiny_model: Path) -> AdapterUpdates:
    """The base models `one` and `two`, both the tiny one, and no expert."""
    bases = {name: BaseModelSettings(model="somewhere") for name in ("one", "two")}
    models = load_models(
        dict.fromkeys(bases, tiny_model), bases, {}, EngineSettings(backend="torch")
    )
    return AdapterUpdates(build_catalog(bases, {}), models, {})


def test_where_there_are_several_base_models_one_must_be_named(
    two_bases: AdapterUpdates, tmp_path: Path
) -> None:
    request = LoadAdapterRequest(lora_name="a", lora_path=str(tiny_adapter(tmp_path / "a")))
    with pytest.raises(InvalidRequest, match="one, two") as refused:
        two_bases.load(request)
    assert refused.value.param == "base_model"


def test_an_adapter_may_move_to_another_base_model(
    two_bases: AdapterUpdates, tmp_path: Path
) -> None:
    adapter = str(tiny_adapter(tmp_path / "a"))
    models = two_bases._models
    for base in ("one", "two"):
        two_bases.load(LoadAdapterRequest(lora_name="a", lora_path=adapter, base_model=base))
        assert [name for name, model in models.items() if model.adapters.names] == [base]
    two_bases.unload("a")
    assert not any(model.adapters.names for model in models.values())

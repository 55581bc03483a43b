"""Shared by all tests: one loaded demo (base model, six experts, router) behind one real server."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import settings

from polymath.experts import Engine, ExpertSettings
from polymath.gateway import Prepared, load_config, prepare
from polymath.gateway.app import Gateway, create_app
from polymath.gateway.http_protocol import limited_protocol
from tests.proxy.stand_in import StandInServer

ROOT = Path(__file__).resolve().parents[1]
DEMO_CONFIG = ROOT / "configs" / "polymath.yaml"
EXPERTS = ("math", "coding", "health", "law", "finance", "general")
COMBINED: dict[str, dict[str, Any]] = {
    "both": {"members": {"math": 0.3, "general": 0.7}},
    "logits": {"members": {"math": 0.5, "general": 0.5}, "combine": "logits"},
    "posterior": {"members": {"math": 1, "general": 1}, "combine": "posterior"},
    "first": {"members": {"math": 1, "general": 0}},
    "routed": {"members": ["math", "coding", "general"]},
    "steered": {"large": "general", "tuned": "math", "untuned": "smollm2", "alpha": 0.5},
    "twin": {"large": "smollm2", "tuned": "math", "untuned": "smollm2"},
    "unsteered": {"large": "general", "tuned": "math", "untuned": "smollm2", "alpha": 0},
}
"""Experts of the session that combine others, beside those of the shipped config."""

START_SECONDS = 120


def pytest_configure() -> None:
    """Give each of several test processes a core, or else their threads wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


settings.register_profile("polymath", deadline=None)
settings.load_profile("polymath")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def shipped() -> Prepared:
    """The shipped config with its artifacts checked and its router open."""
    return prepare(load_config(DEMO_CONFIG, environ={}))


@pytest.fixture(scope="session")
def demo(shipped: Prepared) -> Prepared:
    """The shipped config with experts that combine others, and adapters that come and go."""
    settings = shipped.settings
    combined = {
        name: ExpertSettings.model_validate(
            {"kind": "ensemble" if "members" in values else "proxy_tuned", **values}
        )
        for name, values in COMBINED.items()
    }
    more = settings.model_copy(
        update={
            "experts": {**settings.experts, **combined},
            "server": settings.server.model_copy(
                update={"allow_runtime_lora_updating": True, "watch_config": False}
            ),
        }
    )
    return replace(shipped, config=replace(shipped.config, settings=more))


@pytest.fixture(scope="session")
def gateway(demo: Prepared) -> Gateway:
    return Gateway(demo)


@pytest.fixture(scope="session")
def base_url(gateway: Gateway) -> Iterator[str]:
    """A real HTTP server of the demo, ready to answer: `http://127.0.0.1:PORT`."""
    with serving(gateway) as url:
        yield url


@contextmanager
def serving(gateway: Gateway) -> Iterator[str]:
    """A real HTTP server of a gateway, from when it is ready to answer."""
    protocol = limited_protocol(gateway.settings.limits)
    config = uvicorn.Config(create_app(gateway), port=0, http=protocol, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    _wait_until_ready(url)
    yield url
    server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture(scope="session")
def engine(gateway: Gateway, base_url: str) -> Engine:
    """The engine behind the server, with the one loaded model of the session."""
    return gateway.engine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with a byte-level tokenizer and a chat template, as a HF folder."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like `tiny_model` whose token ids mean other bytes."""
    return write_tiny_model(tmp_path_factory.mktemp("foreign"), backwards=True)


@pytest.fixture(scope="session")
def text_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small router that knows three texts, as law, coding and math."""
    from tests.gateway.test_gradient_routing import write_text_router
    from tests.router.conftest import write_tiny_bert

    folder = tmp_path_factory.mktemp("text-router") / "router"
    bert = write_tiny_bert(tmp_path_factory.mktemp("router-bert"))
    write_text_router(bert, folder, ("law", "coding", "math"))
    return folder


def write_tiny_model(folder: Path, backwards: bool = False) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_random_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter of the base model none of whose factors is zero, as a PEFT folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if httpx.get(f"{url}/readyz").status_code == 200:
            return
        time.sleep(0.1)
    raise TimeoutError("the demo did not get ready")


@pytest.fixture(scope="module")
def upstream() -> Iterator[StandInServer]:
    """Stands in for a model provider."""
    server = StandInServer()
    yield server
    server.close()


@pytest.fixture
def server(upstream: StandInServer) -> StandInServer:
    """The same, and nobody has asked it anything yet."""
    upstream.forget()
    return upstream

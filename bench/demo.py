"""The shipped demo, opened for a benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from polymath.experts import LoraModel, Row, adapters_on, render_chat
from polymath.gateway import Prepared, load_config, prepare

__all__ = ["BASE", "CONFIG", "POLYMATH", "chat_row", "demo_text", "load_demo", "open_model"]

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "polymath.yaml"
BASE = "smollm2"
POLYMATH = str(Path(sys.executable).with_name("polymath"))
"""The command."""


def load_demo() -> Prepared:
    """The demo's config with its artifacts on disk."""
    return prepare(load_config(CONFIG, environ={}))


def demo_text() -> str:
    """The demo's config for a file elsewhere."""
    return CONFIG.read_text().replace("demo/", f"{CONFIG.parent}/demo/")


def open_model(demo: Prepared, **engine: Any) -> LoraModel:
    """The demo's base model with its adapters, under changed engine settings."""
    settings = demo.settings.engine.model_copy(update=engine)
    adapters = adapters_on(BASE, demo.settings.experts)
    return LoraModel(demo.folders[BASE], adapters, settings)


def chat_row(model: LoraModel, expert: str | None, text: str) -> Row:
    """A prompt to one expert, as a row of its own."""
    tokens = render_chat(model.tokenizer, [{"role": "user", "content": text}])
    return Row(BASE, expert, tuple(tokens))

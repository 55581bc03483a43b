"""Experts by name, and what their weights need before they can be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymath.experts.chat import Message, frame_conversation, render_chat
from polymath.experts.expert_settings import ExpertSettings, SamplingDefaults
from polymath.experts.group import Row
from polymath.experts.lora_model import LoraModel
from polymath.experts.settings import BaseModelSettings, EngineSettings

__all__ = ["Expert", "adapters_on", "build_catalog", "expert_row", "load_models"]


@dataclass(frozen=True, slots=True)
class Expert:
    """Somebody who can answer: an adapter on a base model, or a base model.

    Attributes:
        domains: router domains that it answers; none for a bare base model.
    """

    name: str
    settings: ExpertSettings
    domains: tuple[str, ...]

    @property
    def sampling(self) -> SamplingDefaults:
        """Values for what a request leaves open."""
        return self.settings.sampling


def build_catalog(
    base_models: Mapping[str, BaseModelSettings], experts: Mapping[str, ExpertSettings]
) -> dict[str, Expert]:
    """All experts by name; every base model is one too, under its own name."""
    catalog = {
        name: Expert(name, settings, settings.domains_of(name))
        for name, settings in experts.items()
    }
    for name, base in base_models.items():
        bare = ExpertSettings(kind="base", base_model=name, description=base.description)
        catalog[name] = Expert(name, bare, ())
    return catalog


def load_models(
    folders: Mapping[str, Path],
    base_models: Mapping[str, BaseModelSettings],
    experts: Mapping[str, ExpertSettings],
    engine: EngineSettings,
) -> dict[str, LoraModel]:
    """Load every base model with the adapters that stand on it; adapters go by expert name."""
    return {
        name: LoraModel(folder, adapters_on(name, experts), engine, base_models[name].max_model_len)
        for name, folder in folders.items()
    }


def adapters_on(base_model: str, experts: Mapping[str, ExpertSettings]) -> dict[str, Path]:
    """The adapter folders of the experts that stand on one base model, by expert name."""
    return {
        name: settings.adapter
        for name, settings in experts.items()
        if settings.base_model == base_model and settings.adapter is not None
    }


def expert_row(expert: Expert, models: Mapping[str, LoraModel], messages: Sequence[Message]) -> Row:
    """The row by which an expert of one model answers a conversation.

    Raises:
        InvalidRequest: the model's chat template refuses the conversation.
        ValueError: the expert combines others.
    """
    settings = expert.settings
    if settings.base_model is None:
        raise ValueError(f"{expert.name} is of kind {settings.kind} and has no row of its own")
    few_shot = [turn.model_dump() for turn in settings.few_shot]
    framed = frame_conversation(messages, settings.system_prompt, few_shot)
    prompt = render_chat(models[settings.base_model].tokenizer, framed)
    adapter = expert.name if settings.adapter is not None else None
    return Row(settings.base_model, adapter, tuple(prompt))

"""How an expert answers: which rows, and how they are combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from polymath.errors import ModelNotFound
from polymath.experts.catalog import Expert, expert_row
from polymath.experts.chat import Message
from polymath.experts.combiner import (
    Combiner,
    Mixture,
    Posterior,
    ProxyTuning,
    Select,
    WeightedLogits,
)
from polymath.experts.comblm import open_combiner
from polymath.experts.expert_settings import ExpertSettings
from polymath.experts.group import Row
from polymath.experts.lora_model import LoraModel
from polymath.experts.vocabulary import Vocabulary

__all__ = [
    "Plan",
    "plan_answer",
    "plan_together",
    "unlike_vocabularies",
    "vocabulary_conflicts",
]


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of an answer and their combiner.

    Attributes:
        names: the expert behind each row.
        remote: the expert behind HTTP whose logits come before those of the rows, if there is one.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    combiner: Combiner
    remote: str | None = None


def plan_answer(
    expert: Expert,
    catalog: Mapping[str, Expert],
    models: Mapping[str, LoraModel],
    messages: Sequence[Message],
    route_weights: Mapping[str, float],
) -> Plan:
    """The plan by which an expert answers a conversation.

    Args:
        route_weights: the router's, for ensembles whose members have none of their own.
    Raises:
        InvalidRequest: a chat template refuses the conversation.
        ModelNotFound: an expert that this one combines is gone.
    """
    settings = expert.settings
    if settings.combiner is not None:
        names, combiner = tuple(settings.members or ()), learned_combiner(settings.combiner)
    elif settings.kind == "ensemble":
        shares = _shares(settings, route_weights)
        names, combiner = tuple(shares), _ensemble(settings, tuple(shares.values()))
    elif settings.kind == "proxy_tuned":
        names = tuple(str(name) for name in (settings.large, settings.tuned, settings.untuned))
        combiner = ProxyTuning(settings.alpha)
    else:
        names, combiner = (expert.name,), Select()
    if gone := [name for name in names if name not in catalog]:
        raise ModelNotFound(f"The expert {gone[0]!r} is not loaded any more.", param="model")
    local = [name for name in names if catalog[name].settings.has_row]
    rows = tuple(expert_row(catalog[name], models, messages) for name in local)
    return Plan(names, rows, combiner, next((name for name in names if name not in local), None))


def plan_together(
    catalog: Mapping[str, Expert],
    models: Mapping[str, LoraModel],
    messages: Sequence[Message],
    weights: Mapping[str, float],
    combiner: Callable[[tuple[float, ...]], Combiner],
) -> Plan:
    """The plan by which several experts answer as one.

    Args:
        weights: of experts of one model each, which share a vocabulary.
        combiner: of the rows, given their weights.
    Raises:
        InvalidRequest: a chat template refuses the conversation.
    """
    total = sum(weights.values())
    shares = tuple(weight / total for weight in weights.values())
    rows = tuple(expert_row(catalog[name], models, messages) for name in weights)
    return Plan(tuple(weights), rows, combiner(shares))


def vocabulary_conflicts(
    catalog: Mapping[str, Expert], vocabulary_of: Callable[[str], Vocabulary]
) -> Iterator[tuple[str, str]]:
    """Experts whose parts cannot be combined token by token, as they mean others by a token.

    Args:
        vocabulary_of: the vocabulary of a base model.
    Returns:
        Pairs of an expert's name and what is wrong with it.
    """
    for expert in catalog.values():
        parts = [catalog[name] for name in expert.settings.parts()]
        bases = [part.settings.base_model for part in parts if part.settings.base_model]
        for first, other in unlike_vocabularies(bases, vocabulary_of):
            yield (
                expert.name,
                f"the base models {first} and {other} have different vocabularies; "
                "only experts that share one can be combined",
            )


def unlike_vocabularies(
    base_models: Iterable[str], vocabulary_of: Callable[[str], Vocabulary]
) -> Iterator[tuple[str, str]]:
    """The first base model with each one whose vocabulary is another."""
    first, *others = dict.fromkeys(base_models) or [""]
    for other in others:
        if vocabulary_of(first) != vocabulary_of(other):
            yield first, other


@cache
def learned_combiner(folder: Path) -> Combiner:
    """A CombLM combiner, opened once.

    Raises:
        CombinerError: its folder cannot be used.
    """
    return open_combiner(folder)


def _shares(settings: ExpertSettings, route_weights: Mapping[str, float]) -> dict[str, float]:
    """The weight of each member; alike where the router gives none of them any."""
    members = settings.members or ()
    shares = (
        dict(members)
        if isinstance(members, Mapping)
        else {name: route_weights.get(name, 0.0) for name in members}
    )
    total = sum(shares.values())
    return {name: share / total if total else 1 / len(shares) for name, share in shares.items()}


def _ensemble(settings: ExpertSettings, shares: tuple[float, ...]) -> Combiner:
    if settings.combine == "logits":
        return WeightedLogits(shares)
    if settings.combine == "posterior":
        return Posterior(shares, settings.top_k, settings.floor)
    return Mixture(shares)

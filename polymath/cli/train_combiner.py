"""`polymath train combiner`: a learned mixture of a large and a small model (CombLM)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polymath.cli.options import DEFAULT_CONFIG, ConfigOption, DataFiles

if TYPE_CHECKING:
    from torch import Tensor

    from polymath.experts import Expert, ExpertSettings, LoraModel
    from polymath.gateway import Settings
    from polymath.training import Scorer

__all__ = ["train_combiner_command"]

SUPPORT = 100
"""Likeliest tokens asked of an upstream."""


class Kind(StrEnum):
    """What the share of the small model depends on."""

    mean = "mean"
    constant = "constant"
    entropy = "entropy"
    full = "full"


def train_combiner_command(
    large: Annotated[str, typer.Option(help="An expert, base model or upstream of the config.")],
    small: Annotated[str, typer.Option(help="An expert or base model of the same vocabulary.")],
    data: DataFiles,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    kind: Annotated[
        Kind, typer.Option(help="mean, constant, entropy (of both models) or full.")
    ] = Kind.entropy,
    support: Annotated[
        int, typer.Option(min=1, help="Likeliest tokens asked of an upstream.")
    ] = SUPPORT,
    seed: Annotated[int, typer.Option()] = 0,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Fit how much of a small model to mix into a large one, with both frozen.

    A third of the conversations is held out. What the models say is kept in the folder, so that
    another kind is fitted in seconds.
    """
    from polymath.cli.progress import conversion_progress
    from polymath.experts import build_catalog, load_models
    from polymath.gateway import load_config, prepare
    from polymath.training import read_chats, train_combiner

    rows = read_chats(data)
    with conversion_progress() as progress:
        prepared = prepare(load_config(config), progress)
    settings = prepared.settings
    catalog = build_catalog(settings.base_models, settings.experts)
    names = (large, small)
    for name in names:
        if name not in catalog:
            raise typer.BadParameter(f"no expert {name!r}; there are {', '.join(catalog)}")
    models = load_models(prepared.folders, settings.base_models, settings.experts, settings.engine)
    local = models.get(str(catalog[small].settings.base_model))
    if local is None:
        raise typer.BadParameter(f"{small!r} is no model of the engine; choose one as --small")
    of_large = _scorer(catalog[large], models, local, support)
    with of_large as large_scorer, conversion_progress() as progress:
        of_small = _local_scorer(catalog[small], local)
        card = train_combiner(
            rows,
            local.tokenizer,
            names,
            (large_scorer, of_small),
            kind.value,
            out,
            seed,
            progress,
            ":".join(_identity(catalog[name].settings, settings, support) for name in names),
        )
    for name, value in card.perplexity.items():
        typer.echo(f"{name}: perplexity {value:.4f}")
    mixed = "a network" if card.share is None else f"{card.share:.4f}"
    typer.echo(f"{out}: share of {small}: {mixed}")


def _identity(expert: ExpertSettings, settings: Settings, support: int) -> str:
    """Whatever changes what a model says."""
    from polymath.experts import adapter_sha256

    if expert.kind == "upstream":
        return f"{expert.api_base}:{expert.model}:{support}"
    base = settings.base_models[str(expert.base_model)].model
    return base if expert.adapter is None else f"{base}:{adapter_sha256(expert.adapter)}"


def _local_scorer(expert: Expert, model: LoraModel) -> Scorer:
    adapter = expert.name if expert.settings.adapter is not None else None
    return lambda tokens: model.all_logits(adapter, tokens)


@contextmanager
def _scorer(
    expert: Expert, models: dict[str, LoraModel], local: LoraModel, support: int
) -> Iterator[Scorer]:
    """Logits of the large model, wherever it is."""
    from polymath.proxy import RemoteScores, Upstream

    if expert.settings.kind != "upstream":
        model = models.get(str(expert.settings.base_model))
        if model is None:
            raise typer.BadParameter(f"{expert.name!r} is no single model; choose one as --large")
        if model.vocabulary != local.vocabulary:
            raise typer.BadParameter(f"{expert.name!r} has another vocabulary than --small")
        yield _local_scorer(expert, model)
        return
    with asyncio.Runner() as runner:
        upstream = Upstream(expert.name, expert.settings)
        scores = RemoteScores(upstream, local, support)
        vocabulary = int(local.all_logits(None, [0]).shape[-1])

        def remote(tokens: Sequence[int]) -> Tensor:
            import torch

            supports = runner.run(scores.every(tokens))
            return torch.stack([one.logits(vocabulary) for one in supports])

        yield remote
        runner.run(upstream.close())

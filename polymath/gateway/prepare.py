"""Everything that must be in order before the server listens: models on disk, adapters, router."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from polymath.artifacts import Progress, no_progress
from polymath.errors import (
    AdapterError,
    CombinerError,
    ConfigError,
    ModelSourceError,
    RouterArtifactError,
)
from polymath.experts import (
    Vocabulary,
    build_catalog,
    open_combiner,
    prepare_base_model,
    prepare_graph,
    read_adapter,
    read_vocabulary,
    runs_on_onnx,
    unlike_vocabularies,
    vocabulary_conflicts,
    weight_shapes,
)
from polymath.gateway.config import ConfigFile, KeyPath
from polymath.gateway.gradients import prompt_features
from polymath.gateway.settings import Settings
from polymath.router import Router, build_router

__all__ = ["Prepared", "open_router", "prepare"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A config whose artifacts are all usable.

    Attributes:
        folders: base model name -> Hugging Face folder.
    """

    config: ConfigFile
    folders: dict[str, Path]
    router: Router

    @property
    def settings(self) -> Settings:
        """The settings of the config."""
        return self.config.settings


def prepare(config: ConfigFile, progress: Progress = no_progress) -> Prepared:
    """Convert or download base models, check all adapters, open the router.

    Raises:
        ConfigError: one line, with file, line and key, for every artifact that cannot be used.
    """
    problems: list[str] = []
    folders: dict[str, Path] = {}
    shapes: dict[str, Shapes] = {}
    for name, base in config.settings.base_models.items():
        try:
            folders[name] = prepare_base_model(base.model, progress)
            shapes[name] = weight_shapes(folders[name])
            if runs_on_onnx(config.settings.engine):
                prepare_graph(folders[name], progress)
        except ModelSourceError as error:
            problems.append(config.problem(("base_models", name, "model"), error.message))
    problems += [config.problem(*problem) for problem in _unfit_adapters(config.settings, shapes)]
    problems += [config.problem(*problem) for problem in _unfit_combiners(config.settings)]
    problems += [config.problem(*problem) for problem in _conflicts(config.settings, folders)]
    try:
        router = open_router(config)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Prepared(config, folders, router)


def open_router(config: ConfigFile) -> Router:
    """The router of a config. (One by gradients needs its base model.)

    Raises:
        ConfigError: its folder cannot be used.
    """
    settings = config.settings
    try:
        return build_router(
            settings.router,
            settings.domains(),
            settings.examples(),
            partial(prompt_features, settings),
        )
    except (RouterArtifactError, ModelSourceError) as error:
        key = ("router", error.param or "path")
        raise ConfigError([config.problem(key, error.message)]) from error


def _unfit_adapters(settings: Settings, shapes: dict[str, Shapes]) -> Iterator[tuple[KeyPath, str]]:
    for name, expert in settings.experts.items():
        if expert.adapter is None or expert.base_model not in shapes:
            continue
        try:
            read_adapter(expert.adapter, shapes[expert.base_model])
        except AdapterError as error:
            yield ("experts", name, "adapter"), error.message


def _unfit_combiners(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    for name, expert in settings.experts.items():
        if expert.combiner is not None:
            try:
                open_combiner(expert.combiner)
            except CombinerError as error:
                yield ("experts", name, "combiner"), error.message


def _conflicts(settings: Settings, folders: dict[str, Path]) -> Iterator[tuple[KeyPath, str]]:
    if len(folders) < max(2, len(settings.base_models)):
        return  # there is nothing to compare, or a base model is missing, which is said already

    @cache
    def vocabulary_of(base_model: str) -> Vocabulary:
        return read_vocabulary(folders[base_model])

    catalog = build_catalog(settings.base_models, settings.experts)
    for name, message in vocabulary_conflicts(catalog, vocabulary_of):
        yield ("experts", name), message
    if settings.router.combine != "select" or settings.router.cluster_folder is not None:
        yield from _uncombinable(settings, vocabulary_of)


def _uncombinable(
    settings: Settings, vocabulary_of: Callable[[str], Vocabulary]
) -> Iterator[tuple[KeyPath, str]]:
    """Whether the router may let any two experts answer together."""
    bases = [e.base_model for e in settings.experts.values() if e.base_model is not None]
    for first, other in unlike_vocabularies(bases, vocabulary_of):
        message = (
            f"the base models {first} and {other} have different vocabularies, so that their "
            "experts cannot answer together"
        )
        if settings.router.kind == "encoder":
            yield ("router", "combine"), f"{message}; use `select`"
        else:
            yield ("router", "kind"), f"{message}; leave those of one base model, or use `encoder`"

"""What the sections of a config say against each other: names of nobody, circles, lost folders."""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from polymath.experts import JudgeSettings
from polymath.gateway.settings import ROUTED_MODELS, Settings

__all__ = ["KeyPath", "contradictions", "suggestion"]

KeyPath = tuple[str | int, ...]


def suggestion(given: Any, names: list[str]) -> str:
    """The nearest valid name, or all of them, to be put behind a message."""
    close = get_close_matches(str(given), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid here: {', '.join(names)}" if names else ""


def contradictions(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    """What each section alone cannot see."""
    bases, experts = list(settings.base_models), list(settings.experts)
    for section, names in (("base_models", bases), ("experts", experts)):
        for name in names:
            if name in ROUTED_MODELS:
                yield (section, name), "this name is reserved for the router; choose another"
    for name in set(bases) & set(experts):
        yield ("experts", name), "a base model has this name already; choose another"
    for name, expert in settings.experts.items():
        if expert.base_model is not None and expert.base_model not in bases:
            message = f"no base model {expert.base_model!r}{suggestion(expert.base_model, bases)}"
            yield ("experts", name, "base_model"), message
        yield from _unfit_parts(settings, name)
        if expert.adapter is not None and not expert.adapter.is_dir():
            yield ("experts", name, "adapter"), _missing_folder(expert.adapter)
        if expert.judge is not None:
            yield from _unfit_judge(expert.judge, name, [*bases, *experts])
    yield from _shared_domains(settings)
    if settings.server.workers > 1 and settings.store == "memory":
        message = "several processes need a store that they share: `store: redis://...`"
        yield ("server", "workers"), message
    if settings.router.kind in ("gradient", "rules"):
        yield from _unfit_without_encoder(settings)
    yield from _unfit_router(settings, [*bases, *experts])


def _unfit_without_encoder(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    message = "needs a router that has a sentence encoder"
    if settings.cache.semantic:
        yield ("cache", "semantic"), message
    for name, expert in settings.experts.items():
        if expert.examples:
            yield ("experts", name, "examples"), message


def _unfit_router(settings: Settings, everybody: list[str]) -> Iterator[tuple[KeyPath, str]]:
    experts = list(settings.experts)
    if settings.router.fallback not in everybody:
        hint = suggestion(settings.router.fallback, experts)
        yield ("router", "fallback"), f"no expert {settings.router.fallback!r}{hint}"
    for index, rule in enumerate(settings.router.rules):
        if rule.expert not in everybody:
            hint = suggestion(rule.expert, experts)
            yield ("router", "rules", index, "expert"), f"no expert {rule.expert!r}{hint}"
    for key in ("path", "clusters"):
        folder = getattr(settings.router, key)
        if folder is not None and not folder.is_dir():
            yield ("router", key), _missing_folder(folder)


def _unfit_parts(settings: Settings, name: str) -> Iterator[tuple[KeyPath, str]]:
    """Experts that another names and that it cannot combine or ask."""
    experts = settings.experts
    with_row = [*settings.base_models, *(n for n, expert in experts.items() if expert.has_row)]
    upstreams = [other for other, expert in experts.items() if expert.kind == "upstream"]
    for part, key in experts[name].parts().items():
        fit = [*with_row, *upstreams] if key == "large" else with_row
        if part in fit:
            continue
        if part not in experts:
            reason = f"no expert {part!r}{suggestion(part, fit)}"
        elif experts[part].parts():
            reason = f"{part!r} combines experts itself; name those"
        else:
            reason = f"{part!r} is of kind {experts[part].kind}, and has no logits to combine"
        yield ("experts", name, key), reason
    everybody = [*settings.base_models, *experts]
    for helper, key in experts[name].helpers().items():
        if helper not in everybody:
            yield ("experts", name, key), f"no expert {helper!r}{suggestion(helper, everybody)}"
        elif (circle := _circle(settings, name, helper)) is not None:
            yield ("experts", name, key), f"asks itself in the end: {' -> '.join(circle)}"


def _unfit_judge(
    judge: JudgeSettings, name: str, everybody: list[str]
) -> Iterator[tuple[KeyPath, str]]:
    key: KeyPath = ("experts", name, "judge")
    if judge.references is not None and not judge.references.is_file():
        yield (*key, "references"), f"{judge.references} does not exist"
    if judge.expert not in (None, *everybody):
        message = f"no expert {judge.expert!r}{suggestion(judge.expert, everybody)}"
        yield (*key, "expert"), message


def _circle(settings: Settings, name: str, helper: str) -> list[str] | None:
    """The way from an expert over a helper back to itself."""
    ways = [[name, helper]]
    seen = {helper}
    while ways:
        way = ways.pop()
        if way[-1] == name:
            return way
        expert = settings.experts.get(way[-1])
        for following in expert.helpers() if expert is not None else ():
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


def _shared_domains(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    owners: dict[str, str] = {}
    for name, expert in settings.experts.items():
        for domain in expert.domains_of(name):
            if (owner := owners.setdefault(domain, name)) != name:
                message = f"domain {domain!r} belongs to expert {owner!r} already"
                yield ("experts", name, "domains"), message


def _missing_folder(folder: Path) -> str:
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    names = {path.name: path for path in siblings if path.is_dir()}
    close = get_close_matches(folder.name, list(names), n=1)
    hint = f"; did you mean {names[close[0]]}?" if close else ""
    return f"{folder} does not exist{hint}"

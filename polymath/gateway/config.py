"""`polymath.yaml` to settings; everything that is wrong with it at once, each with its line.

`${VAR}` and `${VAR:-default}` are expanded in values, after YAML has been parsed, so that a value
of the environment can never change the structure of the file. `$${` stands for a literal `${`.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from polymath.errors import ConfigError
from polymath.experts import ExpertSettings
from polymath.gateway.contradictions import KeyPath, contradictions, suggestion
from polymath.gateway.settings import Settings

__all__ = ["Changes", "ConfigFile", "KeyPath", "load_config", "read_config"]

MERGE_TAG = "tag:yaml.org,2002:merge"
FORM = re.compile(r"^(dict|tuple)\[")
"""How pydantic marks in a location which form of `members` it tried."""

SECRETS = frozenset({"admin_key", "api_base", "api_key", "headers", "store"})
"""Keys whose values are not shown."""

VARIABLE = re.compile(r"(?P<escape>\$)?\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")


Changes = Mapping[tuple[str, ...], Any]
"""Key path -> the value in place of the file's; None takes the key out."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A valid config and where its keys stand.

    Attributes:
        settings: with paths taken from the file's folder.
        lines: key path -> line number, from 1.
        changes: that were made to the file's values.
    """

    path: Path
    settings: Settings
    lines: Mapping[KeyPath, int]
    changes: Changes

    def with_experts(self, experts: Mapping[str, ExpertSettings]) -> "ConfigFile":
        """The same with more experts, whose paths are as they are to be read."""
        more = {**self.settings.experts, **experts}
        return replace(self, settings=self.settings.model_copy(update={"experts": more}))

    def problem(self, key: KeyPath, message: str) -> str:
        """`FILE:LINE: KEY: MESSAGE`"""
        return _problem(self.path, self.lines, key, message)


def load_config(
    path: Path, environ: Mapping[str, str] = os.environ, changes: Changes | None = None
) -> ConfigFile:
    """Read, expand and check a config file. No model is touched yet.

    Args:
        changes: made to the file's values on the command line or at run time.
    Raises:
        ConfigError: one line for each problem.
    """
    file = read_config(path, environ, changes)
    if problems := [file.problem(key, message) for key, message in contradictions(file.settings)]:
        raise ConfigError(problems)
    return file


def read_config(
    path: Path, environ: Mapping[str, str] = os.environ, changes: Changes | None = None
) -> ConfigFile:
    """Read and expand a config file and check each section alone, not what they say of each other.

    Raises:
        ConfigError: one line for each problem.
    """
    reader = _Reader(path, environ)
    values = reader.read()
    if changes and isinstance(values, dict):
        values = reader.changed(values, changes)
    if reader.problems:
        raise ConfigError(reader.problems)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        found = [
            _problem(path, reader.lines, *_explain(detail))
            for detail in error.errors()
            if not (_has_no_form(detail) and isinstance(detail["input"], dict | list))
        ]
        raise ConfigError(list(dict.fromkeys(found))) from None
    return ConfigFile(path, settings.located(path.parent), reader.lines, changes or {})


def _problem(path: Path, lines: Mapping[KeyPath, int], key: KeyPath, message: str) -> str:
    known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    line = lines[known] if known else 1
    name = ".".join(str(part) for part in key)
    return f"{path}:{line}: {name}: {message}" if name else f"{path}:{line}: {message}"


def _section(values: dict[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """The mapping at a key, which is made where there is none.

    Where the file has something else in its place, which is its problem and said to be one, it is a
    mapping of nothing.
    """
    for part in key:
        if values.get(part) is None:
            values[part] = {}
        values = values[part] if isinstance(values[part], dict) else {}
    return values


class _Reader:
    """One reading of one file: values, line numbers and problems."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._path = path
        self._environ = environ
        self._open: list[yaml.Node] = []

    def read(self) -> Any:
        try:
            text = self._path.read_text(encoding="utf-8")
        except OSError as error:
            self.problems.append(f"{self._path}: cannot be read ({error.strerror})")
        except UnicodeDecodeError:
            self.problems.append(f"{self._path}: not UTF-8 text")
        else:
            return self._parse(text)
        return None

    def changed(self, values: dict[str, Any], changes: Changes) -> dict[str, Any]:
        """The values of the file with others at some places, or none."""
        changed = copy.deepcopy(values)
        for (*outer, name), value in changes.items():
            place = _section(changed, outer)
            if value is None:
                place.pop(name, None)
            else:
                place[name] = self._expanded_all(value, (*outer, name))
        return changed

    def _expanded_all(self, value: Any, key: KeyPath) -> Any:
        if isinstance(value, dict):
            return {name: self._expanded_all(v, (*key, name)) for name, v in value.items()}
        if isinstance(value, list):
            return [self._expanded_all(item, (*key, i)) for i, item in enumerate(value)]
        return self._expanded(value, key) if isinstance(value, str) else value

    def _parse(self, text: str) -> Any:
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            return self._value(loader, node, ()) if node is not None else {}
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.problems.append(f"{self._path}:{line}: not valid YAML: {error.problem}")
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            self.problems.append(f"{self._path}:{line}: not valid YAML: {error.reason}")
        except RecursionError:
            self.problems.append(f"{self._path}: not valid YAML: nested too deeply")
        return None

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, key: KeyPath) -> Any:
        if node in self._open:
            self._report(key, "this value holds itself")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(loader, node, key)
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(loader, node, key)
            return self._scalar(loader, node, key)
        finally:
            self._open.pop()

    def _scalar(self, loader: yaml.SafeLoader, node: yaml.Node, key: KeyPath) -> Any:
        try:
            value = loader.construct_object(node)
        except ValueError as error:
            self._report(key, f"not a value that YAML can read ({error})")
            return None
        return self._expanded(value, key) if isinstance(value, str) else value

    def _sequence(
        self, loader: yaml.SafeLoader, node: yaml.SequenceNode, key: KeyPath
    ) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.lines[(*key, index)] = item.start_mark.line + 1
            values.append(self._value(loader, item, (*key, index)))
        return values

    def _mapping(
        self, loader: yaml.SafeLoader, node: yaml.MappingNode, key: KeyPath
    ) -> dict[str, Any]:
        self._check_twice(node, key)
        loader.flatten_mapping(node)  # merged keys come first, so that a key of one's own wins
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            inner = (*key, str(name_node.value))
            self.lines[inner] = name_node.start_mark.line + 1
            values[str(name_node.value)] = self._value(loader, value_node, inner)
        return values

    def _check_twice(self, node: yaml.MappingNode, key: KeyPath) -> None:
        first: dict[str, int] = {}
        for name_node, _ in node.value:
            name, line = str(name_node.value), name_node.start_mark.line + 1
            if name in first and name_node.tag != MERGE_TAG:
                self._report((*key, name), f"given twice, first in line {first[name]}", line)
            first.setdefault(name, line)

    def _expanded(self, text: str, key: KeyPath) -> str:
        def replacement(match: re.Match[str]) -> str:
            if match["escape"]:
                return match[0][1:]
            value = self._environ.get(match["name"])
            if not value and match["default"] is not None:
                value = match["default"]
            if value is None:
                name = match["name"]
                self._report(
                    key,
                    f"the environment variable {name} is not set; set it or write "
                    f"${{{name}:-default}}",
                )
                return ""
            return value

        return VARIABLE.sub(replacement, text)

    def _report(self, key: KeyPath, message: str, line: int | None = None) -> None:
        lines = {**self.lines, key: line} if line else self.lines
        self.problems.append(_problem(self._path, lines, key, message))


def _has_no_form(detail: ErrorDetails) -> bool:
    """Whether a value is not of the form that pydantic tried last."""
    return any(FORM.match(str(part)) for part in detail["loc"][-1:])


def _explain(detail: ErrorDetails) -> tuple[KeyPath, str]:
    """Key path and message of one pydantic error, with the nearest valid name or value."""
    key: KeyPath = tuple(
        part for part in detail["loc"] if part != "[key]" and not FORM.match(str(part))
    )
    kind, given = detail["type"], detail["input"]
    if _has_no_form(detail):
        return key, f"must be a mapping or a list, found {_shown(given)}"
    if kind == "extra_forbidden":
        names = sorted(_fields_at(key[:-1]))
        return key, f"unknown key{suggestion(str(key[-1]), names)}"
    if kind == "missing":
        return key, "missing; this key is required"
    if kind == "literal_error":
        expected: list[str] = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return key, f"{given!r} is not one of {', '.join(expected)}{suggestion(given, expected)}"
    if kind == "model_type":
        return key, f"must hold keys: {', '.join(sorted(_fields_at(key)))}, found {_shown(given)}"
    if kind == "value_error":
        return key, str(detail["ctx"]["error"])
    found = "" if SECRETS.intersection(map(str, key)) else f", found {_shown(given)}"
    return key, f"{detail['msg'][0].lower()}{detail['msg'][1:]}{found}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields_at(key: KeyPath) -> list[str]:
    """Names of the fields of the settings model that stands at a key path."""
    models: list[type[BaseModel]] = [Settings]
    for part in key:
        found = [
            inner
            for model in models
            for inner in (
                _models_in(model.model_fields[part].annotation)
                if isinstance(part, str) and part in model.model_fields
                else [model]  # a name under a mapping, or an index
            )
        ]
        models = found
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]

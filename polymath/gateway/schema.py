"""The JSON Schema of the config file, as an editor needs it."""

from typing import Any

from polymath.gateway.settings import Settings

__all__ = ["config_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
VARIABLE = {"type": "string", "pattern": r"\$\{"}
SCALARS = ("integer", "number", "boolean")


def config_schema() -> dict[str, Any]:
    """The schema of `Settings`, where a number may also be written as `${VAR}`."""
    schema = {"$schema": DIALECT, **Settings.model_json_schema()}
    widened: dict[str, Any] = _with_variables(schema)
    return widened


def _with_variables(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_variables(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = {key: _with_variables(value) for key, value in node.items()}
    if inner.get("type") not in SCALARS:
        return inner
    about = {key: inner.pop(key) for key in ("title", "description", "default") if key in inner}
    return {**about, "anyOf": [inner, VARIABLE]}

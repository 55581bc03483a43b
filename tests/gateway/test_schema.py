"""The config schema, its committed copy and its page agree."""

import json
from collections.abc import Iterator
from typing import Any

from polymath.gateway import config_schema
from tests.conftest import ROOT

NAMED = ("base_models", "experts")


def keys(schema: dict[str, Any], node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Every key of the schema as docs/configuration.md writes it."""
    for part in [node, *node.get("anyOf", ()), *node.get("allOf", ())]:
        if "$ref" in part:
            yield from keys(schema, schema["$defs"][part["$ref"].rsplit("/", 1)[1]], path)
        for name, inner in part.get("properties", {}).items():
            key = f"{path}.{name}" if path else name
            if key not in ("server", "engine", "router", *NAMED):
                yield key
            yield from keys(schema, inner, key)
        if isinstance(part.get("additionalProperties"), dict):
            yield from keys(schema, part["additionalProperties"], f"{path}.NAME")
        if isinstance(part.get("items"), dict):
            yield from keys(schema, part["items"], f"{path}[]")
        if isinstance(part.get("patternProperties"), dict):
            for inner in part["patternProperties"].values():
                yield from keys(schema, inner, f"{path}.NAME")


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    schema = config_schema()
    found = set(keys(schema, schema))
    assert {"server.port", "experts.NAME.few_shot[].role", "experts.NAME.price.input"} <= found
    assert [key for key in sorted(found) if f"`{key}`" not in page] == []


def test_every_documented_key_exists() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    schema = config_schema()
    assert [row for row in rows if row not in set(keys(schema, schema))] == []


def test_the_committed_schema_is_the_printed_one() -> None:
    committed = json.loads((ROOT / "configs" / "polymath.schema.json").read_text(encoding="utf-8"))
    assert committed == config_schema()


def test_a_number_may_be_a_variable() -> None:
    port = config_schema()["$defs"]["ServerSettings"]["properties"]["port"]
    assert {"type": "string", "pattern": r"\$\{"} in port["anyOf"]

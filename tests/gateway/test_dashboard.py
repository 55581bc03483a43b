"""The dashboard for Grafana and our pages name only what `GET /metrics` tells."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from polymath.experts import EngineStats, ExpertSettings
from polymath.gateway.metrics import Metrics, Now
from polymath.proxy import Upstream
from tests.conftest import ROOT
from tests.gateway.test_records import report

PANELS: list[dict[str, Any]] = json.loads(
    (ROOT / "docker" / "grafana-dashboard.json").read_text(encoding="utf-8")
)["panels"]
TARGETS = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
EXPRESSIONS = [pytest.param(*param.values[:1], id=param.id) for param in TARGETS]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]

SELECTOR = re.compile(r"\b(polymath_\w+)(?:\{(.*?)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPING = re.compile(r"\b(?:by|without)\s*\((.*?)\)")
RATE = re.compile(r"\b(?:rate|irate|increase)\((\w+)")
QUANTILE = re.compile(r"\bhistogram_quantile\(\s*[\d.]+,\s*sum by \((.*?)\) \(rate\((\w+)")
LEGEND = re.compile(r"\{\{(.*?)\}\}")


class Page:
    """What Prometheus reads of a gateway that has an engine, an upstream and a past.

    Attributes:
        labels: those of each sample, by its name.
        types: by the names of the samples.
        families: names without `_total`, `_bucket` and the like.
    """

    def __init__(self) -> None:
        expert = {"kind": "upstream", "api_base": "http://127.0.0.1:9/v1", "model": "m"}
        upstream = Upstream("law", ExpertSettings.model_validate(expert))
        stats = EngineStats(*range(10))
        metrics = Metrics(Now(lambda: stats, lambda: {"law": upstream}, lambda: 1))
        metrics.observe(replace(report(1), first_token=0.1, cache="hit"))
        metrics.observe_http("GET", "/metrics", 200, 0.1)
        self.labels: dict[str, set[str]] = {}
        self.types: dict[str, str] = {}
        self.families = set()
        for family in text_string_to_metric_families(bytes(metrics.response().body).decode()):
            self.families.add(family.name)
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)
                self.types[sample.name] = family.type


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


def names(listed: str) -> set[str]:
    return {name.strip() for name in listed.split(",")}


def selectors(expression: str) -> Mapping[str, set[str]]:
    """Samples and the labels by which they are selected."""
    found = SELECTOR.findall(expression)
    return {name: set(MATCHER.findall(matchers)) for name, matchers in found}


def grouping(expression: str) -> set[str]:
    return set().union(*map(names, GROUPING.findall(expression)))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_samples_and_labels_that_there_are(page: Page, expression: str) -> None:
    selected = selectors(expression)
    assert selected
    assert selected.keys() <= page.labels.keys()
    for name, matchers in selected.items():
        assert matchers | grouping(expression) <= page.labels[name]


@pytest.mark.parametrize(("expression", "legend"), TARGETS)
def test_a_legend_names_labels_that_are_left(expression: str, legend: str) -> None:
    assert legend
    assert set(LEGEND.findall(legend)) == grouping(expression) - {"le"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_only_grows_is_shown_as_a_rate_and_nothing_else_is(
    page: Page, expression: str
) -> None:
    growing = {name for name in selectors(expression) if page.types[name] != "gauge"}
    assert set(RATE.findall(expression)) == growing


@pytest.mark.parametrize(
    "expression", [param for param in EXPRESSIONS if "quantile" in str(param.values[0])]
)
def test_a_quantile_is_one_of_buckets(expression: str) -> None:
    ((labels, sample),) = QUANTILE.findall(expression)
    assert "le" in names(labels)
    assert sample.endswith("_bucket")


def test_every_panel_has_an_id_of_its_own_a_title_and_something_to_show() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"].strip() for panel in PANELS]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    assert all(panel["targets"] for panel in PANELS)


def test_no_panel_lies_over_another() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # columns of Grafana's grid


def test_every_metric_that_our_pages_name_is_there(page: Page) -> None:
    named = {
        name
        for file in PAGES
        for name in re.findall(r"\bpolymath_[a-z_]+", file.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= page.families | page.labels.keys()

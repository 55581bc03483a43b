"""The HTML report: it needs nothing else, shows every part, and takes no text for markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.router import Neighbour, RouteDecision, Why
from polymath.training import PromptRow, RoutedPrompt, summarise_routing, write_router_report
from polymath.training.metrics import CALIBRATION_BINS
from polymath.training.router_report import EXCERPT, HISTOGRAM_BINS, MISTAKES, REPORT_FILE

EVIL = "<script>alert('x')</script>\"&amp;{{ title }}"
VOID = {"meta", "br"}


def routed(
    domain: str = "law",
    guess: str | None = "law",
    confidence: float = 0.9,
    text: str = "what is theft?",
    source: str | None = "squad/train",
    nearest: Sequence[Neighbour] = (),
) -> RoutedPrompt:
    row = PromptRow(text=text, domain=domain, source=source)
    why = Why(nearest=tuple(nearest))
    weights = {guess or "general": 1.0}
    return RoutedPrompt(row, RouteDecision(weights, confidence, guess, "encoder", why, 1.5))


RIGHT = [routed(), routed("math", "math", 0.7)]
WRONG = [routed("law", "math", 0.8, "sum of damages"), routed("math", "law", 0.6, "prime of life")]
OUTSIDE = [routed("none", "law", 0.3, "the weather"), routed("none", "general", 0.2)]


class Page(HTMLParser):
    """The page as a reader sees it, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.shown: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.shown.append(data)


def write(folder: Path, prompts: Sequence[RoutedPrompt], title: str = "Router x") -> str:
    summary = summarise_routing(prompts, ["general"])
    return write_router_report(folder, prompts, summary, title).read_text(encoding="utf-8")


def confusion_cells(html: str) -> list[str]:
    table = html.split("<h2>Confusion matrix</h2>")[1].split("</table>", maxsplit=1)[0]
    return re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", table)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(write(tmp_path, [*RIGHT, *WRONG, *OUTSIDE]))


def test_the_file_is_named_and_stands_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    file = write_router_report(folder, RIGHT, summarise_routing(RIGHT, []), "Router")
    assert file == folder / REPORT_FILE
    assert [path.name for path in folder.iterdir()] == [REPORT_FILE]


def test_the_same_evaluation_gives_the_same_file(tmp_path: Path) -> None:
    prompts = [*RIGHT, *WRONG, *OUTSIDE]
    assert write(tmp_path / "one", prompts) == write(tmp_path / "two", prompts)


def test_a_report_replaces_an_older_one(tmp_path: Path) -> None:
    write(tmp_path, RIGHT, "before")
    assert "before" not in write(tmp_path, RIGHT, "after")


@pytest.mark.parametrize("prompts", [[*RIGHT, *WRONG, *OUTSIDE], RIGHT, OUTSIDE])
def test_a_report_loads_nothing(tmp_path: Path, prompts: list[RoutedPrompt]) -> None:
    html = write(tmp_path, prompts)
    assert re.search(r"https?://|@import|url\(", html) is None
    assert Page(html).loads == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(Page(html).tags)


def test_every_tag_is_closed(page: Page) -> None:
    assert page.open == []


def test_all_parts_are_there(page: Page) -> None:
    for part in (
        "Accuracy",
        "Confusion matrix",
        "Confidence",
        "Reliability",
        "The 2 worst mistakes",
        "4 prompts in scope",
        "50.0 % accuracy",
        "50.0 % macro F1",
        "calibration error (ECE)",
        "lost to the fallback",
        "50.0 % of 2 out of scope reached a specialist",
        "1.5 ms a decision",
        "squad",
    ):
        assert part in page.text
    assert page.tags.count("svg") == 2


def test_the_title_stands_twice(tmp_path: Path) -> None:
    assert write(tmp_path, RIGHT, "Router of today").count("Router of today") == 2


def test_the_confusion_matrix_counts_rows_by_truth_and_columns_by_guess(tmp_path: Path) -> None:
    prompts = [*[routed()] * 3, routed("law", "math"), routed("math", "cooking")]
    assert confusion_cells(write(tmp_path, prompts)) == [
        "is \\ was said", "cooking", "law", "math",
        "law", "", "3", "1",
        "math", "1", "", "",
    ]  # fmt: skip


def test_a_decision_without_a_domain_stands_under_none(tmp_path: Path) -> None:
    html = write(tmp_path, [*RIGHT, routed("law", None)])
    assert confusion_cells(html)[:4] == ["is \\ was said", "law", "math", "none"]


def test_a_bar_of_the_reliability_diagram_is_as_high_as_the_accuracy(tmp_path: Path) -> None:
    """Half of the four prompts of one bin are right: half of 300 pixels, from the middle down."""
    half = [routed(confidence=0.9), routed(confidence=0.9)] + [routed("math", "law", 0.9)] * 2
    html = write(tmp_path, half)
    assert "4 prompts, mean confidence 0.900, accuracy 0.500" in html
    width = 300 / CALIBRATION_BINS
    assert f'x="{13 * width}" y="150.0" width="{width - 1}" height="150.0"' in html


def test_the_histogram_shows_shares_in_and_out_of_scope(tmp_path: Path) -> None:
    prompts = [routed(confidence=0.1)] * 3 + [routed(confidence=1.0)]
    html = write(tmp_path, [*prompts, routed("none", "law", 0.0)])
    shares = re.findall(r'fill="(#\w+)"><title>([\d.]+) %', html)
    assert len(shares) == 2 * HISTOGRAM_BINS
    assert [share for share in shares if share[1] != "0.0"] == [
        ("#8fb3e0", "75.0"),
        ("#8fb3e0", "25.0"),
        ("#e0a08f", "100.0"),
    ]


def test_the_surest_mistakes_come_first(page: Page) -> None:
    assert page.text.index("sum of damages") < page.text.index("prime of life")


def test_no_more_than_so_many_mistakes_are_shown(tmp_path: Path) -> None:
    many = [routed("law", "math", 0.5, f"slip {index}.") for index in range(MISTAKES + 10)]
    text = Page(write(tmp_path, many)).text
    assert f"The {MISTAKES} worst mistakes" in text
    assert text.count("slip ") == MISTAKES


def test_a_mistake_shows_an_excerpt(tmp_path: Path) -> None:
    html = write(tmp_path, [routed("law", "math", text="y" * 3 * EXCERPT)])
    assert max(map(len, re.findall("y+", html))) == EXCERPT


def test_a_mistake_shows_the_prompts_that_it_is_near_to(tmp_path: Path) -> None:
    """Of a prompt that is withheld there is only the id."""
    nearest = [Neighbour("a#1", "shown text", "law", 0.9), Neighbour("secret#2", "", "law", 0.8)]
    text = Page(write(tmp_path, [routed("law", "math", nearest=nearest)])).text
    assert "near: shown text" in text
    assert "near: secret#2" in text
    assert "a#1" not in text


@pytest.mark.parametrize("place", ["text", "source", "domain", "guess", "near", "title"])
def test_markup_in_what_is_shown_is_escaped(tmp_path: Path, place: str) -> None:
    near = [Neighbour("a#1", EVIL if place == "near" else "near", "law", 0.9)]
    values = {place: EVIL} if place in ("text", "source", "domain", "guess") else {}
    prompt = routed(**{"guess": "math", **values}, nearest=near)  # type: ignore[arg-type]
    html = write(tmp_path, [prompt], EVIL if place == "title" else "Router")
    assert "<script" not in html
    assert EVIL in " ".join(Page(html).shown)


@settings(deadline=None, max_examples=30)
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=EXCERPT),
    confidence=st.floats(0, 1),
)
def test_any_prompt_comes_out_as_it_went_in(
    tmp_path_factory: pytest.TempPathFactory, text: str, confidence: float
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    page = Page(write(folder, [routed("law", "math", confidence, text)]))
    assert text in page.shown
    assert page.open == []


def test_without_prompts_in_scope_there_is_no_accuracy(tmp_path: Path) -> None:
    page = Page(write(tmp_path, OUTSIDE))
    assert "0 prompts in scope" in page.text
    assert "50.0 % of 2 out of scope reached a specialist" in page.text
    for part in ("Accuracy", "Confusion", "Reliability", "macro F1", "worst mistakes"):
        assert part not in page.text
    assert page.tags.count("svg") == 1


def test_without_prompts_out_of_scope_nothing_is_said_about_them(tmp_path: Path) -> None:
    html = write(tmp_path, [*RIGHT, *WRONG])
    assert "reached a specialist" not in html
    assert "#e0a08f" not in html


def test_without_mistakes_there_is_no_list_of_them(tmp_path: Path) -> None:
    assert "worst mistakes" not in write(tmp_path, [*RIGHT, *OUTSIDE])


def test_without_sources_there_is_no_table_of_them(tmp_path: Path) -> None:
    assert "<th>source</th>" not in write(tmp_path, [routed(source=None)])

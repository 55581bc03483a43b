"""The pages say what the code is."""

import runpy

from tests.conftest import ROOT


def test_the_drawing_of_the_imports_is_current() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    draw = runpy.run_path(str(ROOT / "docs" / "draw_imports.py"))
    assert draw["page_with_drawing"](page) == page, "run `make docs`"


def test_the_readme_links_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme

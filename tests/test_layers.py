"""Who may import whom: the arrows of the architecture, held against the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "polymath"
MODULES = sorted(SOURCE.rglob("*.py"))
PACKAGES = sorted(file.parent.name for file in SOURCE.glob("*/__init__.py"))
FREE = ("polymath", "polymath.errors", "polymath.artifacts")


@dataclass(frozen=True, slots=True)
class Import:
    """`from module import name`, or `import module` where the name is None."""

    line: int
    module: str
    name: str | None

    @property
    def package(self) -> str:
        """`gateway` of `polymath.gateway.app`."""
        return self.module.split(".")[1]

    @property
    def is_deep(self) -> bool:
        return self.module.count(".") > 1


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[Import]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: relative import"
            yield from (Import(node.lineno, node.module or "", alias.name) for alias in node.names)


def foreign_imports(file: Path) -> Iterator[Import]:
    """What a module takes from packages of ours other than its own."""
    home = file.relative_to(SOURCE).parts[0]
    for found in imports(file):
        ours = found.module.split(".")[0] == "polymath"
        if ours and found.module not in FREE and found.package != home:
            yield found


@cache
def public_names(package: str) -> frozenset[str]:
    for node in tree(SOURCE / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    raise AssertionError(f"polymath/{package}/__init__.py has no __all__")


def test_the_import_contracts_are_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_is_something_to_check() -> None:
    assert PACKAGES == ["cli", "experts", "gateway", "proxy", "router", "training"]
    assert any(list(foreign_imports(file)) for file in MODULES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_offers(package: str) -> None:
    names = public_names(package)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_nothing_outside_of_a_package_imports_deeper_than_it(file: Path) -> None:
    deep = [f"{name_of(file)}:{i.line}: {i.module}" for i in foreign_imports(file) if i.is_deep]
    assert deep == []


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_only_public_names_leave_a_package(file: Path) -> None:
    private = [
        f"{name_of(file)}:{found.line}: {found.module}.{found.name}"
        for found in foreign_imports(file)
        if found.name is not None and found.name not in public_names(found.package)
    ]
    assert private == []


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(tree(file))

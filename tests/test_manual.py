"""The manual: every public name stands in it, and links lead somewhere, on its pages and on the site."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from pages import DOCS, GUIDES

import fastlr

ROOT = DOCS.parent
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
PACKAGES = ("fastlr", "fastlr.optim", "fastlr.schedules", "fastlr.batch_growth", "fastlr.plotting")
INTEGRATIONS = Path(fastlr.__file__).parent / "integrations"


def public_names(file: Path) -> list[str]:
    """What a module has for users, whose packages need not be there."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return [name for name in defined if not name.startswith("_")]


def documented() -> list[str]:
    """The names that have an entry in the reference."""
    pages = "\n".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.rst"))
    return re.findall(r"^\.\. (?:auto\w+|data):: (\S+)$", pages, flags=re.MULTILINE)


def offered() -> set[str]:
    """Every public name, by where users find it first."""
    found = {"fastlr.__version__"}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            modules = name in fastlr.__all__ and isinstance(getattr(fastlr, name), type(fastlr))
            if not modules:
                found.add(f"fastlr.{name}" if name in fastlr.__all__ else f"{package}.{name}")
    for file in INTEGRATIONS.glob("*.py"):
        module_name = "fastlr.integrations" + ("" if file.stem == "__init__" else f".{file.stem}")
        if file.stem != "schedulers":  # whose only name the package has
            found |= {f"{module_name}.{name}" for name in public_names(file)}
    return found


def test_every_public_name_stands_in_the_reference_and_nothing_else() -> None:
    entries = documented()
    assert len(entries) == len(set(entries))
    modules = {name for name in entries if (INTEGRATIONS / f"{name.split('.')[-1]}.py").exists()}
    modules |= {"fastlr.integrations", *PACKAGES[1:]}
    assert {name for name in entries if name not in modules} == offered()
    assert modules <= set(entries)


def anchors(page: Path) -> set[str]:
    """What links to a page's headings go to, as GitHub and the site have it."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    text = re.sub(r"```(?!\{toctree).*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path.startswith("api/") or "/api/" in path:
            target = target.with_suffix(".rst")
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {"index"}
    for page in (DOCS / "index.md", DOCS / "frameworks" / "index.md"):
        folder = page.parent.relative_to(DOCS)
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
            listed |= {(folder / line).as_posix() for line in block.splitlines() if line and line[0] != ":"}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= listed
    assert listed - pages == {"api/index"}


def test_the_blocks_of_every_page_are_run() -> None:
    """In test_docs.py, or by the test of what the page is about."""
    tests = "\n".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        if "```python\n" in page.read_text("utf-8"):
            assert name in GUIDES or f'"{name}"' in tests or f'"{page.name}"' in tests, name


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150

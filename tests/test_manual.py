"""The manual: every public name stands in it, and links lead somewhere, on its pages and on the site."""

from __future__ import annotations

import ast
import html
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from pages import DOCS, GUIDES

import fastlr
from fastlr import cli

ROOT = DOCS.parent
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
# Other files whose links are followed.
LINKING = [
    ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "csrc/cuda/README.md")
]
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


def exists(name: str) -> bool:
    """Whether there is ``fastlr.a.b``; modules that frameworks are needed for are read, not imported."""
    if found := re.fullmatch(r"fastlr\.integrations\.([a-z]+)(?:\.(\w+).*)?", name):
        file = INTEGRATIONS / f"{found[1]}.py"
        return file.exists() and (found[2] is None or found[2] in public_names(file))
    thing: object = fastlr
    for part in name.split(".")[1:]:
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_pages_name_exists(page: Path) -> None:
    text = re.sub(r"https?:\S+|[\w/]*/fastlr\S*", "", page.read_text("utf-8"))
    names = set(re.findall(r"\bfastlr(?:\.[A-Za-z]\w*)+", text))
    assert {name for name in names if not exists(name)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_tests_that_pages_name_exist(page: Path) -> None:
    named = re.findall(
        r"\b(?<!/)((?:benchmarks|csrc|docs|examples|fastlr|tests)/[\w./-]+?\.\w+)(?:::(\w+))?`",
        page.read_text("utf-8"),
    )
    for file, test in named:
        assert (ROOT / file).exists(), file
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text("utf-8"), f"{file}::{test}"


def code_of(page: Path) -> str:
    """What stands as code on a page, a line each: in a sentence, or indented."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return "\n".join(re.findall(r"^    (.*)$", text, flags=re.MULTILINE) + re.findall(r"`([^`]+)`", text))


@pytest.mark.parametrize("page", PAGES + LINKING[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_pages_name_exist(page: Path) -> None:
    """Targets of make, extras, and what the command fastlr does."""
    code = code_of(page)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"^make ([a-z][\w-]*)", code, flags=re.MULTILINE)) <= set(targets)
    project = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]\n")[2]
    extras = re.findall(r"^([\w-]+) = \[", project.partition("\n[")[0], flags=re.MULTILINE)
    named = re.findall(r"(?:\.|fastlr)\[([\w,-]+)\]", code)
    assert {extra for several in named for extra in several.split(",")} <= set(extras)
    for command in set(re.findall(r"^fastlr ([a-z][\w-]*)", code, flags=re.MULTILINE)):
        with pytest.raises(SystemExit) as left:
            cli.main([command, "--help"])
        assert left.value.code == 0, command


RUN = sorted(
    {
        line
        for page in PAGES
        for line in re.findall(r"^    fastlr ((?:schedule|doctor) .*)$", page.read_text("utf-8"), re.M)
    }
)


@pytest.mark.parametrize("line", RUN)
def test_commands_run_as_they_are_written(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    pytest.importorskip("rich", reason="drawings in the terminal need rich")
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)) == 0


def test_names_that_do_not_exist_are_found() -> None:
    assert exists("fastlr.FusedSGD.set_schedule")
    assert exists("fastlr.integrations.fastai.Schedules")
    for name in ("fastlr.FusedSDG", "fastlr.integrations.fastai.Schedule", "fastlr.integrations.caffe"):
        assert not exists(name)


def anchors(page: Path) -> set[str]:
    """What links to a page's headings go to, as GitHub and the site have it."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    text = re.sub(r"```(?!\{toctree).*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES + LINKING, ids=lambda page: str(page.relative_to(ROOT)))
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
    assert listed - pages == {"api/index", "made/gallery/index"}


def test_the_blocks_of_every_page_are_run() -> None:
    """In test_docs.py, or by the test of what the page is about."""
    tests = "\n".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        if "```python\n" in page.read_text("utf-8"):
            assert name in GUIDES or f'"{name}"' in tests or f'"{page.name}"' in tests, name


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


# -- the site ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    made = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    # Not where the sources are: fastlr is what is installed.
    built = subprocess.run(
        [*command, "-d", made / "doctrees", DOCS, made / "html"], cwd=made, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return (made / "html").resolve()


def attributes(name: str, text: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(rf'\b{name}="([^"]*)"', text)]


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    texts = {page: page.read_text("utf-8") for page in site.rglob("*.html")}
    places = {page: set(attributes("id", text)) for page, text in texts.items()}
    broken, followed = [], 0
    for page, text in texts.items():
        for link in attributes("href", text) + attributes("src", text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, place = link.partition("#")
            target = (page.parent / unquote(path.split("?")[0])).resolve() if path else page
            followed += 1
            there = target.is_file() and (
                not place or target not in places or unquote(place) in places[target]
            )
            if not there:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []
    assert followed > 1000


def told_by_the_browser(browser: str, pages: list[Path], folder: Path) -> list[str]:
    """What pages write on the console, all open at once."""
    frames = folder / "frames.html"
    frames.write_text("".join(f'<iframe src="{page.as_uri()}"></iframe>\n' for page in pages), "utf-8")
    options = ["--headless", "--disable-gpu", "--no-sandbox", "--allow-file-access-from-files"]
    options += [
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
    ]
    ran = subprocess.run(
        [browser, *options, "--dump-dom", frames.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "iframe" in ran.stdout, ran.stderr
    return [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def test_the_site_writes_nothing_on_a_browsers_console(site: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None or os.name == "nt":
        pytest.skip("there is no Chromium")
    bad = tmp_path / "bad.html"
    bad.write_text("<script>undefinedFunction()</script>", "utf-8")
    pages = sorted(page for page in site.rglob("*.html") if "_modules" not in page.parts)
    (only,) = told_by_the_browser(browser, [pages[0], bad], tmp_path)
    assert "undefinedFunction" in only
    assert told_by_the_browser(browser, pages, tmp_path) == []

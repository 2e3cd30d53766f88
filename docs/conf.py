"""How Sphinx makes the manual of these pages: `make docs`."""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.napoleon import GoogleDocstring

import fastlr

ROOT = Path(__file__).parent.parent

project = "fastlr"
author = copyright = "The fastlr developers"
version = release = fastlr.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]

exclude_patterns = ["gallery"]  # made of it: made/gallery

# Pages are Markdown as GitHub shows it; headings are what links with a # go to.
myst_heading_anchors = 4
# What the command line's blocks are written in, and tables of figures, are not Python.
highlight_language = "text"

# In the order of the source, which is that of their importance.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Frameworks are not needed to read what their adapters take.
autodoc_mock_imports = ["lightning", "mmengine", "pytorch_lightning", "transformers"]
for _name, _contents in {
    "fastai": {},
    "fastai.callback": {},
    "fastai.callback.core": {"Callback": type("Callback", (), {})},
    # With a number that is reckoned with.
    "fastai.callback.schedule": {"ParamScheduler": type("", (), {"order": 0}), "LRFinder": type("", (), {})},
}.items():
    sys.modules[_name] = ModuleType(_name)
    vars(sys.modules[_name]).update(_contents)
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Raises (at the fit)", "Raises")]
python_maximum_signature_line_length = 80

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"fastlr {version}"
html_copy_source = False
html_show_sphinx = False

sys.path.insert(0, str(ROOT / "docs"))  # for gallery_figures
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "made/gallery",
    "image_scrapers": ("gallery_figures.scrape",),
    "reset_modules": (),
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "copyfile_regex": "",
    "within_subsection_order": "FileNameSortKey",
}

# A name of fastlr that leads nowhere is an error. Those of others have no page here.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!fastlr\b).*"),
    (r"py:class", r"fastlr\.(\w+\.)*_\w+\.\w+"),  # in signatures: private modules
    (r"py:class", r"fastlr\.batch_growth\.(sampler\.(MicroBatch|Step)|updates\.Update)"),
    (r"py:class", r"fastlr\.optim\.cyclic\.FoundBounds"),
]
# Files whose text is a page, too.
WHOLE_FILES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}


def read_page(_app: Any, page: str, source: list[str]) -> None:
    """Links to what is in the repository and not in the manual become its path."""
    place = f"{page}.md"
    if page in WHOLE_FILES:
        place = f"../{WHOLE_FILES[page]}"
        source[0] = (ROOT / WHOLE_FILES[page]).read_text("utf-8")

    def link(found: re.Match[str]) -> str:
        text, path, heading = found.groups()
        target = Path(os.path.normpath(ROOT / "docs" / Path(place).parent / path))
        if target.is_relative_to(ROOT / "docs"):
            there = os.path.relpath(target, ROOT / "docs" / Path(page).parent)
            return f"[{text}]({Path(there).as_posix()}{heading})"
        name = target.relative_to(ROOT).as_posix()
        return text if name in text else f"{text} (`{name}`)"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)([^)\s]*)\)", link, source[0])


def list_options(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Makes lists of a module's indented ``name: text``, as ``Args`` have them."""
    if what == "module":
        for i, line in enumerate(lines):
            item = re.fullmatch(r"    (\w+): (.*)", line)
            lines[i] = f"- ``{item[1]}``: {item[2]}" if item else re.sub(r"^ {8}(?! )", "  ", line)


def read_property(app: Any, what: str, _name: str, obj: Any, _options: Any, lines: list[str]) -> None:
    """Reads a property again, of which napoleon takes what is before a colon in its first line for a type."""
    if what == "property":
        lines[:] = [*GoogleDocstring(inspect.getdoc(obj) or "", app.config, app, "method").lines(), ""]


def find_again(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """What is public as ``fastlr.X`` is named as ``fastlr.schedules.X`` and as ``X``, too."""
    if node.get("refdomain") != "py":
        return None
    short = re.sub(
        r"^(fastlr\.((optim|schedules|batch_growth|range_test)\.)?)?", "fastlr.", node["reftarget"]
    )
    python = env.get_domain("py")
    document = node.get("refdoc", "")
    return python.resolve_xref(env, document, app.builder, node["reftype"], short, node, contnode)


def link_names(_app: Any, doctree: nodes.document) -> None:
    """Has names of fastlr that stand as code in the manual's text lead to the reference."""
    page = Path(doctree["source"])
    if page.suffix != ".md" or page.stem in WHOLE_FILES:
        return
    for literal in list(doctree.findall(nodes.literal)):
        found = re.fullmatch(
            r"(fastlr(?:\.[A-Za-z]\w*)+|[A-Z]\w+)(\(.*\))?", literal.astext(), flags=re.DOTALL
        )
        if (
            not found
            or literal.get("classes")
            or isinstance(literal.parent, (addnodes.pending_xref, nodes.reference))
        ):
            continue
        if found[1].startswith("fastlr.") or found[1] in fastlr.__all__:
            name = found[1] if found[1].startswith("fastlr.") else f"fastlr.{found[1]}"
            link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name, refwarn=True)
            literal.replace_self(link)
            link += literal


def setup(app: Any) -> None:
    app.connect("doctree-read", link_names)
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", list_options, priority=400)  # before napoleon, which has 500
    app.connect("autodoc-process-docstring", read_property, priority=600)
    app.connect("missing-reference", find_again)

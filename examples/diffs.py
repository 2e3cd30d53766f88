"""Writes into docs/examples.md what moving to fastlr changes in the training scripts beside this file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "examples.md"
FORMS = ("torch_form.py", "fastlr_form.py")


def changes(name: str) -> str:
    """The difference between an example's two forms, as Markdown."""
    before, after = ((FOLDER / name / form).read_text("utf-8").splitlines() for form in FORMS)
    names = (f"examples/{name}/{form}" for form in FORMS)
    lines = list(difflib.unified_diff(before, after, *names, lineterm="", n=1))
    removed, added = (sum(line[0] == sign for line in lines[2:]) for sign in "-+")
    # Line numbers of hunks would change with every line above them.
    shown = "\n".join(re.sub(r"^@@ .* @@$", "@@", line) for line in lines)
    return f"```diff\n{shown}\n```\n\nOf {len(before)} lines {removed} go, and {added} come."


def page() -> str:
    """The page with the differences as they are now."""
    return re.sub(
        r"(<!-- changes: (\w+) -->\n).*?(<!-- end of changes -->)",
        lambda found: f"{found[1]}{changes(found[2])}\n{found[3]}",
        PAGE.read_text("utf-8"),
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")

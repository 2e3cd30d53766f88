"""Which sources were built, so that no stage looks at a build of others."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = "sources.sha256"  # in the folder that stage b installs into


def digest() -> str:
    """Of all that is built."""
    made = hashlib.sha256()
    paths = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"]
    for folder in ("cmake", "csrc", "fastlr"):
        paths += [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix not in (".pyc", ".so", ".md")]
    for path in paths:
        if path.is_file():
            made.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return made.hexdigest()

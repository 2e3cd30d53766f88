"""What a stage found, written anew at each check, so that a crash loses only what was not reached."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: object) -> None:
    """In one go: whoever reads it finds the old file or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(unfinished, path)


class Report:
    """The result of one stage: named checks, figures, and a headline.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.headline = ""
        self.figures: dict[str, Any] = {}
        self.checks: list[dict[str, Any]] = []

    def save(self) -> None:
        content = {"headline": self.headline, "figures": self.figures, "checks": self.checks}
        write_json(self._path, content)

    def check(self, name: str, function: Callable[[], object]) -> None:
        """Runs a check, which fails by raising; what it returns is noted with it. The others go on."""
        begin = time.perf_counter()
        entry: dict[str, Any] = {"check": name, "passed": True}
        try:
            entry["found"] = function()
        except Exception as error:
            entry |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        entry["seconds"] = round(time.perf_counter() - begin, 3)
        self.checks.append(entry)
        found = "" if entry.get("found") is None else f"  {entry['found']}"
        print(
            f"{'ok' if entry['passed'] else 'FAILED':7}{entry['seconds']:8.2f} s  {name}{found}", flush=True
        )
        self.save()

    def finish(self, headline: str = "") -> int:
        """Counts the checks in the headline. Returns the exit status."""
        failed = sum(not entry["passed"] for entry in self.checks)
        counts = f"{len(self.checks) - failed} of {len(self.checks)} checks"
        self.headline = ", ".join(part for part in (counts, headline) if part)
        self.save()
        return min(failed, 1)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every stage's program is told."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--result", type=Path, required=True, help="the file to write")
    parser.add_argument("--backend", choices=["cuda", "cuda-on-cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="less of everything")
    return parser

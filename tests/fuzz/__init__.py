"""Runs drawn at random from a seed. ``FASTLR_FUZZ_RUNS`` says how many; a seed's run is always the same."""

from __future__ import annotations

import os


def seeds(default: int) -> range:
    """The seeds to run: as many as the environment asks for, from ``FASTLR_FUZZ_FIRST`` on."""
    first = int(os.environ.get("FASTLR_FUZZ_FIRST", 0))
    return range(first, first + int(os.environ.get("FASTLR_FUZZ_RUNS", default)))

"""Runs drawn at random from a seed. ``FASTLR_FUZZ_RUNS`` says how many; a seed's run is always the same."""

from __future__ import annotations

import os


def seeds(default: int) -> range:
    """The seeds to run: as many as the environment asks for."""
    return range(int(os.environ.get("FASTLR_FUZZ_RUNS", default)))

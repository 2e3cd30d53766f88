"""DTensors in every placement, in worlds of two and four processes: each run goes on in the other too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded

WORLDS = (2, 4)
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, emulated: Any) -> Results:
    """By phase and world."""
    folder = tmp_path_factory.mktemp("sharded")
    begun = {
        f"begin-{world}": sharded.run(folder, world, "begin", Path(emulated.__file__)) for world in WORLDS
    }
    return begun | {f"resume-{world}": sharded.run(folder, world, "resume") for world in WORLDS}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Each case in a single process, on whole parameters."""
    return {name: sharded.run_alone(case) for name, case in sharded.CASES.items()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("phase", ["begin", "resume"])
@pytest.mark.parametrize("name", sharded.CASES)
def test_case(results: Results, alone: dict[str, Any], name: str, phase: str, world: int) -> None:
    for rank in results[f"{phase}-{world}"]:
        sharded.assert_same_ending(sharded.CASES[name], alone[name], rank["runs"][name])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", sharded.ON_CUDA)
def test_case_on_cuda(results: Results, alone: dict[str, Any], name: str, world: int) -> None:
    for rank in results[f"begin-{world}"]:
        sharded.assert_same_ending(sharded.CASES[name], alone[name], rank["runs on cuda"][name])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [*sharded.CHECKS, "on_cuda"])
def test_check(results: Results, name: str, world: int) -> None:
    for rank in results[f"begin-{world}"]:
        assert rank.get(name, "was not reached") is None, rank[name]

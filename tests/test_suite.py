"""How the suite itself is run: what is built once, and which tests are repetitions of others."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SEEDS, repeats_with_another_seed
from cuda_on_cpu import build, faults
from test_cuda_sanitized import FIRST

TESTS = Path(__file__).parent


def test_what_several_want_at_once_is_made_once(tmp_path: Path):
    output = tmp_path / "shared" / "made"
    wanted = threading.Barrier(4)
    calls: list[Path] = []

    def make(unfinished: Path) -> None:
        assert not output.exists()
        calls.append(unfinished)
        unfinished.write_text("all of it")

    def ask(_: int) -> str:
        wanted.wait()
        return build.make_once(output, make).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["all of it"] * 4
    assert len(calls) == 1


def test_what_could_not_be_made_is_tried_again(tmp_path: Path):
    def fail(unfinished: Path) -> None:
        unfinished.write_text("half of it")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        build.make_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
    assert build.make_once(tmp_path / "made", lambda path: path.write_text("whole")).read_text() == "whole"


def test_other_sources_do_away_with_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = build.built_here(tmp_path / "cache")
    (before / "object.o").touch()
    assert build.built_here(tmp_path / "cache") == before
    assert (before / "object.o").exists()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O3"))
    assert build.built_here(tmp_path / "cache") != before
    assert not before.exists()


def test_each_test_keeps_one_seed_and_all_seeds_are_kept():
    def kept(name: str) -> list[str]:
        backends = ["cpu", "cuda", *(f"cuda-on-cpu-{seed}" for seed in SEEDS)]
        items = {
            backend: SimpleNamespace(
                nodeid=f"tests/test_sgd.py::{name}[{backend}-plain]",
                callspec=SimpleNamespace(params={"backend": backend}),
            )
            for backend in backends
        }
        return [backend for backend, item in items.items() if not repeats_with_another_seed(item)]

    found = [kept(f"test_{k}") for k in range(40)]
    assert all(backends[:2] == ["cpu", "cuda"] and len(backends) == 3 for backends in found)
    assert {backends[2] for backends in found} == {f"cuda-on-cpu-{seed}" for seed in SEEDS}
    assert not repeats_with_another_seed(SimpleNamespace(nodeid="tests/test_sgd.py::test_of_no_backend"))


def test_a_fault_of_every_kind_is_no_repetition():
    kinds = [(fault.build, fault.noticed) for fault in faults.FAULTS.values()]
    assert {(faults.FAULTS[name].build, faults.FAULTS[name].noticed) for name in FIRST} == set(kinds)
    assert len(FIRST) == len(set(kinds)) < len(kinds)


FRAMEWORKS = ("accelerate", "ignite", "lightning", "skorch", "transformers")


def test_what_needs_a_framework_is_skipped_without_it():
    """As for a newcomer, whose ``make test`` brings none of them."""
    named = re.compile(rf"^ +(?:from|import) (?:{'|'.join(FRAMEWORKS)})\b|importorskip", re.MULTILINE)
    tests = [path for path in sorted(TESTS.glob("test_*.py")) if named.search(path.read_text("utf-8"))]
    assert len(tests) > 5
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({FRAMEWORKS}));"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-q", "-p", "no:cacheprovider", "--backend=cpu", "-k", " or ".join(FRAMEWORKS)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, *map(str, tests)], cwd=TESTS, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout

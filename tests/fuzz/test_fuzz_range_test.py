"""A range test leaves nothing changed that can be reached, whatever the job hides and however it ends."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from fingerprint import differences

from fuzz import seeds
from fuzz.range_test import Job, Stop


@pytest.mark.parametrize("seed", seeds(60))
def test_a_range_test_leaves_no_trace(seed: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    job = Job(seed, tmp_path)
    before = job.fingerprint()
    with contextlib.suppress(Stop, KeyboardInterrupt):
        job.range_test()
    changed = differences(before, job.fingerprint())
    assert changed == [], "\n".join([*changed, *job.log])
    assert not list(tmp_path.iterdir())

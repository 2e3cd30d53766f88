"""Cases that run in several processes, which talk through gloo: one pool of them for all cases of a file."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

# What the server that processes are forked from has imported before them.
_IMPORTED = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
    *("torch.distributed.tensor.parallel", "fastlr", "pytest"),
)
# A rank that waits longer for another one, which may have failed, gives up.
_PATIENCE = datetime.timedelta(seconds=60)
_LONGEST = 240


class Case(NamedTuple):
    """What each rank runs.

    Attributes:
        ranks: how many.
        run: ``run(folder)``, with a folder that all cases share; at the top level of a module.
        options: for it, by keyword.
    """

    ranks: int
    run: Callable[..., None]
    options: Mapping[str, Any] = {}


def forking() -> ForkServerContext:
    """Where processes begin with PyTorch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def outcomes(cases: Mapping[str, Case], folder: Path) -> dict[str, str]:
    """What each rank's traceback says of each case, in turn; nothing where the case has passed.

    Of cases with fewer ranks than others, the rest wait. What comes after a failure is not run.
    """
    context = forking()
    world = max(case.ranks for case in cases.values())
    workers = [context.Process(target=_work, args=(rank, dict(cases), folder)) for rank in range(world)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + _LONGEST
    try:
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    told = [path.read_text() for path in sorted(folder.glob("told-*"))]
    ended = f"the ranks ended with {[worker.exitcode for worker in workers]}\n" + "\n".join(told)
    found = {}
    for name, case in cases.items():
        paths = [folder / f"{name}-{rank}.outcome" for rank in range(case.ranks)]
        texts = {path.read_text() for path in paths if path.exists()}  # ranks often say the same
        if missing := [rank for rank, path in enumerate(paths) if not path.exists()]:
            texts.add(f"not finished by ranks {missing}; {ended}")
        found[name] = "\n".join(sorted(texts)).strip()
    return found


def _work(rank: int, cases: dict[str, Case], folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        parts = itertools.groupby(cases.items(), lambda item: item[1].ranks)
        for place, (world, part) in enumerate(parts):
            if rank >= world:
                continue
            meeting = f"file://{folder}/meeting-{place}"
            dist.init_process_group(
                "gloo", init_method=meeting, rank=rank, world_size=world, timeout=_PATIENCE
            )
            for name, case in part:
                failure = _failure(case, folder)
                (folder / f"{name}-{rank}.outcome").write_text(failure)
                failures: list[Any] = [None] * world
                dist.all_gather_object(failures, failure)
                if any(failures):
                    return
            dist.destroy_process_group()
    except Exception:
        (folder / f"told-{rank}").write_text(traceback.format_exc())


def _failure(case: Case, folder: Path) -> str:
    torch.manual_seed(0)
    try:
        case.run(folder, **case.options)
    except Exception:
        return traceback.format_exc()
    return ""

"""The papers' claims, shown on real data: ``python -m benchmarks.claims [NAME ...]``; all without a name.

Stopped, it goes on where it was when started again. See runner.py for how a claim is made.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.claims import runner, tasks
from fastlr._progress import progress

# In the order in which they are run; each is a file of this folder.
NAMES = ("saddles", "cyclic", "adaptive", "super_convergence", "range_test", "batch_growth", "noise")

OUT = Path("benchmarks/results/claims")
DOCS = Path("docs/claims.md")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--data", choices=("digits", "fashion-mnist", "cifar10"), help="default: the claim's own"
    )
    parser.add_argument("--folder", help="of the data's files; CIFAR-10: of its python version")
    parser.add_argument("--quick", action="store_true", help="two seeds, few updates, small grids")
    parser.add_argument(
        "--seeds", type=at_least(2), help="runs of each policy (default: 10, quick: 2); needs --out"
    )
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (default: cpu)")
    parser.add_argument(
        "--workers", type=at_least(0), default=os.cpu_count(), help="processes; 0: none but this one"
    )
    parser.add_argument("--out", type=Path, help=f"folder to write to (default: {OUT}, quick: {OUT}/quick)")
    parser.add_argument("--redraw", action="store_true", help="tables and pictures anew from the JSON files")
    parser.add_argument(
        "--docs", action="store_true", help=f"{DOCS} anew from the JSON files, and nothing else"
    )
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"no claim is called {unknown[0]}; there are {', '.join(NAMES)}")
    if given.seeds and not given.out:
        parser.error("--seeds makes results that are not the usual ones: say where they go with --out")
    if given.seeds and given.seeds < 5 and not given.quick:
        parser.error(f"fewer than 5 seeds say too little, but with --quick; got --seeds {given.seeds}")
    if (given.redraw or given.docs) and (given.seeds or given.device != "cpu"):
        parser.error("--redraw and --docs take what was run: they go with no --seeds and no --device")
    out = given.out or (OUT / "quick" if given.quick else OUT)
    if given.docs:
        if given.quick or given.names or given.data:
            parser.error("--docs makes the page of all claims and data, not of some, and not of quick runs")
        try:
            runner.write_docs(map(runner.load, NAMES), out, DOCS)
        except ValueError as error:
            parser.error(str(error))
        return
    try:
        chosen = list(settings(given))
        if given.redraw:
            for claim, setting in chosen:
                tell(claim, setting, runner.redraw(claim, setting, out), out)
            return
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:  # torch asserts that it has CUDA
        parser.error(str(error))

    done = []
    with runner.pool(given.workers) as submit, progress(True) as stage:
        for claim, setting in chosen:
            tell(claim, setting, runner.run_claim(claim, setting, out, submit, stage), out)
            done.append(runner.finished_path(claim, setting, out))
    for path in done:  # kept until here: when the last claim is killed, the first ones stay done
        path.unlink(missing_ok=True)


def tell(claim: runner.Claim, setting: runner.Setting, summary: runner.Summary, out: Path) -> None:
    print(f"{claim.name}: {summary.verdict}. {out / runner.stem(claim, setting)}.md")
    print(summary.listed, flush=True)


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument."""

    def integer(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    return integer


def settings(given: argparse.Namespace) -> Iterator[tuple[runner.Claim, runner.Setting]]:
    """The claims to run, and with what: all of it is looked at before any of it runs.

    Raises:
        ValueError, RuntimeError, OSError: there is no such device, or the data is not there.
    """
    torch.empty(0, device=given.device)
    options = {**(runner.QUICK if given.quick else {}), **({"seeds": given.seeds} if given.seeds else {})}
    for name in dict.fromkeys(given.names or NAMES):
        claim = runner.load(name)
        data = (given.data or claim.data[0]) if claim.data else None
        if data is not None:
            if data not in claim.data:
                raise ValueError(f"{name} is shown on {', '.join(claim.data)}, not on {data}")
            if not given.redraw:
                tasks.dataset(data, given.folder, 0.0, 0, "cpu")
        folder, device = (given.folder, given.device) if data else (None, "cpu")
        yield claim, runner.Setting(data, folder, device=device, **options)


if __name__ == "__main__":
    main()

"""The papers' claims, shown on real data: ``python -m benchmarks.claims [NAME ...]``; all without a name.

Stopped, it goes on where it was when started again. See runner.py for how a claim is made.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.claims import runner
from fastlr._progress import progress

# In the order in which they are run; each is a file of this folder.
NAMES = ("saddles", "cyclic", "adaptive", "super_convergence", "range_test", "batch_growth", "noise")

OUT = Path("benchmarks/results/claims")
DOCS = Path("docs/claims.md")
QUICK = {"seeds": 2, "scale": 0.25, "quick": True}


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
    parser.add_argument("--seeds", type=int, help="runs of each policy (default: 10, quick: 2)")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (default: cpu)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: none but this one")
    parser.add_argument("--out", type=Path, help=f"folder to write to (default: {OUT}, quick: {OUT}/quick)")
    parser.add_argument("--redraw", action="store_true", help="tables and pictures anew from the JSON files")
    parser.add_argument(
        "--docs", action="store_true", help=f"{DOCS} anew from the JSON files, and nothing else"
    )
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"no claim is called {unknown[0]}; there are {', '.join(NAMES)}")
    out = given.out or (OUT / "quick" if given.quick else OUT)
    if given.docs:
        runner.write_docs(map(runner.load, NAMES), out, DOCS)
        return
    options = {**(QUICK if given.quick else {}), **({"seeds": given.seeds} if given.seeds else {})}

    done = []
    with runner.pool(0 if given.redraw else given.workers) as submit, progress(True) as stage:
        for name in given.names or NAMES:
            claim = runner.load(name)
            data = (given.data or claim.data[0]) if claim.data else None
            if data is not None and data not in claim.data:
                parser.error(f"{name} is shown on {', '.join(claim.data)}, not on {data}")
            setting = runner.Setting(data, given.folder if data else None, device=given.device, **options)
            if given.redraw:
                summary = runner.redraw(claim, setting, out)
            else:
                summary = runner.run_claim(claim, setting, out, submit, stage)
                done.append(runner.finished_path(claim, setting, out))
            print(f"{name}: {summary.verdict}. {out / runner.stem(claim, setting)}.md")
            print(summary.listed, flush=True)
    for path in done:  # kept until here: when the last claim is killed, the first ones stay done
        path.unlink()


if __name__ == "__main__":
    main()

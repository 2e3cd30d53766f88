"""Many runs in parallel processes: ``make fuzz``, or ``python -m fuzz --runs 10000`` in this folder's parent.

The exit status is 1 if a run failed; each is named with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from cuda_on_cpu import build

TESTS = Path(__file__).parents[1]

# What is run, and its part of the runs. A run on the emulated device takes as long as five on the CPU.
PARTS = {
    ("fuzz/test_fuzz_steps.py", "--backend=cpu"): 0.35,
    ("fuzz/test_fuzz_steps.py", "--backend=cuda-on-cpu"): 0.15,
    ("fuzz/test_fuzz_schedules.py",): 0.2,
    ("fuzz/test_fuzz_range_test.py",): 0.2,
    ("fuzz/test_fuzz_growth.py",): 0.1,
}
# Seeds to a process: it takes some seconds to start, and tells of its progress when it is done.
CHUNK = 100


class Chunk(NamedTuple):
    """Some seeds of one part."""

    part: tuple[str, ...]
    first: int
    runs: int

    def command(self, python: str) -> str:
        seeds = f"FASTLR_FUZZ_FIRST={self.first} FASTLR_FUZZ_RUNS={self.runs}"
        return f"{seeds} {python} -m pytest {' '.join(self.part)}"

    def failed(self) -> tuple[list[int], str]:
        """Runs it: the seeds that failed, and what was printed."""
        numbers = {"FASTLR_FUZZ_FIRST": str(self.first), "FASTLR_FUZZ_RUNS": str(self.runs)}
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *self.part]
        done = subprocess.run(
            command, cwd=TESTS, env={**os.environ, **numbers}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return [], done.stdout
        seeds = {int(seed) for seed in re.findall(r"^FAILED .*?(\d+)\](?: |$)", done.stdout, re.MULTILINE)}
        if done.returncode != 1:  # a crash: the run that began last
            seeds |= {int(seed) for seed in re.findall(r"^\S+::\S*?(\d+)\] ", done.stdout, re.MULTILINE)[-1:]}
        return sorted(seeds) or [self.first], done.stdout


def chunks(runs: int, first: int) -> list[Chunk]:
    """The parts' runs, dealt out in turn, so that all parts progress alike."""
    found = []
    for part, share in PARTS.items():
        wanted = round(runs * share)
        for start in range(0, wanted, CHUNK):
            place = (start + CHUNK / 2) / wanted
            found.append((place, Chunk(part, first + start, min(CHUNK, wanted - start))))
    return [chunk for _, chunk in sorted(found)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="in all; default: 10,000")
    parser.add_argument("--first", type=int, default=0, help="the first seed; default: 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one a core")
    given = parser.parse_args()
    if build.LIBRARY not in os.environ:  # once, and not by several processes at the same time
        os.environ[build.LIBRARY] = str(build.build_extension(build.CACHE))
    wanted = chunks(given.runs, given.first)
    total = sum(chunk.runs for chunk in wanted)
    begin, done, failures = time.monotonic(), 0, 0
    with ThreadPoolExecutor(given.jobs) as pool:
        running: dict[Future[tuple[list[int], str]], Chunk] = {pool.submit(c.failed): c for c in wanted}
        try:
            for future in as_completed(running):
                chunk, (failed, output) = running[future], future.result()
                done, failures = done + chunk.runs, failures + len(failed)
                if failed:  # what pytest says of them, without those that passed
                    print(*(line for line in output.splitlines() if " PASSED " not in line), sep="\n")
                for seed in failed:
                    one = chunk._replace(first=seed, runs=1)
                    print(f"failed; to repeat it, in {TESTS.name}/: {one.command('python')}")
                print(f"{done}/{total} runs, {failures} failed, {time.monotonic() - begin:.0f} s", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

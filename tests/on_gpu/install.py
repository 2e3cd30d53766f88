"""Builds fastlr for the GPU that is present and installs it into a folder of its own: the machine stays as
it was, and nothing is fetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cuda_on_cpu import build
from native import toolchain

from . import report, sources


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--site", type=Path, required=True, help="the folder to install into")
    options = parser.parse_args()
    made = report.Report(options.result)
    on_gpu = options.backend == "cuda"
    settings = ["FASTLR_CUDA=ON", "CMAKE_CUDA_ARCHITECTURES=native"] if on_gpu else ["FASTLR_CUDA=OFF"]
    begin = time.perf_counter()
    shutil.rmtree(options.site, ignore_errors=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"),
            *("--no-compile", "--target", options.site),
            *(f"--config-settings=cmake.define.{setting}" for setting in settings),
            toolchain.ROOT,
        ],
        check=True,
        env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    made.figures["seconds"] = round(time.perf_counter() - begin, 1)
    if not on_gpu:
        begin = time.perf_counter()
        build.build_extension(build.CACHE)
        made.figures["emulation_seconds"] = round(time.perf_counter() - begin, 1)
    code = "import fastlr, json; print(json.dumps(fastlr.build_info()))"
    environment = {**os.environ, "PYTHONPATH": str(options.site)}
    told = toolchain.run_or_fail(sys.executable, "-c", code, env=environment)
    made.figures["build_info"] = json.loads(told)
    print(told)
    (options.site / sources.FILE).write_text(sources.digest())
    made.headline = f"built in {made.figures['seconds']} s"
    made.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Learning-rate schedules, range test and fused optimizers for PyTorch, in one native step."""

from __future__ import annotations

import sys as _sys
from importlib.metadata import version as _version

import torch  # noqa: F401  # first: the native code runs on the OpenMP runtime that it loads

from fastlr import batch_growth, integrations, optim, schedules
from fastlr._build import build_info
from fastlr.batch_growth import *  # noqa: F403
from fastlr.optim import *  # noqa: F403
from fastlr.range_test import RangeTestGrid, RangeTestResult, range_test, range_test_grid
from fastlr.schedules import *  # noqa: F403

__version__ = _version("fastlr")
__all__ = [
    *batch_growth.__all__,
    *optim.__all__,
    *schedules.__all__,
    "RangeTestGrid",
    "RangeTestResult",
    "batch_growth",
    "build_info",
    "integrations",
    "optim",
    "range_test",
    "range_test_grid",
    "schedules",
]

# `import fastlr.FusedSGD as optimizer` gives the class, and so does importlib.import_module: the import
# system takes whatever sys.modules holds under a name, once the parent package has been imported.
_sys.modules.update(
    {
        f"{__name__}.{_name}": _kind  # type: ignore[misc]
        for _name, _kind in vars(optim).items()
        if _name in optim.__all__ and isinstance(_kind, type) and issubclass(_kind, optim.FusedOptimizer)
    }
)

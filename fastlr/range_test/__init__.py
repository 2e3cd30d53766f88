"""The learning-rate range test: raise the rate with every update, watch the loss, read off the bounds.

:func:`range_test` runs the sweep and puts everything back as it was; :class:`RangeTestResult` reads
the curve, also one that was recorded elsewhere; :func:`range_test_grid` compares several settings.
"""

from __future__ import annotations

from fastlr.range_test.grid import RangeTestGrid, range_test_grid
from fastlr.range_test.result import RangeTestResult
from fastlr.range_test.sweep import range_test

__all__ = ["RangeTestGrid", "RangeTestResult", "range_test", "range_test_grid"]

"""Every picture, drawn from arrays and small protocols: whoever has such a thing can have it drawn.

Matplotlib is imported inside; no display and no pyplot state is needed.
"""

from fastlr.plotting.accuracy import plot_accuracy
from fastlr.plotting.batch_plan import plot_batch_plan
from fastlr.plotting.figure import save
from fastlr.plotting.range_test import plot_range_test, plot_range_test_grid
from fastlr.plotting.schedules import plot_schedules

__all__ = [
    "plot_accuracy",
    "plot_batch_plan",
    "plot_range_test",
    "plot_range_test_grid",
    "plot_schedules",
    "save",
]

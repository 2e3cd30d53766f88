"""fastai: a callback that puts schedules in charge of what fastai sets itself.

Not imported with fastlr: ``import fastlr.integrations.fastai``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder, ParamScheduler

from fastlr.optim import FusedOptimizer
from fastlr.schedules import Schedule


class Schedules(Callback):  # type: ignore[misc]
    """Puts schedules in charge at the beginning of a fit, where fastai has just written its own rate.

    A ``Learner`` makes its optimizer with its own ``lr`` and writes it again in each ``fit``, so that a
    schedule in ``opt_func`` alone is lost without a word. For fastlr optimizers in fastai's ``OptimWrapper``.
    ``learn.recorder.lrs`` then has the rate that each batch was trained with. ``learn.lr_find()`` finds as
    ever, and changes nothing.

    Args:
        lr: a schedule in updates or samples; None: the one that ``opt_func``, a partial, holds.
        start: ``"zero"``: schedules go on from fit to fit, and where a loaded optimizer stopped; ``"now"``:
            each fit begins them anew.
        others: what else :meth:`fastlr.FusedOptimizer.set_schedule` takes, as ``momentum``.

    Raises (at the fit):
        TypeError: the learner's optimizer is none of fastlr's, or there is no schedule for the rate.
        ValueError: fastai drives one of the options as well, as ``fit_one_cycle`` does.

    Warns (at the fit) of a rate that was given to ``fit`` and is not used.
    """

    order = ParamScheduler.order - 1
    run_valid = False

    def __init__(
        self, lr: Schedule | None = None, *, start: Literal["zero", "now"] = "zero", **others: Any
    ) -> None:
        self.start = start
        self.schedules = {name: value for name, value in {"lr": lr, **others}.items() if value is not None}

    def before_fit(self) -> None:
        """Sets the schedules."""
        self.driving = False
        optimizer = self._optimizer()
        if self._searches():
            return
        given = {"lr": _in_partial(self.learn.opt_func), **self.schedules}
        if given["lr"] is None:
            raise TypeError(
                "there is no schedule for lr; give it to the callback: Schedules(lr=fastlr.Triangular(...))"
            )
        if twice := sorted(self._driven_by_fastai() & given.keys()):
            raise ValueError(
                f"{', '.join(twice)} must be driven by fastai or by a schedule, got both; call learn.fit() "
                "in place of what adds a ParamScheduler, as fit_one_cycle does"
            )
        rate = optimizer.param_groups[-1]["lr"]
        if any(group["lr"] != self.learn.lr for group in optimizer.param_groups):
            warnings.warn(
                f"the rate {rate!r} given to fit() is not used, as {given['lr']!r} drives it",
                UserWarning,
                stacklevel=2,
            )
        optimizer.set_schedule(**given, start=self.start)
        self.driving = True

    def before_epoch(self) -> None:
        """Leaves the rate to LRFinder, which has saved the optimizer with its schedules by now."""
        if self._searches():
            self._optimizer().set_schedule(lr=0.0)  # it writes its own before each batch

    def before_batch(self) -> None:
        """Keeps the rate of this batch."""
        self.rate = self._optimizer().param_groups[-1]["lr"]

    def after_batch(self) -> None:
        """Records it, as behind the step the optimizer holds that of the next."""
        if self.driving and self.training and hasattr(self.learn, "recorder"):
            self.recorder.lrs[-1] = self.rate

    def _optimizer(self) -> FusedOptimizer:
        optimizer = getattr(self.learn.opt, "opt", None)
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"opt_func must make a fastlr optimizer, as partial(OptimWrapper, opt=fastlr.FusedSGD), got "
                f"{type(self.learn.opt if optimizer is None else optimizer).__name__}"
            )
        return optimizer

    def _searches(self) -> bool:
        return any(isinstance(callback, LRFinder) for callback in self.learn.cbs)

    def _driven_by_fastai(self) -> set[str]:
        schedulers = [callback for callback in self.learn.cbs if isinstance(callback, ParamScheduler)]
        names = {name for callback in schedulers for name in callback.scheds}
        return {"momentum" if name == "mom" else name for name in names}


def _in_partial(made_by: Any) -> Schedule | None:
    """The schedule that one of several partials, one within another, holds for the rate."""
    while isinstance(made_by, functools.partial):
        if isinstance(made_by.keywords.get("lr"), Schedule):
            return made_by.keywords["lr"]  # type: ignore[no-any-return]
        made_by = made_by.keywords.get("opt")
    return None

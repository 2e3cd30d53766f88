"""Who drives the options of parameter groups: schedules and numbers, as they are given, written or scaled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fastlr import _core
from fastlr._checks import index, number, real
from fastlr.optim._groups import Clock, RuleOptions, check_owner
from fastlr.optim._parts import ZERO, Parts
from fastlr.schedules import Schedule

# What may come to be in charge of an option; None: what is.
Driver: TypeAlias = float | Schedule | None

# NOTE: [a group's lr_scale]
# Recipes with a decay by layer (timm, BEiT, MAE) keep a factor in each group as "lr_scale", by which whoever
# writes the rates of all groups multiplies. So a schedule that comes to drive the rate of all groups is
# multiplied by it, here and nowhere else. What a group is given alone, numbers, and schedules that a file or
# a group of another optimizer brings, are what they say.


def scaled_for(group: Mapping[str, Any], lr: Any, where: str) -> Any:
    """The rate of all groups as one of them has it, see NOTE: [a group's lr_scale].

    Raises:
        ValueError: the group's ``lr_scale`` is out of range.
    """
    if not isinstance(lr, Schedule) or "lr_scale" not in group:
        return lr
    scale = real(f"lr_scale{where}", group["lr_scale"])
    return lr if scale == 1.0 else lr * scale


class Driving:
    """What :class:`FusedOptimizer` has of changing who drives an option."""

    param_groups: list[dict[str, Any]]
    _plan: _core.Plan
    _options: RuleOptions
    _set_aside: list[dict[str, Any]] | None
    _parts: Parts | None

    if TYPE_CHECKING:

        def _check_outside_zero(self, what: str, remedy: str) -> None: ...
        def _refuse_handed_over(self, what: str) -> None: ...
        def _sync(self) -> Clock: ...
        def _unit_with(self, groups: list[dict[str, Any]]) -> str: ...
        def _change(self, changes: list[dict[str, Any]]) -> None: ...
        def _checked(self, group: dict[str, Any], where: str, *, new: bool = False) -> dict[str, Any]: ...

    def scale_lr(self, factor: float, group: int | None = None) -> None:
        """Multiplies the learning rate from now on, be it a schedule or a number.

        What ``ReduceLROnPlateau`` does to a rate. A schedule goes on where it is, times the factor;
        factors of several calls become one. CUDA graphs that were captured before follow.

        Args:
            factor: finite, >= 0.
            group: index of one parameter group; None: all.

        Raises:
            ValueError: the factor is out of range, or there is no such group.
            RuntimeError: something else wrote a value that a schedule owns, or the options are handed over.

        >>> import fastlr, torch
        >>> opt = fastlr.FusedSGD([torch.zeros(2)], lr=fastlr.LinearRamp(0.0, 1.0, 10))
        >>> opt.set_clock(updates=5)
        >>> opt.scale_lr(0.5)
        >>> opt.param_groups[0]["lr"], opt.param_groups[0]["lr_schedule"](10)
        (0.25, 0.5)
        """
        self._check_outside_zero("scale_lr()", "give that a schedule which says it when you make it")
        self._refuse_handed_over("scale_lr()")
        factor = real("factor", factor)
        places = self._places(group)
        self._sync()
        option = self._options.named("lr")
        assert option is not None  # each rule has it
        for place in range(len(self.param_groups)):
            self._plan.check_owned(self.param_groups, place, [])
        changes: list[dict[str, Any]] = [{} for _ in self.param_groups]
        for place in places:
            own, where = self.param_groups[place], f" of parameter group {place}"
            owner = own["lr_schedule"]
            if owner is None:
                rate = number(f"lr{where}", self._options.without_tensors(own).get("lr", own["lr"]))
                changes[place] = self._options.driven(own, option, rate * factor, Clock(0, 0), where)
            else:
                scaled = owner * factor
                check_owner(option, scaled, where)
                if "_warned" in vars(owner):  # that it has ended, once
                    scaled._set(_warned=True)
                changes[place] = {"lr_schedule": scaled}
            self._checked({**own, **self._options.without_tensors(own), **changes[place]}, where)
        self._change(changes)

    def _places(self, group: int | None) -> Iterable[int]:
        """Of the groups that a caller names by one's index, or by None: all."""
        size = len(self.param_groups)
        return range(size) if group is None else (index("group", group, size),)

    def _drive(self, given: list[dict[str, Any]], origin: Clock) -> None:
        """Puts in charge what each group is given, by options.

        Args:
            given: no None in it; an empty dict leaves a group as it is.
            origin: where the zero of schedules lies.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`FusedOptimizer.set_schedule` says; nothing has
                changed then.
        """
        for place, drivers in enumerate(given):
            self._plan.check_owned(self.param_groups, place, list(drivers))
        changes: list[dict[str, Any]] = [{} for _ in given]
        for place, drivers in enumerate(given):
            if not drivers:
                continue
            where = f" of parameter group {place}"
            own = self.param_groups[place]
            changed = {**own, **self._options.without_tensors(own)}
            for option in self._options.scheduled:
                if option.name in drivers:
                    changes[place] |= self._options.driven(
                        changed, option, drivers[option.name], origin, where
                    )
                    changed |= changes[place]
            self._checked(changed, where)
        groups = [{**group, **change} for group, change in zip(self.param_groups, changes, strict=True)]
        unit = self._unit_with(groups)
        self._change([{**change, "clock_unit": unit} for change in changes])

    def _written(self) -> list[dict[str, Schedule]]:
        """Schedules that somebody has written into groups in place of numbers, by options; empty: none."""
        if self._set_aside is not None or self._parts is ZERO:  # both write groups over
            return []
        written = [
            {
                option.name: value
                for option in self._options.scheduled
                if isinstance(value := self._options.found(group, option), Schedule)
            }
            for group in self.param_groups
        ]
        return written if any(written) else []

    def _adopt(self, written: list[dict[str, Schedule]]) -> None:
        """Puts these in charge, from the present clock on.

        Raises:
            TypeError, ValueError, RuntimeError: one of them cannot drive its option; nothing has changed.
        """
        if not written:
            return
        self._plan.sync(self.param_groups)
        self._drive(written, Clock(self.param_groups[0]["updates"], self.param_groups[0]["samples"]))

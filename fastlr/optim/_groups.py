"""What a parameter group of a fused optimizer may hold: its rule's options, and who drives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import torch

from fastlr import _core
from fastlr._checks import describe, flag, is_sequence, number
from fastlr.schedules import Schedule

# NOTE: [what drives an option]
# For each option that a schedule can drive, a group holds the value that the next step uses under its
# name, its owner under "<name>_schedule" (a Schedule or None), and the clock at which the schedule's zero
# lies under "<name>_start". Some options stand together in a tuple, as Adam's in "betas".


class Clock(NamedTuple):
    """Where an optimizer stands.

    Attributes:
        updates: updates that were applied; a step that GradScaler made it skip does not count.
        samples: samples consumed, as told by :meth:`FusedOptimizer.advance_samples`.
    """

    updates: int
    samples: int


class _OtherClock(Clock):
    """A clock that counts something in place of samples."""

    __slots__ = ()

    _counts: ClassVar[str]

    @property
    def samples(self) -> int:
        raise AttributeError(f"this clock has no samples, as it counts {self._counts}: {self[1]:,} so far")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(updates={self.updates}, {self._counts}={self[1]})"

    def _asdict(self) -> dict[str, Any]:
        return {"updates": self.updates, self._counts: self[1]}


class TokenClock(_OtherClock):
    """Where an optimizer stands that counts tokens in place of samples: ``(updates, tokens)``.

    Attributes:
        updates: as :class:`Clock` has them.
        tokens: tokens consumed, as told by :meth:`FusedOptimizer.advance_tokens`.
    """

    __slots__ = ()

    _counts = "tokens"

    @property
    def tokens(self) -> int:
        return self[1]


class EpochClock(_OtherClock):
    """Where an optimizer stands that counts epochs in place of samples: ``(updates, epochs)``.

    Attributes:
        updates: as :class:`Clock` has them.
        epochs: epochs behind it, as told by :meth:`FusedOptimizer.advance_epoch`.
    """

    __slots__ = ()

    _counts = "epochs"

    @property
    def epochs(self) -> int:
        return self[1]


# NOTE: [what the second clock counts]
# Beside updates, native code knows one clock, under "samples" of a group. What it counts is "clock_unit" of
# the groups, the same in all: what their schedules do, or else what it was told last, as long as it stands
# at 0. Once it has counted, only set_clock() and a checkpoint give it another unit.

# By the units that it may have, the coarsest first.
CLOCKS: dict[str, type[Clock]] = {"epoch": EpochClock, "sample": Clock, "token": TokenClock}
# And what moves it.
TELLS = {"epoch": "advance_epoch()", "sample": "advance_samples()", "token": "advance_tokens()"}


def clock_of(schedule: Schedule) -> str:
    """The group's clock that a schedule follows."""
    return "updates" if schedule.unit == "update" else "samples"


def name_of_clock(schedule: Schedule) -> str:
    """The same as users call it."""
    return f"{schedule.unit}s"


class RuleOptions:
    """The options of a rule, as groups hold them. What they are called and where they lie the rule knows.

    Attributes:
        all: the rule's own in its order, then those of stages, which every rule has.
        scheduled: those that a schedule can drive.
    """

    def __init__(self, plan: _core.Plan) -> None:
        self._plan = plan
        self.all = plan.options()
        self.scheduled = [option for option in self.all if option.scheduled]
        self._sizes: dict[str, int] = {}  # of the tuples
        for option in self.all:
            if option.tuple is not None:
                self._sizes[option.tuple] = self._sizes.get(option.tuple, 0) + 1

    def named(self, name: str) -> _core.Option | None:
        """The option of this name that a schedule can drive, or None."""
        return next((option for option in self.scheduled if option.name == name), None)

    def value(self, group: Mapping[str, Any], option: _core.Option, where: str = "") -> Any:
        """What stands in a group for an option."""
        if option.tuple is None:
            return group[option.name]
        values, size = group[option.tuple], self._sizes[option.tuple]
        if not is_sequence(values) or len(values) != size:
            kind = "numbers or schedules" if option.name in map(_name, self.scheduled) else "numbers"
            raise ValueError(
                f"{option.tuple}{where} must be a tuple of {size} {kind}, got {describe(values)}"
            )
        return values[option.place]

    def found(self, group: Mapping[str, Any], option: _core.Option) -> Any:
        """What stands there for an option, be the group as it should or not; None: nothing."""
        value: Any = group.get(option.tuple or option.name)
        if option.tuple is None:
            return value
        return value[option.place] if is_sequence(value) and option.place < len(value) else None

    def entry(self, group: Mapping[str, Any], option: _core.Option, value: Any) -> dict[str, Any]:
        """What a group with another value for an option holds in place of the present one."""
        if option.tuple is None:
            return {option.name: value}
        values = list(group[option.tuple])
        values[option.place] = value
        return {option.tuple: tuple(values)}

    def spread(self, given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """What is given for options, each of those in a tuple under its own name."""
        spread = {name: value for name, value in given.items() if name not in self._sizes}
        for option in self.all:
            if option.tuple is not None and given.get(option.tuple) is not None:
                if given.get(option.name) is not None:
                    raise TypeError(
                        f"{option.tuple} and {option.name} are both given{where}; {option.name} stands in "
                        f"{option.tuple}"
                    )
                spread[option.name] = self.value(given, option, where)
        return spread

    def checked(self, group: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A complete group's hyperparameters as plain Python values.

        Raises:
            TypeError, ValueError: one of them has a wrong type or is out of range.
        """
        values: dict[str, Any] = {}
        for option in self.all:
            name, value = f"{option.name}{where}", self.value(group, option, where)
            if option.flag:
                values[option.name] = flag(name, value)
            elif not option.may_be_none:
                values[option.name] = number(name, value)
            else:
                values[option.name] = None if value is None else number(name, value, "a number or None")
        self._plan.check(list(values.values()), where)
        return self._in_group(values)

    def counted(self, groups: Iterable[Mapping[str, Any]]) -> str | None:
        """What schedules of complete groups count beside updates, one of ``CLOCKS``; None: nothing.

        Raises:
            ValueError: some count one of them, and others another.
        """
        found: dict[str, str] = {}
        for place, group in enumerate(groups):
            for option in self.scheduled:
                schedule = group[f"{option.name}_schedule"]
                if schedule is not None and clock_of(schedule) == "samples":
                    found.setdefault(schedule.unit, f"{option.name} of parameter group {place}")
        if len(found) > 1:
            coarse, fine = [unit for unit in CLOCKS if unit in found][:2]
            raise ValueError(
                f"{found[fine]} counts {fine}s, but {found[coarse]} {coarse}s, and an optimizer has one "
                f"clock for both; turn {coarse}s into {fine}s with "
                f"schedule.in_{fine}s({fine}s_per_{coarse})"
            )
        return next(iter(found), None)

    def _in_group(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values by their options' names, in the order of the options, as a group holds them."""
        held: dict[str, Any] = {}
        for option in self.all:
            if option.tuple is None:
                held[option.name] = values[option.name]
            else:
                held[option.tuple] = (*held.get(option.tuple, ()), values[option.name])
        return held

    def plain(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of a group that steps take, whatever their types, as Python's own."""
        changed = dict(group)
        for option in self.all:
            if (option.tuple or option.name) in group:  # somebody may have taken one out
                value = self.value(changed, option)
                if value is not None:
                    changed |= self.entry(changed, option, (bool if option.flag else float)(value))
        return changed

    def numbers(self, group: Mapping[str, Any]) -> list[float | None]:
        """A checked group's hyperparameters, in the order of the options."""
        values = [self.value(group, option) for option in self.all]
        return [None if value is None else float(value) for value in values]

    def without_tensors(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a group's numbers that are tensors of one, as torch's rates may be, as numbers."""
        changed: dict[str, Any] = {}
        for option in self.all:
            value = self.value({**group, **changed}, option)
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                changed |= self.entry({**group, **changed}, option, value.item())
        return changed

    def driven(
        self, group: Mapping[str, Any], option: _core.Option, value: object, start: Clock, where: str
    ) -> dict[str, Any]:
        """A group's entries for an option that is a number, or a schedule with its zero."""
        name = option.name
        if value is None and option.may_be_none:
            return {**self.entry(group, option, None), f"{name}_schedule": None, f"{name}_start": 0}
        if not isinstance(value, Schedule):
            remedy = ""
            if isinstance(value, torch.Tensor):
                remedy = "; pass its .item(). A schedule changes it, in CUDA graphs too"
            elif hasattr(value, "triangular2"):  # a range test's result
                reason = getattr(value, "reason", None)
                remedy = f", which gives no bounds: {reason}" if reason else "; pass its triangular2(...)"
            expected = (
                "a number, a fastlr schedule or None"
                if option.may_be_none
                else ("a number or a fastlr schedule")
            )
            fixed = number(f"{name}{where}", value, expected, remedy)
            return {
                **self.entry(group, option, fixed),
                f"{name}_schedule": None,
                f"{name}_start": 0,
            }
        check_owner(option, value, where)
        return {
            **self.entry(group, option, value._native.value(0)),
            f"{name}_schedule": value,
            f"{name}_start": getattr(start, clock_of(value)),
        }


def _name(option: _core.Option) -> str:
    return option.name


def check_owner(option: _core.Option, schedule: Schedule, where: str) -> None:
    """Raises ValueError for a schedule that cannot drive an option."""
    if not option.bounds(schedule.peak):
        raise ValueError(
            f"{option.name}{where} must stay {option.range}, but its schedule peaks at {schedule.peak!r}"
            f"{option.reason}"
        )


def tensors_of(params: object) -> list[torch.Tensor]:
    """Those that a new group is given, each alone or with its name; what else is wrong PyTorch says."""
    entries = params if isinstance(params, list) else [params]
    tensors = [entry[-1] if isinstance(entry, tuple) and entry else entry for entry in entries]
    return [p for p in tensors if isinstance(p, torch.Tensor)]


def check_rounded_by_chance(params: object, where: str) -> None:
    """Raises ValueError for a float16 parameter among a group's."""
    for p in tensors_of(params):
        if p.dtype in (torch.float16, torch.complex32):
            dtype = str(p.dtype).removeprefix("torch.")
            raise ValueError(
                f"stochastic_rounding{where} must be False, got True: it is for bfloat16, and a parameter of "
                f"shape {tuple(p.shape)} has {dtype}; use master_weights=True instead"
            )


def checked_state_dtype(where: str, value: object, name: str = "state_dtype") -> torch.dtype | None:
    """The type that a group keeps state in: None for each parameter's own, or float32."""
    if value is not None and value is not torch.float32:
        raise ValueError(f"{name}{where} must be None or torch.float32, got {value!r}")
    return torch.float32 if value is not None else None


class OptionsOfAllGroups(TypedDict, total=False):
    """What every optimizer takes besides, for all groups at once, as :mod:`fastlr.optim` says."""

    max_grad_norm: float | None
    nonfinite: Literal["skip", "raise"]


class StageOptions(TypedDict, total=False):
    """What every optimizer takes for its groups besides its rule's options, as :mod:`fastlr.optim` says."""

    ema_decay: float | Schedule | None
    ema_warmup: bool
    ema_dtype: torch.dtype | None
    max_grad_value: float | None
    cautious: bool
    master_weights: bool
    stochastic_rounding: bool
    rounding_seed: float


STAGE_DEFAULTS: StageOptions = {
    "ema_decay": None,
    "ema_warmup": False,
    "ema_dtype": torch.float32,
    "max_grad_value": None,
    "cautious": False,
    "master_weights": False,
    "stochastic_rounding": False,
    "rounding_seed": 0.0,
}


class StepOptions(OptionsOfAllGroups, StageOptions, total=False):
    """Both."""


class TorchOptions(StepOptions, total=False):
    """And options of torch's optimizers that say how a step is made, which here is always the same.

    What asks for nothing else is accepted: ``fused=True``, ``foreach=False``, ``differentiable=False``,
    ``capturable`` either way, and None for each.
    """

    foreach: bool | None
    fused: bool | None
    capturable: bool | None
    differentiable: bool | None


OF_ALL_GROUPS = tuple(OptionsOfAllGroups.__annotations__)
STATE_DTYPES = ("state_dtype", "ema_dtype")


# What each may not be, and why.
REFUSED_OPTIONS = {
    "foreach": (True, "every step updates all parameters in one native pass"),
    "fused": (False, "every step is fused"),
    "capturable": (None, ""),
    "differentiable": (True, "no gradient flows through a step"),
}


def check_step_options(options: Mapping[str, Any], made: str) -> None:
    """Raises for what no optimizer takes, and for what a step cannot do."""
    for name, value in options.items():
        if name in OF_ALL_GROUPS or name in STAGE_DEFAULTS:
            continue
        if name not in REFUSED_OPTIONS:
            raise TypeError(f"{made} got an unexpected keyword argument {name!r}")
        _check_torch_option(name, value)


def check_torch_options_in(group: Mapping[str, Any], where: str) -> None:
    """Raises for what a new group, which may be torch's, asks for as the constructor would."""
    for name in REFUSED_OPTIONS:
        if name in group:
            _check_torch_option(name, group[name], where)


def _check_torch_option(name: str, value: object, where: str = "") -> None:
    refused, reason = REFUSED_OPTIONS[name]
    if value is not None and flag(f"{name}{where}", value) is refused:
        raise ValueError(
            f"{name}{where} must be {not refused} or None, got {value!r}: {reason}; leave it out"
        )

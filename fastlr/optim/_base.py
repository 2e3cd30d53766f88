"""What all fused optimizers share: clocks, schedules in parameter groups, step and checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, overload

import torch
from torch.optim import optimizer as torch_optimizer

from fastlr import _core
from fastlr._build import tell_of_missing_cuda
from fastlr._checks import choice, count
from fastlr._runtime import Runtime
from fastlr.optim._averages import Averages
from fastlr.optim._buffers import EMA_BUFFERS
from fastlr.optim._checkpoint import Loaded, pack, unpack
from fastlr.optim._driving import Driver, Driving, scaled_for
from fastlr.optim._grad_norm import GradNorm
from fastlr.optim._groups import (
    CLOCKS,
    OF_ALL_GROUPS,
    STAGE_DEFAULTS,
    STATE_DTYPES,
    TELLS,
    Clock,
    RuleOptions,
    check_rounded_by_chance,
    check_step_options,
    check_torch_options_in,
    checked_state_dtype,
    clock_of,
    name_of_clock,
    tensors_of,
)
from fastlr.optim._handover import Handover
from fastlr.optim._moving import Moving
from fastlr.optim._parts import FSDP1, ZERO, are_flattened, is_called_by, is_made_by_zero
from fastlr.optim._state import RuleState
from fastlr.schedules import Schedule

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class FusedOptimizer(GradNorm, Averages, Driving, Handover, Moving, torch.optim.Optimizer):
    """Base of the fused optimizers: :class:`fastlr.FusedSGD`, :class:`fastlr.FusedAdamW` and their kin."""

    # GradScaler then calls step() on every iteration and hands over what it knows as two attributes,
    # `grad_scale` and `found_inf`, which it deletes again: they must not exist on the class.
    _step_supports_amp_scaling = True

    _rule: str  # the native rule's name
    # What every group holds, whatever its maker or a file says.
    _fixed: dict[str, Any] = {}  # noqa: RUF012
    # What the constructor, and new groups, may call a key of a group; groups in use have the key alone.
    _other_names: dict[str, str] = {}  # noqa: RUF012

    # Whether a step is as long as the rate says, however large the gradients are.
    _adapts = True

    # By which the next step moves the clock of samples or tokens; from whoever counts, in a hook before it.
    _samples_of_step = 0
    # A float32 on the gradients' device that the next step makes 1 where it finds an inf or NaN, and then
    # skips the update; there for one step, from fastlr.GradScaler.
    _seeks_inf_for: torch.Tensor
    _loaded: Loaded

    # NOTE: [what a checkpoint holds]
    # Clocks and schedules live in param_groups, so that state_dict, deepcopy, pickle and the helpers of
    # torch.distributed.checkpoint (which keep nothing but state and param_groups) carry them. In a
    # state_dict a schedule is a plain dict. The type of state is `state_dtype` of its group.

    def __init__(
        self, params: Params, defaults: dict[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        options = options or {}
        check_step_options(options, f"{type(self).__name__}()")
        if is_made_by_zero():
            self._parts = ZERO
        self.max_grad_norm = options.get("max_grad_norm")
        self.nonfinite = options.get("nonfinite", "skip")
        self._make_plan()
        defaults |= {name: options.get(name, value) for name, value in STAGE_DEFAULTS.items()}
        for option in self._options.scheduled:
            defaults |= {f"{option.name}_schedule": None, f"{option.name}_start": 0}
        defaults |= {**self._fixed, "updates": 0, "samples": 0, "clock_unit": "sample", "fresh": False}
        # An optimizer fills its groups in. The dicts of the caller, which may be another optimizer's,
        # stay as they are. PyTorch has its say on a set of tensors, which holds no dict.
        if not isinstance(params, (torch.Tensor, set)):
            params = [dict(item) if isinstance(item, dict) else item for item in params]  # type: ignore[assignment]
        super().__init__(params, defaults)
        self._check_warmup()

    def _make_plan(self) -> None:
        self._runtime = Runtime()
        self._plan = _core.Plan(self._rule, self._runtime, self._other_names)
        self._options = RuleOptions(self._plan)
        self._rule_state = RuleState(self._plan, self._options)

    def _checked(self, group: dict[str, Any], where: str, *, new: bool = False) -> dict[str, Any]:
        """A group's hyperparameters as plain Python values.

        Args:
            group: complete.
            where: which one, for messages.
            new: whether its values were chosen together. Of a group in use, what a step takes is taken, as
                some of its values may have been written into it.

        Raises:
            TypeError, ValueError: one of them has a wrong type or is out of range.
        """
        dtypes = {name: checked_state_dtype(where, group[name], name) for name in STATE_DTYPES}
        return {**self._options.checked(group, where), **dtypes}

    def _from_file(self, group: dict[str, Any], where: str) -> dict[str, Any]:
        """A file's group, completed by the optimizer's own, in this class's form and checked."""
        group = {**group, **self._fixed}
        group |= _live_dtypes(group)
        return {**group, **self._checked(group, where)}

    def _complete(self, group: dict[str, Any]) -> None:
        """Adds what the group of an optimizer that an older version pickled does not have."""
        for name, value in {"state_dtype": None, "clock_unit": "sample", **STAGE_DEFAULTS}.items():
            group.setdefault(name, value)
        for option in self._options.scheduled:
            group.setdefault(f"{option.name}_schedule", None)
            group.setdefault(f"{option.name}_start", 0)

    # -- groups and schedules --------------------------------------------------------------------

    def _in_own_words(self, param_group: dict[str, Any], where: str) -> dict[str, Any]:
        """A new group dict with the rule's options in place of what the class calls them."""
        return dict(param_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its schedules begin at their zero now.

        Args:
            param_group: ``{"params": ..., "lr": number or schedule, ...}``; what it does not say is
                taken from the optimizer's arguments, a schedule as its ``lr`` times what the group has as
                ``lr_scale``. It becomes the optimizer's, completed; on an error it stays as it was.

        Raises:
            ValueError: a hyperparameter is out of range, a schedule counts epochs, samples or tokens where
                others count another of these, or it has a schedule of another optimizer, and a number that
                is not that schedule's.
            TypeError: a value has a wrong type.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            return super().add_param_group(param_group)  # which raises
        self._refuse_handed_over("add_param_group()")
        place = len(self.param_groups)
        where = f" of parameter group {place}"
        clock = self._sync() if self.param_groups else Clock(0, 0)
        for name, value in self._fixed.items():
            if param_group.get(name, value) != value:
                raise ValueError(
                    f"{name}{where} must be {value!r} in {type(self).__name__}, got {param_group[name]!r}; "
                    "leave it out of the group"
                )
        for name in OF_ALL_GROUPS:
            if name in param_group:
                if self._parts is ZERO and param_group[name] == getattr(self, name):
                    continue  # it gives its groups, too, what it gives the constructor
                raise ValueError(
                    f"{name}{where} is {param_group[name]!r}, but it is one of all groups together; give it "
                    f"to {type(self).__name__}()"
                )
        driven = [option.name for option in self._options.scheduled]
        for option in self._options.all:
            if option.name not in driven and param_group.get(f"{option.name}_schedule") is not None:
                raise ValueError(
                    f"{option.name}_schedule{where} is for nothing, as no schedule can drive {option.name}; "
                    f"leave it out of the group, got {param_group[f'{option.name}_schedule']!r}"
                )
            if option.tuple is not None and option.name in param_group:
                raise ValueError(
                    f"{option.name}{where} stands in {option.tuple}, got {param_group[option.name]!r} as an "
                    f"entry of its own; give the group {option.tuple}"
                )
        own = self._in_own_words(param_group, where)
        filled = {**self.defaults, **own}
        if filled["lr"] is self.defaults["lr"]:
            filled["lr"] = scaled_for(own, filled["lr"], where)
        check_torch_options_in(filled, where)
        left_over = Clock(filled["updates"], filled["samples"])  # where another optimizer had the group
        filled |= {**self._fixed, "updates": clock.updates, "samples": clock.samples, "fresh": False}
        for option in self._options.scheduled:
            owner = filled[f"{option.name}_schedule"]  # a group of another optimizer brings its own
            given = self._options.value(filled, option, where)
            if owner is not None and (option.tuple or option.name) in own:
                said = owner
                if isinstance(owner, Schedule) and not isinstance(given, Schedule):
                    at = getattr(left_over, clock_of(owner)) - filled[f"{option.name}_start"]
                    said = owner._native.value(max(at, 0))
                if given != said:
                    raise ValueError(
                        f"{option.name}{where} is {given!r}, and {option.name}_schedule {owner!r}"
                        f"{'' if said is owner else f', which says {said!r}'}; leave one out"
                    )
            given = given if owner is None else owner
            filled |= self._options.driven(filled, option, given, clock, where)
        for name in OF_ALL_GROUPS:
            filled.pop(name, None)
        filled |= self._checked(filled, where, new=True)
        filled["clock_unit"] = unit = self._unit_with([*self.param_groups, filled])
        if isinstance(filled["params"], Iterator):  # read once; a second try still has them
            filled["params"] = param_group["params"] = list(filled["params"])
        if filled["stochastic_rounding"]:
            check_rounded_by_chance(filled["params"], where)
        self._meet_parts(tensors_of(filled["params"]))
        super().add_param_group(filled)
        tell_of_missing_cuda(filled["params"])
        param_group.clear()
        param_group.update(filled)
        self.param_groups[place] = param_group
        for group in self.param_groups:
            group["clock_unit"] = unit

    def _meet_parts(self, parameters: list[torch.Tensor]) -> None:
        """Sees to it that nobody takes a rank's parts of parameters for the whole.

        Raises:
            ValueError: this optimizer is to measure or clip their norm.
        """
        if not are_flattened(parameters):
            return
        self._parts = FSDP1
        # ShardedGradScaler tells the ranks of each other's inf only where the optimizer leaves that to it.
        self._step_supports_amp_scaling = False
        if self._max_grad_norm is not None:
            self._check_whole("max_grad_norm", self._max_grad_norm)
        if self._measures_grad_norm:
            self._check_whole("measure_grad_norm", True)

    def _check_outside_zero(self, what: str, remedy: str) -> None:
        """Raises RuntimeError for what would be undone, see NOTE: [inside ZeroRedundancyOptimizer]."""
        if self._parts is ZERO:
            raise RuntimeError(
                f"{what} would be undone by {ZERO.name}, which made this optimizer and writes its own "
                f"parameter groups over this one's before each step; {remedy}"
            )

    def set_schedule(
        self,
        lr: Driver = None,
        *,
        group: int | None = None,
        start: Literal["now", "zero"] = "now",
        **others: Driver | tuple[Driver, ...],
    ) -> None:
        """Puts schedules, or plain numbers, in charge of the learning rate and other hyperparameters.

        Args:
            lr: a schedule, or a number, which takes the rate back from a schedule; None: unchanged.
            others: the same for each argument of the constructor that takes a schedule, by its name. What
                stands in a tuple there has a name of its own, too.
            group: index of one parameter group; None: all.
            start: ``"now"``: the schedule's zero is the present clock; ``"zero"``: its zero is the
                clock's, so that it continues in the middle.

        A schedule for the rates of all groups is, in a group with an ``lr_scale`` (a decay by layer), that
        times this. A number, and what is for one group alone, stands as it is given.

        A schedule that is written into a group, ``param_groups[0]["lr"] = schedule``, is put in charge of it
        at the next :meth:`step`, :meth:`sync` or ``state_dict()``, from then on.

        Raises:
            ValueError: a value is out of range, schedules count different things beside updates, or there
                is no such group.
            TypeError: a value is neither a number nor a schedule, or this optimizer has no such option.
        """
        self._check_outside_zero("set_schedule()", "give that the schedule when you make it")
        self._refuse_handed_over("set_schedule()")
        choice("start", start, ("now", "zero"))
        places = self._places(group)
        given = self._options.spread({"lr": lr, **others})
        names = [option.name for option in self._options.scheduled]
        if unknown := [name for name in given if name not in names]:
            raise TypeError(
                f"set_schedule() got {unknown[0]!r}, which is nothing that a schedule can drive in "
                f"{type(self).__name__}; that are {', '.join(names)}"
            )
        now = self._sync()
        taken = {name: value for name, value in given.items() if value is not None}
        drivers: list[dict[str, Any]] = [{} for _ in self.param_groups]
        for place in places:
            drivers[place] = dict(taken)
            if group is None and "lr" in taken:
                where = f" of parameter group {place}"
                drivers[place]["lr"] = scaled_for(self.param_groups[place], taken["lr"], where)
        self._drive(drivers, now if start == "now" else Clock(0, 0))

    def _change(self, changes: list[dict[str, Any]]) -> None:
        """Writes into every group, and lets the devices and their captured graphs know at once.

        Where host or device cannot take it, an error is raised and nothing has changed.
        """
        changed = [{**group, **change} for group, change in zip(self.param_groups, changes, strict=True)]
        self._plan.publish(changed)
        self._push(changed)
        _core.update_groups(self.param_groups, changed)  # all at once, so that Ctrl-C finds none half changed

    def _push(self, groups: list[dict[str, Any]]) -> None:
        self._plan.push(groups)
        if self._buffer_averages is not None:
            self._buffer_averages.push(groups[0])

    # -- clocks ----------------------------------------------------------------------------------

    def clock(self) -> Clock:
        """Updates applied and samples consumed so far, as the host counts them.

        On CUDA devices the host does not see which updates a GradScaler made the device skip, nor
        replays of a graph; :meth:`sync` asks the device.

        Where tokens or epochs are counted in place of samples it is a :class:`TokenClock` or an
        :class:`EpochClock`.
        """
        first = self.param_groups[0]
        return CLOCKS[first["clock_unit"]](first["updates"], first["samples"])

    def sync(self) -> Clock:
        """Brings the host's clock and rates up to date with the devices', and returns the clock.

        Waits for CUDA devices; on the CPU the two are always the same. What could not be said during
        steps is said here: that a schedule has ended, and that a ``grad_scale`` was out of range.

        Raises:
            ValueError: a ``grad_scale`` had no inverse in float32, so that updates were skipped.
            RuntimeError: called while a CUDA graph is captured, or devices disagree.
        """
        self._sync()
        return self.clock()

    def _sync(self) -> Clock:
        """As :meth:`sync`, with whatever the second clock counts as samples."""
        self._adopt(self._written())
        self._plan.sync(self.param_groups)
        if self._buffer_averages is not None:
            self._buffer_averages.sync(self.param_groups[0])
        return Clock(self.param_groups[0]["updates"], self.param_groups[0]["samples"])

    def _unit_with(self, groups: list[dict[str, Any]]) -> str:
        """What the second clock counts once the groups are these; NOTE: [what the second clock counts].

        Raises:
            ValueError: their schedules do not count the same, or something else than the clock has counted.
        """
        counted = self._options.counted(groups)
        if not self.param_groups:
            return counted or "sample"
        unit: str = self.param_groups[0]["clock_unit"]
        if counted in (None, unit):
            return unit
        self._plan.sync(self.param_groups)
        if before := self.param_groups[0]["samples"]:
            raise ValueError(
                f"a schedule counts {counted}s, but the optimizer's clock has counted {before:,} {unit}s; "
                f"tell it how many {counted}s these were with set_clock({counted}s=...) first"
            )
        assert counted is not None
        return counted

    def set_clock(
        self,
        *,
        updates: int | None = None,
        samples: int | None = None,
        tokens: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """Sets the clock of all groups, and with it the values of their schedules.

        For a run that another optimizer began, whose checkpoint says nothing of how far it was. CUDA
        graphs that were captured before go on from the new clock.

        Args:
            updates: applied so far, >= 0; None: unchanged.
            samples: consumed so far, >= 0; None: unchanged.
            tokens, epochs: in place of samples, which are then counted no longer.

        Raises:
            ValueError: a number is out of range, a schedule begins after the new clock, or schedules count
                something else.
            RuntimeError: something else wrote a value that a schedule owns.

        >>> import fastlr, torch
        >>> opt = fastlr.FusedSGD([torch.zeros(2)], lr=fastlr.StepDecay(0.1, every=30, gamma=0.5))
        >>> opt.set_clock(updates=60)
        >>> opt.clock(), opt.param_groups[0]["lr"]
        (Clock(updates=60, samples=0), 0.025)
        """
        self._refuse_handed_over("set_clock()")
        self._check_outside_zero("set_clock()", "load a consolidated state with such a clock into that")
        change: dict[str, Any] = {} if updates is None else {"updates": count("updates", updates, 0)}
        others = {"sample": samples, "token": tokens, "epoch": epochs}
        told = {name: value for name, value in others.items() if value is not None}
        if len(told) > 1:
            raise ValueError(
                "an optimizer counts samples, tokens or epochs, got "
                + " and ".join(f"{name}s={value!r}" for name, value in told.items())
                + "; leave one out"
            )
        for name, value in told.items():
            change["samples"] = count(f"{name}s", value, 0)
        clock = self._sync()._replace(**change)
        unit = next(iter(told), self.param_groups[0]["clock_unit"])
        counted = self._options.counted(self.param_groups)
        if counted not in (None, unit):
            raise ValueError(
                f"the optimizer's schedules count {counted}s, so that its clock cannot be set to {unit}s; "
                f"give {counted}s=..., or take the values back from them first, with set_schedule()"
            )
        change["clock_unit"] = unit
        self._check_owned()
        for place, group in enumerate(self.param_groups):
            for option in self._options.scheduled:
                name = option.name
                schedule, start = group[f"{name}_schedule"], group[f"{name}_start"]
                if schedule is None:
                    continue
                if start > (reached := getattr(clock, clock_of(schedule))):
                    raise ValueError(
                        f"{name_of_clock(schedule)} must be >= {start}, where the {name} schedule of "
                        f"parameter group {place} begins, got {reached}; first put a schedule in place with "
                        'set_schedule(..., start="zero")'
                    )
        self._change([dict(change) for _ in self.param_groups])

    def keep_devices(self) -> Callable[[], None]:
        """For code that puts ``param_groups`` and ``state`` back as they were: what to call afterwards.

        The clock is kept on CUDA devices as well; and native code keeps whether the last step was skipped.
        """
        self.sync()
        skipped = self._plan.skipped

        def put_back() -> None:
            self._push(self.param_groups)
            self._plan.skipped = skipped

        return put_back

    def advance_samples(self, samples: int) -> None:
        """Moves the samples clock, after a step, by the samples that the step consumed.

        To be called for skipped steps too: the samples are gone either way. Only schedules with
        ``unit="sample"`` follow this clock.

        Args:
            samples: >= 0.

        Raises:
            RuntimeError: something else wrote a value that a schedule owns, or tokens or epochs are counted.
        """
        self._advance("sample", count("samples", samples, 0))

    def advance_tokens(self, tokens: int) -> None:
        """Moves the tokens clock, as :meth:`advance_samples` does that of samples.

        An optimizer counts samples, tokens or epochs: what its schedules have as ``unit``, or where none of
        them does what it is told first.

        Args:
            tokens: that the step consumed, over all ranks; >= 0.

        Raises:
            RuntimeError: something else wrote a value that a schedule owns, or samples or epochs are counted.

        >>> import fastlr, torch
        >>> opt = fastlr.FusedAdamW([torch.zeros(2)], lr=fastlr.LinearRamp(0.0, 1.0, 4096, unit="token"))
        >>> opt.step()
        >>> opt.advance_tokens(2048)
        >>> opt.clock(), opt.param_groups[0]["lr"]
        (TokenClock(updates=1, tokens=2048), 0.5)
        """
        self._advance("token", count("tokens", tokens, 0))

    def advance_epoch(self) -> None:
        """Moves the epochs clock by one: stands where ``scheduler.step()`` stood once an epoch.

        Only schedules with ``unit="epoch"`` follow this clock. How many updates an epoch had, and how many
        of them were skipped, is all the same to it. See :meth:`advance_tokens` for what an optimizer counts.

        Raises:
            RuntimeError: something else wrote a value that a schedule owns, or samples or tokens are counted.

        >>> import fastlr, torch
        >>> schedule = fastlr.StepDecay(0.1, every=30, gamma=0.5, unit="epoch")
        >>> opt = fastlr.FusedSGD([torch.zeros(2)], lr=schedule)
        >>> for epoch in range(30):
        ...     opt.step()
        ...     opt.step()
        ...     opt.advance_epoch()
        >>> opt.clock(), opt.param_groups[0]["lr"]
        (EpochClock(updates=60, epochs=30), 0.05)
        """
        self._advance("epoch", 1)

    def _advance(self, unit: str, number: int) -> None:
        remedy = f"steps alone can move the {unit}s clock there, as those of a bound GrowingLoader do"
        if unit == "epoch":
            remedy = "let its schedules count updates, by schedule.in_updates(updates_per_epoch)"
        self._check_outside_zero(TELLS[unit], remedy)
        if self.param_groups[0]["clock_unit"] != unit:
            self._count(unit)
        written = None
        try:
            self._plan.advance_samples(self.param_groups, number)
        except ValueError:
            if not (written := self._written()):  # as in a step
                raise
        if written is not None:
            self._adopt(written)
            self._plan.advance_samples(self.param_groups, number)
        if self._buffer_averages is not None:
            self._buffer_averages.advance_samples(number)

    def _count(self, unit: str) -> None:
        """Has the second clock count this, which it has not yet; NOTE: [what the second clock counts]."""
        before = self._sync().samples
        counts = self.param_groups[0]["clock_unit"]
        if counts == unit:
            return  # as schedules do that were written into the groups
        if before or self._options.counted(self._in_charge()) is not None:
            raise RuntimeError(
                f"the optimizer counts {counts}s, and stands at {before:,}, so that it cannot count "
                f"{unit}s; tell it {counts}s with {TELLS[counts]}"
            )
        self._change([{"clock_unit": unit} for _ in self.param_groups])

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last :meth:`step` changed nothing: GradScaler, or the norm, found an inf or NaN.

        Asks the device as :meth:`sync` does.
        """
        self.sync()
        return self._plan.skipped

    # -- the step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient, then moves the clock and the schedules.

        Everything is checked before the first byte is written. After an error or Ctrl-C nothing has changed,
        or everything has (of parameters on several CUDA devices, those of some may have). A step in which
        no parameter has a gradient counts as applied.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a hyperparameter is out of range, or a tensor cannot be updated; the message
                names it.
            RuntimeError: something else wrote a value that a schedule owns, or another thread is in a step of
                this optimizer.
        """
        if torch.compiler.is_compiling():
            return self._uncompiled_step(closure)
        try:
            return self._step_once(closure)
        except BaseException:
            # GradScaler takes these back only after a step that returns, and multiplies what is left into
            # the next scale.
            for name in ("grad_scale", "found_inf", "_seeks_inf_for"):
                self.__dict__.pop(name, None)
            self._samples_of_step = 0
            raise

    step.hooked = True  # type: ignore[attr-defined]  # tells PyTorch not to wrap it
    # No native code can be traced: a graph breaks here.
    _uncompiled_step: Callable[..., float | None] = torch._disable_dynamo(step)  # type: ignore[attr-defined]

    def _step_once(self, closure: Callable[[], float] | None) -> float | None:
        if not self.state and self._only_initializes_state():
            return None
        # PyTorch's wrapper around step (hooks, profiler label) costs as much as a small step itself, so
        # it is entered only where somebody listens. A subclass with a step of its own is wrapped already.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ) and type(self).step is FusedOptimizer.step:
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.param_groups[0]["fresh"]:
            self._drop_initialized_state()
        samples, self._samples_of_step = self._samples_of_step, 0
        sought = self.__dict__.pop("_seeks_inf_for", None)
        buffers = self._buffer_averages
        if buffers is not None:
            buffers.find()
        if self._parts is ZERO:
            self._take_up_loaded()
        given = (
            self.param_groups,
            self.state,
            getattr(self, "found_inf", None) if sought is None else sought,
            getattr(self, "grad_scale", None),
            sought is not None,
            torch.get_num_threads(),
            self._measures_grad_norm,
            math.inf if self._max_grad_norm is None else self._max_grad_norm,
            self._raises_nonfinite,
            samples,
        )
        written = None
        try:
            self._plan.step(*given)
        except ValueError:
            # A schedule that was written where a number stood is found by reading the groups, before all
            # else. So plain steps need not look for any.
            if not (written := self._written()):
                raise
        if written is not None:
            self._adopt(written)
            self._plan.step(*given)
        if buffers is not None:
            buffers.step(self._plan, self.param_groups[0], samples)
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    # torch.distributed.checkpoint makes an optimizer create its state, which a checkpoint is then read
    # into, by a step with lr 0 and zero gradients while the state is empty. That is not an update: the
    # buffers are created as zeros, marked as fresh, and dropped again before the first real update,
    # so that neither weights nor clock move, no hook runs and the first update is a first update. A
    # training step may look the same (a warm-up from 0, a model whose gradients are still zero), so it
    # is recognised by who calls: a function of this name, in whatever module a copy of it stands.
    _INITIALIZES_STATE = "_init_optim_state"

    def _only_initializes_state(self) -> bool:
        if any(group["lr"] != 0.0 for group in self.param_groups):
            return False  # the function sets it to 0; this spares other steps the walk up the stack
        if not is_called_by(self._INITIALIZES_STATE):
            return False
        for group in self.param_groups:
            group["fresh"] = True
            for p in group["params"]:
                if p.grad is not None and (state := self._rule_state.new(p, group)):
                    self.state[p] = state
        if self._buffer_averages is not None:
            self._buffer_averages.begin(self.param_groups[0])
        return True

    def _take_up_loaded(self) -> None:
        """Makes what ZeroRedundancyOptimizer has put here, as it stands in a file, what a step takes."""
        self._rule_state.bring_home(self.state)
        for group in self.param_groups:
            for option in self._options.scheduled:
                if isinstance(owner := group[f"{option.name}_schedule"], dict):
                    group[f"{option.name}_schedule"] = Schedule.from_dict(owner)
            group |= _live_dtypes(group)

    def _drop_initialized_state(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state.pop(p, None)
        self.param_groups[0].pop(EMA_BUFFERS, None)
        if self._buffer_averages is not None:
            self._buffer_averages.forget()
        # Last, and the one that is asked at the very end: what Ctrl-C leaves over the next step drops.
        for group in reversed(self.param_groups):
            group["fresh"] = False

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As that of torch's optimizer, plus schedules and clocks; numbers, strings, dicts and tensors only.

        Waits for CUDA devices, as :meth:`sync`.
        """
        self.sync()
        _remove_hook(self._optimizer_state_dict_post_hooks, self._pack)
        try:
            self.register_state_dict_post_hook(self._pack, prepend=True)
            return super().state_dict()
        finally:
            _remove_hook(self._optimizer_state_dict_post_hooks, self._pack)

    def _pack(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        own_groups = self._in_charge()
        if own_groups is self.param_groups and self._parts is not ZERO:
            # What a schedule owns it says in a file, whoever has written another number just now.
            own_groups = [dict(group) for group in own_groups]
            self._plan.publish(own_groups)
        if own_groups is not self.param_groups:
            for group, own in zip(state_dict["param_groups"], own_groups, strict=True):
                group.update({key: value for key, value in own.items() if key != "params"})
        pack(own_groups, self._options, self._rule_state, state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict`, or that of torch's optimizer, returned. State is copied, once a CUDA
        graph has captured the step into the tensors that there are, so that it goes on from what was loaded.

        A file of fastlr brings back what was saved: schedules, fixed values, clocks. A file of another
        optimizer knows no schedules and no clock; there the optimizer keeps its own. What a schedule owns
        is computed anew. State is converted to the type that its group keeps it in.

        A schedule that goes on beside a file without a clock does so where this optimizer stands, which a
        warning says; :meth:`set_clock` tells how far the file's run was. torch's optimizers keep a clock that
        they do not know, so that after updates of theirs it has to be told too.

        torch.distributed.checkpoint asks a file for every key that the groups of this optimizer have. What of
        these a file of another optimizer, or of version 0.1, has not comes from this one's own
        ``get_optimizer_state_dict(model, optimizer, ...)``: read the file into that with
        ``DefaultLoadPlanner(allow_partial_load=True)``, or, where both are flattened, pass
        ``{**own, **file}`` to ``set_optimizer_state_dict``. What this optimizer does not keep, as averages
        and masters, it does not read, which a warning says: make it with the options that the file has.

        Raises:
            ValueError: the file is damaged, or the groups differ in number or size, or state in shape.
                Nothing has changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        self._check_outside_zero("load_state_dict()", "load the consolidated state into that")
        self._plan.refuse_capture("load_state_dict()")
        _remove_hook(self._optimizer_load_state_dict_pre_hooks, self._unpack)
        try:
            self.register_load_state_dict_pre_hook(self._unpack)
            super().load_state_dict(state_dict)
        finally:
            loaded = self.__dict__.pop("_loaded", None)
            _remove_hook(self._optimizer_load_state_dict_pre_hooks, self._unpack)
        if loaded is not None and loaded.clockless:
            warnings.warn(
                f"the file has no clock, as it is another optimizer's: {'; '.join(loaded.clockless)}. "
                "If its run was elsewhere, say how far: optimizer.set_clock(updates=..., "
                f"{self.param_groups[0]['clock_unit']}s=...).",
                UserWarning,
                stacklevel=2,
            )
        if loaded is not None and loaded.overruled:
            warnings.warn(
                f"the file was changed, and what a schedule owns it says: {'; '.join(loaded.overruled)}. "
                "set_schedule(lr=...) takes such a value back; where torch's optimizer has gone on with the "
                "file, set_clock(updates=...) tells how far.",
                UserWarning,
                stacklevel=2,
            )
        if loaded is not None and loaded.left_out:
            warnings.warn(
                "the file brings options of which no state was read, so that it begins with the next update: "
                f"{', '.join(loaded.left_out)}. Where the file has it, torch.distributed.checkpoint has read "
                "only what this optimizer keeps: make it with the file's options, and load once more.",
                UserWarning,
                stacklevel=2,
            )

    def _unpack(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        self.__dict__.pop("_loaded", None)
        loaded = unpack(
            self._in_charge(), self._plan, self._options, self._rule_state, self._from_file, state_dict
        )
        if loaded is None:
            return None
        if self._buffer_averages is not None:
            self._buffer_averages.check(loaded.state_dict["param_groups"][0])
        self._loaded = loaded
        return loaded.state_dict

    def __getstate__(self) -> dict[str, Any]:
        self.sync()
        return {**super().__getstate__(), "param_groups": self._in_charge(), **self._norm_settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_plan" not in self.__dict__:  # unpickled or copied; else a state_dict is being loaded
            super().__setstate__(state)
            self._make_plan()
            for group in self.param_groups:
                self._complete(group)
            return
        loaded = dict(self._loaded.states) if "_loaded" in self.__dict__ else {}
        groups = state["param_groups"]
        if self._set_aside is not None:
            state["_set_aside"] = [self._owners(group) for group in groups]
            for group in groups:
                group.update(self._nobody())
        self._push(groups)  # first, as a captured graph may refuse them
        if self._plan.captured():  # it goes on with its own state, also with what the file has nothing for
            for group in groups:
                for p in group["params"]:
                    if p in self.state:
                        loaded[p] = self._rule_state.into(p, self.state[p], loaded.get(p, {}), group)
        for p, entry in loaded.items():
            state["state"].setdefault(p, {}).update(entry)
        if self._buffer_averages is not None:
            self._buffer_averages.load(groups[0], in_place=self._plan.captured())
        super().__setstate__(state)  # at once: Ctrl-C finds what was there before or all that is new


def _live_dtypes(group: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Those that a file has by name."""
    return {name: torch.float32 for name in STATE_DTYPES if group[name] == "float32"}


def _remove_hook(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    """By what it calls: also one that an earlier call left there, as Ctrl-C stopped it."""
    for key in [key for key, registered in hooks.items() if registered == hook]:
        del hooks[key]

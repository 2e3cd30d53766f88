"""What all fused optimizers share: clocks, schedules in parameter groups, step and checkpoint."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from torch.autograd.graph import increment_version
from torch.optim import optimizer as torch_optimizer

from fastlr import _core
from fastlr._checks import flag
from fastlr.optim._runtime import Runtime
from fastlr.schedules import Schedule

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]

# Hyperparameters that a schedule can drive. For each, a group holds the value that the next step uses
# under its name, its owner under "<name>_schedule" (a Schedule or None), and the clock at which the
# schedule's zero lies under "<name>_start".
_SCHEDULED = ("lr", "momentum")


class Clock(NamedTuple):
    """Where an optimizer stands.

    Attributes:
        updates: updates that were applied; a step that GradScaler made it skip does not count.
        samples: samples consumed, as told by :meth:`FusedOptimizer.advance_samples`.
    """

    updates: int
    samples: int


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers; use :class:`fastlr.FusedSGD` or :class:`fastlr.FusedCyclicSGD`."""

    # GradScaler then calls step() on every iteration and hands over what it knows as two attributes,
    # `grad_scale` and `found_inf`, which it deletes again: they must not exist on the class.
    _step_supports_amp_scaling = True

    _last_step_skipped = False
    _measures_grad_norm = False
    _loaded_momenta: dict[torch.Tensor, torch.Tensor]

    # NOTE: [what a checkpoint holds]
    # Clocks and schedules live in param_groups, so that state_dict, deepcopy, pickle and the helpers of
    # torch.distributed.checkpoint (which keep nothing but state and param_groups) carry them. In a
    # state_dict a schedule is a plain dict. A buffer's type is `momentum_dtype` of its group.

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        for name in _SCHEDULED:
            defaults |= {f"{name}_schedule": None, f"{name}_start": 0}
        defaults |= {"updates": 0, "samples": 0, "fresh": False}
        self._plan = self._new_plan()
        super().__init__(params, defaults)

    def _new_plan(self) -> _core.SgdPlan:
        """The native step of this optimizer's rule."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any], where: str) -> None:
        """Raises ValueError for a hyperparameter of a group that is out of range."""
        raise NotImplementedError

    # -- groups and schedules --------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its schedules begin at their zero now.

        Args:
            param_group: ``{"params": ..., "lr": number or schedule, ...}``; what it does not say is
                taken from the optimizer's arguments.

        Raises:
            ValueError: a hyperparameter is out of range, or a schedule counts epochs.
        """
        if isinstance(param_group, dict):
            index = len(self.param_groups)
            clock = self.sync() if self.param_groups else Clock(0, 0)
            filled = {**self.defaults, **param_group, "updates": clock.updates}
            filled |= {"samples": clock.samples, "fresh": False}
            for name in _SCHEDULED:
                owner = filled[f"{name}_schedule"]  # a group of another optimizer brings its own
                filled |= self._hyperparameter(name, filled[name] if owner is None else owner, clock, index)
            self._check_group(filled, f" of parameter group {index}")
            param_group.update({key: value for key, value in filled.items() if key != "params"})
        super().add_param_group(param_group)

    def _hyperparameter(self, name: str, value: object, start: Clock, group: int) -> dict[str, Any]:
        """A group's entries for a hyperparameter that is a number, or a schedule with its zero."""
        where = f"{name} of parameter group {group}"
        if not isinstance(value, Schedule):
            if isinstance(value, torch.Tensor) or not isinstance(value, (int, float, np.number)):
                remedy = "; pass its .item()" if isinstance(value, torch.Tensor) else ""
                if hasattr(value, "triangular2"):  # a range test's result
                    reason = getattr(value, "reason", None)
                    remedy = f", which gives no bounds: {reason}" if reason else "; pass its triangular2(...)"
                raise TypeError(
                    f"{where} must be a number or a fastlr schedule, got {type(value).__name__}{remedy}"
                )
            return {name: float(value), f"{name}_schedule": None, f"{name}_start": 0}
        if value.unit == "epoch":
            raise ValueError(
                f"{where} counts epochs, which an optimizer cannot see; convert it with "
                "schedule.in_updates(updates_per_epoch)"
            )
        if name == "momentum" and not value.peak < 1.0:
            raise ValueError(f"{where} must stay in [0, 1), but its schedule peaks at {value.peak!r}")
        zero = start.samples if value.unit == "sample" else start.updates
        return {name: value._native.value(0), f"{name}_schedule": value, f"{name}_start": zero}

    def set_schedule(
        self,
        lr: float | Schedule | None = None,
        *,
        momentum: float | Schedule | None = None,
        group: int | None = None,
        start: Literal["now", "zero"] = "now",
    ) -> None:
        """Puts a schedule, or a plain number, in charge of the learning rate or the momentum.

        Args:
            lr: a schedule, or a number, which takes the rate back from a schedule; None: unchanged.
            momentum: the same for the momentum.
            group: index of one parameter group; None: all.
            start: ``"now"``: the schedule's zero is the present clock; ``"zero"``: its zero is the
                clock's, so that it continues in the middle.

        Raises:
            ValueError: a value is out of range, a schedule counts epochs, or there is no such group.
        """
        if start not in ("now", "zero"):
            raise ValueError(f'start must be "now" or "zero", got {start!r}')
        if group is not None and not 0 <= group < len(self.param_groups):
            raise ValueError(f"group must be in 0 .. {len(self.param_groups) - 1}, got {group}")
        indices = range(len(self.param_groups)) if group is None else (group,)
        now = self.sync()
        origin = now if start == "now" else Clock(0, 0)
        changes = []
        for index in indices:
            change: dict[str, Any] = {}
            for name, value in (("lr", lr), ("momentum", momentum)):
                if value is not None:
                    change |= self._hyperparameter(name, value, origin, index)
            self._check_group({**self.param_groups[index], **change}, f" of parameter group {index}")
            changes.append(change)
        for index, change in zip(indices, changes, strict=True):
            self.param_groups[index].update(change)
        _core.advance(self.param_groups, 0, 0)
        self._plan.push(self.param_groups)

    # -- clocks ----------------------------------------------------------------------------------

    def clock(self) -> Clock:
        """Updates applied and samples consumed so far, as the host counts them.

        On CUDA devices the host does not see which updates a GradScaler made the device skip, nor
        replays of a graph; :meth:`sync` asks the device.
        """
        return Clock(self.param_groups[0]["updates"], self.param_groups[0]["samples"])

    def sync(self) -> Clock:
        """Brings the host's clock and rates up to date with the devices', and returns the clock.

        Waits for CUDA devices; on the CPU the two are always the same. What could not be said during
        steps is said here: that a schedule has ended, and that a ``grad_scale`` was out of range.

        Raises:
            ValueError: a ``grad_scale`` had no inverse in float32, so that updates were skipped.
            RuntimeError: called while a CUDA graph is captured, or devices disagree.
        """
        skipped = self._plan.sync(self.param_groups)
        if skipped is not None:
            self._last_step_skipped = skipped
        return self.clock()

    def keep_devices(self) -> Callable[[], None]:
        """For code that puts ``param_groups`` and ``state`` back as they were: what to call afterwards.

        The clock, and which momentum buffers hold nothing yet, are kept on CUDA devices as well.
        """
        self.sync()
        empty = self._plan.uninitialized()

        def put_back() -> None:
            self._plan.loaded(empty)
            self._plan.push(self.param_groups)

        return put_back

    def advance_samples(self, samples: int) -> None:
        """Moves the samples clock, after a step, by the samples that the step consumed.

        To be called for skipped steps too: the samples are gone either way. Only schedules with
        ``unit="sample"`` follow this clock.

        Args:
            samples: >= 0.
        """
        count = operator.index(samples)
        if count < 0:
            raise ValueError(f"samples must be >= 0, got {samples!r}")
        self._plan.advance_samples(self.param_groups, count)

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last :meth:`step` changed nothing because GradScaler found an inf or NaN.

        Asks the device as :meth:`sync` does.
        """
        self.sync()
        return self._last_step_skipped

    # -- the gradients' norm ---------------------------------------------------------------------

    @property
    def measure_grad_norm(self) -> bool:
        """Whether :meth:`step` measures the norm of the gradients that it reads, for ``last_grad_norm``.

        False unless set. A CUDA graph measures on each replay if it was captured with it.
        """
        return self._measures_grad_norm

    @measure_grad_norm.setter
    def measure_grad_norm(self, measure: bool) -> None:
        self._measures_grad_norm = flag("measure_grad_norm", measure)

    @property
    def last_grad_norm(self) -> float | None:
        """The 2-norm of all gradients of the last :meth:`step`, as one vector; None if not measured.

        It is that of ``p.grad`` without GradScaler's scale, before weight decay; NaN where the update was
        skipped. The squares are added up in float64 in the pass that reads the gradients for the update,
        in one order whatever the device, threads and types; of parameters on several devices, each device
        adds up its own. Waits for CUDA devices.

        >>> import fastlr, torch
        >>> p = torch.zeros(2, requires_grad=True)
        >>> opt = fastlr.FusedSGD([p], lr=0.1)
        >>> opt.measure_grad_norm = True
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> opt.step()
        >>> opt.last_grad_norm
        5.0
        """
        squares = self._plan.squared_norm()
        return None if squares is None else math.sqrt(squares)

    # -- the step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient, then moves the clock and the schedules.

        Everything is checked before the first byte is written. A step in which no parameter has a
        gradient counts as applied.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a hyperparameter is out of range, or a tensor cannot be updated; the message
                names it.
            RuntimeError: something else wrote a value that a schedule owns.
        """
        if torch.compiler.is_compiling():
            return self._uncompiled_step(closure)
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

    step.hooked = True  # type: ignore[attr-defined]  # tells PyTorch not to wrap it

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        try:
            return self._apply(closure)
        except BaseException:
            # GradScaler takes these back only after a step that returns, and multiplies what is left into
            # the next scale.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    def _apply(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.param_groups[0]["fresh"]:
            self._drop_initialized_state()
        updated = self._plan.step(
            self.param_groups,
            self.state,
            getattr(self, "found_inf", None),
            getattr(self, "grad_scale", None),
            torch.get_num_threads(),
            self._measures_grad_norm,
        )
        self._last_step_skipped = updated is None
        if updated is not None:
            increment_version(updated)  # so that a backward through an overwritten parameter raises
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)
    _uncompiled_step = torch._disable_dynamo(  # type: ignore[attr-defined]
        _observed_step  # native code cannot be traced
    )

    # torch.distributed.checkpoint makes an optimizer create its state, which a checkpoint is then read
    # into, by a step with lr 0 and zero gradients while the state is empty. That is not an update: the
    # buffers are created as zeros, marked as fresh, and dropped again before the first real update,
    # so that neither weights nor clock move, no hook runs and the first update is a first update. A
    # training step may look the same (a warm-up from 0, a model whose gradients are still zero), so it
    # is recognised by who calls: a function of this name, which other libraries have copied.
    _INITIALIZES_STATE = "_init_optim_state"

    def _only_initializes_state(self) -> bool:
        if any(group["lr"] != 0.0 for group in self.param_groups):
            return False  # the function sets it to 0; this spares other steps the walk up the stack
        frame = sys._getframe(1).f_back
        while frame is not None and frame.f_code.co_name != self._INITIALIZES_STATE:
            frame = frame.f_back
        if frame is None:
            return False
        for group in self.param_groups:
            group["fresh"] = True
            for p in group["params"]:
                if p.grad is not None and group["momentum"] != 0.0:
                    self.state[p]["momentum_buffer"] = Runtime.new_momentum(p, group).zero_()
        return True

    def _drop_initialized_state(self) -> None:
        for group in self.param_groups:
            group["fresh"] = False
            for p in group["params"]:
                self.state.pop(p, None)

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.SGD``'s, plus schedules and clocks; numbers, strings, dicts and tensors only.

        Waits for CUDA devices, as :meth:`sync`.
        """
        self.sync()
        handle = self.register_state_dict_post_hook(_pack, prepend=True)  # type: ignore[arg-type]
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict`, or ``torch.optim.SGD``'s, returned. Buffers are copied, into those
        that there are, so that a captured CUDA graph goes on from what was loaded.

        A file of fastlr brings back what was saved: schedules, fixed values, clocks. A file of another
        optimizer knows no schedules and no clock; there the optimizer keeps its own. What a schedule owns
        is computed anew. Buffers are converted to the type that their group keeps momentum in.

        Raises:
            ValueError: the groups differ in number or size, or a buffer in shape.
        """
        handle = self.register_load_state_dict_pre_hook(_unpack)  # type: ignore[arg-type]
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loaded_momenta", None)

    def __getstate__(self) -> dict[str, Any]:
        self.sync()
        state = self.state.copy()
        for p in self._plan.uninitialized():
            _drop_momentum(state, p)
        return {**super().__getstate__(), "state": state, "_measures_grad_norm": self._measures_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = self.__dict__.get("state", {})
        super().__setstate__(state)
        if "_plan" not in self.__dict__:  # unpickled or copied; else a state_dict is being loaded
            self._plan = self._new_plan()
            return
        loaded = self.__dict__.get("_loaded_momenta", {})
        empty = []
        if self._plan.captured():
            # The graph goes on with its own buffers, also with those that the file has nothing for.
            for p, entry in own.items():
                buffer = entry.get("momentum_buffer")
                if buffer is not None and p not in loaded:
                    empty.append(p)
                    loaded[p] = buffer
                elif buffer is not None and _same_layout(buffer, loaded[p]):
                    loaded[p] = buffer.copy_(loaded[p])
        for p, buffer in loaded.items():
            self.state[p]["momentum_buffer"] = buffer
        self._plan.loaded(empty)
        self._plan.push(self.param_groups)


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


def _drop_momentum(state: dict[Any, dict[str, Any]], key: object) -> None:
    """Takes a momentum buffer out of a copied state, whose inner dicts are still the original's."""
    entry = {name: value for name, value in state.pop(key, {}).items() if name != "momentum_buffer"}
    if entry:
        state[key] = entry


def _pack(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Makes a state_dict of plain values, without buffers that hold nothing yet."""
    empty = set(optimizer._plan.uninitialized())
    for own, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, key in zip(own["params"], group["params"], strict=True):
            if p in empty:
                _drop_momentum(state_dict["state"], key)
        for key, value in group.items():
            if isinstance(value, Schedule):
                group[key] = value.to_dict()
            elif isinstance(value, torch.dtype):
                group[key] = str(value).removeprefix("torch.")


def _unpack(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A state_dict whose groups are complete and live again; sets its momenta aside.

    PyTorch would cast the momenta to their parameters' type, which loses what float32 momenta hold.
    """
    own_groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (own_groups, saved_groups)]
    if sizes[0] != sizes[1]:
        return None  # PyTorch raises next

    groups: list[dict[str, Any]] = []
    momenta: dict[torch.Tensor, torch.Tensor] = {}
    state = {
        key: dict(entry) if isinstance(entry, dict) else entry for key, entry in state_dict["state"].items()
    }
    for own, saved in zip(own_groups, saved_groups, strict=True):
        group = {**own, "fresh": False, **saved}
        for name in _SCHEDULED:
            if f"{name}_schedule" not in saved:
                schedule = own[f"{name}_schedule"]
                clock = group["samples" if schedule is not None and schedule.unit == "sample" else "updates"]
                group[f"{name}_start"] = min(own[f"{name}_start"], clock)
            elif (owner := saved[f"{name}_schedule"]) is not None:
                group[f"{name}_schedule"] = Schedule.from_dict(owner)
            group[name] = float(group[name])  # a torch optimizer's may be a tensor
        if group["momentum_dtype"] == "float32":
            group["momentum_dtype"] = torch.float32
        optimizer._check_group(group, f" of the file's parameter group {len(groups)}")
        groups.append(group)
        for key, parameter in zip(saved["params"], own["params"], strict=True):
            buffer = state[key].pop("momentum_buffer", None) if key in state else None
            if buffer is None:
                if key in state and not state[key]:
                    del state[key]
                continue
            if buffer.shape != parameter.shape or buffer.is_complex() != parameter.is_complex():
                raise ValueError(
                    f"the file's momentum_buffer {key} has shape {tuple(buffer.shape)} and "
                    f"{buffer.dtype}, its parameter {tuple(parameter.shape)} and {parameter.dtype}"
                )
            momenta[parameter] = Runtime.new_momentum(parameter, group).copy_(buffer)
    _core.advance(groups, 0, 0)  # what schedules own follows from the clock, not from the file
    optimizer._loaded_momenta = momenta
    return {**state_dict, "state": state, "param_groups": groups}

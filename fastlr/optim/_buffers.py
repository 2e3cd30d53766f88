"""Averages of a model's buffers, which move with the averages of its parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from fastlr import _core
from fastlr._runtime import Runtime
from fastlr.optim._state import same_layout

EMA = "ema"  # in a parameter's state
EMA_BUFFERS = "ema_buffers"  # in the first parameter group: averages of buffers, by the buffers' names

# NOTE: [averages of buffers]
# They have a native step of their own, which follows each step of the optimizer: SGD with a rate of 0 and
# gradients of 0, over views of the buffers. It writes these as they are and moves their averages, by the
# arithmetic, clocks and schedules of every step. Updates that the host knows to be skipped it leaves out; of
# others, what skipped them on the device skips it there as well, in CUDA graphs too.
# Averages and what moves them belong to the first parameter group, so that whatever carries parameter groups
# (NOTE: [what a checkpoint holds]) carries them. State under a name would not do:
# torch.distributed.checkpoint knows parameters alone as its keys.
RULE = "sgd"

# What of the first parameter group the step's own has.
_FOLLOWED = ("ema_decay", "ema_decay_schedule", "ema_decay_start", "ema_warmup", "ema_dtype")
_CLOCK = ("updates", "samples")

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


class Named(dict[str, torch.Tensor]):
    """Averages by name, in few words where a parameter group is printed."""

    def __repr__(self) -> str:
        return f"{{{len(self)} averages}}"


class BufferAverages:
    """The averages of a model's buffers, as NOTE: [averages of buffers] has it.

    Args:
        model: whose buffers they are.
        plan: a native step of :data:`RULE`.
        group: the optimizer's first, with averages that a file brought, or without.
    """

    def __init__(self, model: torch.nn.Module, plan: _core.Plan, group: dict[str, Any]) -> None:
        self._plan = plan
        kept = model.state_dict()
        self._places = [
            (name, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, buffer in model.named_buffers()
            if name in kept and _can_be_averaged(buffer)
        ]
        self._averages = Named()
        self._views: list[torch.Tensor] = []  # without the buffers' version counters
        self._seen: list[torch.Tensor] = []  # the buffers that they are of
        self._state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        options: dict[str, Any] = {}
        for option in plan.options():
            options[option.name] = None if option.may_be_none else False if option.flag else 0.0
            if option.scheduled:
                options |= {f"{option.name}_schedule": None, f"{option.name}_start": 0}
        self._groups = [{**options, "state_dtype": None, "params": self._views}]
        self._follow(group)
        self.check(group)
        self.find()
        self.load(group, in_place=False)

    # -- the buffers -----------------------------------------------------------------------------

    def _buffers(self) -> list[torch.Tensor]:
        return [module._buffers[key] for _, module, key in self._places]  # type: ignore[misc]

    def averaged(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each buffer that has an average, with it."""
        named = zip(self._places, self._buffers(), strict=True)
        return [(buffer, self._averages[name]) for (name, _, _), buffer in named if name in self._averages]

    def find(self) -> None:
        """Looks where the buffers are, which modules replace as they like."""
        buffers = self._buffers()
        for (name, _, _), buffer in zip(self._places, buffers, strict=True):
            if buffer is None or not _can_be_averaged(buffer):
                what = "None" if buffer is None else f"one of {buffer.dtype} with strides {buffer.stride()}"
                raise ValueError(
                    f"the buffer {name} has become {what}, which has no average; call average_buffers(model) "
                    "again"
                )
        moved = [
            place
            for place, buffer in enumerate(buffers)
            if not self._views
            or buffer is not self._seen[place]
            or buffer.data_ptr() != self._views[place].data_ptr()
        ]
        if not moved:
            return
        self._plan.refuse_capture("averaging a buffer that has moved")
        views = list(self._views) or [buffer.data for buffer in buffers]
        for place in moved:
            view = views[place] = buffers[place].data
            view.grad = torch.zeros_like(view)
        averages = Named()
        for (name, _, _), view in zip(self._places, views, strict=True):
            if name in self._averages:
                averages[name] = self._fitted(name, self._averages[name], view)
        self._views[:] = views
        self._seen = buffers
        self._keep(averages)

    def _fitted(self, name: str, average: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """An average as its buffer, which may have become another, takes it."""
        _check_shape(name, average, view)
        new = Runtime.new_average(view, self._groups[0]["ema_dtype"])
        return average if same_layout(average, new) else new.copy_(average)

    def _keep(self, averages: Named) -> None:
        self._averages.clear()
        self._averages.update(averages)
        self._attach()

    def _attach(self) -> None:
        self._state.clear()
        for (name, _, _), view in zip(self._places, self._views, strict=True):
            if name in self._averages:
                self._state[view] = {EMA: self._averages[name]}

    # -- the step --------------------------------------------------------------------------------

    def begin(self, group: dict[str, Any]) -> None:
        """Makes the averages that there are none of yet what their buffers are."""
        if len(self._averages) == len(self._places) or group["ema_decay"] is None:
            return
        averages = Named(self._averages)
        for (name, _, _), view in zip(self._places, self._views, strict=True):
            if name not in averages:
                averages[name] = Runtime.new_average(view, group["ema_dtype"]).copy_(view)
        self._keep(averages)
        group[EMA_BUFFERS] = self._averages

    def step(self, optimizer: _core.Plan, group: dict[str, Any], samples: int) -> None:
        """Moves the averages, after a step of the optimizer.

        Args:
            optimizer: its native step.
            group: its first.
            samples: that the step consumed.
        """
        self.begin(group)
        if not self._places:
            return
        own = self._groups[0]
        if own["ema_decay_schedule"] is None:
            own["ema_decay"] = group["ema_decay"]
        own["ema_warmup"] = group["ema_warmup"]
        if optimizer.skipped:
            self.advance_samples(samples)
            return
        self._plan.step(
            self._groups,
            self._state,
            optimizer.skipped_on_device(),
            None,
            False,
            torch.get_num_threads(),
            False,
            math.inf,
            False,
            samples,
        )

    # -- the clock -------------------------------------------------------------------------------

    def _follow(self, group: dict[str, Any]) -> None:
        self._groups[0].update({name: group[name] for name in (*_FOLLOWED, *_CLOCK)})

    def advance_samples(self, samples: int) -> None:
        if samples != 0:
            self._plan.advance_samples(self._groups, samples)

    def push(self, group: dict[str, Any]) -> None:
        """Takes over what has been written into the optimizer's first group, and tells devices."""
        self._follow(group)
        self._plan.push(self._groups)

    def sync(self, group: dict[str, Any]) -> None:
        """Follows the optimizer's clock, which is exact now."""
        self._plan.sync(self._groups)
        if any(self._groups[0][name] != group[name] for name in _CLOCK):  # Ctrl-C came in between
            self.push(group)

    # -- checkpoints -----------------------------------------------------------------------------

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for a file's averages that are not of these buffers."""
        buffers = {name: module._buffers[key] for name, module, key in self._places}
        for name, average in group.get(EMA_BUFFERS, {}).items():
            if name not in buffers:
                raise ValueError(
                    f"there is an average of the buffer {name}, which the model given to average_buffers() "
                    f"does not have; its buffers are {', '.join(buffers) or 'none'}"
                )
            _check_shape(name, average, buffers[name])

    def load(self, group: dict[str, Any], *, in_place: bool) -> None:
        """Takes the averages that a group brings; those that it has not begin anew.

        Args:
            group: a first one, whose averages become copies.
            in_place: they go into the tensors that there are, for CUDA graphs that know their addresses.
        """
        found = group.get(EMA_BUFFERS, {})
        averages = Named()
        for (name, _, _), view in zip(self._places, self._views, strict=True):
            there = self._averages[name] if in_place and name in self._averages else None
            if there is None and name not in found:
                continue
            if there is None:
                there = Runtime.new_average(view, group["ema_dtype"])
            averages[name] = there.copy_(found.get(name, view))
        self._averages = averages  # another dict: a group that is in use keeps its own
        self._attach()
        if averages:
            group[EMA_BUFFERS] = averages
        else:
            group.pop(EMA_BUFFERS, None)

    def forget(self) -> None:
        self._keep(Named())


def _can_be_averaged(buffer: torch.Tensor) -> bool:
    # Expanded, its elements share memory.
    return buffer.dtype in _TYPES and buffer.layout is torch.strided and 0 not in buffer.stride()


def checked_averages(group: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """A file's averages of buffers."""
    found = group.get(EMA_BUFFERS, {})
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{EMA_BUFFERS}{where} must be a dict of tensors, got {type(found).__name__}")
    return found


def _check_shape(name: str, average: torch.Tensor, buffer: Any) -> None:
    if average.shape != buffer.shape or average.is_complex() != buffer.is_complex():
        raise ValueError(
            f"the average of the buffer {name} has shape {tuple(average.shape)} and {average.dtype}, "
            f"the buffer {tuple(buffer.shape)} and {buffer.dtype}"
        )

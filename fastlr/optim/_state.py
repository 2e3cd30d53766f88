"""The state that a rule keeps for each parameter: what there is to it, and how it is made and copied."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from fastlr import _core
from fastlr._runtime import Runtime
from fastlr.optim._groups import RuleOptions

# Tensors of state by name, of each parameter.
States: TypeAlias = dict[torch.Tensor, dict[str, torch.Tensor]]

# NOTE: [step]
# How many applied updates a parameter's state has seen stands in state[p]["step"], a float32 tensor, as
# torch's optimizers keep it; on CUDA devices it is there that it is counted. Where torch's optimizer counts
# nothing, the state on the host does not either, and a state_dict never does: what has a momentum buffer has
# been updated.
STEP = "step"


class RuleState:
    """The state of a rule's parameters.

    Attributes:
        slots: names of its tensors that are as large as the parameter.
        stage_slots: the same of what stages keep beside the rule.
        counts_steps: whether torch's optimizer of this rule has a ``step``.
    """

    def __init__(self, plan: _core.Plan, options: RuleOptions) -> None:
        self._plan = plan
        self._options = options
        self.slots = plan.slots()
        self.stage_slots = plan.stage_slots()
        self.counts_steps = plan.counts_steps()

    def new(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The state of a parameter that was never updated."""
        values = self._options.numbers(group)
        live = self._plan.live_slots(values)
        state = {
            name: Runtime.new_state(parameter, group["state_dtype"]) for name in live if name in self.slots
        }
        Runtime.fill(list(state.values()), self._plan.initial_state(values))
        for name in live:
            if name in self.stage_slots:
                state[name] = Runtime.new_average(parameter, group["ema_dtype"])
                Runtime.copy([state[name]], [parameter])
        if self.counts_steps:
            state[STEP] = Runtime.new_step(parameter)
            Runtime.fill([state[STEP]], 0)
        return state

    def from_file(
        self, key: object, entry: dict[str, Any], parameter: torch.Tensor, group: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Takes the rule's tensors out of a file's entry, in the types that the group keeps state in.

        PyTorch would cast them to their parameters' type, which loses what float32 state holds.
        """
        loaded: dict[str, torch.Tensor] = {}
        of_stages: dict[str, torch.Tensor] = {}
        for name in (*self.slots, *self.stage_slots):
            found = entry.pop(name, None)
            if found is None:
                continue
            if found.shape != parameter.shape or found.is_complex() != parameter.is_complex():
                raise ValueError(
                    f"the file's {name} {key} has shape {tuple(found.shape)} and "
                    f"{found.dtype}, its parameter {tuple(parameter.shape)} and {parameter.dtype}"
                )
            if name in self.stage_slots:
                of_stages[name] = Runtime.new_average(parameter, group["ema_dtype"]).copy_(found)
            else:
                loaded[name] = Runtime.new_state(parameter, group["state_dtype"]).copy_(found)
        step = entry.pop(STEP, None)
        if step is not None and self.counts_steps:
            single = not isinstance(step, torch.Tensor) or step.numel() == 1
            age = float(step) if single else math.nan
            if not (age >= 0.0 and age.is_integer()):
                raise ValueError(f"the file's step {key} must be a number of updates, got {step!r}")
            loaded[STEP] = Runtime.new_step(parameter).fill_(age)
        elif loaded and self.counts_steps:
            raise ValueError(f"the file's state of parameter {key} has {', '.join(loaded)}, but no step")
        others = [name for name, value in entry.items() if isinstance(value, torch.Tensor)]
        if others and not loaded:
            raise ValueError(
                f"the file's state of parameter {key} has {', '.join(others)} and nothing of "
                f"{', '.join(self.slots)}; it may be of another kind of optimizer"
            )
        lost = [name for name in self._plan.always_live() if name not in loaded]
        if loaded and lost:
            raise ValueError(
                f"the file's state of parameter {key} has {', '.join(loaded)}, but no {lost[0]}; it may be "
                "of another kind of optimizer"
            )
        return {**loaded, **of_stages}

    def into(
        self,
        parameter: torch.Tensor,
        present: dict[str, Any],
        loaded: dict[str, torch.Tensor],
        group: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Copies loaded state into the tensors that there are, for CUDA graphs that know their addresses.

        Returns:
            What to keep: what is nowhere in the file is as it was before the first update.
        """
        kept = dict(loaded)
        fill = self._plan.initial_state(self._options.numbers(group))
        has_begun = any(name in loaded for name in self.slots)
        age = 1.0 if has_begun and not self.counts_steps else 0.0
        for name in (*self.slots, *self.stage_slots, STEP):
            tensor, new = present.get(name), loaded.get(name)
            if not isinstance(tensor, torch.Tensor):
                continue
            if new is None and name in self.stage_slots:
                Runtime.copy([tensor], [parameter])
                kept[name] = tensor
            elif new is None:
                Runtime.fill([tensor], age if name == STEP else fill)
                kept[name] = tensor
            elif _same_layout(tensor, new):
                kept[name] = tensor.copy_(new)
        return kept

    def in_file(self, state: dict[Any, dict[str, Any]], keys: Iterable[Any]) -> None:
        """Leaves out of a copied state, whose entries are still the original's, what torch's has not."""
        if self.counts_steps:
            return
        entries = {key: state[key] for key in keys if key in state and STEP in state[key]}
        ages = _numbers([entry[STEP] for entry in entries.values()])
        for (key, entry), age in zip(entries.items(), ages, strict=True):
            left_out = {STEP} if age else {STEP, *self.slots}
            state[key] = {name: value for name, value in entry.items() if name not in left_out}
            if not state[key]:
                del state[key]


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


def _numbers(tensors: list[torch.Tensor]) -> list[float]:
    """Tensors of one number each as numbers; waits for each device once."""
    numbers = dict.fromkeys(range(len(tensors)), 0.0)
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        values = torch.stack([tensors[i].reshape(()) for i in places]).tolist()
        numbers.update(zip(places, values, strict=True))
    return list(numbers.values())

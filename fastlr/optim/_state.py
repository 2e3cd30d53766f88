"""The state that a rule keeps for each parameter: what there is to it, and how it is made and copied."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from fastlr import _core
from fastlr._checks import describe
from fastlr._distributed import any_nonzero, cut_as, is_distributed, local
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
# What a half parameter lacks of its master; see NOTE: [master weights] in csrc/stages.h.
MASTER = "master"
# What torch's optimizers of rules that there are not here keep: NAdam, Adamax, ASGD and Rprop. Beside it they
# have what others have too.
_OF_TORCHS_OTHERS = ("mu_product", "exp_inf", "ax", "eta", "mu", "prev", "step_size")
# Below which an age has to be: float32 counts on no further than 2**24 anyway.
_AGES_END = 2**62


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
        self._strange = {*plan.slots_of_other_rules(), *_OF_TORCHS_OTHERS}
        self.counts_steps = plan.counts_steps()
        self._starts_with_state = plan.starts_with_state()

    def new(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The state of a parameter that was never updated."""
        values = self._options.numbers(group)
        live = self._plan.live_slots(values)
        rule = [name for name in live if name in self.slots]
        state = {name: self._new_tensor(name, parameter, group) for name in rule}
        Runtime.fill(list(state.values()), self._plan.initial_state(values))
        for name in live:
            if name in self.stage_slots and self.may_have(name, parameter):
                state[name] = self._new_tensor(name, parameter, group)
                Runtime.begin_stages([state[name]], [parameter])
        if self.counts_steps:
            state[STEP] = Runtime.new_step(parameter)
            Runtime.fill([state[STEP]], 0)
        return state

    @staticmethod
    def may_have(name: str, parameter: torch.Tensor) -> bool:
        """Whether state of this name is ever kept beside such a parameter."""
        return name != MASTER or Runtime.is_half(parameter)

    def _new_tensor(self, name: str, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """An uninitialized one of a parameter's state, in the type that its group keeps it in."""
        if name == MASTER:
            return Runtime.new_master(parameter)
        if name in self.stage_slots:
            return Runtime.new_average(parameter, group["ema_dtype"])
        has_master = group["master_weights"] and Runtime.is_half(parameter)
        return Runtime.new_state(parameter, torch.float32 if has_master else group["state_dtype"])

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
            _check_slot(f"the file's {name} {key}", found, parameter)
            if name == MASTER:
                _check_master(f"the file's {name} {key}", found, parameter)
            elif not found.is_floating_point() and not found.is_complex():
                raise ValueError(
                    f"the file's {name} {key} has {found.dtype}, as of another optimizer, which keeps codes "
                    "in place of numbers; make it floating-point numbers, or take it out of the file"
                )
            made = self._new_tensor(name, parameter, group)
            Runtime.copy([made], [cut_as(found, parameter)])
            (of_stages if name in self.stage_slots else loaded)[name] = made
        step = entry.pop(STEP, None)
        if step is not None and self.counts_steps:
            loaded[STEP] = Runtime.new_step(parameter).fill_(_age(f"the file's step {key}", step))
        elif loaded and self.counts_steps:
            raise ValueError(f"the file's state of parameter {key} has {', '.join(loaded)}, but no step")
        others = [name for name, value in entry.items() if isinstance(value, torch.Tensor)]
        if others and not loaded:
            raise ValueError(
                f"the file's state of parameter {key} has {', '.join(others)} and nothing of "
                f"{', '.join(self.slots)}; it may be of another kind of optimizer"
            )
        if strange := [name for name in others if name in self._strange]:
            raise ValueError(
                f"the file's state of parameter {key} has {', '.join(strange)} besides "
                f"{', '.join(loaded)}; it may be of another kind of optimizer"
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
                Runtime.begin_stages([tensor], [parameter])
                kept[name] = tensor
            elif new is None:
                Runtime.fill([tensor], age if name == STEP else fill)
                kept[name] = tensor
            elif same_layout(tensor, new):
                Runtime.copy([tensor], [new])
                kept[name] = tensor
        return kept

    def bring_home(self, states: States) -> None:
        """Puts each ``step`` on its parameter's device; ZeroRedundancyOptimizer loads them on the host."""
        if not self.counts_steps:
            return
        for parameter, entry in states.items():
            if STEP in entry and entry[STEP].device != parameter.device:
                entry[STEP] = Runtime.new_step(parameter).copy_(entry[STEP])

    def is_new(self, entry: dict[str, torch.Tensor]) -> bool:
        """Whether state is as :meth:`new` makes it; without a ``step``, whether the rule's is all zeros."""
        if any(map(Runtime.has_no_values, entry.values())):
            return True
        if STEP in entry:
            return float(entry[STEP]) == 0.0
        of_rule = [tensor for name, tensor in entry.items() if name in self.slots]
        return bool(of_rule) and not any(any_nonzero(tensor) for tensor in of_rule)

    def in_file(
        self, state: dict[Any, dict[str, Any]], parameters: dict[Any, torch.Tensor], group: dict[str, Any]
    ) -> None:
        """Makes a copied state, whose entries are still the original's, that of torch's optimizer.

        Args:
            state: by keys.
            parameters: those of one group, by their keys in it.
            group: theirs.
        """
        for key in parameters:  # what somebody has taken out by a None, which torch's would not load
            entry = state.get(key, {})
            if gone := {
                name for name in (*self.slots, *self.stage_slots, STEP) if entry.get(name, 0) is None
            }:
                state[key] = {name: value for name, value in entry.items() if name not in gone}
                if not state[key]:
                    del state[key]
        if self._starts_with_state:
            for key, parameter in parameters.items():
                if not state.get(key):
                    made = self.new(parameter, group)
                    state[key] = {name: made[name] for name in made if name not in self.stage_slots}
        for key, parameter in parameters.items():
            if (master := state.get(key, {}).get(MASTER)) is None:
                continue
            if not Runtime.is_half(parameter):  # any more
                state[key] = {name: value for name, value in state[key].items() if name != MASTER}
            elif is_distributed(master) and master.dtype is torch.int16:
                # What processes exchange to make a file: neither gloo nor NCCL sends int16.
                state[key] = {**state[key], MASTER: master.to(torch.int32)}
        if self.counts_steps:
            return
        entries = {key: state[key] for key in parameters if key in state and STEP in state[key]}
        ages = _numbers([entry[STEP] for entry in entries.values()])
        for (key, entry), age in zip(entries.items(), ages, strict=True):
            left_out = {STEP} if age else {STEP, *self.slots}
            state[key] = {name: value for name, value in entry.items() if name not in left_out}
            if not state[key]:
                del state[key]


def _check_slot(name: str, found: torch.Tensor, parameter: torch.Tensor) -> None:
    """Raises ValueError for a file's tensor that is no state of a parameter."""
    if not _is_dense(found) or (Runtime.has_no_values(found) and not Runtime.has_no_values(parameter)):
        raise ValueError(f"{name} must be a dense tensor with values, got {_kind(found)}")
    if found.shape != parameter.shape or found.is_complex() != parameter.is_complex():
        raise ValueError(
            f"{name} has shape {tuple(found.shape)} and {found.dtype}, its parameter "
            f"{tuple(parameter.shape)} and {parameter.dtype}"
        )


def _check_master(name: str, found: torch.Tensor, parameter: torch.Tensor) -> None:
    """Raises ValueError for what is kept of the master of a parameter of another type."""
    is_half = Runtime.is_half(parameter)
    expected = Runtime.new_master(parameter).dtype if is_half else None
    in_file = (torch.int16, torch.int32) if expected is torch.int16 else (expected,)
    if found.dtype not in in_file:
        raise ValueError(
            f"{name} has {found.dtype}, and not what is kept beside {parameter.dtype}: it is of parameters "
            "of another type, or an optimizer of torch's has loaded it, which rounds it; take it out of the "
            'file, and out of its groups "master_weights", to go on from the parameter alone'
        )
    if found.dtype is torch.int32 and found.numel() and not Runtime.has_no_values(found):
        part = local(found)  # each process has its own to answer for
        if part.numel() and not -(2**15) <= int(part.min()) <= int(part.max()) < 2**15:
            raise ValueError(
                f"{name} must hold 16 bits of each element, got numbers from {int(part.min())} to "
                f"{int(part.max())}; the file is damaged"
            )


def _age(name: str, step: object) -> float:
    """A file's count of updates: a number, or a tensor of one."""
    age = step
    if isinstance(step, torch.Tensor):
        step = cut_as(step, torch.empty(()))  # of a DTensor, which some helpers make of it, the number
        usable = _is_dense(step) and not Runtime.has_no_values(step) and step.numel() == 1
        age = step.item() if usable else None
    is_number = isinstance(age, (int, float)) and not isinstance(age, bool)
    if not is_number or not 0 <= age < _AGES_END or age != int(age):  # type: ignore[operator, call-overload]
        raise ValueError(f"{name} must be a number of updates, got {describe(step)}")
    return float(age)  # type: ignore[arg-type]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _kind(tensor: torch.Tensor) -> str:
    return f"one of {tensor.dtype} with layout {tensor.layout} on {tensor.device}"


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


def _numbers(tensors: list[torch.Tensor]) -> list[float]:
    """Tensors of one number each as numbers; waits for each device once."""
    numbers = dict.fromkeys(range(len(tensors)), 0.0)
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        values = torch.stack([tensors[i].reshape(()) for i in places]).tolist()
        numbers.update(zip(places, values, strict=True))
    return list(numbers.values())

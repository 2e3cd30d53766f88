"""Training runs at random: whatever people do to a fused optimizer between two steps.

Beside every optimizer runs its counterpart of torch.optim on the CPU, with correctly rounded roots, on twins
of the parameters: reals of the type that is computed in, which are rounded to the parameter's type after each
step, and complex ones as pairs of reals. How halves are kept otherwise stands in halves.py.
``python -m fuzz.steps 17`` in this folder's parent shows what happens in the run of seed 17.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import reference
import torch
from helpers import through_file
from rule_table import taking_exact_roots

import fastlr
from fastlr import Schedule
from fuzz import moves, schedules, stage_actions, stages
from fuzz.memory import (
    DTYPES,
    EXACT,
    SHAPES,
    Memory,
    as_reals,
    assert_twins,
    computed_in,
    gradient_laid_out,
    laid_out,
    random_values,
    rounded,
    same_bits,
)
from fuzz.rules import Rule, rule_of
from fuzz.stages import EMA, MASTER, Average, Averaging, Limits, Scalers, Staging


@dataclass
class Pair:
    """A parameter and its twin.

    Attributes:
        memory: what the parameter is a view of; None: a copy's own.
        first: the step at which it gets its first gradient.
        slot_dtype: of the state that it has, None: it has none.
        average: what is kept of it, None: nothing is.
        rest: what is kept beside it of its master, None: nothing is.
        shares: its memory with another, and PyTorch's count of its versions too.
    """

    ours: torch.nn.Parameter
    theirs: torch.nn.Parameter
    memory: Memory | None
    first: int
    slot_dtype: torch.dtype | None = None
    average: Average | None = None
    rest: torch.Tensor | None = None
    shares: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.ours.dtype


@dataclass
class Group:
    """What a parameter group should hold.

    Attributes:
        owners: of each scheduled hyperparameter: a number, or (schedule, its zero).
        words: what the class in CyclicLR's words is told in place of them.
    """

    pairs: list[Pair]
    options: dict[str, Any]
    owners: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    averaging: Averaging = field(default_factory=Averaging)
    staging: Staging = field(default_factory=Staging)

    def all_owners(self) -> dict[str, Any]:
        """Of the options that a schedule can drive, of stages, too."""
        return {**self.owners, "ema_decay": self.averaging.decay}

    def state_type(self, pair: Pair) -> torch.dtype:
        """Of new state."""
        if self.staging.has_master(pair.dtype):
            return torch.float32
        return self.options[SLOT_TYPE] or pair.dtype

    def given(self, rule: Rule) -> dict[str, Any]:
        """A parameter group as an optimizer is given it."""
        owners = {name: o[0] if isinstance(o, tuple) else o for name, o in self.owners.items()}
        held = rule.in_tuples(owners)
        if self.words:
            for name in ("lr", rule.held_as(rule.cycled)[0]):
                del held[name]
        stages = self.averaging.given() | self.staging.given()
        return {**self.options, **held, **self.words, **stages, "params": [pair.ours for pair in self.pairs]}


SLOT_TYPE = "state_dtype"
STEP = "step"


class Run:
    """A run, made and done from a seed.

    Args:
        backend: "cpu", "cuda", ...: what updates the parameters.
    """

    def __init__(self, seed: int, backend: str = "cpu") -> None:
        self.rng, self.rule, self.backend = Random(f"steps {seed}"), rule_of(seed), backend
        self.stage_rng = Random(f"stages {seed}")
        self.move_rng = Random(f"moves {seed}")
        self.moves, self.moved = self.move_rng.random() < 0.3, 0  # whether it has torch's options alone
        # What its optimizers count beside updates.
        self.second = "update" if self.moves else self.move_rng.choice(["sample", "sample", "epoch"])
        self.scalers = Scalers(self.stage_rng)
        self.log: list[str] = []
        self.updates = self.samples = self.steps = 0
        self.skipped: bool | None = False
        self.norm: float | None = None
        self.measures = False
        self.groups: list[Group] = []
        torch.set_num_threads(self.rng.choice([1, 1, 2]))
        self.cyclic = self.rule.cyclic is not None and self.rng.random() < 0.3
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            self.groups.append(self.new_group())
        self.optimizer = self.build(self.groups)
        self.note(f"built {self.optimizer}")
        self.reference = self.build_reference()

    def note(self, what: str) -> None:
        self.log.append(what)

    # -- what there is ---------------------------------------------------------------------------------

    @property
    def pairs(self) -> list[Pair]:
        return [pair for group in self.groups for pair in group.pairs]

    def new_pairs(self) -> list[Pair]:
        rng = self.rng
        if rng.random() < 0.1:
            return self.pairs_of_one_memory()
        dtype = rng.choice(DTYPES)
        shape = (16390,) if rng.random() < 0.03 else rng.choice(SHAPES)
        values = random_values(rng, shape, dtype)
        view, memory = laid_out(rng, values)
        twin = as_reals(values).to(computed_in(dtype)).clone()
        return [self.pair(view, twin, memory)]

    def pairs_of_one_memory(self) -> list[Pair]:
        """Two parameters that share elements, which are updated one after another."""
        rng = self.rng
        values = random_values(rng, (40,), rng.choice(EXACT))
        memory, twin = Memory(values.to(torch.get_default_device(), copy=True)), as_reals(values).clone()
        made = []
        for low, high in ((0, rng.randint(20, 40)), (rng.randint(0, 20), 40)):
            view = memory.view((high - low,), (1,), low)
            made.append(self.pair(view, twin[low:high], memory))
            made[-1].shares = True
        return made

    def pair(self, view: torch.Tensor, twin: torch.Tensor, memory: Memory) -> Pair:
        first = self.steps + self.rng.choice([0, 0, 0, 1, 4, 10**9])
        return Pair(torch.nn.Parameter(view), torch.nn.Parameter(twin), memory, first)

    def new_group(self) -> Group:
        rng = self.rng
        pairs = [pair for _ in range(rng.choice([1, 2, 3, 5])) for pair in self.new_pairs()]
        options = {name: drawn(rng) for name, drawn in self.rule.options.items()}
        slot_type = rng.choice([None, None, torch.float32])
        if self.moves:
            slot_type = None
        group = Group(pairs, {**options, SLOT_TYPE: slot_type})
        self.set_owners(group)
        return group

    def set_owners(self, group: Group) -> None:
        if not self.moves:
            group.averaging, group.staging = stages.averaging(self), stages.staging(self, group)
        group.owners = {name: self.new_owner(top, self.clock) for name, top in self.rule.scheduled.items()}
        if self.cyclic:
            group.words, cycled = self.words()
            group.owners |= cycled
        self.settle(group)
        key = self.rule.held_as(self.rule.cycled)[0]
        owners = {name: o[0] if isinstance(o, tuple) else o for name, o in group.owners.items()}
        if group.words and key == "betas":
            if group.words["cycle_momentum"]:
                owners[self.rule.cycled] = self.rng.choice([0.9, group.words["max_momentum"]])
            group.words[key] = self.rule.in_tuples(owners)[key]
        elif group.words and not group.words["cycle_momentum"]:
            group.words[key] = owners[key]

    def words(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments in CyclicLR's words, and the schedules that they stand for."""
        rng = self.rng
        arguments, policy, kind = schedules.cycle_arguments(rng, self.rule.scheduled["lr"])
        arguments["inverted"] = False
        if self.backend == "cuda":  # whose pow() has other last bits
            arguments["interpolation"], policy, kind = "linear", fastlr.Triangular, "none"
            arguments = {name: v for name, v in arguments.items() if name not in ("gamma", "decay_base")}
        words = {name: value for name, value in arguments.items() if name not in ("base", "max", "inverted")}
        modes = {"none": "triangular", "halving": "triangular2"}
        # All of them, as what a group does not say is taken from the constructor's arguments.
        words = {"gamma": 1.0, "decay_base": False, **words, "mode": modes.get(kind, "exp_range")}
        words |= {"base_lr": arguments["base"], "max_lr": arguments["max"]}
        lr = policy(**arguments), self.updates
        if rng.random() < 0.5:
            momentum = rng.choice([0.0, rng.uniform(0.0, 0.97)])
            words |= {"cycle_momentum": False, "base_momentum": None, "max_momentum": None}
            return words, {"lr": lr, self.rule.cycled: momentum}
        low, high = sorted((rng.uniform(0.1, 0.97), rng.uniform(0.1, 0.97)))
        words |= {"cycle_momentum": True, "base_momentum": low, "max_momentum": high}
        if self.rule.cycled == "momentum":
            words["momentum"] = None
        against = {**arguments, "base": low, "max": high, "inverted": True}
        against |= {"decay_base": False} if "decay_base" in against else {}
        return words, {"lr": lr, self.rule.cycled: (policy(**against), self.updates)}

    def settle(self, group: Group) -> None:
        values = {
            **group.options,
            **{n: o[0] if isinstance(o, tuple) else o for n, o in group.owners.items()},
        }
        before = dict(values)
        self.rule.settled(values)
        for name, value in values.items():
            if value is not before[name]:
                (group.owners if name in group.owners else group.options)[name] = value

    def new_owner(self, top: float, start: Callable[[Schedule], int], rng: Random | None = None) -> Any:
        rng = rng or self.rng
        if rng.random() < 0.4:
            return rng.choice([0.0, rng.uniform(0, top), rng.uniform(0, top), top])
        while True:
            unit = rng.choice(["update", "update", "sample"])
            unit = self.second if unit == "sample" else unit
            try:
                drawn = schedules.draw(rng, unit, top, depth=rng.choice([0, 1, 3])).schedule
                drawn(0)
            except ValueError as error:
                if not any(reason in str(error) for reason in schedules.REFUSED):
                    raise
                continue
            if drawn.peak < 1.0 and not (self.backend == "cuda" and schedules.needs_pow(drawn)):
                return drawn, start(drawn)

    def clock(self, schedule: Schedule) -> int:
        return self.updates if schedule.unit == "update" else self.samples

    def value(self, owner: Any) -> float:
        """What the next step uses."""
        if not isinstance(owner, tuple):
            return float(owner)
        schedule, start = owner
        return schedule(self.clock(schedule) - start)

    def build(self, groups: list[Group]) -> fastlr.optim.FusedOptimizer:
        """An optimizer of the groups, by arguments or by groups."""
        made = [group.given(self.rule) for group in groups]
        kind = self.rule.cyclic if self.cyclic else self.rule.fused
        assert kind is not None
        self.limits = Limits(None, "skip") if self.moves else Limits.drawn(self.stage_rng)
        arguments = inspect.signature(kind).parameters.keys()
        arguments |= Averaging().given().keys() | Staging().given().keys()
        if len(made) == 1 and self.rng.random() < 0.5 and made[0].keys() <= arguments:
            return kind(**made[0], **self.limits.given())
        bounds = {"base_lr": 0.01, "max_lr": 0.02} if self.cyclic else {}
        return kind(made, **bounds, **self.limits.given())

    def build_reference(self) -> torch.optim.Optimizer:
        groups = [
            {**self.reference_options(group), "params": [pair.theirs for pair in group.pairs]}
            for group in self.groups
        ]
        return self.like_reference(groups)

    def like_reference(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """PyTorch's optimizer of groups with values by the options' names, without state."""
        made = self.rule.torch([self.rule.in_tuples(group) for group in groups], lr=0.1, foreach=False)
        made.state.clear()  # what an eager one has made; see prepare_reference()
        return taking_exact_roots(made)

    def reference_options(self, group: Group) -> dict[str, Any]:
        return {name: as_plain(value) for name, value in group.options.items() if name != SLOT_TYPE}

    def values(self, group: Group) -> dict[str, Any]:
        """What the next step uses, by the names of the options."""
        owned = {name: self.value(owner) for name, owner in group.owners.items()}
        return {**self.reference_options(group), **owned}

    def tell_reference(self) -> None:
        for group, theirs in zip(self.groups, self.reference.param_groups, strict=True):
            theirs.update(self.rule.in_tuples(self.values(group)))

    def prepare_reference(self) -> None:
        """Makes the state that PyTorch's optimizer takes for granted, as it makes all at a first update."""
        for group in self.groups:
            values = self.values(group)
            for pair in group.pairs:
                if pair.theirs.grad is not None and not self.rule.begins_with_gradient:
                    self.make_state(group, pair, values)

    def make_state(self, group: Group, pair: Pair, values: dict[str, Any]) -> None:
        state = self.reference.state[pair.theirs]
        dtype = pair.slot_dtype or group.state_type(pair)
        for name in self.rule.live(values):
            if state.get(name) is None:
                fill = self.rule.initial(values)
                state[name] = rounded(torch.full_like(pair.theirs, fill, requires_grad=False), dtype)
                pair.slot_dtype = dtype
        if self.rule.counts and state.get(STEP) is None:
            state[STEP] = torch.tensor(0.0)

    def make_eager_state(self) -> None:
        """What a file of an eager rule has of parameters that were never updated, which go on from it."""
        for group in self.groups:
            for pair in group.pairs:
                if self.rule.eager and pair.slot_dtype is None:
                    self.make_state(group, pair, self.values(group))

    # -- one step --------------------------------------------------------------------------------------

    def set_gradients(self, spoilt: Pair | None = None) -> None:
        """spoilt: gets an inf or NaN into its gradient."""
        for pair in self.pairs:
            pair.ours.grad = pair.theirs.grad = None
            if self.steps < pair.first or self.rng.random() < 0.15:
                continue
            if (
                self.rng.random() < 0.03 and not pair.shares
            ):  # its own parameter, each element at its own place
                pair.ours.grad = pair.ours.detach()
            else:
                gradient = random_values(self.rng, pair.ours.shape, pair.dtype)
                if pair is spoilt:
                    stages.spoil(self.stage_rng, gradient)
                pair.ours.grad = gradient_laid_out(self.rng, gradient, pair.ours)
            exact = pair.ours.grad.detach().cpu().resolve_conj().contiguous()
            pair.theirs.grad = as_reals(exact).to(pair.theirs.dtype, copy=True)

    def step(self) -> None:
        rng, stage_rng, limits = self.rng, self.stage_rng, self.limits
        found, scale = rng.choice(
            [(None, None)] * 4 + [(0.0, None), (1.0, None), (0.0, 1024.0), (0.0, 7 / 3), (1.0, 4.0)]
        )
        scales, clips = stage_rng.random() < 0.25, limits.max_grad_norm is not None
        spoils = (scales or clips) and stage_rng.random() < 0.15
        self.set_gradients(stage_rng.choice(self.pairs) if spoils else None)
        kept = [pair.ours.grad.clone() if pair.ours.grad is not None else None for pair in self.pairs]
        versions = [pair.ours._version for pair in self.pairs]
        scaler = self.scalers.ours if scales and any(gradient is not None for gradient in kept) else None
        if scaler is not None:
            found, scale = None, scaler.get_scale()
        inverse = 1.0 if scale is None else float(np.float32(1.0 / scale_as_float32(scale)))
        # What a scaler seeks is there before anything is clipped to a value.
        norm, sought = self.expected_norm(kept, inverse), self.expected_norm(kept)
        if scaler is not None and not math.isfinite(sought):
            norm = sought
        nonfinite = not found and not math.isfinite(norm) and (clips or scaler is not None)
        raises = nonfinite and scaler is None and limits.nonfinite == "raise"
        by = "" if scaler is None else " by fastlr.GradScaler"
        self.note(f"step{by}, found_inf={found}, grad_scale={scale}" + nonfinite * ", nonfinite")
        consumed = rng.choice([0, 0, 1, 32]) * (self.second != "epoch")
        told = self.told(consumed, found, scale if scaler is None else None)
        with told, refused(RuntimeError, "the gradients' norm") if raises else nullcontext():
            self.take_step(scaler)
            if raises:
                self.optimizer.sync()  # when a device tells of it
        if scaler is not None:
            gradients = [pair.theirs.grad for pair in self.pairs if pair.theirs.grad is not None]
            assert self.scalers.torchs_applies(gradients) is not nonfinite
            assert scaler.state_dict() == self.scalers.theirs.state_dict()
        skipped = bool(found) or nonfinite
        self.check_written(kept, versions, skipped)
        self.steps += 1
        self.skipped = skipped
        self.norm = None
        if self.measures or clips or scaler is not None:
            self.norm = float("nan") if found else inverse * norm
        if raises and self.backend == "cpu":  # as if there had been no step
            self.skipped, consumed = None, 0
        if not skipped:
            # To the bit by the norm that it has measured, which check() looks at.
            clip = limits.clip(self.optimizer.last_grad_norm) if clips else 1.0
            self.step_reference(inverse, clip)
        elif self.backend != "cpu":  # the device finds out, when the state is there
            if self.rule.counts:
                self.prepare_reference()
            self.remove_early_stages()
        self.samples += consumed
        if rng.random() < 0.4:
            more = rng.choice([0, 1, 32])
            if self.second != "epoch":
                self.optimizer.advance_samples(more)
                self.samples += more
            elif more:
                self.optimizer.advance_epoch()
                self.samples += 1

    @contextmanager
    def told(self, consumed: int, found: float | None, scale: float | None) -> Iterator[None]:
        """What a loader and torch's GradScaler tell an optimizer of one step."""
        optimizer = self.optimizer
        if found is not None:
            optimizer.found_inf = torch.tensor(found)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        hook = None
        if consumed:  # before the step
            hook = optimizer.register_step_pre_hook(
                lambda stepping, *_: setattr(stepping, "_samples_of_step", consumed)
            )
        yield
        if hook is not None:
            hook.remove()
        for name in ("found_inf", "grad_scale"):
            optimizer.__dict__.pop(name, None)

    def take_step(self, scaler: fastlr.GradScaler | None) -> None:
        closure = [lambda: 7.0] if self.rng.random() < 0.2 else []
        if scaler is None:
            returned = self.optimizer.step(*closure)
        else:
            returned = scaler.step(self.optimizer, *closure)
            scaler.update()
        assert returned == (7.0 if closure else None)

    def check_written(self, kept: list[torch.Tensor | None], versions: list[int], skipped: bool) -> None:
        for before, version, pair in zip(kept, versions, self.pairs, strict=True):
            gradient = pair.ours.grad
            if gradient is None or gradient.data_ptr() != pair.ours.data_ptr():
                assert before is None or same_bits(before, gradient), "a gradient was written"
            counted, once = pair.ours._version - version, gradient is not None
            assert skipped or counted == once or (pair.shares and counted <= 2), "its version"

    def remove_early_stages(self) -> None:
        """A device makes averages and masters in a first update that it skips, and they stay what the
        parameters are then."""
        for pair in self.pairs:
            entry = self.optimizer.state.get(pair.ours, {})
            if pair.average is None:
                entry.pop(EMA, None)
            if pair.rest is None:
                entry.pop(MASTER, None)

    def step_reference(self, inverse: float, clip: float) -> None:
        """inverse: of the gradients' scale; clip: what they are multiplied with besides."""
        self.tell_reference()
        for group, theirs in zip(self.groups, self.reference.param_groups, strict=True):
            if group.staging.cautious:
                theirs["weight_decay"] = 0.0
        self.prepare_reference()
        gradients = [pair.theirs.grad for pair in self.pairs]
        decays = self.begin_averages()
        for pair in self.pairs:
            pair.theirs.grad = None
        # Of those that share memory, an average follows before the next one is updated.
        of_groups = [(group, pair) for group in self.groups for pair in group.pairs]
        alone = [[number] for number, pair in enumerate(self.pairs) if pair.shares]
        for part in [[n for n, pair in enumerate(self.pairs) if not pair.shares], *alone]:
            taken = [n for n in part if gradients[n] is not None]
            for number in taken:
                group, pair = of_groups[number]
                group.staging.widen(pair)
                pair.theirs.grad = group.staging.clip(gradients[number], inverse) * (inverse * clip)
                if group.staging.cautious:
                    stages.decay_cautiously(self, group, pair)
            self.reference.step()
            for number in taken:
                group, pair = of_groups[number]
                pair.theirs.grad = None
                followed = group.staging.keep(pair, self.updates, number)
                if decays[number] is not None:
                    pair.average.follow(followed, decays[number])
        self.updates += 1
        for group in self.groups:
            for pair in group.pairs:
                if self.slots(pair) and pair.slot_dtype is None:
                    pair.slot_dtype = group.state_type(pair)
                self.round_slots(pair)

    def begin_averages(self) -> list[float | None]:
        """Those that an update has begin. The decay for each pair, None: its average stays."""
        decays = []
        for group in self.groups:
            for pair in group.pairs:
                decays.append(self.decay(group) if pair.theirs.grad is not None else None)
                if decays[-1] is not None and pair.average is None:
                    pair.average = Average.of(pair, group.averaging.kept_in(pair.dtype))
        return decays

    def decay(self, group: Group) -> float | None:
        """Of the averages, at the next update."""
        if group.averaging.decay is None:
            return None
        decay, before = self.value(group.averaging.decay), self.updates
        return min(decay, (1 + before) / (10 + before)) if group.averaging.warmup else decay

    def slots(self, pair: Pair) -> dict[str, torch.Tensor]:
        """What the reference has as a parameter's state."""
        state = self.reference.state.get(pair.theirs, {})
        return {name: slot for name, slot in state.items() if slot is not None and name != STEP}

    def round_slots(self, pair: Pair) -> None:
        for slot in self.slots(pair).values():
            slot.copy_(rounded(slot, pair.slot_dtype))

    def convert_slots(self) -> None:
        """As a file that is loaded does, to the types that its groups name."""
        for group in self.groups:
            group.owners = {n: o if isinstance(o, tuple) else float(o) for n, o in group.owners.items()}
            if isinstance(group.averaging.decay, (torch.Tensor, np.generic)):
                group.averaging.decay = float(group.averaging.decay)
            for pair in group.pairs:
                pair.slot_dtype = pair.slot_dtype and group.state_type(pair)
                if pair.slot_dtype is not None:
                    self.round_slots(pair)
                if pair.average is not None:
                    pair.average.convert(group.averaging.kept_in(pair.dtype))

    def expected_norm(self, kept: list[torch.Tensor | None], inverse: float | None = None) -> float:
        """inverse: of their scale, for that of elements clipped to a value; None: of all as they are."""
        stagings = [group.staging for group in self.groups for _ in group.pairs]
        gradients = []
        for staging, gradient in zip(stagings, kept, strict=True):
            if gradient is not None:
                exact = as_reals(gradient.cpu().resolve_conj()).to(computed_in(gradient.dtype))
                gradients.append(exact if inverse is None else staging.clip(exact, inverse))
        return math.sqrt(reference.squared_norm([g.double().numpy() for g in gradients]))

    # -- what must hold --------------------------------------------------------------------------------

    def check(self) -> None:
        optimizer = self.optimizer
        assert optimizer.sync() == optimizer.clock() == (self.updates, self.samples)
        if self.skipped is not None:
            assert optimizer.last_step_skipped == self.skipped
            norm = optimizer.last_grad_norm
            assert (norm is None) == (self.norm is None)
            if norm is not None and not (math.isnan(norm) and math.isnan(self.norm)):
                assert norm == self.norm or abs(norm - self.norm) <= 1e-12 * self.norm, (norm, self.norm)
        for group, own in zip(self.groups, optimizer.param_groups, strict=True):
            for name, owner in group.all_owners().items():
                schedule, start = owner if isinstance(owner, tuple) else (None, own[f"{name}_start"])
                assert own[f"{name}_schedule"] == schedule
                assert own[f"{name}_start"] == start
                held = self.rule.held(own, name)
                assert (held is owner is None) or float(held) == self.value(owner), name
            averaging = {"ema_warmup": group.averaging.warmup, "ema_dtype": group.averaging.dtype}
            for name, value in (group.options | averaging | group.staging.given()).items():
                assert own[name] == value, name
        for number, pair in enumerate(self.pairs):
            assert_twins(f"parameter {number}", pair.ours.detach(), pair.theirs.detach(), pair.dtype)
            if pair.memory is not None:
                pair.memory.check()
        self.check_slots()

    def check_slots(self) -> None:
        states = [opt.state_dict()["state"] for opt in (self.optimizer, self.reference)]
        states[0] = {k: dict(entry) for k, entry in states[0].items()}
        for number, pair in enumerate(self.pairs):
            entry = states[0].get(number, {})
            self.check_average(number, pair, entry.pop(EMA, None))
            stages.check_master(number, pair, entry.pop(MASTER, None))
        # A file of Adagrad has state of all parameters; torch's makes it for those of its constructor alone.
        later = {k for k in states[0] if all(v is None for v in states[1].get(k, {}).values())}
        states[0] = {k: v for k, v in states[0].items() if k not in later or v.get(STEP) != 0.0}
        ours, theirs = (
            {(k, name): s for k, slots in state.items() for name, s in slots.items() if s is not None}
            for state in states
        )
        for place in ours.keys() ^ theirs.keys():
            # Where a schedule drives the momentum, a device has its buffer before there is a momentum.
            made = ours.get(place, theirs.get(place))
            early = self.backend != "cpu" and self.rule.counts and place[1] == "momentum_buffer"
            assert early, f"{place} is there and should not be, or the other way round"
            assert not made.any(), place
        for place, slot in ours.items():
            if place not in theirs:
                continue
            if place[1] == STEP:
                assert slot == theirs[place], place
            else:
                assert_twins(str(place), slot, theirs[place], slot_type(self.pairs[place[0]]))

    def check_average(self, number: int, pair: Pair, found: torch.Tensor | None) -> None:
        assert (found is None) == (pair.average is None), f"average of parameter {number}"
        if found is not None and pair.average is not None:
            assert_twins(f"average of parameter {number}", found, pair.average.values, pair.average.dtype)

    # -- what people do between steps --------------------------------------------------------------------

    def set_by_hand(self) -> None:
        group = self.rng.randrange(len(self.groups))
        own, model = self.optimizer.param_groups[group], self.groups[group]
        free = [name for name, owner in model.owners.items() if not isinstance(owner, tuple)]
        name = self.rng.choice([*free, *self.rule.options])
        if name in model.owners:
            drawn = self.rng.choice([0.0, self.rng.uniform(0.0, self.rule.scheduled[name])])
            kinds = [float, np.float64, np.float32, torch.tensor]
        else:
            drawn = self.rule.options[name](self.rng)
            kinds = [type(drawn)] + ([np.bool_] if isinstance(drawn, bool) else [np.float64])
        before = copy.copy(model.options), copy.copy(model.owners)
        value = self.rng.choice(kinds)(drawn)
        (model.owners if name in model.owners else model.options)[name] = value
        spares = model.staging.cautious and not stages.decouples(self, model)
        if spares or not self.rule.fits(self.values(model)):
            model.options, model.owners = before
            return
        key, held = self.rule.entry(own, name, value)
        if isinstance(held, tuple) and self.rng.random() < 0.3:
            held = list(held)
        self.note(f"group {group}: {key} = {held!r}")
        own[key] = held

    def set_schedule(self) -> None:
        rng = self.rng
        group = rng.choice([None, rng.randrange(len(self.groups))])
        start = rng.choice(["now", "zero"])
        names = rng.sample(list(self.rule.scheduled), rng.choice([1, 1, 2, len(self.rule.scheduled)]))
        zero = self.clock if start == "now" else lambda schedule: 0
        owners = {name: self.new_owner(self.rule.scheduled[name], zero) for name in names}
        targets = self.groups if group is None else [self.groups[group]]
        if not all(
            self.rule.fits(self.values(Group([], g.options, {**g.owners, **owners}))) for g in targets
        ):
            return
        given = {name: o[0] if isinstance(o, tuple) else o for name, o in owners.items()}
        if rng.random() < 0.5 and all(name in given for names in self.rule.tuples.values() for name in names):
            given = self.rule.in_tuples(given)
        self.note(f"set_schedule({given}, group={group}, start={start!r})")
        self.optimizer.set_schedule(**given, group=group, start=start)
        for target in targets:
            target.owners.update(owners)

    def set_clock(self) -> None:
        owners = [o for group in self.groups for o in group.all_owners().values() if isinstance(o, tuple)]
        second = "epochs" if self.second == "epoch" else "samples"
        at = {"updates": self.updates, second: self.samples}
        for unit in self.rng.sample(list(at), self.rng.choice([1, 2])):
            at[unit] = self.rng.choice([0, self.rng.randrange(60), self.rng.randrange(10**6)])
        self.note(f"set_clock({at})")
        if any(start > at[f"{schedule.unit}s"] for schedule, start in owners):
            with refused(ValueError, "begins"):
                self.optimizer.set_clock(**at)
            return
        self.optimizer.set_clock(**at)
        self.updates, self.samples = at["updates"], at[second]

    def add_group(self) -> None:
        if len(self.groups) > 3:
            return
        group = self.new_group()
        self.note(f"add_param_group of {len(group.pairs)} with {group.owners}")
        self.optimizer.add_param_group(group.given(self.rule))
        self.groups.append(group)
        theirs = {**self.reference_options(group), "params": [pair.theirs for pair in group.pairs]}
        self.reference.add_param_group(theirs)  # which makes no state, also where it is eager

    def measure(self) -> None:
        self.measures = not self.measures
        self.note(f"measure_grad_norm = {self.measures}")
        self.optimizer.measure_grad_norm = self.measures

    def toggle_requires_grad(self) -> None:
        pair = self.rng.choice(self.pairs)
        self.note("requires_grad toggled")
        pair.ours.requires_grad_(not pair.ours.requires_grad)

    def replace_data(self) -> None:
        number = self.rng.randrange(len(self.pairs))
        pair = self.pairs[number]
        values = pair.ours.detach().cpu().clone(memory_format=torch.contiguous_format)
        if self.rng.random() < 0.3:
            values = random_values(self.rng, values.shape, values.dtype)
        pair.ours.grad = None
        pair.ours.data, pair.memory = laid_out(self.rng, values)
        pair.theirs.data = as_reals(values).to(pair.theirs.dtype, copy=True)
        self.note(f"data of parameter {number} replaced, strides {pair.ours.stride()}")

    def operate_on_state(self) -> None:
        """Buffers replaced, moved, laid out otherwise, cleared, deleted; ages set; dicts replaced."""
        pairs = [pair for pair in self.pairs if self.optimizer.state.get(pair.ours) and pair.slot_dtype]
        if not pairs:
            return
        pair, state = self.rng.choice(pairs), self.optimizer.state
        kind = self.rng.choice(
            [
                "moved",
                "laid out",
                "written",
                "deleted",
                "None",
                "new",
                "one of them",
                "aged",
                "dict",
                "all dicts",
            ]
        )
        self.note(f"state of parameter {[p is pair for p in self.pairs].index(True)}: {kind}")
        theirs, own = self.reference.state[pair.theirs], state[pair.ours]
        slots = self.slots(pair)
        names = list(slots)
        if kind == "one of them" and self.rule.counts:  # the age stays, and what is made anew joins it
            kind, names = "deleted", self.rng.sample(names, 1)
            if names[0] in self.rule.always_live():  # which spoil_slot() takes away
                return
        elif kind in ("deleted", "None") and self.rule.counts:
            names = list(own)  # also what is not the reference's, see check_slots()
        if kind == "aged" and self.rule.counts:
            age = self.rng.choice([0, 3, 10**6])
            for step in (own[STEP], theirs[STEP]):
                step.fill_(age)
        if kind in ("deleted", "None") and EMA in names:
            pair.average = None
        if kind in ("deleted", "None") and MASTER in names:
            pair.rest = None
        for name in names:
            slot = own.get(name)
            if not isinstance(slot, torch.Tensor):
                continue  # the reference's alone
            if kind == "moved":
                slot.data = slot.data.clone()
            elif kind == "laid out":
                own[name] = laid_out(self.rng, slot.cpu())[0]
            elif kind == "written":
                slot.zero_()
                theirs[name].zero_()
            elif kind in ("deleted", "None"):
                own[name] = None
                if kind == "deleted":
                    del own[name]
                theirs.pop(name, None)
            elif kind == "new":
                values = random_values(self.rng, slot.shape, slot.dtype)
                if name not in self.rule.averages:
                    as_reals(values).abs_()
                own[name] = laid_out(self.rng, values)[0]
                theirs[name].copy_(as_reals(values))
        if not self.slots(pair):
            pair.slot_dtype = None
        if kind == "dict":
            state[pair.ours] = dict(state[pair.ours])
        elif kind == "all dicts":
            self.optimizer.state = type(state)(dict)
            for key, value in reversed(list(state.items())):
                self.optimizer.state[key] = dict(value)

    def copy(self) -> None:
        way = self.rng.choice(["deepcopy", "pickle"])
        self.note(way)
        made = (
            copy.deepcopy(self.optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(self.optimizer))
        )
        self.optimizer = made
        for group, own in zip(self.groups, made.param_groups, strict=True):
            for pair, parameter in zip(group.pairs, own["params"], strict=True):
                pair.ours, pair.memory = parameter, None
                pair.theirs.data = pair.theirs.data.clone()
        self.skipped = None

    def save_and_load(self) -> None:
        """Into an optimizer of other arguments."""
        saved = through_file(self.optimizer.state_dict())
        self.make_eager_state()
        was_cyclic, had_limits = self.cyclic, self.limits
        self.cyclic = self.rule.cyclic is not None and self.rng.random() < 0.3
        others = [Group(group.pairs, dict(group.options)) for group in self.groups]
        for other in others:
            other.options = {name: drawn(self.rng) for name, drawn in self.rule.options.items()}
            other.options[SLOT_TYPE] = self.rng.choice([None, torch.float32])
            if self.moves:
                other.options[SLOT_TYPE] = None
            self.set_owners(other)
        into = self.build(others)
        if self.rng.random() < 0.3:
            into, self.cyclic, self.limits = self.optimizer, was_cyclic, had_limits
        self.note(f"saved and loaded into {'itself' if into is self.optimizer else into}")
        kept = copy.deepcopy(saved)
        with warnings.catch_warnings():
            # Averages that begin with the next update look like some that a file was read without.
            warnings.filterwarnings("ignore", "the file brings options of which no state was read")
            into.load_state_dict(saved)
        assert str(kept) == str(saved)
        if into is not self.optimizer:
            self.skipped, self.measures = None, False
        self.optimizer = into
        self.convert_slots()

    def go_through_pytorch(self) -> None:
        """The file becomes another reference's, with the values that the groups have."""
        if any(pair.dtype.is_complex for pair in self.pairs):
            return
        self.note("PyTorch's optimizer loaded the file")
        theirs = self.build_reference()
        theirs.load_state_dict(through_file(self.optimizer.state_dict()))
        for group, own in zip(self.groups, theirs.param_groups, strict=True):
            for name, value in self.values(group).items():
                assert self.rule.held(own, name) == value, name
            for key in own.keys() - theirs.defaults.keys() - {"params"}:
                del own[key]  # clock and schedules, which it carries on but does not know
            for pair in group.pairs:
                found = theirs.state.get(pair.theirs, {}).pop(EMA, None)
                assert (found is None) == (pair.average is None)
                assert found is None or same_bits(found, pair.average.values), "carried on"
                found = theirs.state.get(pair.theirs, {}).pop(MASTER, None)
                assert (found is None) == (pair.rest is None)
                assert found is None or same_bits(found, pair.rest.to(found.dtype)), "carried on"
                if self.rule.eager and pair.slot_dtype is None:  # the file has new state of those, too
                    theirs.state.pop(pair.theirs, None)
        self.reference = theirs

    def load_the_references(self) -> None:
        """The file of PyTorch's own optimizer knows no schedules: they stay, and the clock with them."""
        if any(pair.dtype.is_complex for pair in self.pairs):
            return
        self.note("loaded the file of PyTorch's optimizer")
        self.tell_reference()
        self.make_eager_state()
        self.optimizer.load_state_dict(through_file(self.reference.state_dict()))
        for pair in self.pairs:
            pair.average = pair.rest = None
        self.convert_slots()

    def go_back(self) -> None:
        """To a checkpoint, after more steps."""
        saved = through_file(self.optimizer.state_dict())
        values = [pair.ours.detach().clone() for pair in self.pairs]
        twins = [pair.theirs.detach().clone() for pair in self.pairs]
        theirs = copy.deepcopy(self.reference.state_dict())
        model = copy.deepcopy(
            [
                (g.options, g.owners, g.averaging, [(p.slot_dtype, p.average, p.rest) for p in g.pairs])
                for g in self.groups
            ]
        )
        at = self.updates, self.samples
        for _ in range(self.rng.choice([1, 3])):
            self.step()
        self.note("back to the file before that")
        self.optimizer.load_state_dict(saved)
        self.reference.load_state_dict(theirs)
        self.updates, self.samples = at
        for pair, value, twin in zip(self.pairs, values, twins, strict=True):
            pair.ours.data.copy_(value)
            pair.theirs.data.copy_(twin)
        for group, (options, owners, averaging, states) in zip(self.groups, model, strict=True):
            group.options, group.owners, group.averaging = options, owners, averaging
            for pair, (dtype, average, rest) in zip(group.pairs, states, strict=True):
                pair.slot_dtype, pair.average, pair.rest = dtype, average, rest
        self.convert_slots()

    def fail(self) -> None:
        """A step that raises, for a reason of many."""
        self.set_gradients()
        place = self.rng.randrange(len(self.groups))
        own = self.optimizer.param_groups[place]
        kinds: list[Callable[[], Any]] = [lambda: self.spoil_group(own)] * 3
        kinds += [self.spoil_gradient, self.spoil_slot, self.overlap, self.overlap]
        self.fail_by(self.rng.choice(kinds))

    def fail_by(self, spoil: Callable[[], Any]) -> None:
        """A step that raises, and what was wrong put back: nothing has moved.

        Args:
            spoil: returns what is wrong, the first word of which the error names, and what puts it back; or
                None where there is nothing to spoil.
        """
        groups = [dict(group) for group in self.optimizer.param_groups]
        versions = [pair.ours._version for pair in self.pairs]
        with self.spoilt(spoil) as what:
            if what is None:
                return
            self.note(f"step fails: {what}")
            named = what.split(" ")[0]
            with refused((ValueError, RuntimeError), "starts" if named.endswith("_start") else named):
                self.optimizer.step()
        for before, now in zip(groups, self.optimizer.param_groups, strict=True):
            assert before.keys() == now.keys()
            assert all(now[key] is before[key] for key in before)
        assert versions == [pair.ours._version for pair in self.pairs]
        self.skipped = None

    @contextmanager
    def spoilt(self, spoil: Callable[[], Any]) -> Iterator[str | None]:
        found = spoil()
        if found is None:
            yield None
            return
        what, put_back = found
        try:
            yield what
        finally:
            put_back()

    def spoil_group(self, own: dict[str, Any]) -> Any:
        def part(name: str, values: list[Any]) -> list[tuple[str, Any]]:
            return [self.rule.entry(own, name, value) for value in values]

        wrong = {
            name: [(name, value) for value in values] if name in own else part(name, values)
            for name, values in (self.rule.wrong | stages.WRONG).items()
        }
        for name in (*self.rule.scheduled, "ema_decay"):
            if own[f"{name}_schedule"] is not None:
                wrong[name] += part(name, [self.rule.held(own, name) + 0.01])
                start = f"{name}_start"
                wrong[start] = [(start, own["updates"] + own["samples"] + 1)]
            wrong[f"{name}_schedule"] = [(f"{name}_schedule", value) for value in ("Cosine", 0.1)]
        wrong["updates"] = [("updates", value) for value in ("3", None, 2**63)]
        wrong["samples"] = [("samples", value) for value in (2**63, 1.5)]
        name = self.rng.choice(list(wrong))
        key, value = self.rng.choice(wrong[name])
        before = own[key]
        own[key] = value
        return f"{name} = {value!r}", lambda: own.__setitem__(key, before)

    def spoil_gradient(self) -> Any:
        pair = self.rng.choice(self.pairs)
        if pair.dtype.is_complex or not pair.ours.numel():
            return None
        before = pair.ours.grad
        pair.ours.grad = torch.zeros(pair.ours.shape, dtype=pair.dtype).to_sparse()
        return "gradient that is sparse", lambda: setattr(pair.ours, "grad", before)

    def live_state(self) -> list[tuple[Pair, str]]:
        """The tensors of state that the next step works on."""
        state = self.optimizer.state
        return [
            (pair, name)
            for group in self.groups
            for pair in group.pairs
            for name in (
                *self.rule.live(self.values(group)),
                *([EMA] if self.decay(group) is not None else []),
            )
            if pair.ours.grad is not None and isinstance(state.get(pair.ours, {}).get(name), torch.Tensor)
        ]

    def spoil_slot(self) -> Any:
        live = self.live_state()
        if not live:
            return None
        pair, name = self.rng.choice(live)
        entry = self.optimizer.state[pair.ours]
        slot = entry[name]
        wrong = [torch.zeros(3, 3, 3), slot.to(torch.int32) if not slot.is_complex() else slot.real.clone()]
        wrong += [None] if self.rule.counts and name in self.rule.always_live() else []
        if STEP in entry and self.rule.counts and self.rng.random() < 0.3:
            name, slot = STEP, entry[STEP]
            wrong = [torch.zeros(2), torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)]
            wrong += [torch.tensor(-1.0)] if self.backend == "cpu" else []  # devices count for themselves
        entry[name] = made = self.rng.choice(wrong)
        what = "that is lost" if made is None else f"of {made.shape} and {made.dtype}"
        return f"{name} {what}", lambda: entry.__setitem__(name, slot)

    def overlap(self) -> Any:
        """Memory shared where the order of reads and writes would decide."""
        live = [(pair, name) for pair, name in self.live_state() if pair.ours.numel() > 1]
        pairs = [pair for pair in self.pairs if pair.ours.numel() > 1 and pair.ours.grad is not None]
        if not pairs:
            return None
        kind = self.rng.choice(["gradient", "state", "two"])
        if kind == "gradient" or not live:
            pair = self.rng.choice(pairs)
            return self.put_gradient(pair, elsewhere(pair.ours.detach()), "the parameter")
        pair, name = self.rng.choice(live)
        entry = self.optimizer.state[pair.ours]
        slot = entry[name]
        if kind == "two":
            others = [other for p, other in live if p is pair and other != name]
            if not others:
                return None
            entry[name] = entry[self.rng.choice(others)]
            return f"{name} shares memory with another", lambda: entry.__setitem__(name, slot)
        if slot.dtype != pair.dtype:
            return None
        if self.rng.random() < 0.5:
            return self.put_gradient(pair, slot.detach(), name)
        entry[name] = pair.ours.detach()
        return f"{name} shares memory with its parameter", lambda: entry.__setitem__(name, slot)

    def put_gradient(self, pair: Pair, gradient: torch.Tensor, what: str) -> Any:
        before = pair.ours.grad
        pair.ours.grad = gradient
        return f"gradient that shares memory with {what}", lambda: setattr(pair.ours, "grad", before)

    ACTIONS = (
        *(set_by_hand, set_by_hand, set_schedule, set_schedule, set_clock, add_group, measure),
        *(toggle_requires_grad, replace_data, replace_data, operate_on_state, operate_on_state, copy),
        *(save_and_load, save_and_load, load_the_references, go_through_pytorch, go_back, fail, fail, fail),
    )

    def go(self) -> None:
        """The whole run; what it did stands in ``log``."""
        self.check()
        for _ in range(self.rng.choice([3, 8, 14])):
            for _ in range(self.rng.choice([1, 1, 2, 4])):
                self.step()
                self.check()
            action = self.rng.choice(self.ACTIONS)
            action(self)
            self.check()
            if self.stage_rng.random() < 0.6 and not self.moves:
                self.stage_rng.choice(stage_actions.ACTIONS)(self)
                self.check()
            if self.move_rng.random() < 0.4:
                self.move_rng.choice(moves.MOVES if self.moves else moves.ACTIONS)(self)
                self.check()


def as_plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def elsewhere(parameter: torch.Tensor) -> torch.Tensor:
    """A view of some of the parameter's elements in the parameter's shape, at other places than their own."""
    dim = next(dim for dim, n in enumerate(parameter.shape) if n > 1)
    return parameter.narrow(dim, 0, 1).expand(parameter.shape)


def scale_as_float32(scale: float) -> float:
    return float(np.float32(scale))


def slot_type(pair: Pair) -> torch.dtype:
    assert pair.slot_dtype is not None
    real = pair.dtype.is_complex and not pair.slot_dtype.is_complex
    return pair.slot_dtype.to_complex() if real else pair.slot_dtype


@contextmanager
def refused(kinds: type[Exception] | tuple[type[Exception], ...], message: str) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        if message not in str(error):
            raise
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run = Run(int(argument))
        try:
            run.go()
        finally:
            print(*run.log, sep="\n")

"""Where a run stands: the loader's place in the plan and the bound optimizer's clock, moved as one."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from fastlr.batch_growth.batch import Batch
from fastlr.batch_growth.plan import BatchPlan
from fastlr.batch_growth.updates import Update
from fastlr.optim import EpochClock, FusedOptimizer, TokenClock


class UnderWay(Protocol):
    """An epoch that a loader is in."""

    index: int
    left: int | None


class _Move(NamedTuple):
    """What completing an update changes: noted before the optimizer's clock moves, taken up after it."""

    start: int  # of the next update
    epoch: int  # to be gone through next, or under way
    tokens: int | None  # before it
    clock: int  # the optimizer's, of samples or tokens, when it has moved


# NOTE: [two clocks, one move]
# The optimizer's step moves its clock of samples or tokens itself, together with everything else, and this
# place follows in a hook. Ctrl-C between the two, where it is seen when it came during the update, must not
# leave them apart: a checkpoint written then would repeat the update. So it is noted where the run is
# going to stand before the optimizer moves, and whoever asks next sees by the optimizer's clock that it
# has. Assignments in a row are safe: Ctrl-C is seen at calls and loops only.


class Place:
    """A place in a plan, always at the beginning of an update.

    Attributes:
        plan: as it has grown.
        samples: before the first update that is not completed.
        tokens: that the updates before it had; None: nobody counts them.
        next_epoch: to be gone through next, or under way.
        epoch: that is under way.
        given: what the training loop has at present.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self._optimizer: FusedOptimizer | None = None
        self._hooks: list[Any] = []
        start = plan._updates.next_start(0)
        self.stand(start, 0, plan.clock_at(start) if plan.unit == "token" else 0)

    def stand(self, samples: int, epoch: int, tokens: int | None) -> None:
        """Stands at the beginning of an update, with nothing under way."""
        self.samples, self.next_epoch, self.tokens = samples, epoch, tokens
        self.epoch: UnderWay | None = None
        self.given: tuple[Batch, Update] | None = None
        self._move: _Move | None = None  # that has begun

    @property
    def bound(self) -> bool:
        """Whether an optimizer moves with this place."""
        return self._optimizer is not None

    def bind(self, optimizer: FusedOptimizer) -> None:
        """Moves an optimizer's clock of samples or tokens from now on, in place of another's."""
        _check_counts(optimizer)
        self.catch_up()
        for hook in self._hooks:
            hook.remove()
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        at_start = self.samples == self.plan._updates.next_start(0)
        if at_start and optimizer.clock()[1] == 0 and (left_out := self._clock()):
            self._advance(left_out)  # what is left out before the first update

    def _before_step(self, *_: Any) -> None:
        self.catch_up()
        if self.given is None or self._optimizer is None:
            return
        if not self.given[0].ends_update:
            raise RuntimeError(
                f"optimizer.step() in the middle of the update at sample {self.samples:,}: step only where "
                "batch.ends_update is True"
            )
        self._optimizer._samples_of_step = self._begin_move(self.start_after(self.given[1]))

    def _after_step(self, *_: Any) -> None:
        self._end_move()

    def complete(self) -> None:
        """Counts the update whose last micro-batch the training loop has, if it has one."""
        self.catch_up()
        if self.given is not None and self.given[0].ends_update:
            self.move_to(self.start_after(self.given[1]))

    def start_after(self, update: Update) -> int:
        """Where the next update begins; unlike ``update``, the plan may have grown since."""
        return self.plan._updates.next_start(update.start + update.size)

    def move_to(self, start: int) -> None:
        """Stands before the update that begins at ``start``, samples that are left out behind it."""
        amount = self._begin_move(start)
        self._advance(amount)
        self._end_move()

    def _begin_move(self, start: int) -> int:
        """Notes where the run is going to stand; returns what the optimizer's clock moves by."""
        epoch, amount, clock = self.next_epoch, start - self.samples, 0
        if self.epoch is not None:
            epoch = min(start // self.plan.dataset_size, self.epoch.index + 1)
        tokens = self._tokens_before(start)
        if self._optimizer is not None:
            _check_counts(self._optimizer)
            if self._in_tokens:
                if tokens is None or self.tokens is None:
                    raise RuntimeError(
                        "the optimizer counts tokens, but how many the update at sample "
                        f"{self.samples:,} has is not known: let the loader's count(data) be whole numbers, "
                        "or give the plan a sequence_length"
                    )
                amount = tokens - self.tokens
            clock = self._optimizer.clock()[1] + amount
        self._move = _Move(start, epoch, tokens, clock)
        return amount

    def _tokens_before(self, start: int) -> int | None:
        """Tokens of the run before ``start``, where the update that is given ends, if one is."""
        if self.plan.unit == "token":
            return self.plan.clock_at(start)
        if self.given is None or self.tokens is None:
            return self.tokens  # samples that nobody reads have none
        tokens = self.given[0].global_tokens
        return None if tokens is None else self.tokens + tokens

    @property
    def _in_tokens(self) -> bool:
        """Whether the bound optimizer counts tokens."""
        return self._optimizer is not None and isinstance(self._optimizer.clock(), TokenClock)

    def _clock(self) -> int | None:
        """Where the clock of the bound optimizer should stand."""
        return self.tokens if self._in_tokens else self.samples

    def _advance(self, amount: int) -> None:
        if self._optimizer is None:
            return
        if self._in_tokens:
            self._optimizer.advance_tokens(amount)
        else:
            self._optimizer.advance_samples(amount)

    def _end_move(self) -> None:
        if self._move is None:
            return
        self.samples, self.next_epoch, self.tokens, _ = self._move
        self.given = self._move = None

    def catch_up(self) -> None:
        """Follows the optimizer where Ctrl-C has kept this place from it."""
        if self._move is None or self._optimizer is None:
            return
        if self._optimizer.clock()[1] == self._move.clock:
            self._end_move()
        self._move = None

    def check_clock(self) -> None:
        """Raises RuntimeError where the bound optimizer's schedules stand elsewhere, or nobody knows it."""
        if (own := self._clock()) is None:
            raise RuntimeError(
                f"the optimizer counts tokens, but how many the run had before sample {self.samples:,} is "
                "not known: the loader whose state was loaded did not count them, or no whole number. If the "
                'optimizer knows it, load {**state, "tokens": optimizer.clock()[1]}'
            )
        for group in self._optimizer.param_groups if self._optimizer is not None else ():
            for name in ("lr", "momentum", "beta1"):  # what a plan has; rules have one of the last, or none
                schedule = group.get(f"{name}_schedule")
                if schedule is None:
                    continue
                clock = group["samples"] - group[f"{name}_start"]
                if schedule.unit != "update" and clock != own:
                    raise RuntimeError(
                        f"the optimizer's {name} schedule stands at {schedule.unit} {clock:,}, the loader at "
                        f"{own:,}; load the state of both from the same checkpoint, and put a "
                        'schedule in place in mid-run with set_schedule(..., start="zero")'
                    )


def _check_counts(optimizer: FusedOptimizer) -> None:
    """Raises RuntimeError where an optimizer counts what no loader tells."""
    if isinstance(optimizer.clock(), EpochClock):
        raise RuntimeError(
            "the optimizer counts epochs, but a loader tells samples or tokens; let its schedules count "
            "these, by schedule.in_samples(len(dataset)), or say set_clock(samples=...) where none counts "
            "epochs any more"
        )

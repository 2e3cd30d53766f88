"""An optimizer's options as plain numbers for a while, for code that writes them itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastlr import _core
from fastlr.optim._groups import Clock, RuleOptions

# NOTE: [what is handed over]
# While options are handed over, the groups in use have no owners: None stands where a schedule stood, so that
# steps, devices and graphs take the numbers as they are. The schedules stand in `_set_aside`. What leaves the
# optimizer meanwhile (state_dict, pickle, copies) has them in charge, with the values that they say.


class Handover:
    """What :class:`FusedOptimizer` has of handing its options over."""

    param_groups: list[dict[str, Any]]
    _plan: _core.Plan
    _options: RuleOptions
    # Of each group the owners and their zeros; None: they are in charge.
    _set_aside: list[dict[str, Any]] | None = None

    if TYPE_CHECKING:

        def sync(self) -> Clock: ...
        def _change(self, changes: list[dict[str, Any]]) -> None: ...
        def _push(self, groups: list[dict[str, Any]]) -> None: ...

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """The groups' options are plain numbers inside a ``with`` block, which anybody may write.

        For code that sets ``group["lr"]`` itself where a schedule owns it: ``SWALR`` of
        ``torch.optim.swa_utils`` and other schedulers of torch's, Lightning's ``Tuner.lr_find`` and whatever
        else searches rates (:func:`fastlr.range_test` does so without it). Schedules are set aside, all of
        them, and each value stays what it is until somebody writes another. The clock goes on. Behind the
        block the schedules own their options again, also where it raises, and say what they say at the clock
        as it then is. Numbers that no schedule owned stay as they were written.

        A checkpoint, a pickle or a copy that is made inside holds the schedules in charge, and not the
        numbers. What is loaded inside brings its schedules for later, and their values as numbers. CUDA
        graphs that were captured before take the numbers, what is written inside from the next
        :meth:`FusedOptimizer.step` outside of a graph on, and follow the schedules again behind the block.

        Raises:
            RuntimeError: a block is open already, something else has written a value that a schedule owns,
                or a CUDA graph is being captured; or inside it, a schedule, the clock or a new group is put
                in place.

        >>> import fastlr, torch
        >>> p = torch.zeros(2, requires_grad=True)
        >>> opt = fastlr.FusedSGD([p], lr=fastlr.LinearRamp(0.0, 1.0, 10))
        >>> with opt.handed_over():
        ...     opt.param_groups[0]["lr"] = 0.25
        ...     for _ in range(5):
        ...         opt.step()
        >>> opt.param_groups[0]["lr"], opt.clock().updates
        (0.5, 5)
        """
        self._refuse_handed_over("handed_over()")
        self.sync()
        self._check_owned()
        aside = [self._owners(group) for group in self.param_groups]
        try:
            self._set_aside = aside
            self._change([self._nobody() for _ in aside])
            yield
        finally:
            try:
                self._take_back()
            except KeyboardInterrupt:
                self._take_back()  # which can be done over again
                raise

    def _take_back(self) -> None:
        try:
            self.sync()  # as devices know what replays of a graph have done
        finally:
            if self._set_aside is not None:
                _core.update_groups(self.param_groups, self._in_charge())  # all at once
                self._set_aside = None
            self._push(self.param_groups)

    def _in_charge(self) -> list[dict[str, Any]]:
        """The groups with their schedules in charge: those in use, or what they will be behind the block."""
        if self._set_aside is None:
            return self.param_groups
        groups = [{**group, **own} for group, own in zip(self.param_groups, self._set_aside, strict=True)]
        self._plan.publish(groups)
        return groups

    def _owners(self, group: dict[str, Any]) -> dict[str, Any]:
        return {key: group[key] for key in self._nobody()}

    def _nobody(self) -> dict[str, Any]:
        """What stands in a group for the owners of options that have none."""
        names = [option.name for option in self._options.scheduled]
        return {
            key: value for name in names for key, value in ((f"{name}_schedule", None), (f"{name}_start", 0))
        }

    def _check_owned(self) -> None:
        """Raises RuntimeError where something else has written a value that a schedule owns."""
        for place in range(len(self.param_groups)):
            self._plan.check_owned(self.param_groups, place, [])

    def _refuse_handed_over(self, what: str) -> None:
        """Raises RuntimeError where schedules are set aside."""
        if self._set_aside is not None:
            raise RuntimeError(
                f"{what} was called while the options are handed over; call it before or behind the block of "
                "handed_over(), where the schedules are in charge"
            )

"""The norm of an optimizer's gradients: measured, and clipped, by its step."""

from __future__ import annotations

import math
from typing import Any, Literal

from fastlr import _core
from fastlr._checks import choice, flag, number
from fastlr.optim._parts import Parts


class GradNorm:
    """What :class:`FusedOptimizer` has of its gradients' norm."""

    _plan: _core.Plan
    _measures_grad_norm = False
    _max_grad_norm: float | None = None
    _raises_nonfinite = False

    _parts: Parts | None = None

    def _check_whole(self, name: str, value: object) -> None:
        """Raises ValueError where this rank has parts of the parameters, of which no norm is the model's."""
        if self._parts is not None:
            raise ValueError(
                f"{name} takes the norm of all gradients, of which {self._parts.name} leaves a part to each "
                f"rank, got {value!r}; leave it out and call {self._parts.clip}, which returns the norm, "
                "before the step"
            )

    def _norm_settings(self) -> dict[str, Any]:
        """What a copy of the optimizer takes over."""
        kept = ("_measures_grad_norm", "_max_grad_norm", "_raises_nonfinite", "_parts")
        return {name: getattr(self, name) for name in kept}

    @property
    def measure_grad_norm(self) -> bool:
        """Whether :meth:`step` measures the norm of the gradients that it reads, for ``last_grad_norm``.

        False unless set. A CUDA graph measures on each replay if it was captured with it.
        """
        return self._measures_grad_norm

    @measure_grad_norm.setter
    def measure_grad_norm(self, measure: bool) -> None:
        measures = flag("measure_grad_norm", measure)
        if measures:
            self._check_whole("measure_grad_norm", measure)
        self._measures_grad_norm = measures

    @property
    def last_grad_norm(self) -> float | None:
        """The 2-norm of all gradients of the last :meth:`step`, as one vector; None if not measured.

        It is that of ``p.grad`` without GradScaler's scale, as ``max_grad_value`` clips it, before the norm
        is clipped and before weight decay; NaN where torch's GradScaler had the update skipped.
        :class:`fastlr.GradScaler` has it measured in each step; there it is the inf or NaN that was found.
        The squares are added up in float64 in one order whatever the device, threads and types; of
        parameters on several devices, each device adds up its own.
        Without :attr:`max_grad_norm` and :class:`fastlr.GradScaler` that happens in the pass that reads the
        gradients for the update. Waits for CUDA devices.

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

    @property
    def max_grad_norm(self) -> float | None:
        """What the norm of all gradients is clipped to before the update; None: it is not.

        As ``torch.nn.utils.clip_grad_norm_`` does it, on gradients without GradScaler's scale, over all
        groups::

            g = g * min(1, max_grad_norm / (norm + 1e-6))

        ``p.grad`` itself stays as it is. The norm is that of :attr:`last_grad_norm`, measured in a pass of
        its own before the update. On a CUDA device neither of the two passes waits for the host, so that
        CUDA graphs take both, with the ``max_grad_norm`` of their capture; where parameters are on several
        devices, the host waits for these. Where the norm is inf or NaN, :attr:`nonfinite` says what happens.

        What a framework clips by itself (``gradient_clip_val``, ``Trainer``'s ``max_grad_norm``) it clips
        before the step: switch that off, or leave this None.

        >>> import fastlr, torch
        >>> p = torch.zeros(2, requires_grad=True)
        >>> opt = fastlr.FusedSGD([p], lr=1.0, max_grad_norm=1.0)
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> opt.step()
        >>> [round(value, 3) for value in p.tolist()], opt.last_grad_norm
        ([-0.6, -0.8], 5.0)
        """
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        if limit is not None:
            limit = number("max_grad_norm", limit, "a number or None")
            if not 0.0 < limit < math.inf:
                raise ValueError(f"max_grad_norm must be finite and > 0, or None, got {limit!r}")
            self._check_whole("max_grad_norm", limit)
        self._max_grad_norm = limit

    @property
    def nonfinite(self) -> Literal["skip", "raise"]:
        """What a step does where the norm that it is to clip is inf or NaN, and no GradScaler has found that.

        ``"skip"``: nothing is updated and the clock of updates waits, as after GradScaler's inf;
        :attr:`last_step_skipped` says so. ``"raise"``: nothing is updated and a RuntimeError is raised, on a
        CUDA device by the next :meth:`sync`.
        """
        return "raise" if self._raises_nonfinite else "skip"

    @nonfinite.setter
    def nonfinite(self, what: Literal["skip", "raise"]) -> None:
        self._raises_nonfinite = choice("nonfinite", what, ("skip", "raise")) == "raise"

"""A GradScaler that looks for inf and NaN in the step's own pass over the gradients."""

from __future__ import annotations

from typing import Any

import torch

from fastlr._distributed import is_distributed, tell_of_inf
from fastlr.optim._base import FusedOptimizer
from fastlr.optim._parts import FSDP1


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that leaves the search for inf and NaN to fastlr's optimizers.

    Constructor, methods, scales and ``state_dict`` are those of ``torch.amp.GradScaler``; either loads the
    other's. Its check reads and writes every gradient before the step. Here the step measures the norm of
    the gradients, which only reads them, and which ``max_grad_norm`` needs anyway::

        found_inf = not isfinite(sum(g * g))        # of the scaled gradients, added up in float64

    Where it is found, nothing is updated, the optimizer's clock of updates waits, and :meth:`update` lowers
    the scale. On a CUDA device nothing waits for that, so that CUDA graphs capture :meth:`step` and
    :meth:`update`; where one optimizer has parameters on several devices, the host waits for these.
    ``nonfinite="raise"`` of the optimizer raises nothing here: an inf is how a scale is found.
    ``last_grad_norm`` tells the norm of every step, also that of a skipped one, inf or NaN.

    Optimizers of others, and gradients that :meth:`unscale_` has seen, are checked by torch.

    The sum is not finite where an element is not, and besides where float64 gradients are so large that
    their squares overflow, above 1e154: such an update is skipped too. A closure given to :meth:`step` by
    position comes before the search, which in torch it does not.

    >>> import fastlr, torch
    >>> p = torch.zeros(2, requires_grad=True)
    >>> opt = fastlr.FusedSGD([p], lr=0.25)
    >>> scaler = fastlr.GradScaler("cpu", init_scale=1024.0)
    >>> for target in (1.0, float("inf")):
    ...     opt.zero_grad()
    ...     scaler.scale((p - target).square().sum()).backward()
    ...     scaler.step(opt)
    ...     scaler.update()
    ...     print(p.tolist(), scaler.get_scale(), opt.last_step_skipped)
    [0.5, 0.5] 1024.0 False
    [0.5, 0.5] 512.0 True
    """

    def step(self, optimizer: torch.optim.Optimizer, *arguments: Any, **options: Any) -> float | None:
        """As torch's, which searches before a closure makes gradients; here the closure comes first."""
        if not (
            self._enabled and isinstance(optimizer, FusedOptimizer) and arguments and callable(arguments[0])
        ):
            return super().step(optimizer, *arguments, **options)
        closure, *others = arguments
        with torch.enable_grad():
            loss = closure()
        return super().step(optimizer, lambda: loss, *others, **options)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As torch's; of DTensors, whatever their placements, all processes find the same.

        Raises:
            ValueError: FSDP1 leaves each rank a part of the gradients; the others have to be told of an inf.
        """
        if isinstance(optimizer, FusedOptimizer) and optimizer._parts is FSDP1:
            raise ValueError(
                f"{FSDP1.name} leaves each rank a part of the gradients, and this scaler tells no other rank "
                "of an inf in it; use torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
            )
        super().unscale_(optimizer)

    # With what torch's unscale_() and check search; of DTensors torch's tells of an inf along the placements
    # of the first gradient alone.
    def _unscale_grads_(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> dict[Any, Any]:
        found = super()._unscale_grads_(optimizer, *arguments)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for found_inf in found.values():
            tell_of_inf(parameters, found_inf)
        return found

    # What torch's step() asks for found_inf where unscale_() has not been called; in every version so far.
    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
        if not isinstance(optimizer, FusedOptimizer):
            return super()._check_inf_per_device(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Where others have parts of the gradients, a process without any learns from them.
        first = next((p for p in parameters if p.grad is not None or is_distributed(p)), None)
        found = {}
        if first is not None:  # else the step has nothing to look at, which update() complains of
            sought = torch.zeros((), dtype=torch.float32, device=first.device)
            found[first.device] = optimizer._seeks_inf_for = sought
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

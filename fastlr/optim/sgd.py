"""SGD with momentum, driven by schedules."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import TorchOptions, checked_state_dtype
from fastlr.schedules import Schedule


class FusedSGD(FusedOptimizer):
    r"""SGD with momentum whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`, as ``torch.optim.SGD`` and bit for bit the same in
    float32 and float64::

        g = g + weight_decay * p
        m = momentum * m + (1 - dampening) * g      (first update: m = g)
        u = g + momentum * m if nesterov else m
        p = p - lr * u

    With ``decoupled_weight_decay`` the gradient has no decay added, and ``p = p * (1 - lr * weight_decay)``
    comes first, as in AdamW (SGDW of Loshchilov and Hutter, arXiv 1711.05101, with the decay times lr).
    This differs from Sutskever et al., who multiply lr into the buffer. Half types are computed in
    float32 and rounded once on each store.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer: dense
            tensors of float16, bfloat16, float32, float64 or a complex type, of any shape and strides.
        lr: learning rate, >= 0, or a schedule (clocked in updates, epochs, samples or tokens).
        momentum: in [0, 1), or a schedule that stays there.
        dampening: of the gradient that enters the buffer; any finite number.
        weight_decay: L2 penalty, or what decays decoupled; >= 0, or a schedule.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        decoupled_weight_decay: weight decay shrinks the parameter and does not enter the momentum.
            ``torch.optim.SGD``, which a checkpoint may go to, knows no such decay and adds it.
        state_dtype: None keeps momentum in the parameter's type; ``torch.float32`` keeps it in
            float32 (complex64 for complex parameters). ``momentum_dtype`` is another name for it.
        foreach, fused, capturable, differentiable: as torch's optimizers take them, for code that passes
            them on. A step is always fused, can be captured in CUDA graphs and is not differentiable; what
            asks for something else is an error.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Each of them may stand in a parameter group. ``param_groups[i]["lr"]`` is a float: what the next
    step will use; its owner stands under ``"lr_schedule"``, a schedule or None.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedSGD(model.parameters(), lr=fastlr.Cosine(0.1, 0.0, 100), momentum=0.9)
    >>> for _ in range(100):
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     opt.step()
    ...     opt.zero_grad()
    >>> opt.param_groups[0]["lr"], opt.clock()
    (0.0, Clock(updates=100, samples=0))
    """

    _rule = "sgd"
    _adapts = False
    _other_names = {"momentum_dtype": "state_dtype"}  # noqa: RUF012

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-3,
        momentum: float | Schedule = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Schedule = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        **step_options: Unpack[TorchOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_dtype": state_dtype,
        }
        if momentum_dtype is not None:
            defaults = with_state_dtype({**defaults, "momentum_dtype": momentum_dtype}, "")
        super().__init__(params, defaults, step_options)

    def _checked(self, group: dict[str, Any], where: str, *, new: bool = False) -> dict[str, Any]:
        values = super()._checked(group, where, new=new)
        # Chosen together; in a group in use momentum may be set to zero, as in torch.
        without = values["momentum"] == 0.0 and group["momentum_schedule"] is None
        if new and values["nesterov"] and without:
            raise ValueError(f"momentum{where} must be > 0 with nesterov=True, got {group['momentum']!r}")
        return values

    def _in_own_words(self, param_group: dict[str, Any], where: str) -> dict[str, Any]:
        return with_state_dtype(super()._in_own_words(param_group, where), where)

    def _complete(self, group: dict[str, Any]) -> None:
        if "momentum_dtype" in group:  # of version 0.1
            group["state_dtype"] = group.pop("momentum_dtype")
        group.setdefault("decoupled_weight_decay", False)  # older ones know no other
        super()._complete(group)

    def _from_file(self, group: dict[str, Any], where: str) -> dict[str, Any]:
        # A file of version 0.1 knows the other name only.
        if group.get("momentum_dtype") == "float32":
            group = {**group, "momentum_dtype": torch.float32}
        return super()._from_file(with_state_dtype(group, where, old_file=True), where)


def with_state_dtype(group: dict[str, Any], where: str, *, old_file: bool = False) -> dict[str, Any]:
    """A group without ``momentum_dtype``, the name that SGD has for ``state_dtype`` too."""
    if "momentum_dtype" not in group:
        return group
    group = dict(group)
    given = checked_state_dtype(where, group.pop("momentum_dtype"), "momentum_dtype")
    if not old_file and group.get("state_dtype") not in (None, given):
        raise ValueError(
            f"momentum_dtype{where} is another name for state_dtype, got {given} and {group['state_dtype']}"
        )
    return {**group, "state_dtype": given}

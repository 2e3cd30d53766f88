"""The averages of an optimizer's parameters, which its step keeps: how they are read and put to use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch

from fastlr import _core
from fastlr._checks import choice, describe
from fastlr._distributed import cut_as, is_distributed, local, reshard_models
from fastlr._runtime import Runtime
from fastlr.optim._buffers import EMA, RULE, BufferAverages
from fastlr.optim._parts import ZERO, Parts

# What becomes of a model's buffers where its parameters' averages are: a copy, or averages too.
Buffers: TypeAlias = Literal["copy", "average"]


class Averages:
    """What :class:`FusedOptimizer` has of its parameters' averages."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[torch.Tensor, Any]
    _plan: _core.Plan
    _runtime: Runtime
    _buffer_averages: BufferAverages | None = None
    _parts: Parts | None

    def _check_warmup(self) -> None:
        """Raises ValueError where ``ema_warmup`` warms nothing up."""
        warms_up = any(group["ema_warmup"] for group in self.param_groups)
        if warms_up and not self._keeps_averages():
            raise ValueError(
                "ema_warmup must be False without ema_decay, got True; give the decay that it grows to, as "
                "ema_decay=0.9999"
            )

    def _keeps_averages(self) -> bool:
        return any(group["ema_decay"] is not None for group in self.param_groups)

    def _averaged(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter that has an average, with it."""
        if not self._keeps_averages():
            raise ValueError(
                f"{type(self).__name__} keeps no averages, as ema_decay is None; give it one, as "
                "ema_decay=0.9999"
            )
        if self._parts is ZERO:
            raise RuntimeError(
                f"{ZERO.name} leaves this optimizer a part of the parameters, so that the model would be a "
                "mixture of weights and averages; load its consolidated state into a fastlr optimizer of the "
                "whole model, which then has all averages"
            )
        found = []
        for number, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"] if group["ema_decay"] is not None else ()):
                average = self.state.get(p, {}).get(EMA)
                if average is None:
                    continue
                if getattr(average, "shape", None) != p.shape:
                    what = f"shape {tuple(average.shape)}" if hasattr(average, "shape") else describe(average)
                    raise ValueError(
                        f"the average of parameter {place} of group {number} must have its shape "
                        f"{tuple(p.shape)}, got {what}; let it begin anew, by "
                        'del optimizer.state[parameter]["ema"], or give the parameter back what it was'
                    )
                found.append((p, average))
        return found

    def average_buffers(self, model: torch.nn.Module) -> None:
        """Has each step average the model's buffers too, as BatchNorm's running mean and variance.

        To be called once before the training, before or after :meth:`FusedOptimizer.load_state_dict`, and
        for a copy of the optimizer again. Floating-point and complex buffers that ``model.state_dict()`` has
        then move with each applied update, by the decay that it uses in the first parameter group::

            ema = ema + (1 - decay) * (buffer - ema)

        An average begins as its buffer is at the first :meth:`FusedOptimizer.step`, be that skipped or not.
        Integers, as ``num_batches_tracked``, have none. Modules may replace a buffer by another of its shape;
        inside ``averaged_weights("average")`` what they replace it by stays. Ctrl-C between the update and
        this leaves the averages of buffers an update behind.

        Averages stand in ``param_groups[0]["ema_buffers"]`` by the buffers' names in the model, and
        so in ``state_dict()``, and in what torch.distributed.checkpoint makes of it; there with
        ``flatten_optimizer_state_dict=True`` once for each parameter of the group. Where GradScaler, or a
        norm that is not finite, has a CUDA device skip the update, it skips this as well, and the host waits
        only for buffers on the host. CUDA graphs take it where a step was made before the capture.

        The same elsewhere: ``ModelEmaV3`` of timm with its ``exclude_buffers=False``, whose averages begin as
        the buffers are when it is made, and ``AveragedModel(use_buffers=True)`` of
        ``torch.optim.swa_utils``, which averages integers as well.

        Args:
            model: whose parameters the optimizer updates, for as long as the optimizer lives.

        Raises:
            ValueError: the first group has no ``ema_decay``, or what was loaded is of other buffers.
            RuntimeError: a CUDA graph has captured the step.

        >>> import fastlr, torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> opt = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.75)
        >>> opt.average_buffers(model)
        >>> for mean in (0.0, 4.0):
        ...     model.running_mean.fill_(mean)  # as a forward pass does
        ...     opt.step()
        tensor([0., 0.])
        tensor([4., 4.])
        >>> opt.averaged_state_dict(model, buffers="average")["running_mean"]
        tensor([1., 1.])
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")
        group = self.param_groups[0]
        if group["ema_decay"] is None:
            raise ValueError(
                "average_buffers() takes the ema_decay of parameter group 0, which must be a number or a "
                "schedule, got None; give it one, as ema_decay=0.9999"
            )
        if self._plan.captured():
            raise RuntimeError(
                "a CUDA graph has captured the step without averages of these buffers; call "
                "average_buffers() before the capture"
            )
        self._plan.sync(self.param_groups)
        self._buffer_averages = BufferAverages(model, _core.Plan(RULE, self._runtime), group)

    def _averaged_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self._buffer_averages is None:
            raise ValueError(
                'buffers="average" takes averages, which steps keep from average_buffers(model) on; '
                "call it first: once before the training, and for a copy of the optimizer again"
            )
        return self._buffer_averages.averaged()

    @contextmanager
    def averaged_weights(self, buffers: Buffers = "copy") -> Iterator[None]:
        """The parameters are their averages inside a ``with`` block, and themselves again behind it.

        With ``ema_decay`` a step keeps an average of each parameter in ``state[p]["ema"]``, in its own pass
        over the parameter. Before the first applied update it is the parameter as it then is (on a CUDA
        device, which alone knows what it skips, as it is at the first step). After each::

            ema = ema + (1 - decay) * (p - ema)     (ema.lerp_(p, 1 - decay), of complex numbers part by part)
            decay = min(ema_decay, (1 + t) / (10 + t)) if ema_warmup else ema_decay

        p is the parameter as it is stored, of halves the rounded one, or with ``master_weights`` its master.
        t counts the updates that were applied before, as :meth:`FusedOptimizer.clock` does when the step
        begins: TensorFlow's ``ExponentialMovingAverage`` takes such a ``num_updates``, and diffusers has the
        same formula from the second update on; at the first it copies. A skipped update changes no average.
        A parameter without a gradient keeps its own, and whoever begins later starts as it is then, as after
        loading a file that has no averages.

        Weights are copied out and in again to the bit, also where the block raises. Parameters without an
        average (in groups without ``ema_decay``, or never updated) stay what they are. Averages in float32 of
        half parameters are rounded. An average takes 4 bytes an element, of float64 8, and the block as much
        as the parameters.

        The same elsewhere: ``ModelEmaV3`` of timm and ``AveragedModel`` of ``torch.optim.swa_utils`` are a
        second model (``get_ema_multi_avg_fn(decay)``; see :meth:`copy_averages_to`), ``EMAModel`` of
        diffusers has ``store()``, ``copy_to()`` and ``restore()`` for what this block does. Their
        ``update_parameters()`` or ``step()`` is here the optimizer's step.

        Args:
            buffers: ``"copy"``: the model's stay as they are; ``"average"``: they are their averages too, see
                :meth:`average_buffers`.

        Raises:
            ValueError: no group has an ``ema_decay``, or nobody has called :meth:`average_buffers`.
            RuntimeError: a block is open already, or another thread is in a step; or inside it,
                :meth:`FusedOptimizer.step` is called.

        >>> import fastlr, torch
        >>> p = torch.zeros(2, requires_grad=True)
        >>> opt = fastlr.FusedSGD([p], lr=1.0, ema_decay=0.75)
        >>> p.grad = torch.tensor([-4.0, 4.0])
        >>> opt.step()
        >>> with opt.averaged_weights():
        ...     p.tolist()
        [1.0, -1.0]
        >>> p.tolist()
        [4.0, -4.0]
        """
        buffers_too = choice("buffers", buffers, get_args(Buffers)) == "average"
        self._plan.hold()
        try:
            self._reshard()
            averaged = self._averaged()
            if buffers_too:
                averaged += self._averaged_buffers()
            parameters = [p for p, _ in averaged]
            weights = [p.detach().clone() for p in parameters]
            try:
                Runtime.copy(parameters, [average for _, average in averaged])
                yield
            finally:
                _put_back(parameters, weights)
                self._reshard()
        finally:
            self._plan.release()

    def _reshard(self) -> None:
        """Sees to it that models compute with what is in the parameters, of which FSDP may have copies."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(is_distributed(p) or Runtime.is_flattened(p) for p in parameters):
            reshard_models()

    def copy_averages_to(self, model: torch.nn.Module | Iterable[torch.Tensor]) -> None:
        """Copies the averages into a model's parameters; of those without one, the weights themselves.

        timm and ``torch.optim.swa_utils`` call such a model ``ema.module``; diffusers fills one by
        ``copy_to(model.parameters())``. Buffers stay as they are: :meth:`averaged_state_dict` has both.

        Args:
            model: the trained one itself, or another of the same parameters, as ``copy.deepcopy(model)``, of
                which each takes the one of its name, where the optimizer was given ``named_parameters()``, or
                else, of a single group, of its place. What the optimizer does not have, as frozen
                parameters, stays as it is.

        Raises:
            ValueError: no group has an ``ema_decay``, it cannot be told which parameter is which, or the
                model has some of the trained parameters themselves beside copies of others.

        >>> import copy, fastlr, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = fastlr.FusedSGD(model.named_parameters(), lr=0.1, ema_decay=0.99)
        >>> averaged = copy.deepcopy(model).eval()
        >>> opt.copy_averages_to(averaged)
        """
        given = _checked(model)
        self._reshard()  # before the model says what its parameters are
        averages = dict(self._averaged())
        trained = [p for group in self.param_groups for p in group["params"]]
        matched = self._matched(given, trained)
        pairs = [(to, averages.get(p, p)) for to, p in matched if to is not p or p in averages]
        Runtime.copy([to for to, _ in pairs], [cut_as(value.detach(), to) for to, value in pairs])

    def _matched(
        self, model: torch.nn.Module | list[torch.Tensor], trained: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A model's parameters, each with the optimizer's that it is or is like."""
        by_name = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
        theirs = list(model.parameters() if isinstance(model, torch.nn.Module) else model)
        for place, p in enumerate(theirs):
            memory = local(p)
            if memory.layout is torch.strided and memory.numel() and not memory.untyped_storage().nbytes():
                raise ValueError(
                    f"parameter {place} has no memory, as one that FSDP had made whole and has given up; "
                    "pass the model itself"
                )
        known = set(trained)
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if own := [p for p in theirs if p in known]:
            alike: list[tuple[torch.Tensor, torch.Tensor]] = []
            if names and by_name:
                alike = [
                    (by_name[name], p) for name, p in zip(names, trained, strict=True) if name in by_name
                ]
            elif len(theirs) == len(trained):
                alike = list(zip(theirs, trained, strict=True))
            copies = [to for to, p in alike if to not in known and to.shape == p.shape]
            if copies and sum(to is p for to, p in alike) == len(own):
                raise ValueError(
                    f"the model has {len(own)} of the trained parameters themselves and {len(copies)} like "
                    "others of them; give it the trained model, or one that shares nothing with it, as "
                    "copy.deepcopy(model)"
                )
            return [(p, p) for p in own]
        if names and by_name:
            if missing := [name for name in names if name not in by_name]:
                raise ValueError(
                    f"the model has no parameter {missing[0]}, which the optimizer averages, but "
                    f"{next(iter(by_name))}; pass what a wrapper holds (model.module, model._orig_mod) "
                    "or, of a single group, model.parameters(), or copy the trained model inside "
                    "averaged_weights()"
                )
            pairs: list[tuple[torch.Tensor, torch.Tensor]] = [
                (by_name[name], p) for name, p in zip(names, trained, strict=True)
            ]
        elif len(self.param_groups) > 1:
            raise ValueError(
                f"which of the model's parameters is which of the {len(self.param_groups)} groups' cannot be "
                "told; make the optimizer from named parameters, or copy the model inside averaged_weights()"
            )
        elif len(theirs) != len(trained):
            raise ValueError(
                f"the model has {len(theirs)} parameters, and the optimizer {len(trained)}; pass those that "
                "it has, in its order, or make it from named_parameters()"
            )
        else:
            pairs = list(zip(theirs, trained, strict=True))
        for place, (to, p) in enumerate(pairs):
            if to.shape != p.shape:
                raise ValueError(
                    f"parameter {place} has shape {tuple(to.shape)} in the model and {tuple(p.shape)} in the "
                    "optimizer; give it a model like the one that is trained"
                )
            numbers = to.is_complex() if p.is_complex() else to.is_floating_point()
            dense = to.layout is torch.strided
            expanded = dense and 0 in (step for n, step in zip(to.shape, to.stride(), strict=True) if n > 1)
            if not numbers or not dense or expanded:
                raise ValueError(
                    f"parameter {place} is {to.dtype} with layout {to.layout}{', expanded,' * expanded} in "
                    f"the model, which cannot hold an average of {p.dtype}; give it a model like the one "
                    "that is trained"
                )
        return pairs

    def averaged_state_dict(self, model: torch.nn.Module, buffers: Buffers = "copy") -> dict[str, Any]:
        """The trained model's ``state_dict()`` with the averages in place of its parameters; a copy.

        Args:
            model: whose parameters the optimizer updates.
            buffers: ``"copy"``: the model's own, as with diffusers, timm's ``exclude_buffers`` and
                ``AveragedModel``'s ``use_buffers=False``. For BatchNorm, whose statistics then are those of
                the weights and not of their averages, load the result into a copy of the model and let
                ``torch.optim.swa_utils.update_bn(loader, copy)`` measure them anew. ``"average"``: the
                averages that :meth:`average_buffers` has begun, and the model's own where there are none.

        Raises:
            ValueError: no group has an ``ema_decay``, the model has none of the optimizer's parameters, or
                nobody has called :meth:`average_buffers`.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}")
        choice("buffers", buffers, get_args(Buffers))
        self._reshard()
        trained = {p for group in self.param_groups for p in group["params"]}
        if not trained.intersection(model.parameters()):
            raise ValueError(
                "the model has none of the optimizer's parameters; give it the one that is trained"
            )
        with self.averaged_weights(buffers):
            state = model.state_dict()
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = value.detach().clone()
        return state


def _checked(model: object) -> torch.nn.Module | list[torch.Tensor]:
    """A module, or its parameters as a list.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, torch.nn.Module):
        return model
    given: list[Any] = list(model) if isinstance(model, Iterable) else [model]
    if not all(isinstance(p, torch.Tensor) for p in given):
        raise TypeError(f"model must be a torch.nn.Module or its parameters, got {describe(model)}")
    return given


def _put_back(parameters: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Once more, one by one, where Ctrl-C or a parameter that has become another stops it."""
    try:
        Runtime.copy(parameters, weights)
    except BaseException:
        for p, value in zip(parameters, weights, strict=True):
            if p.shape == value.shape:
                Runtime.copy([p], [value])
        raise

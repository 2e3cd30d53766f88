"""One update of the sweep: batches, losses, gradients, and weights that stop at the first bad loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastlr._exchange import no_sync
from fastlr.range_test.record import kept_dtype, ranks
from fastlr.range_test.snapshot import all_parameters


class Batches:
    """The batches of a loader, without end, on a device.

    Args:
        name: of the loader, for messages.
        loader: begun again where it runs out, which is said once.
        placed: ``(name, batch) -> batch``, checked and where the model is.
        say: tells a sentence; None: nobody is told.

    Attributes:
        failed: whether the loader raised, which is not the weights' fault.
    """

    failed = False

    def __init__(
        self,
        name: str,
        loader: Iterable[Any],
        placed: Callable[[str, Any], Any],
        say: Callable[[str], object] | None = None,
    ) -> None:
        self._name, self._loader, self._placed, self._say = name, loader, placed, say
        self._endless = self._run()

    def __next__(self) -> Any:
        self.failed = True
        batch = next(self._endless)
        self.failed = False
        return batch

    def once(self) -> Iterator[Any]:
        """One pass."""
        empty = True
        for batch in self._loader:
            empty = False
            yield self._placed(self._name, batch)
        if empty:
            raise ValueError(f"{self._name} is empty")

    def _run(self) -> Iterator[Any]:
        count = 0
        for batch in self.once():
            count += 1
            yield batch
        if self._say is not None:
            self._say(f"{self._name} ran out after {count} batches and is begun again")
        while True:
            again = False
            for batch in self._loader:
                again = True
                yield self._placed(self._name, batch)
            if not again:
                raise ValueError(
                    f"{self._name} is exhausted after {count} batches and yields none when begun again; pass "
                    "one that can be iterated anew, such as a DataLoader, or lower num_steps"
                )


def trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What the optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class Update:
    """Makes updates.

    Args:
        model, optimizer, scaler: to train; no scaler: None.
        loss_of: ``(batch) -> loss``.
        accumulate: batches to each update.
        autocast: returns the context in which losses are computed.
        lrs: to be written into each group before each update, shape (groups, updates); None: the optimizer
            has a schedule for it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        loss_of: Callable[[Any], torch.Tensor],
        accumulate: int,
        autocast: Callable[[], AbstractContextManager[object]],
        lrs: Any,
    ) -> None:
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._loss_of, self._accumulate, self._autocast, self._lrs = loss_of, accumulate, autocast, lrs
        self._parameters = all_parameters(model, optimizer)
        self._trained = trained(optimizer)
        self._before = [p.detach().clone() for p in self._trained]
        self._sound: torch.Tensor | None = None
        self._count = 0
        for group in optimizer.param_groups if lrs is not None else ():
            if isinstance(group["lr"], torch.Tensor):  # which groups may share
                group["lr"] = group["lr"].clone()

    def __call__(self, batches: Batches) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss before the update, averaged over batches and ranks, and whether the scaler skipped it."""
        if self._lrs is not None:
            _write_lrs(self._optimizer, self._lrs[:, self._count])
        loss = self._gradients(batches)
        if ranks() > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / ranks()
        if self._count == 0:
            self._check_gradients(loss.device)
        skipped = self._step(loss)
        self._optimizer.zero_grad(set_to_none=True)
        for p in self._parameters:
            p.grad = None
        self._count += 1
        return loss, skipped

    def sound(self) -> bool:
        """Whether all weights are finite. Asks the device."""
        return all(bool(torch.isfinite(p).all()) for p in self._trained)

    def _gradients(self, batches: Batches) -> torch.Tensor:
        mean: torch.Tensor | None = None
        for i in range(self._accumulate):
            # Gradients are averaged over the ranks once, with the last batch.
            last = i == self._accumulate - 1
            with (
                nullcontext() if last else no_sync(self._model),
                torch.enable_grad(),
            ):
                with self._autocast():
                    loss = self._loss_of(next(batches))
                    _check_loss(loss)
                    part = loss / self._accumulate if self._accumulate > 1 else loss
                scaled = part if self._scaler is None else self._scaler.scale(part)
                scaled.backward()  # type: ignore[no-untyped-call]
            part = part.detach().reshape(()).to(kept_dtype(part.device))
            mean = part if mean is None else mean + part
        assert mean is not None
        return mean

    def _step(self, loss: torch.Tensor) -> torch.Tensor | None:
        # NOTE: [weights stop at the first bad loss]
        # The host learns of a loss that is not finite only when it reads the block. Until then the device
        # itself puts the weights back after each update, from the first such loss on. This works with any
        # optimizer and needs nothing of it; the price is one more copy of the weights.
        sound = torch.isfinite(loss)
        self._sound = sound if self._sound is None else self._sound & sound
        skipped = None
        with torch.no_grad():
            for p, before in zip(self._trained, self._before, strict=True):
                before.copy_(p)
        if self._scaler is None:
            self._optimizer.step()
        else:
            # The scale is lowered exactly when an update was skipped; comparing it here asks no host.
            one = torch.ones((), device=loss.device)
            scale = self._scaler.scale(one)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            skipped = self._scaler.scale(one) < scale
        with torch.no_grad():
            for p, before in zip(self._trained, self._before, strict=True):
                p.copy_(torch.where(self._sound.to(p.device), p, before))
        return skipped

    def _check_gradients(self, device: torch.device) -> None:
        """Once, before anything is updated: whether there is anything to update with, on any rank.

        Where parameters are sharded, a rank may have none of those that do.
        """
        gradients = [p.grad for p in self._trained if p.grad is not None]
        values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        found = [bool(values), any(bool(torch.any(g != 0)) for g in values)]
        if ranks() > 1:
            everybodys = torch.tensor(found, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(everybodys)
            found = everybodys.tolist()
        some, some_nonzero = found
        if not some:
            raise ValueError("the loss does not depend on any parameter that the optimizer holds")
        if not some_nonzero:
            raise ValueError(
                "the gradient is zero everywhere on the first batch: no rate can change the loss; check that "
                "the loss depends on the output, and for dead units or a detached tensor"
            )


def _write_lrs(optimizer: torch.optim.Optimizer, lrs: Any) -> None:
    for group, lr in zip(optimizer.param_groups, lrs.tolist(), strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _check_loss(loss: object) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = (
            f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(loss).__name__
        )
        complex_loss = isinstance(loss, torch.Tensor) and loss.is_complex()
        remedy = "take its real part, or its absolute value" if complex_loss else "take its mean()"
        raise ValueError(f"the loss must be a real scalar tensor, got {got}; {remedy}")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter that requires a gradient")

"""How a loader's batches become losses, and what a metric is told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Metric: TypeAlias = Callable[..., "torch.Tensor | float"]


@dataclass(frozen=True)
class Feed:
    """What is done with batches.

    Attributes:
        placed: ``(name of the loader, batch) -> batch``, checked and on the model's device.
        loss: ``(batch) -> loss``.
        measured: ``(metric) -> (batch) -> number``.
        samples: ``(batch) -> samples``, by which metrics are averaged.
        accuracy: the metric where none is given; None: there has to be one.
    """

    placed: Callable[[str, Any], Any]
    loss: Callable[[Any], torch.Tensor]
    measured: Callable[[Metric], Metric]
    samples: Callable[[Any], float]
    accuracy: Metric | None

    @classmethod
    def checked(
        cls,
        model: torch.nn.Module,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        step_fn: Callable[[Any], torch.Tensor] | None,
        device: torch.device,
    ) -> Feed:
        """Pairs for a loss_fn, anything for a step_fn, and dicts for a model that gives its own loss.

        Raises:
            TypeError: there are both functions, or one cannot be called.
        """
        if loss_fn is not None and step_fn is not None:
            raise TypeError(
                "pass loss_fn, called with output and target, or step_fn, called with the batch: one of them"
            )
        for name, function in (("loss_fn", loss_fn), ("step_fn", step_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if step_fn is not None:
            return cls(lambda name, batch: batch, step_fn, lambda metric: metric, lambda batch: 1.0, None)
        if loss_fn is not None:
            return cls(
                lambda name, batch: _pair(name, batch, device),
                lambda batch: loss_fn(model(batch[0]), batch[1]),
                lambda metric: lambda batch: metric(model(batch[0]), batch[1]),
                lambda batch: _samples(batch[1]),
                _accuracy,
            )
        return cls(
            lambda name, batch: _keywords(name, batch, device),
            lambda batch: _own_loss(model(**batch), batch),
            lambda metric: lambda batch: metric(model(**batch), batch),
            _samples,
            _accuracy_of_logits,
        )


def _kind(batch: object) -> str:
    return type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")


def _pair(name: str, batch: Any, device: torch.device) -> tuple[Any, Any]:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        own = isinstance(batch, Mapping)
        raise TypeError(
            f"{name} must yield pairs (input, target), got {_kind(batch)}; for other batches pass "
            "step_fn=(batch) -> loss in place of loss_fn"
            + (", or neither where model(**batch) answers with its loss" if own else "")
        )
    return _moved(batch[0], device), _moved(batch[1], device)


def _keywords(name: str, batch: Any, device: torch.device) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{name} must yield dicts, whose model(**batch) answers with its loss, got {_kind(batch)}; for "
            "other batches pass loss_fn, called with output and target, or step_fn, called with the batch"
        )
    return {key: _moved(part, device) for key, part in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _part(output: object, name: str) -> Any:
    """What a model's output has under a name, in itself or as an attribute; None: nothing."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _own_loss(output: object, batch: Mapping[str, Any]) -> Any:
    loss = _part(output, "loss")
    if loss is None:
        raise ValueError(
            f"the model's output ({type(output).__name__}) has no loss for a batch of "
            f"{', '.join(map(str, batch))}; add what it is computed from (in transformers the labels), or "
            "pass loss_fn or step_fn"
        )
    return loss


def _samples(target: Any) -> float:
    """How many samples a batch has, by the first tensor of its target; 1, where there is none."""
    if isinstance(target, torch.Tensor):
        return float(len(target)) if target.ndim else 1.0
    if isinstance(target, Mapping):
        target = list(target.values())
    nested = (torch.Tensor, Mapping, tuple, list)
    parts = target if isinstance(target, (tuple, list)) else ()
    return next((_samples(part) for part in parts if isinstance(part, nested)), 1.0)


def _accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if (
        not isinstance(output, torch.Tensor)
        or not isinstance(target, torch.Tensor)
        or output.ndim != target.ndim + 1
        or target.is_floating_point()
        or output.shape[1] < 2
    ):
        raise _no_accuracy("an output", output, target, "target")
    return (output.argmax(1) == target).double().mean()


def _accuracy_of_logits(output: object, batch: Mapping[str, Any]) -> torch.Tensor:
    """Of one class a sample; where the classes of several stand, and which of them count, models differ."""
    logits, labels = _part(output, "logits"), batch.get("labels")
    if _part(logits, "ndim") != 2 or _part(labels, "ndim") != 1:
        raise _no_accuracy("logits", logits, labels, "batch")
    return _accuracy(logits, labels)  # type: ignore[arg-type]


def _no_accuracy(what: str, output: object, target: object, given: str) -> ValueError:
    got = [
        f"shape {tuple(v.shape)}, {v.dtype}" if isinstance(v, torch.Tensor) else type(v).__name__
        for v in (output, target)
    ]
    return ValueError(
        f"no accuracy for {what} of {got[0]} and targets of {got[1]}; pass metric=(output, {given}) -> "
        "number, larger is better"
    )

"""What is measured during the sweep besides the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastlr._checks import count, describe
from fastlr.range_test.feeding import Feed, Metric
from fastlr.range_test.update import Batches


@dataclass
class Validation:
    """Measures a metric on the same batches each time.

    Attributes:
        wanted: whether there is a val_loader.
        name: of the metric.
    """

    model: torch.nn.Module
    loader: Iterable[Any] | None
    every: int
    most: int | None
    value: Metric | None
    name: str
    context: Callable[[], AbstractContextManager[object]]
    feed: Feed

    @classmethod
    def checked(
        cls,
        model: torch.nn.Module,
        metric: Metric | None,
        loader: Iterable[Any] | None,
        every: int,
        most: int | None,
        context: Callable[[], AbstractContextManager[object]],
        feed: Feed,
    ) -> Validation:
        every = count("val_every", every)
        if most is not None:
            most = count("val_batches", most)
        if metric is not None and not callable(metric):
            raise TypeError(f"metric must be callable, got {describe(metric)}")
        if metric is not None and loader is None:
            raise ValueError("metric needs a val_loader to be measured on")
        wanted = feed.accuracy if metric is None else metric
        if wanted is None and loader is not None:
            raise ValueError("with step_fn a val_loader needs metric=(batch) -> number, larger is better")
        name = "accuracy" if metric is None else getattr(metric, "__name__", "metric").strip("<>")
        value = None if wanted is None else feed.measured(wanted)
        return cls(model, loader, every, most, value, name, context, feed)

    @property
    def wanted(self) -> bool:
        return self.loader is not None

    def load(self) -> None:
        """Reads the batches."""
        self._batches: list[Any] = []
        if self.loader is not None:
            batches = Batches("val_loader", self.loader, self.feed.placed)
            self._batches = list(islice(batches.once(), self.most))

    def due(self, step: int, num_steps: int) -> bool:
        return self.wanted and (step % self.every == self.every - 1 or step == num_steps - 1)

    @torch.no_grad()
    def __call__(self) -> tuple[torch.Tensor | float, float]:
        """The metric times the samples, summed over the batches, and the number of samples."""
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        assert self.value is not None
        total: Any = 0.0
        weights = 0.0
        try:
            with self.context():
                for batch in self._batches:
                    weight = self.feed.samples(batch)
                    total = total + _number(self.value(batch), self.name) * weight
                    weights += weight
        finally:
            for module, training in flags:
                module.training = training
        return total, weights


def _number(value: object, name: str) -> torch.Tensor | float:
    """What a metric returned, once it is sure to be one number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(())
    if isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        return float(value)
    got = (
        f"a {value.dtype} tensor of shape {tuple(value.shape)}"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
    )
    raise ValueError(f"the metric {name} must return one real number, got {got}; take its mean")

"""AdaptiveGrowth: a batch that follows the measured noise scale upwards."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

from fastlr._checks import count, describe, flag, items, real, saved_state
from fastlr.batch_growth.batch import Batch
from fastlr.batch_growth.loader import GrowingLoader
from fastlr.batch_growth.noise_scale import GradientNoiseScale

_LOG = logging.getLogger("fastlr")


class Growth(NamedTuple):
    """One growth of an :class:`AdaptiveGrowth`.

    Attributes:
        sample: samples of the run consumed by then.
        noise_scale: that was measured.
        before: batch size.
        after: batch size.
    """

    sample: int
    noise_scale: float
    before: int
    after: int


class AdaptiveGrowth:
    """Says, or does, when the batch should grow: once the noise scale has clearly passed its next size.

    The batch sizes are ``batch_size * factor ** k``. It grows by one of these steps when the noise scale
    has been at least ``margin`` times the next size in ``patience`` observations one after another; what
    falls short once begins the count anew. It never shrinks and never passes ``max_batch_size``. Each
    growth is logged (``logging.getLogger("fastlr")``, level INFO) and kept in ``log``.

    Advisory unless ``apply=True``: ``batch_size`` is what it would take. With ``apply=True`` it calls
    :meth:`GrowingLoader.grow`, and the learning rate stays as it is, for SGD and for adaptive rules: what is
    measured is the gradients', whatever the rule. What growth is worth in rate, the plan's ``scaling`` says.

    Args:
        noise: what measures; :meth:`update` reads it after its ``observe``.
        loader: whose batches are watched.
        max_batch_size: >= the loader's batch size at present, <= the data set's size.
        factor: integer >= 2.
        margin: > 0; 1.0 grows to where the noise scale is.
        patience: observations, >= 1.
        apply: let the loader's batches grow.

    Raises:
        ValueError: an argument is out of range, or one of the sizes, or the tail of a phase that grows to
            it, cannot be shared between the ranks and cut into equal micro-batches.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(3, 1)
    >>> data = torch.utils.data.TensorDataset(torch.randn(96, 3), torch.randn(96, 1))
    >>> plan = fastlr.BatchPlan.from_phases([(0, 8)], dataset_size=96, epochs=2, lr=0.0)
    >>> loader = fastlr.GrowingLoader(data, plan, micro_batch_size=4)
    >>> noise = fastlr.GradientNoiseScale(model.parameters())
    >>> growth = fastlr.AdaptiveGrowth(noise, loader, max_batch_size=32, patience=3)
    >>> for batch in loader:
    ...     ((model(batch.data[0]) - batch.data[1]).square().mean() * batch.weight).backward()
    ...     noise.observe(batch)
    ...     grew = growth.update(batch)
    ...     if batch.ends_update:
    ...         model.zero_grad()
    >>> growth.batch_size in (8, 16, 32), loader.plan.batch_sizes
    (True, (8,))
    """

    def __init__(
        self,
        noise: GradientNoiseScale,
        loader: GrowingLoader,
        *,
        max_batch_size: int,
        factor: int = 2,
        margin: float = 1.0,
        patience: int = 10,
        apply: bool = False,
    ) -> None:
        if not isinstance(noise, GradientNoiseScale):
            raise TypeError(f"noise must be a GradientNoiseScale, got {describe(noise)}")
        if not isinstance(loader, GrowingLoader):
            raise TypeError(f"loader must be a GrowingLoader, got {describe(loader)}")
        self._noise, self._loader = noise, loader
        self.batch_size = loader.plan.phase_at(loader.samples).batch_size
        self.max_batch_size = count("max_batch_size", max_batch_size)
        if self.max_batch_size < self.batch_size:
            raise ValueError(
                f"max_batch_size must be >= the present batch size, {self.batch_size:,}, "
                f"got {max_batch_size:,}"
            )
        if self.max_batch_size > loader.plan.dataset_size:
            raise ValueError(
                f"max_batch_size must be <= the data set's {loader.plan.dataset_size:,} samples, "
                f"got {max_batch_size:,}"
            )
        self.factor = count("factor", factor, 2)
        for size in loader.plan.batch_sizes:
            size = max(size, self.batch_size)
            while (size := size * self.factor) <= self.max_batch_size:
                loader._check_growth(size)  # each that may come
        self.margin = real("margin", margin, above=True)
        self.patience = count("patience", patience)
        self.apply = flag("apply", apply)
        self.log: list[Growth] = []
        self._above = 0
        self._observations = noise.observations

    def update(self, batch: Batch) -> bool:
        """Looks at the noise scale after an update; to be called after ``noise.observe(batch)``, and after
        ``opt.step()`` where ``noise`` reads an optimizer.

        Args:
            batch: the batch that was observed; only an update's last one counts, and the run's last one has
                nothing to grow for. Every rank has to call it.

        Returns:
            Whether the batch grew, or, where advisory, should.
        """
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch of a GrowingLoader, got {describe(batch)}")
        return batch.ends_update and self._look()

    def _look(self) -> bool:
        """Takes an observation into account that was not so far."""
        sample = self._loader.samples
        if self._noise.observations == self._observations or sample == self._loader.plan.total_samples:
            return False
        self._observations = self._noise.observations
        # The plan may have grown by itself.
        self.batch_size = max(self.batch_size, self._loader.plan.phase_at(sample).batch_size)
        after = self.batch_size * self.factor
        scale = self._noise.scale
        self._above = self._above + 1 if scale >= self.margin * after else 0
        if self._above < self.patience or after > self.max_batch_size:
            return False
        self._above = 0
        if self.apply:
            self._loader.grow(after)
        growth = Growth(sample, scale, self.batch_size, after)
        self.log.append(growth)
        _LOG.info(
            "noise scale %.4g at sample %d: the batch %s from %d to %d",
            growth.noise_scale, growth.sample, "grows" if self.apply else "should grow", growth.before, after,
        )  # fmt: skip
        self.batch_size = after
        return True

    def state_dict(self) -> dict[str, Any]:
        """The size, the counts and the log; plain numbers and lists.

        Save it with the noise scale's, the loader's and the optimizer's. Between ``opt.step()`` and
        :meth:`update` there is an observation to be taken into account, which :meth:`load_state_dict` does.
        """
        return {
            "batch_size": self.batch_size,
            "above": self._above,
            "observations": self._observations,
            "sample": self._loader.samples,
            "log": [list(growth) for growth in self.log],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned; load the optimizer, loader and noise scale first.

        Raises:
            ValueError: it is damaged, or the loader or noise scale stand elsewhere than the file's; nothing
                has changed then.
        """
        keys = ("batch_size", "above", "observations", "sample", "log")
        state = saved_state("an AdaptiveGrowth", state, keys)
        batch_size, above = count("batch_size", state["batch_size"]), count("above", state["above"], 0)
        size = self._loader.plan.dataset_size
        if batch_size > size:
            raise ValueError(f"batch_size must be <= the data set's {size:,} samples, got {batch_size:,}")
        observations = count("observations", state["observations"], 0)
        sample = count("sample", state["sample"], 0)
        log = [_growth(entry) for entry in items("log", state["log"])]
        if observations > self._noise.observations:
            raise ValueError(
                f"the file has seen {observations:,} observations, the noise scale has "
                f"{self._noise.observations:,}; load the noise scale's state first"
            )
        if observations < self._noise.observations and sample != self._loader.samples:
            raise ValueError(
                f"the file is from sample {sample:,} and has an observation to take into account there, the "
                f"loader stands at {self._loader.samples:,}; load the loader's state first"
            )
        self.batch_size, self._above, self.log = batch_size, above, log
        self._observations = observations
        self._look()


def _growth(entry: object) -> Growth:
    """An entry of a saved log."""
    if not isinstance(entry, (list, tuple)) or len(entry) != len(Growth._fields):
        raise ValueError(f"an entry of log must be {', '.join(Growth._fields)}, got {describe(entry)}")
    sample, scale, before, after = entry
    growth = Growth(
        count("sample of log", sample, 0),
        # inf where noise hid the gradient
        math.inf if isinstance(scale, float) and scale == math.inf else real("noise_scale of log", scale),
        count("before of log", before),
        count("after of log", after),
    )
    if growth.after <= growth.before:
        raise ValueError(f"after of log must be > before, {growth.before}, got {growth.after}")
    return growth

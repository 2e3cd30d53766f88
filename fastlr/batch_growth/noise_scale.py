"""The gradient noise scale: how large a batch is worth its samples (arXiv 1812.06162)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from fastlr import _core
from fastlr._checks import count, describe, real, saved_state, tensors
from fastlr._distributed import Share, added_up, is_distributed, local, settled, share_of
from fastlr._runtime import Runtime
from fastlr.batch_growth.batch import Batch
from fastlr.batch_growth.ranks import sum_over_ranks
from fastlr.optim import FusedOptimizer


def squared_norm(tensors: Iterable[torch.Tensor], native: _core.SquaredNorm | None = None) -> float:
    """The sum of the squares of all elements, each squared and added up in float64.

    Waits for CUDA devices. Where no kernel was built for a tensor's device, PyTorch adds them up. Of
    DTensors each part counts once, in whatever process it is: all processes of their mesh must ask.

    Args:
        tensors: of any shape, strides, device, and floating or complex type, or sparse COO.
        native: what keeps tables on devices from one call to the next, where tensors stay the same.

    >>> squared_norm([torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])])
    169.0
    """
    native = native or _core.SquaredNorm(Runtime)
    whole: list[torch.Tensor] = []
    parts: dict[Share, list[torch.Tensor]] = {}
    for given in tensors:
        tensor = settled(given) if is_distributed(given) else given
        share = share_of(tensor) if is_distributed(given) else None
        (whole if share is None else parts.setdefault(share, [])).append(local(tensor))
    total = _squares(whole, native)
    if parts:
        total += math.fsum(added_up(list(parts), [_squares(own, native) for own in parts.values()]))
    return total


def _squares(tensors: list[torch.Tensor], native: _core.SquaredNorm) -> float:
    total, others = native.measure(tensors, torch.get_num_threads())
    sums: dict[torch.device, torch.Tensor] = {}
    for tensor in others:
        values = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor
        values = torch.view_as_real(values) if values.is_complex() else values
        flat = values.detach().to(torch.float64).flatten()
        sums[tensor.device] = sums.get(tensor.device, flat.new_zeros(())) + torch.dot(flat, flat)
    return total + sum(float(value) for value in sums.values())


class _Small(NamedTuple):
    """What an update's smaller batch tells."""

    batch_size: float
    squared_norm: float


class _Begun(NamedTuple):
    """An observation that waits for the optimizer's step."""

    small: _Small
    batch_size: float
    updates: int  # the optimizer's clock before the step


class GradientNoiseScale:
    r"""The simple noise scale :math:`B = \mathrm{tr}(\Sigma) / |G|^2`, measured while training.

    G is the gradient of the whole loss and :math:`\Sigma` the covariance of a sample's. A batch much
    smaller than B gains from being larger almost in proportion; one much larger wastes samples. The
    squared norms of gradients over two batch sizes give unbiased estimates of both:

    .. math::
        |G|^2 = \frac{b_2 |g_2|^2 - b_1 |g_1|^2}{b_2 - b_1}, \qquad
        S = \frac{|g_1|^2 - |g_2|^2}{1 / b_1 - 1 / b_2}

    Each is averaged over updates, exponentially with the same weights, and then divided; averaging the
    quotients would be biased. The larger size is the update's. The smaller one is that of its first
    micro-batch, averaged over the ranks, whose gradients must not have been reduced yet: with several ranks
    the loop has to use :meth:`Batch.sync`. After :meth:`attach` it is that of each rank before the
    all-reduce.

    Updates with a single micro-batch on a single rank have one size only and tell nothing. Neither do the
    partial ones of a tail, nor those with inf or NaN.

    With one of fastlr's optimizers in place of parameters, the larger batch's norm is what its step measures
    in the pass that updates the parameters (``opt.measure_grad_norm``, which this switches on). An
    observation is then complete after the step, and one whose step was skipped does not count. The step has
    to see gradients as the loss gave them: where they are clipped before, pass the parameters. After
    :meth:`attach` the optimizer has to hold all of the model's.

    Args:
        parameters: whose gradients are measured, or a fused optimizer that holds them.
        decay: of the averages, in [0, 1): they span some 1 / (1 - decay) updates.

    Raises:
        ValueError: there are no parameters, one is given twice, FSDP1 has sharded them, or decay is out of
            range.
        TypeError: no tensors, or an optimizer of another kind.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(3, 1)
    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
    >>> plan = fastlr.BatchPlan.from_phases([(0, 16)], dataset_size=64, epochs=2, lr=0.1)
    >>> opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr)
    >>> noise = fastlr.GradientNoiseScale(opt)
    >>> for batch in fastlr.GrowingLoader(data, plan, micro_batch_size=4).bind(opt):
    ...     x, y = batch.data
    ...     ((model(x) - y).square().mean() * batch.weight).backward()
    ...     noise.observe(batch)
    ...     if batch.ends_update:
    ...         opt.step()
    ...         opt.zero_grad()
    >>> noise.observations
    8

    References:
        McCandlish, Kaplan, Amodei et al., An Empirical Model of Large-Batch Training, arXiv 1812.06162,
        appendix A.1.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] | FusedOptimizer, decay: float = 0.99) -> None:
        self.decay = real("decay", decay)
        if self.decay >= 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        self._optimizer: FusedOptimizer | None = None
        self._parameters: list[torch.Tensor] = []
        if isinstance(parameters, FusedOptimizer):
            self._optimizer = parameters
            parameters.measure_grad_norm = True
        elif isinstance(parameters, torch.optim.Optimizer):
            raise TypeError(
                f"parameters must be tensors or one of fastlr's optimizers, got {type(parameters).__name__}; "
                "pass the parameters that it holds"
            )
        else:
            self._parameters = tensors("parameters", parameters)
            if any(map(Runtime.is_flattened, self._parameters)):
                raise ValueError(
                    "FullyShardedDataParallel leaves each rank a part of the gradients, whose noise is not "
                    "the model's; measure it under DistributedDataParallel"
                )
        self._native = _core.SquaredNorm(Runtime)
        self._observations = 0
        self._gradient = self._noise = self._weight = 0.0
        self._small: _Small | None = None
        self._begun: _Begun | None = None
        self._reduced: float | None = None  # of this rank before the all-reduce
        self._attached = False
        self._warned = False

    def attach(self, model: Any) -> GradientNoiseScale:
        """Measures each rank's gradient right before ``DistributedDataParallel`` reduces it.

        That works with a single micro-batch to an update too. It takes the place of DDP's communication
        hook, of which there can be one.

        Args:
            model: a ``DistributedDataParallel``.

        Returns:
            This object.
        """
        if not hasattr(model, "register_comm_hook"):
            raise TypeError(f"model must be a DistributedDataParallel, got {describe(type(model).__name__)}")
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        # Without annotations: DDP compares them with its own types, and here they are strings.
        def measure(group, bucket):  # type: ignore[no-untyped-def]
            self._reduced = (self._reduced or 0.0) + self._squared_norm([bucket.buffer()])
            return default_hooks.allreduce_hook(group, bucket)

        model.register_comm_hook(None, measure)
        self._attached = True
        return self

    def observe(self, batch: Batch, grad_scale: float = 1.0) -> None:
        """Reads the gradients; to be called after each backward pass, before ``opt.step()``.

        Args:
            batch: whose weighted loss was differentiated. Every rank has to call it.
            grad_scale: what the loss was multiplied with, such as ``scaler.get_scale()``, > 0. A fused
                optimizer's step knows it from the scaler.
        """
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch of a GrowingLoader, got {describe(batch)}")
        scale = real("grad_scale", grad_scale, above=True)
        world = batch.ranks
        if batch.starts_update and not batch.ends_update and not self._attached:
            # p.grad is weight times the gradient of this rank's mean loss, since nothing was reduced yet.
            mine = [0.0, 0.0, 0.0]  # nothing counts in this micro-batch
            if batch.weight > 0.0:
                squares = self._squared_norm(self._gradients()) / (scale * batch.weight) ** 2
                if squares == 0.0 and any(map(is_distributed, self.parameters)):
                    raise RuntimeError(
                        "the first micro-batch has left no gradients in the parameters, which are DTensors; "
                        "FSDP2 (fully_shard) keeps them from batch.sync(model) until ranks exchange them, so "
                        "that their noise scale cannot be measured; use DistributedDataParallel, or give the "
                        "growth in advance"
                    )
                mine = [squares, batch.samples, 1.0]
            squares, samples, ranks = sum_over_ranks(mine, world)
            if ranks > 0.0:
                self._small = _Small(samples / ranks, squares / ranks)
        if not batch.ends_update:
            return
        self._complete()
        self._begun = None
        small, self._small = self._small, None
        if self._attached:
            reduced, self._reduced = self._reduced, None
            if reduced is not None and world > 1:
                squares = sum_over_ranks([reduced / scale**2], world)[0] / world
                small = _Small(batch.global_batch / world, squares)
        if not batch.full:
            return
        if small is None:
            self._warn()
        elif self._optimizer is not None:
            self._begun = _Begun(small, float(batch.global_batch), self._optimizer.sync().updates)
        else:
            self._add(small, float(batch.global_batch), self._squared_norm(self._gradients()) / scale**2)

    def _complete(self) -> None:
        """Takes what the optimizer's step has measured, if it was applied since the observation began."""
        if self._optimizer is None or self._begun is None:
            return
        small, batch_size, updates = self._begun
        passed = self._optimizer.sync().updates - updates
        if passed == 0:
            return
        self._begun = None
        norm = self._optimizer.last_grad_norm
        if norm is None:
            raise RuntimeError(
                "the optimizer's step did not measure the gradients' norm; leave opt.measure_grad_norm "
                "switched on, also while a CUDA graph is captured, or pass the parameters to "
                "GradientNoiseScale in place of the optimizer"
            )
        if passed == 1:  # else it is another update's
            self._add(small, batch_size, norm**2)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Whose gradients are measured."""
        if self._optimizer is None:
            return self._parameters
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _squared_norm(self, tensors: list[torch.Tensor]) -> float:
        return squared_norm(tensors, self._native)

    def _add(self, small: _Small, b2: float, g2: float) -> None:
        b1, g1 = small
        if not (math.isfinite(g1) and math.isfinite(g2)):
            return
        self._observations += 1
        keep = self.decay
        self._gradient = keep * self._gradient + (1.0 - keep) * (b2 * g2 - b1 * g1) / (b2 - b1)
        self._noise = keep * self._noise + (1.0 - keep) * (g1 - g2) / (1.0 / b1 - 1.0 / b2)
        self._weight = keep * self._weight + (1.0 - keep)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "an update of one micro-batch has one batch size only, so nothing is measured: give the "
                "loader a micro_batch_size below the batch's share of a rank, or with several ranks "
                "attach(model)",
                UserWarning,
                stacklevel=3,
            )

    @property
    def observations(self) -> int:
        """Updates that were measured so far."""
        self._complete()
        return self._observations

    @property
    def squared_gradient(self) -> float:
        """The averaged estimate of :math:`|G|^2`; NaN before the first observation."""
        self._complete()
        return self._gradient / self._weight if self._weight else math.nan

    @property
    def noise(self) -> float:
        r"""The averaged estimate of :math:`S = \mathrm{tr}(\Sigma)`; NaN before the first observation."""
        self._complete()
        return self._noise / self._weight if self._weight else math.nan

    @property
    def scale(self) -> float:
        """The noise scale in samples: inf where noise hides the gradient, NaN where nothing is known."""
        gradient, noise = self.squared_gradient, self.noise
        if math.isnan(gradient) or noise <= 0.0:
            return math.nan if math.isnan(gradient) or gradient <= 0.0 else 0.0
        return noise / gradient if gradient > 0.0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The averages so far."""
        return {
            "observations": self.observations,  # completes the last one
            "gradient": self._gradient,
            "noise": self._noise,
            "weight": self._weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the averages that :meth:`state_dict` returned.

        Raises:
            ValueError: it is damaged; nothing has changed then.
        """
        state = saved_state("a GradientNoiseScale", state, ("observations", "gradient", "noise", "weight"))
        observations, weight = (
            count("observations", state["observations"], 0),
            real("weight", state["weight"]),
        )
        gradient, noise = (real(name, state[name], -math.inf) for name in ("gradient", "noise"))
        if (observations > 0) != (weight > 0.0):
            raise ValueError(
                f"observations and weight must be > 0 together, got observations={observations} and "
                f"weight={weight!r}"
            )
        self._observations, self._weight = observations, weight
        self._gradient, self._noise = gradient, noise
        self._small = self._reduced = self._begun = None

    def __getstate__(self) -> dict[str, Any]:
        self._complete()  # a copied optimizer has made no step
        return {name: value for name, value in self.__dict__.items() if name != "_native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _native=_core.SquaredNorm(Runtime))

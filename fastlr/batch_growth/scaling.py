r"""How rate and batch go together: in proportion for SGD, by the square root for adaptive rules.

``"linear"``: SGD's fluctuations depend on :math:`\mathrm{lr} / (B (1 - m))` (arXiv 1711.00489).

``"sqrt"``: the step of Adam, RMSprop and their kin is divided by the gradient's own root mean square, which
noise dominates and which falls by sqrt(k) when the batch grows by k. Such a step is as long as the rate says,
whatever the batch; over an epoch's N / B of them noise drives a parameter :math:`\mathrm{lr} \sqrt{N / B}`
far, root mean square. That is what stays the same when the rate follows the batch's square root.

References:
    Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv 1404.5997: the square
    root, from the variance of the gradient.
    Malladi, Lyu, Panigrahi and Arora, On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
    arXiv 2205.10287: the same for RMSprop and Adam, by the equations that they approximate.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

Scaling = Literal["linear", "sqrt"]

SCALINGS = ("linear", "sqrt")

Values = np.ndarray[Any, np.dtype[np.float64]]


def noise_scale(lr: float, momentum: float, batch_size: int, dataset_size: int, scaling: Scaling) -> float:
    """What plans of one scaling are compared by; see the head of this file.

    >>> noise_scale(0.1, 0.5, 100, 1000, "linear"), noise_scale(0.1, 0.5, 10, 1000, "sqrt")
    (2.0, 1.0)
    """
    if scaling == "sqrt":
        return lr * math.sqrt(dataset_size / batch_size)
    return lr * dataset_size / (batch_size * (1.0 - momentum))


def rate_factor(growth: float, scaling: Scaling) -> float:
    """What the rate is to be multiplied with where the batch is with ``growth``, for one noise scale.

    >>> rate_factor(4.0, "linear"), rate_factor(4.0, "sqrt")
    (4.0, 2.0)
    """
    return math.sqrt(growth) if scaling == "sqrt" else growth


def batch_sizes(start: float, peak: float, rates: Values, scaling: Scaling) -> Values:
    """The exact batch of ``peak`` that has the noise scale of ``start`` at each of lower ``rates``.

    >>> batch_sizes(10.0, 0.4, np.array([0.4, 0.1]), "linear").tolist()
    [10.0, 40.0]
    >>> batch_sizes(10.0, 0.4, np.array([0.4, 0.1]), "sqrt").tolist()
    [10.0, 160.0]
    """
    with np.errstate(divide="ignore", over="ignore"):
        if scaling == "sqrt":
            return np.where(rates > 0.0, start * (peak / rates) ** 2, np.inf)
        return np.where(rates > 0.0, start * peak / rates, np.inf)

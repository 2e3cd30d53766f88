"""mmengine: fastlr's optimizers in its registry, and schedules in its configurations.

Not imported with fastlr: ``import fastlr.integrations.mmengine``.
"""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS

from fastlr import optim
from fastlr.schedules import Schedule


class FusedOptimWrapperConstructor(DefaultOptimWrapperConstructor):  # type: ignore[misc]
    """mmengine's default constructor for optimizers whose configuration has schedules.

    What stands there as ``dict(type="Cosine", ...)``, the form of :meth:`fastlr.schedules.Schedule.to_dict`,
    becomes a schedule, also in ``betas``; ``lr_mult`` and ``decay_mult`` of ``paramwise_cfg`` scale it. Of
    several parameter groups the log has the first one's ``lr``; there is no ``base_lr``, which mmengine keeps
    for its own schedulers.
    """

    def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None) -> None:
        options = {name: _with_schedules(value) for name, value in optim_wrapper_cfg["optimizer"].items()}
        super().__init__({**optim_wrapper_cfg, "optimizer": options}, paramwise_cfg)

    def __call__(self, model: Any) -> Any:
        """The wrapper around the optimizer of a model."""
        wrapper = super().__call__(model)
        wrapper.base_param_settings = None
        return wrapper


def register() -> list[str]:
    """Adds fastlr's optimizers, and :class:`FusedOptimWrapperConstructor`, to mmengine's registries.

    Returns:
        The names in configurations; calling it again changes nothing.
    """
    kinds = [getattr(optim, name) for name in optim.__all__ if name.startswith("Fused")]
    kinds.remove(optim.FusedOptimizer)
    for kind in kinds:
        if kind.__name__ not in OPTIMIZERS:
            OPTIMIZERS.register_module(module=kind)
    if FusedOptimWrapperConstructor.__name__ not in OPTIM_WRAPPER_CONSTRUCTORS:
        OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=FusedOptimWrapperConstructor)
    return [kind.__name__ for kind in kinds]


def _with_schedules(value: Any) -> Any:
    if isinstance(value, dict) and "type" in value:
        return Schedule.from_dict(dict(value))
    if isinstance(value, (list, tuple)):
        return tuple(_with_schedules(entry) for entry in value)
    return value

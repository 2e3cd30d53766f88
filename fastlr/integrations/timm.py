"""timm: its factory finds fastlr's optimizers."""

from __future__ import annotations

import dataclasses

from fastlr import optim

# timm's name of a rule, and what has it here.
_COUNTERPARTS: dict[str, type[optim.FusedOptimizer]] = {
    "sgd": optim.FusedSGD,
    "momentum": optim.FusedSGD,
    "adam": optim.FusedAdam,
    "adamw": optim.FusedAdamW,
    "adagrad": optim.FusedAdagrad,
    "adadelta": optim.FusedAdadelta,
    "rmsprop": optim.FusedRMSprop,
    "lion": optim.FusedLion,
}


def register() -> list[str]:
    """Has ``timm.optim.create_optimizer_v2(model, opt="fastlradamw", ...)`` make fastlr's optimizers.

    Each is called as timm's own with ``fastlr`` before it and has the defaults that it has there:
    ``fastlrsgd`` is Nesterov's with momentum 0.9. ``lr`` and other options may be schedules. What timm gives
    a parameter group as its ``lr_scale`` (``layer_decay=0.75``) scales the schedule of its rate, as
    :meth:`fastlr.FusedOptimizer.set_schedule` says and timm's schedulers do.

    Returns:
        The names; calling it again changes nothing.
    """
    from timm.optim import get_optimizer_info, list_optimizers
    from timm.optim._optim_factory import default_registry  # which no public module has

    known = list_optimizers()
    for name, kind in _COUNTERPARTS.items():
        info = dataclasses.replace(
            get_optimizer_info(name),
            name=f"fastlr{name}",
            opt_class=kind,
            description=f"fastlr.{kind.__name__}, driven by schedules",
        )
        if info.name not in known:
            default_registry.register(info)
    return [f"fastlr{name}" for name in _COUNTERPARTS]

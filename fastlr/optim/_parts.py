"""What leaves an optimizer, as one rank of several, a part of a model, and what it then cannot do."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fastlr._runtime import Runtime


class Parts(NamedTuple):
    """Who divides a model between ranks.

    Attributes:
        name: its class.
        clip: what clips the gradients' norm there, and returns it.
    """

    name: str
    clip: str


FSDP1 = Parts("FullyShardedDataParallel", "model.clip_grad_norm_(max_norm)")
ZERO = Parts("ZeroRedundancyOptimizer", "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)")

# NOTE: [inside ZeroRedundancyOptimizer]
# It makes an optimizer of a rank's share of the parameters. Before each step it writes its own groups over
# that one's, and after it reads them, so that all else that changes them is undone. It tells nobody that it
# is there, and is recognised by who calls the constructor.
_MAKES_SHARE = "_init_local_optimizer"
_ITS_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"


def are_flattened(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether there are FSDP1's among them."""
    return any(map(Runtime.is_flattened, parameters))


def is_made_by_zero() -> bool:
    """Whether an optimizer is under construction inside ZeroRedundancyOptimizer."""
    return is_called_by(_MAKES_SHARE, _ITS_MODULE)


def is_called_by(name: str, module: str | None = None) -> bool:
    """Whether a function of this name, of that module or of any, is on the stack."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code.co_name == name and module in (None, frame.f_globals.get("__name__")):
            return True
        frame = frame.f_back
    return False

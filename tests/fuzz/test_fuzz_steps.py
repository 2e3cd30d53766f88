"""Any run of a fused optimizer is that of PyTorch's own with the schedules' values."""

from __future__ import annotations

import pytest

from fuzz import seeds
from fuzz.steps import Run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*holds its last value:UserWarning", "ignore:the file has no clock:UserWarning"
)


@pytest.mark.parametrize("seed", seeds(42))
def test_a_run_is_pytorchs_whatever_happens_between_its_steps(seed: int, backend: str) -> None:
    run = Run(seed, backend)
    try:
        run.go()
    except BaseException as error:
        error.add_note("\n".join(run.log)) if hasattr(error, "add_note") else print(*run.log, sep="\n")
        raise

"""What PyTorch and hooks raise in the middle of a call, and memory that runs out at any place."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import parameters
from native import toolchain

import fastlr
from fastlr._runtime import Runtime
from soak.test_interrupts import Subject, measuring, same, scaled_step, step

try:
    import _testcapi
except ModuleNotFoundError:
    _testcapi = None

ERRORS = (MemoryError, KeyboardInterrupt, torch.OutOfMemoryError)


class Failing(Runtime):
    """Raises at the k-th call of one of its methods."""

    def __init__(self, method: str, k: int, error: type[BaseException]) -> None:
        def fail(*arguments: Any) -> Any:
            nonlocal k
            k -= 1
            if k < 0:
                raise error("for the test")
            return getattr(Runtime, method)(*arguments)

        setattr(self, method, fail)
        self.method = method


def unhurt(subject: Subject, call: Any) -> None:
    """The next call, with a runtime that works, is as if nothing had been."""
    other = Subject(steps=0)
    subject.optimizer._make_plan()
    call(subject)
    call(other)
    assert same(subject.state(), other.state())


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize(
    ("method", "calls"),
    [("new_state", 4), ("fill", 1), ("read_amp", 1), ("will_write", 1)],
    ids=lambda v: str(v),
)
def test_what_the_runtime_raises_leaves_everything_as_it_was(
    method: str, calls: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(calls):
        monkeypatch.setattr("fastlr.optim._base.Runtime", lambda k=k: Failing(method, k, error))
        subject = Subject(steps=0)
        monkeypatch.undo()
        before = subject.state()
        with pytest.raises(error, match="for the test"):
            scaled_step(subject)
        assert same(subject.state(), before)
        assert len(subject.optimizer.state) == 0
        assert not hasattr(subject.optimizer, "grad_scale")
        unhurt(subject, scaled_step)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_the_same_plan_goes_on_after_an_error(error: type[BaseException]) -> None:
    """As after a buffer that did not fit: memory was made free, and the step is repeated."""
    failing = Failing("new_state", 2, error)
    subject, other = Subject(steps=0), Subject(steps=0)
    subject.optimizer._plan = fastlr._core.Plan("sgd", failing)
    with pytest.raises(error, match="for the test"):
        step(subject)
    failing.new_state = Runtime.new_state
    for _ in range(2):
        step(subject)
        step(other)
    assert same(subject.state(), other.state())


@pytest.mark.parametrize("k", range(2))
def test_a_gradient_that_cannot_be_copied_leaves_everything_as_it_was(
    k: int, on_emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On devices, gradients that lie otherwise than their parameters are copied first."""
    monkeypatch.setattr("fastlr.optim._base.Runtime", lambda: Failing("gradient_like", k, MemoryError))
    model = parameters([(4, 6), (3, 5)])
    for p in model:
        p.grad = torch.randn(p.shape[::-1]).t()
    before = [p.detach().clone() for p in model]
    optimizer = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    with pytest.raises(MemoryError, match="for the test"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model, strict=True))
    assert optimizer.clock() == (0, 0)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_that_raise(when: str) -> None:
    """Before the step nothing has happened, after it everything; GradScaler's numbers are taken back."""
    subject, other = Subject(), Subject()
    before = subject.state()

    def fail(*_: object) -> None:
        raise RuntimeError("for the test")

    register = getattr(subject.optimizer, f"register_step_{when}_hook")
    handle = register(fail)
    with pytest.raises(RuntimeError, match="for the test"):
        scaled_step(subject)
    handle.remove()
    if when == "post":
        scaled_step(other)
        before = other.state()
    assert same(subject.state(), before)
    assert not hasattr(subject.optimizer, "grad_scale")
    assert not hasattr(subject.optimizer, "found_inf")


class Scarce:
    """A plan in whose step one allocation of Python objects fails, the k-th."""

    def __init__(self, plan: Any, k: int) -> None:
        self._plan, self._k = plan, k

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def step(self, *arguments: Any) -> None:
        step = self._plan.step
        _testcapi.set_nomemory(self._k, self._k + 1)
        try:
            step(*arguments)
        finally:
            _testcapi.remove_mem_hooks()


CASES = {
    "first step": lambda: Subject(steps=0),
    "step": Subject,
    "measured first step": lambda: measuring(Subject(steps=0)),
}


@pytest.mark.skipif(_testcapi is None, reason="this Python has no _testcapi, which lets allocations fail")
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_memory_of_python_that_runs_out(make: Any, soak: bool) -> None:
    """At the k-th allocation, whichever it is, nothing has happened or everything."""
    whole = make()
    before = whole.state()
    step(whole)
    after = whole.state()
    failures = 0
    for k in range(300):
        subject = make()
        plan = subject.optimizer._plan
        subject.optimizer._plan = Scarce(plan, k)
        failed = False
        try:
            step(subject)
        except (MemoryError, RuntimeError, ValueError):
            failed = True
        failures += failed
        subject.optimizer._plan = plan
        made = not failed
        assert same(subject.state(), after if made else before), f"half a step at allocation {k}"
        if failed:
            step(subject)
            assert same(subject.state(), after)
        elif k > 100:
            break
    assert failures >= 3


# Room for the model, its gradients and the first buffer; then for the second one, too.
NO_ROOM = """
import resource
import torch, fastlr

torch.set_num_threads(1)
model = [torch.nn.Parameter(torch.ones(n)) for n in (1000, 20_000_000)]
for p in model:
    p.grad = torch.ones_like(p)
optimizer = fastlr.FusedSGD(model, lr=fastlr.Cosine(0.5, 0.0, 10), momentum=0.9)
limits = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, limits[1]))
try:
    optimizer.step()
except (RuntimeError, MemoryError) as error:
    print(type(error).__name__, "memory" in str(error))
resource.setrlimit(resource.RLIMIT_AS, limits)
print(all(bool((p == 1).all()) for p in model), optimizer.clock().updates, len(optimizer.state))
optimizer.step()
print(all(bool((p == 0.5).all()) for p in model), optimizer.clock().updates, len(optimizer.state))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_memory_that_runs_out_for_a_buffer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM], capture_output=True, text=True, timeout=120, cwd=toolchain.TESTS
    )
    assert done.stdout.splitlines() == ["RuntimeError True", "True 0 0", "True 1 2"], done.stderr

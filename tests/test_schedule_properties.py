"""What holds for every schedule, however it is put together."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlr
from fastlr import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*holds its last value:UserWarning")

# A sum and a product may round up once each: (max - base) * 1 + base can be one ulp above max.
ROUNDING = 1 + 4 * np.finfo(np.float64).eps

WINDOWS = ["linear", "geometric", "parabolic", "sinusoidal"]

no_deadline = settings(deadline=None)
rates = st.floats(0.0, 1.0, allow_subnormal=False)
positive = st.floats(1e-6, 1.0)
lengths = st.integers(1, 60)
sizes = st.floats(0.0, 40.0, allow_subnormal=False)


@st.composite
def cycles(draw: st.DrawFn) -> Schedule:
    base, top = sorted((draw(positive), draw(positive)))
    up = draw(sizes)
    down = draw(sizes if up >= 1.0 else st.floats(1.0, 40.0))
    shape = (base, top, up, down, draw(st.sampled_from(WINDOWS)))
    options = {"inverted": draw(st.booleans())}
    if draw(st.booleans()):
        return fastlr.ExpRange(*shape, gamma=draw(positive), decay_base=draw(st.booleans()), **options)
    return draw(st.sampled_from([fastlr.Triangular, fastlr.Triangular2]))(*shape, **options)


leaves = st.one_of(
    cycles(),
    st.builds(fastlr.Constant, rates),
    st.builds(fastlr.LinearRamp, rates, rates, lengths),
    st.builds(fastlr.Cosine, rates, rates, lengths),
    st.builds(fastlr.Polynomial, rates, rates, lengths, st.floats(0.1, 5.0)),
    st.builds(fastlr.OneMinusSqrt, rates, rates, lengths),
    st.builds(fastlr.InverseSqrt, rates, lengths),
    st.builds(fastlr.CosineWarmRestarts, rates, rates, lengths, st.integers(1, 4)),
    st.builds(fastlr.Exponential, rates, positive),
    st.builds(fastlr.TimeBased, rates, rates),
    st.builds(fastlr.StepDecay, rates, lengths, positive),
    st.builds(
        fastlr.MultiStep, rates, st.lists(st.integers(0, 80), max_size=6).map(sorted), st.floats(0.1, 2.0)
    ),
    st.builds(
        fastlr.OneCycle, rates, lengths, st.floats(0.0, 0.5), st.sampled_from(["cos", "linear"]),
        st.floats(0.5, 30.0), st.floats(0.5, 1e5), st.booleans(),
    ),
    st.builds(fastlr.Tabulated, st.lists(rates, min_size=1, max_size=20)),
)  # fmt: skip
any_schedule = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Schedule.then, inner, inner, lengths),
        st.builds(fastlr.Scaled, inner, st.floats(0.0, 4.0)),
        st.builds(fastlr.Shifted, inner, st.integers(0, 99)),
    ),
    max_leaves=5,
)
SPAN = 150


@no_deadline
@given(any_schedule)
def test_values_are_finite_and_between_zero_and_the_peak(schedule: Schedule) -> None:
    values = schedule.values(0, SPAN)
    assert np.isfinite(values).all()
    assert values.min() >= 0.0
    assert values.max() <= schedule.peak * ROUNDING


@no_deadline
@given(any_schedule)
def test_save_and_load_changes_nothing(schedule: Schedule) -> None:
    loaded = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert loaded == schedule
    assert loaded.values(0, SPAN).tobytes() == schedule.values(0, SPAN).tobytes()


@no_deadline
@given(any_schedule, any_schedule, any_schedule, lengths, lengths)
def test_joining_is_associative(a: Schedule, b: Schedule, c: Schedule, first: int, second: int) -> None:
    left = a.then(b, first).then(c, first + second)
    right = a.then(b.then(c, second), first)
    assert left == right
    assert left.values(0, SPAN).tobytes() == right.values(0, SPAN).tobytes()


@no_deadline
@given(any_schedule, any_schedule, lengths)
def test_joined_is_each_part_in_its_place(a: Schedule, b: Schedule, at: int) -> None:
    joined = a.then(b, at)
    assert joined.values(0, at).tobytes() == a.values(0, at).tobytes()
    assert joined.values(at, at + SPAN).tobytes() == b.values(0, SPAN).tobytes()
    assert a.then(joined, 10**6).values(0, SPAN).tobytes() == a.values(0, SPAN).tobytes()


@no_deadline
@given(leaves, st.floats(0.0, 100.0, allow_subnormal=False))
def test_scaling_commutes_with_evaluation(schedule: Schedule, factor: float) -> None:
    assert (schedule * factor).values(0, SPAN).tolist() == (schedule.values(0, SPAN) * factor).tolist()
    assert factor * schedule == schedule * factor
    assert (schedule * 2.0) * 0.5 == schedule * 1.0


@no_deadline
@given(any_schedule, st.floats(0.1, 100.0))
def test_scaling_commutes_with_joining(schedule: Schedule, factor: float) -> None:
    halves = (schedule * factor).then(schedule * factor, 7)
    whole = schedule.then(schedule, 7) * factor
    np.testing.assert_allclose(halves.values(0, SPAN), whole.values(0, SPAN), rtol=1e-15, atol=1e-300)


@no_deadline
@given(leaves, st.integers(1, 9))
def test_in_updates_holds_each_epochs_value(schedule: Schedule, n: int) -> None:
    epochs = dataclasses.replace(schedule, unit="epoch")
    updates = epochs.in_updates(n)
    assert updates.unit == "update"
    assert updates.values(0, SPAN).tolist() == [epochs(u // n) for u in range(SPAN)]
    if epochs.duration is not None:
        assert updates.duration == epochs.duration * n


@no_deadline
@given(leaves, st.integers(1, 9))
def test_in_samples_holds_each_updates_value(schedule: Schedule, n: int) -> None:
    samples = schedule.in_samples(n)
    assert samples.unit == "sample"
    assert samples.values(0, SPAN).tolist() == [schedule(t // n) for t in range(SPAN)]


@no_deadline
@given(any_schedule, st.integers(0, 99))
def test_shifted_is_read_further_on(schedule: Schedule, by: int) -> None:
    shifted = fastlr.Shifted(schedule, by)
    assert shifted.values(0, SPAN).tobytes() == schedule.values(by, by + SPAN).tobytes()
    assert fastlr.Shifted(shifted, 3) == fastlr.Shifted(schedule, by + 3)
    samples = schedule.in_samples(4)
    assert fastlr.Shifted(samples, by)(5) == samples(by + 5)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush denormals")
@pytest.mark.parametrize(
    "schedule",
    [
        fastlr.Exponential(1.0, 0.5),
        fastlr.Triangular2(0.0, 1.0, 1),
        fastlr.ExpRange(0.0, 1.0, 3, gamma=0.5),
        fastlr.ExpRange(0.1, 1.0, 3, 2, "geometric", gamma=0.5, decay_base=True),
        fastlr.StepDecay(1e-300, 7, 0.5),
        fastlr.Tabulated([5e-324, 1e-310]),
        fastlr.Polynomial(1.0, 0.0, 1000, 104.0),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_flushing_denormals_changes_nothing(schedule: Schedule) -> None:
    normal = schedule.values(0, 2200)
    subnormal = (normal > 0.0) & (normal < np.finfo(np.float64).tiny)
    assert subnormal.any()
    torch.set_flush_denormal(True)
    try:
        # Compared as bytes: a thread that flushes takes 5e-324 for 0.
        flushed = Schedule.from_dict(schedule.to_dict()).values(0, 2200).tobytes()
        called = np.array([schedule(t) for t in range(2200)]).tobytes()
    finally:
        torch.set_flush_denormal(False)
    assert flushed == called == normal.tobytes()

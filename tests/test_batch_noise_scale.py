"""The noise scale against a problem where it is known, and the growth that follows it."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch

import fastlr
from fastlr import AdaptiveGrowth, BatchPlan, GradientNoiseScale, GrowingLoader, _core
from fastlr._runtime import Runtime
from fastlr.batch_growth.noise_scale import _Small, squared_norm

D = 64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Linear regression, y = x . w* + e with x ~ N(0, H), e ~ N(0, s^2), loss (x . w - y)^2 / 2. At w = w* + d a
# sample's gradient is x (x . d - e). Gaussian fourth moments give
#   G = H d,   E |gradient|^2 = tr(H) (d.H.d) + 2 |H d|^2 + s^2 tr(H),   tr(Sigma) = E |gradient|^2 - |G|^2.
# With many inputs the squared norms of gradients scatter little, so that a short run says enough.
H = torch.logspace(2, -2, D, base=2.0, dtype=torch.float64)
OFFSET = 0.2 * torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SPREAD = 0.7
SQUARED_GRADIENT = float((H * OFFSET).square().sum())
TRACE = float(
    H.sum() * (H * OFFSET.square()).sum() + 2 * (H * OFFSET).square().sum() + SPREAD**2 * H.sum()
) - SQUARED_GRADIENT  # fmt: skip


class Regression(torch.utils.data.Dataset[Any]):
    def __init__(self, size: int) -> None:
        generator = torch.Generator("cpu").manual_seed(11)
        options: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        self.x = torch.randn(size, D, **options) * H.sqrt()
        # The weights of the model are zero, so that w* is -OFFSET.
        self.y = -self.x @ OFFSET + SPREAD * torch.randn(size, **options)

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> Any:
        return self.x[indices], self.y[indices]


def as_it_is(batch: Any) -> Any:
    return batch


def measured(
    batch_size: int,
    micro: int,
    *,
    size: int = 60_000,
    grad_scale: float = 1.0,
    tail: str = "carry",
    in_step: bool = False,
) -> GradientNoiseScale:
    """The noise scale along a run whose weights stay where they are."""
    plan = BatchPlan.from_phases([(0, batch_size)], dataset_size=size, epochs=1, lr=0.0, tail=tail)
    model = torch.nn.Linear(D, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    opt = fastlr.FusedSGD(model.parameters(), lr=0.0)
    noise = GradientNoiseScale(opt if in_step else model.parameters(), decay=0.9999)
    for batch in GrowingLoader(Regression(size), plan, micro, seed_samples=False, collate_fn=as_it_is):
        x, y = batch.to(torch.get_default_device()).data
        loss = (model(x).squeeze(1) - y).square().mean() / 2
        (loss * batch.weight * grad_scale).backward()
        noise.observe(batch, grad_scale)
        if batch.ends_update:
            opt.grad_scale = torch.tensor(grad_scale)
            opt.step()
            model.zero_grad()
    return noise


@pytest.mark.parametrize(("batch_size", "micro"), [(128, 16), (96, 16), (192, 32)])
def test_a_known_noise_scale_is_found(batch_size: int, micro: int) -> None:
    noise = measured(batch_size, micro)
    assert noise.observations == 60_000 // batch_size
    assert noise.squared_gradient == pytest.approx(SQUARED_GRADIENT, rel=0.1)
    assert noise.noise == pytest.approx(TRACE, rel=0.1)
    assert noise.scale == pytest.approx(TRACE / SQUARED_GRADIENT, rel=0.1)


def test_a_scaled_loss_changes_nothing() -> None:
    plain, scaled = (measured(32, 8, size=3200, grad_scale=scale) for scale in (1.0, 1024.0))
    assert scaled.scale == pytest.approx(plain.scale, rel=1e-12)


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("tail", ["carry", "keep"])
def test_partial_updates_are_left_out(tail: str, in_step: bool) -> None:
    assert measured(32, 8, size=3210, tail=tail, in_step=in_step).observations == 100


def test_one_size_tells_nothing_and_says_so() -> None:
    with pytest.warns(UserWarning, match="one batch size only.*micro_batch_size"):
        noise = measured(32, 32, size=320)
    assert noise.observations == 0
    assert math.isnan(noise.scale)


def test_the_two_sizes_are_combined_without_bias() -> None:
    """By hand: |G|^2 = 3 and S = 80 make squared norms of 3 + 80 / b."""
    noise = GradientNoiseScale([torch.zeros(1)], decay=0.5)
    for _ in range(3):
        noise._add(_Small(4.0, 3 + 80 / 4), 16.0, 3 + 80 / 16)
    assert noise.squared_gradient == pytest.approx(3)
    assert noise.noise == pytest.approx(80)
    assert noise.scale == pytest.approx(80 / 3)
    noise._add(_Small(4.0, math.inf), 16.0, 1.0)
    assert noise.observations == 3


def test_averages_are_saved() -> None:
    noise = measured(32, 8, size=640)
    other = GradientNoiseScale([torch.zeros(1)], decay=noise.decay)
    other.load_state_dict(noise.state_dict())
    assert (other.scale, other.observations) == (noise.scale, noise.observations)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_squared_norms_are_exact(dtype: torch.dtype) -> None:
    exact = torch.complex128 if dtype.is_complex else torch.float64
    tensors = [torch.randn(shape, dtype=exact).to(dtype) for shape in ((), (7,), (5, 0), (33, 9))]
    tensors.append(torch.randn(8, 6, dtype=exact).to(dtype).t()[::2])
    expected = sum(float(abs(complex(v)) ** 2) for t in tensors for v in t.flatten().tolist())
    assert squared_norm(tensors) == pytest.approx(expected, rel=1e-13)
    assert squared_norm([]) == 0.0


def test_squared_norms_depend_on_no_threads_and_no_simd_level() -> None:
    sizes, types = (0, 1, 9, 4096, 4097, 100_003), (torch.float32, torch.bfloat16, torch.float16)
    tensors = [torch.randn(n).to(dtype) for n in sizes for dtype in types]
    tensors += [torch.randn(70, 50).t(), torch.randn(33, dtype=torch.complex64)]
    found = set()
    level = _core.build_info()["simd_level"]
    try:
        for name in _core.build_info()["simd_levels"]:
            _core.set_simd_level(name)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.add(squared_norm(tensors))
    finally:
        _core.set_simd_level(level)
    assert len(found) == 1
    assert _core.SquaredNorm(Runtime).measure(tensors, 1)[1] == []  # all of them natively


def test_squared_norms_of_what_is_not_dense() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)[:, ::2]
    assert squared_norm([tensor, torch.ones(2)]) == float(tensor.square().sum()) + 2.0
    twice = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([3.0, 4.0]), (5,), check_invariants=True
    )
    assert squared_norm([twice, torch.ones(2)]) == 49.0 + 2.0


def test_squared_norms_do_not_overflow_their_type() -> None:
    assert squared_norm([torch.full((4,), 3e30)]) == pytest.approx(3.6e61, rel=1e-6)
    assert squared_norm([torch.full((1 << 16,), 300.0, dtype=torch.float16)]) == 300.0**2 * (1 << 16)


# -- growth --------------------------------------------------------------------------------------------


class Told(GradientNoiseScale):
    """A noise scale that is told what it is."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)])

    def tell(self, scale: float) -> None:
        self._observations += 1
        self._gradient, self._noise, self._weight = 1.0, scale, 1.0


def grow(scales: list[float], **options: Any) -> tuple[AdaptiveGrowth, GrowingLoader, list[int]]:
    plan = BatchPlan.from_phases([(0, 4)], dataset_size=400, epochs=10, lr=0.1)
    loader = GrowingLoader(torch.arange(400), plan, 4, seed_samples=False)
    noise = Told()
    growth = AdaptiveGrowth(noise, loader, **{"max_batch_size": 16, "patience": 3, **options})
    sizes = []
    told = iter(scales)
    for batch in loader:
        if batch.ends_update:
            scale = next(told, None)
            if scale is None:
                break
            sizes.append(batch.global_batch)
            noise.tell(scale)
            growth.update(batch)
    return growth, loader, sizes


def test_growth_needs_patience_and_margin() -> None:
    growth, _, _ = grow([8.0, 8.0, 7.9, 8.0, 8.0, 8.0, 8.0])
    assert [(entry.before, entry.after, entry.sample) for entry in growth.log] == [(4, 8, 24)]
    growth, _, _ = grow([8.0] * 9, margin=1.5)
    assert growth.log == []
    growth, _, _ = grow([12.0] * 9, margin=1.5)
    assert growth.batch_size == 8


def test_growth_is_capped_and_never_shrinks() -> None:
    growth, _, _ = grow([1e6] * 30 + [0.1] * 30)
    assert [entry.after for entry in growth.log] == [8, 16]
    assert growth.batch_size == 16


def test_growth_is_advice_unless_applied(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastlr"):
        growth, loader, sizes = grow([1e6] * 12)
    assert sizes == [4] * 12
    assert loader.plan.batch_sizes == (4,)
    assert growth.batch_size == 16
    assert caplog.messages[0].endswith("the batch should grow from 4 to 8")
    growth, loader, sizes = grow([1e6] * 12, apply=True)
    assert sizes == [4] * 3 + [8] * 3 + [16] * 6
    assert loader.plan.batch_sizes == (4, 8, 16)


def test_growth_is_saved() -> None:
    growth, loader, _ = grow([1e6] * 5)
    noise = Told()
    other = AdaptiveGrowth(noise, loader, max_batch_size=16, patience=3)
    with pytest.raises(
        ValueError, match="seen 5 observations, the noise scale has 0; load the noise scale's"
    ):
        other.load_state_dict(growth.state_dict())
    noise.load_state_dict(growth._noise.state_dict())
    other.load_state_dict(growth.state_dict())
    assert (other.batch_size, other.log, other._above) == (growth.batch_size, growth.log, growth._above)


class Adaptive:
    """A training whose batch follows the noise scale, with all that a checkpoint holds."""

    def __init__(self, by_parameters: bool) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(5, 3)
        data = torch.utils.data.TensorDataset(torch.randn(48, 5), torch.randint(3, (48,)))
        plan = BatchPlan.from_phases([(0, 4), (2, 12)], dataset_size=48, epochs=3, lr=0.1, momentum=0.9)
        self.optimizer = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr, momentum=plan.momentum)
        self.loader = GrowingLoader(data, plan, micro_batch_size=2).bind(self.optimizer)
        measured = list(self.model.parameters()) if by_parameters else self.optimizer
        self.noise = GradientNoiseScale(measured, decay=0.5)
        options = {"max_batch_size": 32, "apply": True, "patience": 2, "margin": 0.01}
        self.growth = AdaptiveGrowth(self.noise, self.loader, **options)

    def save(self) -> dict[str, Any]:
        return {name: copy.deepcopy(part.state_dict()) for name, part in vars(self).items()}

    def train(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What was saved right after each step, and right after the growth has seen it."""
        stepped, seen = [], []
        for batch in self.loader:
            x, y = batch.data
            (torch.nn.functional.cross_entropy(self.model(x), y) * batch.weight).backward()
            self.noise.observe(batch)
            if batch.ends_update:
                self.optimizer.step()
                stepped.append(self.save())
                self.optimizer.zero_grad()
                self.growth.update(batch)
                seen.append(self.save())
        return stepped, seen


@pytest.mark.parametrize("by_parameters", [False, True], ids=["optimizer", "parameters"])
def test_a_run_that_grows_resumes_from_right_after_any_step(by_parameters: bool) -> None:
    whole = Adaptive(by_parameters)
    stepped, seen = whole.train()
    end = whole.save()
    assert len(end["growth"]["log"]) >= 2
    for state in stepped + seen:
        resumed = Adaptive(by_parameters)
        for name, part in vars(resumed).items():
            part.load_state_dict(state[name])
        resumed.train()
        now = resumed.save()
        assert now["growth"] == end["growth"]
        assert now["loader"] == end["loader"]
        assert all(
            torch.equal(a, b) for a, b in zip(now["model"].values(), end["model"].values(), strict=True)
        )


def test_growth_is_loaded_after_the_loader() -> None:
    run = Adaptive(by_parameters=False)
    state = run.train()[0][1]
    other = Adaptive(by_parameters=False)
    other.noise.load_state_dict(state["noise"])
    before = other.save()
    with pytest.raises(ValueError, match=r"from sample 8 .* stands at 0; load the loader's state first"):
        other.growth.load_state_dict(state["growth"])
    assert other.growth.state_dict() == before["growth"]


LOADER = GrowingLoader(
    torch.arange(40), BatchPlan.from_phases([(0, 4)], dataset_size=40, epochs=1, lr=0.1), 4
)
BAD = {
    "no parameters": (lambda: GradientNoiseScale([]), "parameters must be at least one tensor, got none"),
    "decay": (lambda: GradientNoiseScale([torch.zeros(1)], decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
    "another optimizer": (
        lambda: GradientNoiseScale(torch.optim.SGD([torch.zeros(1)])),
        "one of fastlr's optimizers, got SGD; pass the parameters"),
    "attach": (
        lambda: Told().attach(torch.nn.Linear(1, 1)), "must be a DistributedDataParallel, got 'Linear'"),
    "max": (
        lambda: AdaptiveGrowth(Told(), LOADER, max_batch_size=2),
        "max_batch_size must be >= the present batch size, 4, got 2"),
    "more than there is": (
        lambda: AdaptiveGrowth(Told(), LOADER, max_batch_size=64), "must be <= the data set's 40 .* got 64"),
    "factor": (lambda: AdaptiveGrowth(Told(), LOADER, max_batch_size=8, factor=1), "factor must be .* >= 2"),
    "patience": (lambda: AdaptiveGrowth(Told(), LOADER, max_batch_size=8, patience=0), "patience must be"),
    "noise": (lambda: AdaptiveGrowth(3.0, LOADER, max_batch_size=8), "noise must be a GradientNoiseScale"),
    "loader": (lambda: AdaptiveGrowth(Told(), [], max_batch_size=8), "loader must be a GrowingLoader"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# -- in a fused optimizer's step -------------------------------------------------------------------


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0])
def test_the_step_measures_what_a_pass_of_its_own_would(backend: str, grad_scale: float) -> None:
    in_step = measured(32, 8, size=1280, grad_scale=grad_scale, in_step=True)
    apart = measured(32, 8, size=1280, grad_scale=grad_scale)
    assert in_step.observations == apart.observations == 40
    assert in_step.squared_gradient == pytest.approx(apart.squared_gradient, rel=1e-10)
    assert in_step.noise == pytest.approx(apart.noise, rel=1e-12)


def test_a_known_noise_scale_is_found_in_the_step() -> None:
    noise = measured(40, 8, in_step=True)
    assert noise.observations == 1500
    assert noise.scale == pytest.approx(TRACE / SQUARED_GRADIENT, rel=0.1)


class Run:
    """Updates of two micro-batches."""

    def __init__(self) -> None:
        plan = BatchPlan.from_phases([(0, 8)], dataset_size=80, epochs=1, lr=0.01)
        self.model = torch.nn.Linear(D, 1, dtype=torch.float64)
        self.opt = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr)
        self.noise = GradientNoiseScale(self.opt)
        loader = GrowingLoader(Regression(80), plan, 4, seed_samples=False, collate_fn=as_it_is)
        self.batches = iter(loader.bind(self.opt))

    def observe_update(self) -> None:
        for batch in (next(self.batches), next(self.batches)):
            x, y = batch.to(torch.get_default_device()).data
            loss = (self.model(x).squeeze(1) - y).square().mean()
            (loss * batch.weight).backward()
            self.noise.observe(batch)

    def step(self) -> None:
        self.opt.step()
        self.opt.zero_grad()


def test_an_observation_is_complete_after_the_step(backend: str) -> None:
    run = Run()
    assert run.noise.parameters == list(run.model.parameters())
    run.observe_update()
    assert run.noise.observations == 0
    assert math.isnan(run.noise.squared_gradient)
    run.step()
    assert not math.isnan(run.noise.squared_gradient)
    assert run.noise.observations == 1
    assert run.noise.state_dict()["observations"] == 1
    run.observe_update()
    run.step()
    run.observe_update()  # completes the one before
    assert run.noise._observations == 2


def test_updates_that_were_not_applied_do_not_count(backend: str) -> None:
    run = Run()
    run.observe_update()
    run.opt.found_inf = torch.ones(())
    run.step()
    assert run.noise.observations == 0
    del run.opt.found_inf
    run.observe_update()
    run.step()
    assert run.noise.observations == 1
    run.observe_update()
    run.opt.zero_grad()  # no step at all
    run.observe_update()
    run.step()
    assert run.noise.observations == 2
    run.observe_update()
    run.step()
    run.step()  # the norm is this one's
    assert run.noise.observations == 2


@pytest.mark.parametrize("skipped", [0, 1], ids=lambda update: f"update-{update}-skipped")
def test_an_update_that_tells_nothing_takes_none_away(skipped: int) -> None:
    """Full updates, and at the end of each epoch a partial one."""
    plan = BatchPlan.from_phases([(0, 16)], dataset_size=40, epochs=2, lr=0.01, tail="keep")
    model = torch.nn.Linear(D, 1, dtype=torch.float64)
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr)
    noise = GradientNoiseScale(opt)
    updates = 0
    for batch in GrowingLoader(Regression(40), plan, 8, seed_samples=False, collate_fn=as_it_is).bind(opt):
        loss = (model(batch.data[0]).squeeze(1) - batch.data[1]).square().mean()
        (loss * batch.weight).backward()
        noise.observe(batch)
        if batch.ends_update:
            opt.found_inf = torch.tensor(float(updates == skipped))
            opt.step()
            opt.zero_grad()
            updates += 1
    assert updates == 6
    assert noise.observations == 3


def test_a_step_that_measured_nothing_is_told() -> None:
    run = Run()
    run.opt.measure_grad_norm = False
    run.observe_update()
    run.step()
    with pytest.raises(RuntimeError, match=r"leave opt\.measure_grad_norm switched on"):
        run.noise.observations  # noqa: B018


def test_growth_follows_the_step(backend: str) -> None:
    run = Run()
    plan = BatchPlan.from_phases([(0, 8)], dataset_size=80, epochs=9, lr=0.0)
    loader = GrowingLoader(Regression(80), plan, 4, seed_samples=False, collate_fn=as_it_is)
    growth = AdaptiveGrowth(run.noise, loader, max_batch_size=16, margin=1e-9, patience=2)
    grew = []
    for batch in loader:
        if batch.ends_update and len(grew) < 3:
            run.observe_update()
            run.step()
            grew.append(growth.update(batch))
    assert grew == [False, True, False]


def test_it_is_copied_with_its_optimizer() -> None:
    run = Run()
    run.observe_update()
    run.step()
    noise, opt = copy.deepcopy((run.noise, run.opt))
    assert noise._optimizer is opt
    assert noise.observations == 1
    assert squared_norm([torch.ones(3)], noise._native) == 3.0

"""range_test() leaves no trace, sweeps what it says, and refuses what it cannot test."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import fastlr

FEATURES, CLASSES = 6, 3
cross_entropy = torch.nn.functional.cross_entropy


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For such small tensors a second thread only waits, long if other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(torch.nn.Module):
    """Everything that a careless range test would change: dropout, running statistics, other buffers."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(FEATURES, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.frozen_norm = torch.nn.BatchNorm1d(16).eval()
        self.dropout = torch.nn.Dropout(0.3)
        self.last = torch.nn.Linear(16, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mean_input", torch.zeros(FEATURES))

    def forward(self, x):
        self.calls += 1
        self.mean_input = 0.9 * self.mean_input + 0.1 * x.mean(0)  # a new tensor, not an update in place
        x = x + 0.01 * random.random() + 0.01 * float(np.random.random())  # noqa: NPY002
        return self.last(self.dropout(self.frozen_norm(self.norm(self.first(x).relu()))))


OPTIMIZERS = {
    "FusedSGD": lambda p: fastlr.FusedSGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "FusedSGD on a schedule": lambda p: fastlr.FusedSGD(p, lr=fastlr.Cosine(0.1, 0.0, 40), momentum=0.9),
    "FusedCyclicSGD": lambda p: fastlr.FusedCyclicSGD(p, 0.01, 0.1, step_size_up=5, cycle_momentum=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "torch Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "torch Adam, lr a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
}
each_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Job:
    """A training job whose every random number is seeded."""

    def __init__(self, make_optimizer=OPTIMIZERS["FusedSGD"]):
        torch.manual_seed(1)
        np.random.seed(2)  # noqa: NPY002
        random.seed(3)
        x = torch.randn(70, FEATURES)
        y = (x @ torch.randn(FEATURES, CLASSES)).argmax(1)
        self.model = Net()
        self.optimizer = make_optimizer(self.model.parameters())
        self.loader = DataLoader(
            TensorDataset(x, y), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(4)
        )
        self.val_loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    def fit(self, epochs):
        for _ in range(epochs):
            for x, y in self.loader:
                cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    def range_test(self, loss_fn=cross_entropy, **options):
        options = {"num_steps": 40, "val_every": 4, "progress": False} | options
        return fastlr.range_test(self.model, self.optimizer, loss_fn, self.loader, self.val_loader, **options)

    def everything(self):
        """All that the next update depends on, as one structure."""
        return {
            "model": dict(self.model.named_parameters()) | dict(self.model.named_buffers()),
            "gradients": [p.grad for p in self.model.parameters()],
            "flags": [module.training for module in self.model.modules()],
            "optimizer": self.optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),  # noqa: NPY002
            "python": random.getstate(),
            "loader": self.loader.generator.get_state(),
        }


def assert_same(a, b, where=""):
    """Equality bit for bit, through containers; NaN equals NaN."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.detach().numpy().tobytes() == b.detach().numpy().tobytes(), where
    elif isinstance(a, np.ndarray):
        assert a.tobytes() == b.tobytes(), where
    else:
        assert a == b, where


# -- the transaction -----------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("warm", [0, 2], ids=["cold", "warm"])
def test_training_goes_on_as_if_nothing_had_been(make_optimizer, warm):
    plain = Job(make_optimizer).fit(warm).fit(3)
    tested = Job(make_optimizer).fit(warm)
    assert len(tested.range_test().losses) > 10
    tested.fit(3)
    assert_same(tested.everything(), plain.everything())


@each_optimizer
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 23], ids=["first batch", "midway"])
def test_an_exception_is_passed_on_and_leaves_no_trace(make_optimizer, error, at):
    job = Job(make_optimizer).fit(1)
    before = copy.deepcopy(job.everything())
    calls = iter(range(1000))

    def loss_fn(output, target):
        if next(calls) == at:
            raise error("stop here")
        return cross_entropy(output, target)

    with pytest.raises(error, match="stop here"):
        job.range_test(loss_fn)
    assert_same(job.everything(), before)


def test_identities_gradients_and_odd_values_survive():
    job = Job().fit(1)
    parameters = list(job.model.parameters())
    for p in parameters[::2]:
        p.grad = torch.randn_like(p)
    with torch.no_grad():
        parameters[1][0] = torch.nan
    job.model.register_buffer("expanded", torch.ones(1).expand(5))
    job.model.first.eval()
    parameters[3].requires_grad_(False)
    before = copy.deepcopy(job.everything())
    objects = [(p, p.grad, job.optimizer.state[p].get("momentum_buffer")) for p in parameters]
    buffer, entry = job.model.mean_input, job.optimizer.param_groups[0]
    job.range_test()
    assert_same(job.everything(), before)
    for p, gradient, momentum in objects:
        assert p.grad is gradient
        assert job.optimizer.state[p].get("momentum_buffer") is momentum
    assert job.model.mean_input is buffer
    assert job.optimizer.param_groups[0] is entry


def test_the_optimizer_still_knows_that_its_last_step_was_skipped():
    job = Job()
    job.optimizer.found_inf = torch.ones(())
    job.optimizer.step()
    del job.optimizer.found_inf
    job.range_test()
    assert job.optimizer.last_step_skipped


def test_a_numpy_generator_of_the_sampler_is_put_back():
    class Shuffled(torch.utils.data.Sampler):
        def __init__(self):
            self.numpy, self.python = np.random.default_rng(0), random.Random(0)

        def __iter__(self):
            order = list(self.numpy.permutation(20))
            self.python.shuffle(order)
            return iter(order)

    x, y = torch.randn(20, FEATURES), torch.zeros(20, dtype=torch.int64)
    loader = DataLoader(TensorDataset(x, y), sampler=Shuffled(), batch_size=5)
    expected = list(Shuffled())
    model = torch.nn.Linear(FEATURES, CLASSES)
    opt = fastlr.FusedSGD(model.parameters())
    fastlr.range_test(model, opt, cross_entropy, loader, num_steps=10, progress=False)
    assert list(loader.sampler) == expected


def test_a_model_in_eval_mode_is_trained_and_put_back():
    job = Job()
    job.model.eval()
    seen = []
    job.range_test(
        lambda output, target: seen.append(job.model.dropout.training) or cross_entropy(output, target)
    )
    assert all(seen)
    assert not any(module.training for module in job.model.modules())


def test_modules_in_eval_mode_stay_there_in_a_model_in_train_mode():
    job = Job()
    seen = []

    def loss_fn(output, target):
        seen.append((job.model.norm.training, job.model.frozen_norm.training))
        return cross_entropy(output, target)

    job.range_test(loss_fn)
    assert set(seen) == {(True, False)}


# -- the sweep -----------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize(
    ("sweep", "expected"),
    [("exponential", np.geomspace(1e-4, 1e-1, 24)), ("linear", np.linspace(1e-4, 1e-1, 24))],
    ids=["exponential", "linear"],
)
def test_every_group_uses_the_rates_that_are_reported(make_optimizer, sweep, expected):
    job = Job(lambda p: (lambda ps: make_optimizer([{"params": ps[:3]}, {"params": ps[3:]}]))(list(p)))
    used = []

    def loss_fn(output, target):
        used.append([float(group["lr"]) for group in job.optimizer.param_groups])
        return cross_entropy(output, target)

    found = job.range_test(loss_fn, start_lr=1e-4, end_lr=1e-1, num_steps=24, sweep=sweep)
    np.testing.assert_allclose(found.lrs, expected, rtol=1e-12)
    # The rate that update i uses stands in the group while its loss is computed; float32 in a tensor.
    np.testing.assert_allclose(used, np.stack([expected, expected], 1), rtol=1e-6)
    assert found.sweep == sweep


def quadratic(offset=0.0, curvature=1.0):
    """w**2 / 2 on one weight, from 1: SGD at rate lr multiplies the weight by 1 - lr * curvature."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))]
    return model, lambda output, target: curvature * output.square().mean() / 2 + offset, batches


@pytest.mark.parametrize("make", [fastlr.FusedSGD, torch.optim.SGD])
def test_losses_are_those_before_each_update(make):
    model, loss_fn, batches = quadratic()
    found = fastlr.range_test(
        model,
        make(model.parameters()),
        loss_fn,
        batches,
        start_lr=0.01,
        end_lr=0.5,
        num_steps=30,
        progress=False,
    )
    weights = np.concatenate([[1.0], np.cumprod(1 - np.geomspace(0.01, 0.5, 30))[:-1]])
    np.testing.assert_allclose(found.losses, weights**2 / 2, rtol=1e-4)
    assert found.stopped is None
    assert model.weight.item() == 1.0


@pytest.mark.parametrize("offset", [0.0, 1.0, -1000.0], ids=["to zero", "positive", "negative"])
def test_divergence_stops_the_sweep(offset):
    model, loss_fn, batches = quadratic(offset)
    opt = fastlr.FusedSGD(model.parameters())
    found = fastlr.range_test(
        model, opt, loss_fn, batches, start_lr=0.01, end_lr=1e4, num_steps=200, progress=False
    )
    # Above 2 the weight grows; the loss is far beyond any bound long before 1e4.
    assert "diverged" in found.stopped
    assert 2 < found.lrs[-1] < 100
    assert np.isfinite(found.losses).all()


def test_a_negative_loss_that_falls_is_no_divergence():
    model, _, batches = quadratic()
    opt = torch.optim.SGD(model.parameters())
    found = fastlr.range_test(
        model, opt, lambda output, target: -output.mean(), batches, end_lr=10.0, num_steps=60, progress=False
    )
    assert found.stopped is None
    assert len(found.losses) == 60
    assert (np.diff(found.losses) < 0).all()


def test_noise_around_a_loss_of_zero_is_no_divergence():
    model, _, batches = quadratic()
    losses = iter(
        np.concatenate([np.linspace(1, 0.001, 40), 0.001 + 0.1 * np.sin(np.arange(40)), [50.0] * 20])
    )
    found = fastlr.range_test(
        model,
        fastlr.FusedSGD(model.parameters()),
        lambda output, target: 1e-9 * output.mean() + float(next(losses)),
        batches,
        num_steps=100,
        progress=False,
    )
    assert 80 < len(found.losses) < 90
    assert "diverged" in found.stopped


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [1, 15, 16, 37])
def test_the_curve_ends_before_the_first_loss_that_is_not_finite(value, at):
    job = Job()
    calls = iter(range(1000))

    def loss_fn(output, target):
        loss = cross_entropy(output, target)
        return loss * value if next(calls) == at else loss

    before = copy.deepcopy(job.everything())
    found = job.range_test(loss_fn, num_steps=60, val_every=7)
    assert len(found.losses) == len(found.lrs) == len(found.accuracies) == at
    assert str(float(value)) in found.stopped
    assert f"{found.lrs[-1] * (found.lrs[1] / found.lrs[0] if at > 1 else 1):.1g}"[:1] in found.stopped
    assert_same(job.everything(), before)


def test_code_that_chokes_on_nan_does_not_hide_that_the_loss_was_nan():
    job = Job()
    calls = iter(range(1000))

    def loss_fn(output, target):
        if not output.isfinite().all():
            raise FloatingPointError("no NaN here, please")
        return cross_entropy(output, target) * (torch.nan if next(calls) == 5 else 1.0)

    assert "nan" in job.range_test(loss_fn, val_every=100).stopped


def test_a_loader_that_runs_out_begins_again():
    job = Job()
    assert len(job.loader) == 5
    assert len(job.range_test(num_steps=23, end_lr=0.1).losses) == 23


def test_no_update_makes_the_host_wait():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    model = torch.nn.Linear(FEATURES, CLASSES)
    batches = [(torch.randn(8, FEATURES), torch.zeros(8, dtype=torch.int64))] * 3
    opt = fastlr.FusedSGD(model.parameters())
    with Reads() as reads:
        torch.ones(()).item()
        assert reads.count == 1
        fastlr.range_test(model, opt, cross_entropy, batches, num_steps=64, progress=False)
    assert reads.count == 2  # the other: whether the first gradient is zero


# -- validation ----------------------------------------------------------------------------------------


def test_accuracy_is_measured_where_asked_in_eval_mode_and_on_the_same_batches():
    job = Job()
    flags, inputs = [], []

    def remember(module, args, output):
        if not module.training:
            inputs.append(args[0].clone())

    job.model.last.register_forward_hook(remember)

    def metric(output, target):
        flags.append((job.model.training, job.model.dropout.training, torch.is_grad_enabled()))
        return (output.argmax(1) == target).double().mean()

    found = job.range_test(num_steps=23, val_every=5, val_batches=2, metric=metric)
    assert np.flatnonzero(found.measured).tolist() == [4, 9, 14, 19, 22]
    assert set(flags) == {(False, False, False)}
    assert found.metric_name == "metric"
    assert [len(x) for x in inputs] == [32, 32] * 5


def test_the_metric_is_averaged_over_samples_not_batches():
    x = torch.cat([torch.eye(3)] * 4)[:10]
    model = torch.nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1])  # the last is wrong: 90 %
    val = [(x[:8], target[:8]), (x[8:], target[8:])]
    train = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))]
    opt = fastlr.FusedSGD(model.parameters())
    rates = {"start_lr": 1e-9, "end_lr": 1e-8, "num_steps": 20}  # too low to change anything
    found = fastlr.range_test(
        model, opt, cross_entropy, train, val, **rates, val_batches=None, progress=False
    )
    assert found.accuracies[found.measured].tolist() == pytest.approx([0.9, 0.9])


# -- what is refused -----------------------------------------------------------------------------------

BATCH = (torch.randn(4, FEATURES), torch.zeros(4, dtype=torch.int64))


def frozen(job):
    job.model.requires_grad_(False)


def foreign(job):
    job.optimizer = fastlr.FusedSGD(torch.nn.Linear(2, 2).parameters())


def lbfgs(job):
    job.optimizer = torch.optim.LBFGS(job.model.parameters())


def lazy(job):
    job.model = torch.nn.Sequential(torch.nn.LazyLinear(3))
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)


REFUSED = {
    "start_lr zero": (ValueError, "start_lr must be", {"start_lr": 0.0}, None),
    "start_lr above end_lr": (ValueError, "start_lr must be < end_lr", {"start_lr": 2.0}, None),
    "start_lr is end_lr": (ValueError, "start_lr must be < end_lr", {"start_lr": 1.0}, None),
    "end_lr nan": (ValueError, "end_lr", {"end_lr": float("nan")}, None),
    "num_steps 1": (ValueError, "num_steps", {"num_steps": 1}, None),
    "unknown sweep": (ValueError, "sweep must be one of", {"sweep": "cosine"}, None),
    "diverge_factor 1": (ValueError, "diverge_factor", {"diverge_factor": 1.0}, None),
    "val_every 0": (ValueError, "val_every", {"val_every": 0}, None),
    "val_batches 0": (ValueError, "val_batches", {"val_batches": 0}, None),
    "metric without val_loader": (ValueError, "metric needs", {"val_loader": None, "metric": len}, None),
    "empty train_loader": (ValueError, "train_loader is empty", {"train_loader": []}, None),
    "empty val_loader": (ValueError, "val_loader is empty", {"val_loader": []}, None),
    "an iterator": (TypeError, "train_loader is an iterator", {"train_loader": iter([BATCH])}, None),
    "no pairs": (TypeError, "got Tensor; for other batches pass step_fn", {"train_loader": [BATCH[0]]}, None),
    "a loss per sample": (
        ValueError,
        r"scalar tensor, got a torch.float32 tensor of shape \(16,\)",
        {"loss_fn": lambda output, target: cross_entropy(output, target, reduction="none")},
        None,
    ),
    "a loss that is a number": (ValueError, "got float", {"loss_fn": lambda o, t: 1.0}, None),
    "a loss without gradient": (
        ValueError,
        "does not depend on any parameter",
        {"loss_fn": lambda output, target: torch.zeros(())},
        None,
    ),
    "no classes": (ValueError, r"pass metric=", {"val_loader": [(BATCH[0], BATCH[0])]}, None),
    "frozen model": (ValueError, "the model is frozen", {}, frozen),
    "foreign optimizer": (ValueError, "none of the model's parameters", {}, foreign),
    "closure-only optimizer": (TypeError, "needs a closure", {}, lbfgs),
    "lazy model": (ValueError, "uninitialized", {}, lazy),
}


@pytest.mark.parametrize(("error", "message", "options", "change"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_and_nothing_is_touched(error, message, options, change):
    job = Job().fit(1)
    if change is not None:
        change(job)
    before = None if change is lazy else copy.deepcopy(job.everything())
    arguments = {
        "loss_fn": cross_entropy,
        "train_loader": job.loader,
        "val_loader": job.val_loader,
        "progress": False,
        "num_steps": 20,
        "val_every": 5,
    } | options
    with pytest.raises(error, match=message):
        fastlr.range_test(job.model, job.optimizer, **arguments)
    if before is not None:
        assert_same(job.everything(), before)


def test_an_optimizer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="torch optimizer, got list"):
        fastlr.range_test(torch.nn.Linear(1, 1), [], cross_entropy, [BATCH])

"""range_test() leaves no trace, sweeps what it says, and refuses what it cannot test."""

from __future__ import annotations

import copy
import itertools
import random
import signal

import numpy as np
import pytest
import torch
from rule_table import RULES, with_rules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import fastlr
from fastlr.range_test import snapshot

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


def driven(optimizer, rule):
    """By schedules that go on for as long as a test."""
    optimizer.set_schedule(**{**rule.drives, "weight_decay": fastlr.LinearRamp(0.2, 0.0, 500)})
    return optimizer


OPTIMIZERS = {
    "FusedSGD": lambda p: fastlr.FusedSGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "FusedSGD on a schedule": lambda p: fastlr.FusedSGD(p, lr=fastlr.Cosine(0.1, 0.0, 40), momentum=0.9),
    "FusedCyclicSGD": lambda p: fastlr.FusedCyclicSGD(p, 0.01, 0.1, step_size_up=5, cycle_momentum=True),
    # Every rule with all of its state, and every option that can have one on a schedule.
    **{
        f"{rule.fused.__name__}, all driven": lambda p, rule=rule: driven(rule.make(p, **rule.full), rule)
        for rule in RULES.values()
    },
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


@with_rules
@pytest.mark.parametrize("warm", [0, 2], ids=["cold", "warm"])
@pytest.mark.parametrize("where", ["cpu", "cuda-on-cpu"])
def test_every_rules_state_is_as_it_was_on_devices_too(rule, warm, where, request):
    """All of it: the step as well where only a device keeps one, and the types and places of all tensors."""
    if where == "cuda-on-cpu":
        request.getfixturevalue("on_emulated_cuda")
    job = Job(lambda p: driven(rule.make(p, **rule.full, state_dtype=torch.float32), rule)).fit(warm)
    optimizer = job.optimizer
    present = [(p, name, tensor) for p, state in optimizer.state.items() for name, tensor in state.items()]
    values = copy.deepcopy([tensor for _, _, tensor in present])
    groups, clock = copy.deepcopy(optimizer.state_dict()["param_groups"]), optimizer.sync()
    assert len(job.range_test(num_steps=12, end_lr=0.01).losses) == 12
    assert sum(len(state) for state in optimizer.state.values()) == len(present)
    assert bool(present) == bool(warm)
    for (p, name, tensor), value in zip(present, values, strict=True):
        assert optimizer.state[p][name] is tensor
        assert_same(tensor, value, name)
    assert optimizer.state_dict()["param_groups"] == groups
    assert optimizer.sync() == clock
    after = job.fit(2).everything()
    plain = Job(lambda p: driven(rule.make(p, **rule.full, state_dtype=torch.float32), rule)).fit(warm)
    assert_same(after, plain.fit(2).everything())


@with_rules
@pytest.mark.parametrize("where", ["cpu", "cuda-on-cpu"])
def test_every_rule_finds_bounds_within_the_sweep(rule, where, request):
    if where == "cuda-on-cpu":
        request.getfixturevalue("on_emulated_cuda")
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    model, data = torch.nn.Linear(6, 3), TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = rule.make(model.parameters())
    found = fastlr.range_test(
        model, optimizer, cross_entropy, loader, start_lr=1e-4, end_lr=1e4, num_steps=160, progress=False
    )
    assert found, found.reason
    assert 1e-3 < found.base_lr < found.max_lr < 1e3
    assert not optimizer.state
    assert optimizer.sync() == (0, 0)


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


def test_a_metric_that_chokes_on_weights_of_nan_ends_the_sweep():
    job, calls = Job(), iter(range(1000))

    def loss_fn(output, target):
        # The loss is finite, its gradient is not: the weights are the first to be NaN.
        loss = cross_entropy(output, target)
        return loss + (output.sum() * torch.inf).nan_to_num(0, 0, 0) if next(calls) == 18 else loss

    def metric(output, target):
        if not output.isfinite().all():
            raise ValueError("Input contains NaN.")
        return 1.0

    before = copy.deepcopy(job.everything())
    found = job.range_test(loss_fn, metric=metric, val_every=1)
    assert len(found.losses) == 19
    assert "weights were inf or NaN after the update" in found.stopped
    assert_same(job.everything(), before)


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


# -- what is swept, and how -------------------------------------------------------------------------------


def test_a_step_function_gets_the_batch_as_it_comes():
    job, batches = (
        Job(),
        [{"x": torch.randn(8, FEATURES), "y": torch.randint(CLASSES, (8,))} for _ in range(50)],
    )
    seen = []

    def step_fn(batch):
        seen.append(batch)
        return cross_entropy(job.model(batch["x"]), batch["y"])

    def metric(batch):
        return (job.model(batch["x"]).argmax(1) == batch["y"]).double().mean()

    before = copy.deepcopy(job.everything())
    found = fastlr.range_test(
        job.model,
        job.optimizer,
        None,
        batches,
        batches,
        step_fn=step_fn,
        metric=metric,
        num_steps=40,
        end_lr=0.1,
        progress=False,
    )
    assert all(a is b for a, b in zip(seen, batches, strict=False))
    assert found.measured.sum() == 4
    assert_same(job.everything(), before)


def test_inputs_and_targets_may_be_dicts_and_tuples():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, parts):
            return {"sum": self.linear(parts["a"]) + parts["b"][0]}

    model = Pair()
    batch = ({"a": torch.randn(8, 4), "b": (torch.randn(8, 1),)}, [torch.randn(8, 1), "a name"])
    found = fastlr.range_test(
        model,
        torch.optim.SGD(model.parameters()),
        lambda out, target: (out["sum"] - target[0]).square().mean(),
        [batch] * 3,
        num_steps=20,
        end_lr=0.1,
        progress=False,
    )
    assert len(found.losses) == 20


def test_accumulated_batches_make_one_update():
    def losses(batch_size, accumulate):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(4, 1), torch.randn(96, 4)
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)
        found = fastlr.range_test(
            model,
            fastlr.FusedSGD(model.parameters(), momentum=0.9),
            torch.nn.functional.mse_loss,
            loader,
            num_steps=30,
            end_lr=0.1,
            accumulate=accumulate,
            progress=False,
        )
        return found.losses

    np.testing.assert_allclose(losses(8, 3), losses(24, 1), rtol=1e-4)


def test_losses_and_metrics_are_computed_under_autocast():
    job, types = Job(), set()

    def loss_fn(output, target):
        types.add(output.dtype)
        return cross_entropy(output.float(), target)

    def metric(output, target):
        types.add(output.dtype)
        return 1.0

    job.range_test(loss_fn, metric=metric, autocast=torch.bfloat16, num_steps=12)
    assert types == {torch.bfloat16}


each_scaler = pytest.mark.parametrize(
    "make_scaler", [torch.amp.GradScaler, fastlr.GradScaler], ids=["torch's scaler", "fastlr's"]
)


@each_scaler
@each_optimizer
def test_a_scaler_is_used_and_put_back(make_optimizer, make_scaler):
    job = Job(make_optimizer).fit(1)
    scaler = make_scaler("cpu", init_scale=1024.0, growth_interval=5)
    before, vars_before = copy.deepcopy(job.everything()), dict(vars(scaler))
    scaled = job.range_test(scaler=scaler, num_steps=24, end_lr=0.01)
    plain = job.range_test(num_steps=24, end_lr=0.01)
    np.testing.assert_allclose(scaled.losses, plain.losses, rtol=1e-5)
    assert_same(job.everything(), before)
    assert vars(scaler) == vars_before
    scaler.scale(torch.ones(()))  # creates the scale
    job.range_test(scaler=scaler, num_steps=24)
    assert scaler.state_dict()["scale"] == 1024.0
    assert scaler.state_dict()["_growth_tracker"] == 0


def overflowing(at):
    """A loss whose gradient overflows at the given calls; the loss itself is finite."""
    calls = iter(range(10_000))

    def loss_fn(output, target):
        loss = cross_entropy(output, target)
        return loss + (output.sum() * torch.inf).nan_to_num(0, 0, 0) if next(calls) in at else loss

    return loss_fn


@each_scaler
@each_optimizer
def test_a_skipped_update_makes_no_point(make_optimizer, make_scaler):
    job = Job(make_optimizer)
    rates = []
    inner = overflowing({3, 4, 9})

    def loss_fn(output, target):
        rates.append(float(job.optimizer.param_groups[0]["lr"]))
        return inner(output, target)

    scaler = make_scaler("cpu")
    found = job.range_test(loss_fn, scaler=scaler, num_steps=30, end_lr=0.01)
    assert len(rates) == 30  # as many batches as asked for, whatever was skipped
    assert len(found.lrs) == 27
    applied = [rate for i, rate in enumerate(rates) if i not in (3, 4, 9)]
    np.testing.assert_allclose(found.lrs, applied, rtol=1e-6)
    assert found.stopped is None


@each_scaler
@each_optimizer
def test_ten_skipped_updates_in_a_row_end_the_sweep(make_optimizer, make_scaler):
    job = Job(make_optimizer)
    before = copy.deepcopy(job.everything())
    skips = set(range(12, 10_000)) - {15}
    scaler = make_scaler("cpu")
    found = job.range_test(overflowing(skips), scaler=scaler, num_steps=100)
    assert len(found.losses) == 13
    assert "skipped 10 updates in a row" in found.stopped
    assert_same(job.everything(), before)


def test_a_compiled_model_can_be_tested():
    def fit(test):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
        )
        compiled = torch.compile(model, backend="eager")
        opt = fastlr.FusedSGD(compiled.parameters(), lr=0.1, momentum=0.9)
        batches = [(torch.randn(8, FEATURES), torch.randint(CLASSES, (8,))) for _ in range(12)]
        for part in (batches[:4], batches[4:]):
            for x, y in part:
                cross_entropy(compiled(x), y).backward()
                opt.step()
                opt.zero_grad()
            if test:
                found = fastlr.range_test(
                    compiled, opt, cross_entropy, batches, batches, num_steps=20, end_lr=0.1, progress=False
                )
                assert len(found.losses) == 20
        return model.state_dict()

    assert_same(fit(True), fit(False))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_can_be_tested():
    model = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.BatchNorm1d(8)))
    before = copy.deepcopy(dict(model.state_dict()))
    batches = [(torch.randn(8, FEATURES), torch.randint(8, (8,))) for _ in range(20)]
    opt = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    found = fastlr.range_test(model, opt, cross_entropy, batches, num_steps=20, end_lr=0.1, progress=False)
    assert len(found.losses) == 20
    assert_same(dict(model.state_dict()), before)


def test_the_metric_of_a_dict_of_targets_is_weighted_by_its_samples():
    model = torch.nn.Linear(3, 1)
    val = [(torch.ones(n, 3), {"y": torch.full((n, 1), float(n))}) for n in (2, 6)]
    found = fastlr.range_test(
        model,
        fastlr.FusedSGD(model.parameters()),
        lambda out, t: (out - t["y"]).square().mean(),
        val,
        val,
        metric=lambda out, t: t["y"].mean(),
        num_steps=10,
        end_lr=1e-4,
        progress=False,
    )
    assert found.accuracies[-1] == pytest.approx((2 * 2 + 6 * 6) / 8)


@each_optimizer
def test_stairs_hold_each_rate_for_some_updates(make_optimizer):
    job, used = Job(make_optimizer), []

    def loss_fn(output, target):
        used.append(float(job.optimizer.param_groups[0]["lr"]))
        return cross_entropy(output, target)

    for sweep, space in (("exponential", np.geomspace), ("linear", np.linspace)):
        used.clear()
        found = job.range_test(loss_fn, start_lr=1e-3, end_lr=1e-1, num_steps=36, staircase=3, sweep=sweep)
        np.testing.assert_allclose(found.lrs, space(1e-3, 1e-1, 12), rtol=1e-12)
        np.testing.assert_allclose(used, np.repeat(found.lrs, 3), rtol=1e-6)
        assert len(found.losses) == len(found.accuracies) == 12


@each_optimizer
@pytest.mark.parametrize("sweep", ["exponential", "linear"])
def test_each_group_sweeps_between_bounds_of_its_own(make_optimizer, sweep):
    job = Job(lambda p: (lambda ps: make_optimizer([{"params": ps[:3]}, {"params": ps[3:]}]))(list(p)))
    used = []

    def loss_fn(output, target):
        used.append([float(group["lr"]) for group in job.optimizer.param_groups])
        return cross_entropy(output, target)

    bounds = {"start_lr": [1e-5, 1e-3], "end_lr": [1e-2, 1.0]}
    found = job.range_test(loss_fn, **bounds, num_steps=30, sweep=sweep)
    space = np.geomspace if sweep == "exponential" else np.linspace
    expected = np.stack([space(1e-5, 1e-2, 30), space(1e-3, 1.0, 30)], 1)
    np.testing.assert_allclose(used, expected[: len(used)], rtol=1e-6)
    np.testing.assert_allclose(found.group(1).lrs, expected[: len(found.lrs), 1], rtol=1e-9)


def test_a_first_step_over_a_decade_is_said(capsys):
    job = Job()
    found = job.range_test(sweep="linear", num_steps=30, progress=True)
    assert "from 1e-05 to 0.034" in found.notes[0]
    assert found.notes[0] in capsys.readouterr().err
    assert not job.range_test(sweep="linear", num_steps=30, start_lr=0.01).notes[1:]


def test_a_loader_that_runs_out_is_said_once(caplog):
    with caplog.at_level("INFO", logger="fastlr.range_test"):
        found = Job().range_test(num_steps=30, repeats=2, end_lr=0.1)
    (note,) = found.notes
    assert "ran out after 5 batches" in note
    assert [r.message for r in caplog.records].count(note) == 1


@each_optimizer
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_stop_at_the_first_loss_that_is_not_finite(make_optimizer, scaled, value):
    job = Job(make_optimizer)
    weights = []

    def loss_fn(output, target):
        weights.append([p.detach().clone() for p in job.model.parameters()])
        loss = cross_entropy(output, target)
        # The gradient stays finite, so that nothing but the loss says that something is wrong.
        return loss + torch.tensor(value) if len(weights) == 4 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    found = job.range_test(loss_fn, num_steps=60, val_every=1, scaler=scaler)
    assert len(found.losses) == 3
    assert 4 < len(weights) <= 16  # the host reads blocks; until then the device holds the weights
    for later in weights[4:]:
        assert_same(later, weights[3])
    assert not torch.equal(weights[2][0], weights[3][0])


def test_the_host_reads_in_blocks(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(tuple(t.shape)), tolist(t))[1])
    Job().range_test(num_steps=50, val_every=3, end_lr=0.1)
    of_losses = [shape for shape in reads if len(shape) == 2]  # the others are the samplers' orders
    assert of_losses == [(16, 4), (16, 4), (16, 4), (2, 4)]


# -- backup and repeats --------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("backup", ["device", "host", "file", "path"])
def test_every_backup_brings_everything_back(make_optimizer, backup, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    job = Job(make_optimizer).fit(1)
    for p in list(job.model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    before = copy.deepcopy(job.everything())
    found = job.range_test(backup=tmp_path / "backup.pt" if backup == "path" else backup, repeats=2)
    assert len(found.repeats) == 2
    assert_same(job.everything(), before)
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_watched_while_the_test_runs_and_is_no_other(tmp_path):
    job, path, seen = Job(), tmp_path / "backup.pt", []
    parameters = [p.detach().clone() for p in job.model.parameters()]

    def loss_fn(output, target):
        seen.append(path.exists())
        return cross_entropy(output, target)

    job.range_test(loss_fn, backup=path)
    assert all(seen)
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        job.range_test(backup=path)
    assert path.read_text() == "mine"
    assert_same([p.detach() for p in job.model.parameters()], parameters)


def test_the_size_of_the_backup_is_said_before_the_sweep(capsys, caplog):
    model = torch.nn.Linear(1024, 256, bias=False)  # 1 MiB
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    model.weight.grad = torch.zeros_like(model.weight)
    opt.step()  # creates the momentum, 1 MiB; and the gradient is one more
    said = []

    def loss_fn(output, target):
        said.append(capsys.readouterr().err)
        return output.square().mean()

    batches = [(torch.randn(2, 1024), torch.zeros(2))] * 20
    fastlr.range_test(model, opt, loss_fn, batches, backup="host", num_steps=20)
    assert said[0] == "range test: backup of 3.0 MiB on the host, and 1.0 MiB on the device for the sweep\n"
    assert "".join(said[1:]) == ""
    with caplog.at_level("INFO", logger="fastlr.range_test"):
        fastlr.range_test(model, opt, lambda o, t: o.square().mean(), batches, num_steps=20, progress=False)
    assert "backup of 3.0 MiB on the device" in caplog.text
    assert capsys.readouterr().err == ""


def test_a_backup_that_does_not_fit_is_refused(monkeypatch):
    job = Job()
    before = copy.deepcopy(job.everything())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match="does not fit into the 100 bytes left"):
        job.range_test(backup="file")

    def clone(tensor):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with pytest.raises(MemoryError, match="pass backup='host' or 'file'"):
        job.range_test()
    monkeypatch.undo()
    assert_same(job.everything(), before)


def test_repeats_start_from_the_same_weights_over_other_batches():
    job, weights = Job().fit(1), []

    def loss_fn(output, target):
        weights.append(job.model.first.weight.detach().clone())
        return cross_entropy(output, target)

    before = copy.deepcopy(job.everything())
    found = job.range_test(loss_fn, repeats=3, num_steps=20, end_lr=0.1)
    assert len(weights) == 60
    assert_same(weights[::20], [before["model"]["first.weight"].detach()] * 3)
    first, second, third = (r.losses for r in found.repeats)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    np.testing.assert_array_equal(found.losses, np.median([first, second, third], 0))
    assert_same(job.everything(), before)


def test_a_metric_that_is_no_number_is_said():
    model, _, batches = quadratic()
    opt = torch.optim.SGD(model.parameters())
    options = {"num_steps": 40, "end_lr": 0.1, "val_every": 2, "progress": False}
    values = itertools.cycle([float("nan"), float("inf"), 0.5, -float("inf")])

    def value(output, target):
        return next(values)

    loss_fn = torch.nn.functional.mse_loss
    found = fastlr.range_test(model, opt, loss_fn, batches, batches[:1], metric=value, **options)
    assert "value was inf or NaN in 15 of its measurements" in found.notes
    assert found.reason.startswith("value has 5 finite values, of 6 that are needed; ")


def test_repeats_that_are_no_repeats_are_said():
    model, _, batches = quadratic()
    opt = torch.optim.SGD(model.parameters())
    loss_fn = torch.nn.functional.mse_loss
    found = fastlr.range_test(
        model, opt, lambda o, t: loss_fn(o, t), batches, num_steps=20, repeats=2, end_lr=0.1, progress=False
    )
    assert "the same batches" in found.notes[-1]


def test_a_ctrl_c_while_everything_is_put_back_waits_until_it_is():
    done = []
    with pytest.raises(KeyboardInterrupt):
        snapshot.undone(
            lambda: done.append(False), lambda: (signal.raise_signal(signal.SIGINT), done.append(True))
        )
    assert done == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_loaders_with_a_state_of_their_own_are_put_back():
    class Sampler(torch.utils.data.Sampler):
        def __init__(self):
            self.order, self.array, self.epoch = list(range(20)), np.arange(20), 0

        def __iter__(self):
            self.epoch += 1
            random.shuffle(self.order)
            np.random.shuffle(self.array)  # noqa: NPY002
            return iter(
                [i if self.epoch % 2 else int(j) for i, j in zip(self.order, self.array, strict=True)]
            )

    class Data(TensorDataset):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            return super().__getitem__(i)

    sampler, dataset = Sampler(), Data(torch.randn(20, FEATURES), torch.zeros(20, dtype=torch.int64))
    loader = DataLoader(dataset, sampler=sampler, batch_size=5)
    next(iter(loader))
    before = (list(sampler.order), sampler.array.tolist(), sampler.epoch, dataset.reads)
    order, array = sampler.order, sampler.array
    model = torch.nn.Linear(FEATURES, CLASSES)
    fastlr.range_test(
        model, fastlr.FusedSGD(model.parameters()), cross_entropy, loader, num_steps=10, progress=False
    )
    assert (sampler.order, sampler.array.tolist(), sampler.epoch, dataset.reads) == before
    assert sampler.order is order
    assert sampler.array is array


def test_workers_that_outlive_an_epoch_do_not_notice():
    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return torch.randn(FEATURES), 0

    def fit(test):
        torch.manual_seed(0)
        loader = DataLoader(Random(), 5, shuffle=True, num_workers=1, persistent_workers=True)
        model = torch.nn.Linear(FEATURES, CLASSES)
        opt = fastlr.FusedSGD(model.parameters(), lr=0.1)
        for epoch in range(2):
            for x, y in loader:
                cross_entropy(model(x), y).backward()
                opt.step()
                opt.zero_grad()
            if test and epoch == 0:
                fastlr.range_test(model, opt, cross_entropy, loader, num_steps=10, progress=False)
        return model.weight.detach()

    assert_same(fit(True), fit(False))


def test_attributes_of_modules_are_put_back():
    class Stateful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(FEATURES, CLASSES)
            self.hidden, self.calls, self.seen = torch.zeros(1), 0, {"shapes": []}

        def forward(self, x):
            self.calls += 1
            self.hidden += 0.01
            self.seen["shapes"].append(tuple(x.shape))
            self.added = x.mean()
            return self.linear(x) + self.hidden

    model = Stateful()
    hidden = model.hidden
    batches = [(torch.randn(4, FEATURES), torch.zeros(4, dtype=torch.int64))] * 12
    fastlr.range_test(
        model, fastlr.FusedSGD(model.parameters()), cross_entropy, batches, num_steps=12, progress=False
    )
    assert model.hidden is hidden
    assert (hidden.item(), model.calls, model.seen) == (0.0, 0, {"shapes": []})
    assert not hasattr(model, "added")


def test_the_bar_draws_no_random_numbers(monkeypatch):
    pytest.importorskip("rich", reason="the bar is rich's")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich can tell
    job = Job()
    before = copy.deepcopy(job.everything())
    job.range_test(progress=True, num_steps=20)
    assert_same(job.everything(), before)


# -- what is refused -----------------------------------------------------------------------------------

BATCH = (torch.randn(4, FEATURES), torch.zeros(4, dtype=torch.int64))


class Once:
    """Batches that are there for one pass only, though it is no iterator."""

    def __init__(self):
        self.left = [BATCH]

    def __iter__(self):
        while self.left:
            yield self.left.pop()


def frozen(job):
    job.model.requires_grad_(False)


def foreign(job):
    job.optimizer = fastlr.FusedSGD(torch.nn.Linear(2, 2).parameters())


def rateless(job):
    del job.optimizer.param_groups[0]["lr"]


def one_column(job):
    job.model = torch.nn.Linear(FEATURES, 1)
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)


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
    "zero gradient": (
        ValueError,
        "the gradient is zero everywhere",
        {"loss_fn": lambda output, target: 0.0 * output.sum()},
        None,
    ),
    "gradient elsewhere": (
        ValueError,
        "does not depend on any parameter that the optimizer holds",
        {"loss_fn": lambda output, target: torch.ones((), requires_grad=True) * 2},
        None,
    ),
    "exhausted loader": (ValueError, "exhausted after 1 batches", {"train_loader": Once()}, None),
    "one column": (
        ValueError,
        r"no accuracy for an output of shape \(4, 1\)",
        {"train_loader": [BATCH], "val_loader": [BATCH], "loss_fn": lambda output, target: output.mean()},
        one_column,
    ),
    "a metric per sample": (
        ValueError,
        r"must return one real number, got a torch.float64 tensor of shape \(32,\)",
        {"metric": lambda output, target: (output.argmax(1) == target).double()},
        None,
    ),
    "a metric that returns nothing": (
        ValueError,
        "must return one real number, got NoneType",
        {"metric": lambda output, target: None},
        None,
    ),
    "no loss": (TypeError, "loss_fn, called with", {"loss_fn": None}, None),
    "two losses": (TypeError, "one of them", {"step_fn": len}, None),
    "step_fn without metric": (
        ValueError,
        r"needs metric=\(batch\)",
        {"loss_fn": None, "step_fn": len},
        None,
    ),
    "no loader": (TypeError, "train_loader is missing", {"train_loader": None}, None),
    "a number of batches": (TypeError, "to iterate over, got int", {"train_loader": 5}, None),
    "three parts": (TypeError, "got tuple of 3", {"train_loader": [(*BATCH, 1)]}, None),
    "staircase": (ValueError, "num_steps must be a multiple of staircase", {"staircase": 3}, None),
    "rates of other groups": (ValueError, "start_lr has 2 values for 1", {"start_lr": [1e-5, 1e-4]}, None),
    "a rate in words": (ValueError, "start_lr must be a finite number", {"start_lr": "low"}, None),
    "accumulate 0": (ValueError, "accumulate", {"accumulate": 0}, None),
    "repeats 0": (ValueError, "repeats", {"repeats": 0}, None),
    "unknown backup": (ValueError, "backup must be one of", {"backup": "tape"}, None),
    "unknown autocast": (ValueError, "autocast must be", {"autocast": torch.float64}, None),
    "no scaler": (TypeError, "GradScaler, got float", {"scaler": 2.0}, None),
    "frozen model": (ValueError, "the model is frozen", {}, frozen),
    "no rate": (ValueError, "groups without an lr to sweep", {}, rateless),
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


def test_inference_mode_is_refused():
    job = Job()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call it outside"):
        job.range_test()


def test_an_optimizer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="torch optimizer, got list"):
        fastlr.range_test(torch.nn.Linear(1, 1), [], cross_entropy, [BATCH])


@pytest.mark.parametrize("repeats", [1, 2])
def test_an_error_of_the_loader_is_passed_on_where_the_weights_are_nan_too(repeats):
    class Failing(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 2:
                raise OSError("the disk is gone")
            return super().__iter__()

    model = torch.nn.Linear(FEATURES, CLASSES)
    opt = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    loader = Failing([(torch.randn(8, FEATURES), torch.arange(8) % CLASSES)] * 4)

    def loss_fn(output, target):
        return (output * 1e30).square().mean()

    with pytest.raises(OSError, match="the disk is gone"):
        fastlr.range_test(model, opt, loss_fn, loader, num_steps=10, repeats=repeats, progress=False)

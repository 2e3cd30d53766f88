"""Arguments of the wrong kind get an error that names them, their value and a remedy, and change nothing."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
import torch
from fingerprint import differences, fingerprint
from torch.utils.data import DataLoader, TensorDataset

import fastlr
from fastlr import cli, data, demo, plotting

cross_entropy = torch.nn.functional.cross_entropy
LRS, LOSSES = np.geomspace(1e-4, 1.0, 20), np.linspace(2.0, 1.0, 20)
RESULT = fastlr.RangeTestResult(LRS, LOSSES)
WITH_ACCURACY = fastlr.RangeTestResult(LRS, LOSSES, LOSSES)
COSINE = fastlr.Cosine(0.1, 0.0, 10)


class Job:
    def __init__(self):
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.optimizer = fastlr.FusedSGD(self.model.parameters(), momentum=0.9)
        x = torch.randn(32, 4)
        self.loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)

    def arguments(self, **changes):
        own = {"model": self.model, "optimizer": self.optimizer, "train_loader": self.loader}
        return own | {"loss_fn": cross_entropy, "num_steps": 6, "progress": False} | changes


def check(call, error, message, job):
    before = fingerprint(job=job)
    with pytest.raises(error, match=message) as raised:
        call()
    assert raised.type is error  # and none of the errors that Python raises by itself somewhere inside
    assert differences(before, fingerprint(job=job)) == []


# -- range_test() --------------------------------------------------------------------------------------


def number(name):
    for value in (None, "high", 1j, float("nan"), float("inf"), True):
        yield f"{name} {value!r}", (ValueError, rf"{name} must be a finite number .* got ", {name: value})


def counts(name, low):
    for value in (None, "many", 1.5, True, -1, 10**30):
        if name != "val_batches" or value is not None:
            message = rf"{name} must be an integer >= {low}, got "
            yield f"{name} {value!r}", (ValueError, message, {name: value})


RANGE_TEST = {
    "model None": (TypeError, r"model must be a torch\.nn\.Module, got NoneType", {"model": None}),
    "model a function": (TypeError, "model must be .* got function", {"model": lambda x: x}),
    "model a class": (TypeError, "model must be .* got type", {"model": torch.nn.Linear}),
    "optimizer None": (TypeError, "optimizer must be a torch optimizer, got NoneType", {"optimizer": None}),
    "optimizer a schedule": (TypeError, "optimizer must be .* got Cosine", {"optimizer": COSINE}),
    "loss_fn None": (TypeError, "pass loss_fn, called with output and target", {"loss_fn": None}),
    "loss_fn a number": (TypeError, "loss_fn must be callable, got int", {"loss_fn": 3}),
    "step_fn a string": (TypeError, "step_fn must be callable", {"loss_fn": None, "step_fn": "step"}),
    "train_loader None": (TypeError, "train_loader is missing", {"train_loader": None}),
    "train_loader a string": (TypeError, "train_loader must be batches .* got str", {"train_loader": "ab"}),
    "train_loader a dict": (TypeError, "train_loader must be batches .* got dict", {"train_loader": {1: 2}}),
    "train_loader a number": (TypeError, "train_loader must be batches .* got int", {"train_loader": 1}),
    "train_loader an array": (TypeError, "must yield pairs .* float64", {"train_loader": np.zeros(3)}),
    "train_loader an iterator": (TypeError, "is an iterator", {"train_loader": iter([1])}),
    "val_loader bytes": (TypeError, "val_loader must be batches .* got bytes", {"val_loader": b"ab"}),
    "val_loader a number": (TypeError, "val_loader must be .* got float64", {"val_loader": np.float64(3)}),
    "val_loader of one number": (TypeError, "val_loader must be .* Tensor", {"val_loader": torch.tensor(3)}),
    "rates too far apart": (
        ValueError,
        r"end_lr must be < 1e308 times start_lr, got start_lr=1e-300, end_lr=1e\+300",
        {"start_lr": 1e-300, "end_lr": 1e300},
    ),
    "val_loader True": (TypeError, "val_loader must be batches .* got bool", {"val_loader": True}),
    "metric a string": (TypeError, r"metric must be callable, got 'f1' \(str\)", {"metric": "f1"}),
    "metric False": (TypeError, "metric must be callable, got False", {"metric": False}),
    "sweep None": (ValueError, "sweep must be one of exponential, linear, got None", {"sweep": None}),
    "sweep a list": (ValueError, "sweep must be one of", {"sweep": ["linear"]}),
    "autocast a number": (ValueError, r"autocast must be .* True or None, got 1", {"autocast": 1}),
    "scaler True": (TypeError, r"scaler must be a torch\.amp\.GradScaler, got bool", {"scaler": True}),
    "progress a number": (ValueError, "progress must be True or False, got 1", {"progress": 1}),
    "progress None": (ValueError, "progress must be True or False, got None", {"progress": None}),
    "backup None": (ValueError, r"device, host, file or a pathlib\.Path, got None", {"backup": None}),
    "backup a list": (ValueError, r"or a pathlib\.Path, got \[\]", {"backup": []}),
    "backup bytes": (ValueError, "got b'file'", {"backup": b"file"}),
    "start_lr nested": (ValueError, "start_lr must be a finite number", {"start_lr": [[1.0]]}),
    "start_lr a dict": (ValueError, "start_lr must be a finite number > 0, got {}", {"start_lr": {}}),
    "start_lr an array": (ValueError, r"start_lr .* got array\(\[", {"start_lr": np.ones(2)}),
    "end_lr a schedule": (ValueError, "end_lr must be a finite number", {"end_lr": COSINE}),
    **dict(entry for name in ("start_lr", "end_lr", "diverge_factor") for entry in number(name)),
    **dict(counts("num_steps", 2)),
    **dict(
        entry
        for name in ("staircase", "val_every", "val_batches", "accumulate", "repeats")
        for entry in counts(name, 1)
    ),
}


@pytest.mark.parametrize(("error", "message", "changes"), RANGE_TEST.values(), ids=RANGE_TEST.keys())
def test_range_test_refuses(error, message, changes):
    job = Job()
    check(lambda: fastlr.range_test(**job.arguments(**changes)), error, message, job)


def test_a_forgotten_optimizer_is_named():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'optimizer'"):
        fastlr.range_test(None)


def list_for_a_buffer(model):
    model[1]._buffers["running_mean"] = [torch.zeros(3)]


def list_for_buffers(model):
    model[1]._buffers = [torch.zeros(3)]


def number_for_a_parameter(model):
    model[0]._parameters["bias"] = 1.0


MODELS = {
    "buffer": (list_for_a_buffer, r"model\.1\.running_mean must be a tensor, .* _buffers, got list; make"),
    "buffers": (list_for_buffers, r"model\.1\._buffers must be a dict of tensors, got list"),
    "parameter": (number_for_a_parameter, r"model\.0\.bias must be a tensor, .* _parameters, got float"),
}


@pytest.mark.parametrize(("spoil", "message"), MODELS.values(), ids=MODELS.keys())
def test_what_is_no_tensor_among_a_models_tensors_is_named(spoil, message):
    job = Job()
    spoil(job.model)
    check(lambda: fastlr.range_test(**job.arguments()), TypeError, message, job)


def from_call(n, value):
    """A loss that is sound at first."""

    def loss_fn(output, target):
        loss_fn.calls += 1
        loss = cross_entropy(output, target)
        return value(loss) if loss_fn.calls > n else loss

    loss_fn.calls = 0
    return loss_fn


LOSS = {
    "complex": (
        lambda loss: loss.to(torch.complex64),
        r"got a torch\.complex64 tensor .* take its real part",
    ),
    "several": (lambda loss: loss.expand(3), r"got a torch\.float32 tensor of shape \(3,\); take its mean"),
    "an integer": (lambda loss: loss.long(), r"got a torch\.int64 tensor"),
    "a number": (lambda loss: loss.item(), "got float"),
    "nothing": (lambda loss: None, "got NoneType"),
    "detached": (lambda loss: loss.detach(), "does not depend on any parameter"),
}


@pytest.mark.parametrize("at", [0, 3], ids=["at once", "later"])
@pytest.mark.parametrize(("value", "message"), LOSS.values(), ids=LOSS.keys())
def test_a_loss_that_is_none_is_refused_whenever_it_comes(value, message, at):
    job, loss_fn = Job(), from_call(at, value)
    check(lambda: fastlr.range_test(**job.arguments(loss_fn=loss_fn)), ValueError, message, job)


METRIC = {
    "complex": (1j, "got complex"),
    "NumPy's complex": (np.complex128(1j), "got complex128"),
    "a complex tensor": (torch.tensor(1j), r"got a torch\.complex64 tensor"),
    "a string": ("0.9", "got str"),
    "a list": ([0.9], "got list"),
    "several": (torch.ones(2), r"got a torch\.float32 tensor of shape \(2,\)"),
}


@pytest.mark.parametrize(("value", "message"), METRIC.values(), ids=METRIC.keys())
def test_a_metric_that_is_no_number_is_refused(value, message):
    job = Job()
    arguments = job.arguments(val_loader=job.loader, metric=lambda output, target: value, val_every=2)
    message = f"must return one real number, {message}"
    check(lambda: fastlr.range_test(**arguments), ValueError, message, job)


# -- range_test_grid() and RangeTestGrid ---------------------------------------------------------------

GRID = {
    "decay a number": (TypeError, r"weight_decay must be a list .* got 0\.0001; .* pass \[0\.0001\]", 1e-4),
    "decay a string": (TypeError, "weight_decay must be a list of values to try, got 'low'", "low"),
    "decay None": (TypeError, "weight_decay must be a list of values to try, got None", None),
    "decay a dict": (TypeError, "weight_decay must be a list", {1e-4: 1}),
    "a set": (TypeError, "weight_decay must be a list", {1e-4, 1e-3}),
    "a tensor of no dimension": (TypeError, "weight_decay must be a list", torch.tensor(1e-4)),
    "strings": (ValueError, "weight_decay must be a finite number >= 0, got 'low'", ["low"]),
    "complex": (ValueError, "weight_decay must be a finite number >= 0, got 1j", [1j]),
    "nested": (ValueError, "weight_decay must be a finite number", [[1e-4, 1e-3]]),
}


@pytest.mark.parametrize(("error", "message", "values"), GRID.values(), ids=GRID.keys())
def test_a_grid_refuses(error, message, values):
    job = Job()
    check(lambda: fastlr.range_test_grid(**job.arguments(weight_decay=values)), error, message, job)


GRID_OTHERS = {
    "momentum a number": (TypeError, r"momentum must be a list .* got 0\.9", {"momentum": 0.9}),
    "batch_size a number": (TypeError, "batch_size must be a list .* got 8", {"batch_size": 8}),
    "batch_size parts": (ValueError, "batch_size must be an integer >= 1, got 8.0", {"batch_size": [8.0]}),
    "no optimizer": (TypeError, "optimizer must be a torch", {"optimizer": None, "momentum": [0.9]}),
    "no model": (TypeError, r"model must be a torch\.nn\.Module", {"model": None, "momentum": [0.9]}),
    "no loader": (TypeError, r"\(NoneType\) cannot be changed", {"train_loader": None, "batch_size": [8]}),
}


@pytest.mark.parametrize(("error", "message", "changes"), GRID_OTHERS.values(), ids=GRID_OTHERS.keys())
def test_a_grid_refuses_other_arguments(error, message, changes):
    job = Job()
    check(lambda: fastlr.range_test_grid(**job.arguments(**changes)), error, message, job)


def test_a_grid_takes_arrays():
    job = Job()
    grid = fastlr.range_test_grid(**job.arguments(weight_decay=np.array([0.0, 1e-4])))
    assert grid.settings == ({"weight_decay": 0.0}, {"weight_decay": 1e-4})


ONE = ({"momentum": 0.9},)
GRIDS = {
    "nothing": (ValueError, "one or more settings .* got 0 settings and 0 results", (), ()),
    "one too few": (ValueError, "got 1 settings and 2 results", ONE, (RESULT, RESULT)),
    "no sequence": (TypeError, "settings must be a sequence, got 3", 3, (RESULT,)),
    "one result": (TypeError, "results must be a sequence, got RangeTestResult", ONE, RESULT),
    "settings of another kind": (TypeError, "dicts of numbers, got 0.9", (0.9,), (RESULT,)),
    "settings in words": (
        TypeError,
        "dicts of numbers, got {'momentum': 'x'}",
        ({"momentum": "x"},),
        (RESULT,),
    ),
    "results of another kind": (TypeError, "range test results, got float", ONE, (0.1,)),
    "other names": (ValueError, "must all name the same", (*ONE, {"decay": 0.1}), (RESULT, RESULT)),
    "some accuracies": (ValueError, "in all of them or in none", ONE * 2, (RESULT, WITH_ACCURACY)),
}


@pytest.mark.parametrize(("error", "message", "settings", "results"), GRIDS.values(), ids=GRIDS.keys())
def test_grids_that_are_none_are_refused(error, message, settings, results):
    with pytest.raises(error, match=message):
        fastlr.RangeTestGrid(settings, results)


# -- RangeTestResult -----------------------------------------------------------------------------------

CURVES = {
    "complex lrs": (TypeError, "lrs must hold real numbers, got complex128", LRS + 0j, LOSSES),
    "complex losses": (TypeError, "losses must hold real numbers, got complex128", LRS, LOSSES + 0j),
    "complex numbers": (TypeError, "losses must hold real numbers, got complex128", LRS, [1j] * 20),
    "complex tensor": (TypeError, "losses must .* got complex128", LRS, torch.ones(20) + 0j),
    "strings": (TypeError, "lrs must hold real numbers", [str(lr) for lr in LRS], LOSSES),
    "one string": (TypeError, "lrs must hold real numbers", "1e-4", LOSSES),
    "None": (TypeError, r"losses must hold real numbers, got None \(NoneType\)", LRS, [None] * 20),
    "nothing": (TypeError, "lrs must hold real numbers, got None", None, None),
    "flags": (TypeError, "losses must hold real numbers, got bool", LRS, [True] * 20),
    "a flag": (TypeError, "losses must hold real numbers, got bool", LRS, [1.0] * 19 + [np.True_]),
    "dates": (TypeError, "losses must hold .* datetime64", LRS, np.zeros(20, "datetime64[s]")),
    "a dict": (TypeError, "losses must hold real numbers", LRS, dict(enumerate(LOSSES))),
    "a generator": (TypeError, "losses must hold real numbers", LRS, (loss for loss in LOSSES)),
    "one number": (ValueError, r"lrs must have one dimension, got shape \(\)", 0.1, 1.0),
    "a matrix": (ValueError, r"lrs must have one dimension, got shape \(1, 20\)", LRS[None], LOSSES),
    "ragged": (ValueError, "lrs must hold real numbers in one dimension", [[1.0], [1.0, 2.0]], LOSSES),
    "too large": (ValueError, "losses must hold .* too large", LRS[:1], [10**400]),
}


@pytest.mark.parametrize(("error", "message", "lrs", "losses"), CURVES.values(), ids=CURVES.keys())
def test_curves_that_are_none_are_refused(error, message, lrs, losses):
    with pytest.raises(error, match=message):
        fastlr.RangeTestResult(lrs, losses)
    if "losses" in message:
        with pytest.raises(error, match=message.replace("losses", "accuracies")):
            fastlr.RangeTestResult(lrs, np.ones(len(lrs)), losses)


ARRAYS = {
    "list": list,
    "list of tensors": lambda a: [torch.tensor(x, requires_grad=True) for x in a],
    "float32 tensor": lambda a: torch.tensor(a, dtype=torch.float32),
    "bfloat16 tensor": lambda a: torch.tensor(a, dtype=torch.bfloat16),
    "tensor with gradient": lambda a: torch.tensor(a, requires_grad=True),
    "float16 array": lambda a: a.astype(np.float16),
    "NumPy's numbers": lambda a: list(map(np.float32, a)),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS.keys())
def test_curves_may_come_as_lists_arrays_and_tensors(make):
    found = fastlr.RangeTestResult(LRS, make(LOSSES))
    np.testing.assert_allclose(found.losses, LOSSES, rtol=1e-2)
    assert found.losses.dtype == np.float64


RESULTS = {
    "notes a string": (
        TypeError,
        r"notes must be a sequence of strings, got 'abc'; .* \['abc'\]",
        {"notes": "abc"},
    ),
    "notes numbers": (TypeError, "each of notes must be a string, got 1", {"notes": [1]}),
    "notes None": (TypeError, "notes must be a sequence, got None", {"notes": None}),
    "stopped a number": (TypeError, "stopped must be a string, got 1", {"stopped": 1}),
    "stopped False": (TypeError, "stopped must be a string, got False", {"stopped": False}),
    "metric_name None": (TypeError, "metric_name must be a string, got None", {"metric_name": None}),
    "sweep a number": (ValueError, "sweep must be one of", {"sweep": 1}),
    "group_bounds a number": (TypeError, "group_bounds must be a sequence, got 3", {"group_bounds": 3}),
    "group_bounds a pair": (
        TypeError,
        r"group_bounds\[0\] must be a sequence, got 1",
        {"group_bounds": (1, 2)},
    ),
    "group_bounds of one": (ValueError, r"first and a last rate, got \(1,\)", {"group_bounds": [(1,)]}),
    "group_bounds a string": (ValueError, "first and a last rate, got 'ab'", {"group_bounds": ["ab"]}),
    "group_bounds falling": (ValueError, r"\[0\] must ascend, got \(2, 1\)", {"group_bounds": [(2, 1)]}),
    "group_bounds complex": (ValueError, r"\[0\]\[0\] must be a finite", {"group_bounds": [(1j, 2)]}),
    "group_bounds from zero": (ValueError, "must be a finite number > 0, got 0", {"group_bounds": [(0, 1)]}),
    "repeats a result": (TypeError, "repeats must be a sequence, got RangeTestResult", {"repeats": RESULT}),
    "repeats numbers": (TypeError, "repeats must hold range test results, got int", {"repeats": [1]}),
}


@pytest.mark.parametrize(("error", "message", "options"), RESULTS.values(), ids=RESULTS.keys())
def test_results_refuse(error, message, options):
    with pytest.raises(error, match=message):
        fastlr.RangeTestResult(LRS, LOSSES, **options)


@pytest.mark.parametrize("results", [None, 3, [1], "ab", RESULT], ids=str)
def test_what_are_no_repeats_is_refused(results):
    with pytest.raises(TypeError, match=r"results must (be a sequence|hold range test results), got"):
        fastlr.RangeTestResult.from_repeats(results)


@pytest.mark.parametrize("index", [None, "0", 1.0, -1, 2, True, np.int64(2)], ids=repr)
def test_what_is_no_group_is_refused(index):
    found = fastlr.RangeTestResult(LRS, LOSSES, group_bounds=[(1e-4, 1.0), (1e-3, 1.0)])
    with pytest.raises(ValueError, match=r"groups with rates of their own are 0 \.\. 1; got"):
        found.group(index)


GRID_OF_TWO = fastlr.RangeTestGrid(ONE * 2, (RESULT, RESULT))
FILES = {
    "to_csv": RESULT.to_csv,
    "to_json": RESULT.to_json,
    "from_json": fastlr.RangeTestResult.from_json,
    "grid to_csv": GRID_OF_TWO.to_csv,
    "plot": RESULT.plot,
    "grid plot": GRID_OF_TWO.plot,
    "schedule plot": functools.partial(COSINE.plot, 10),
}


@pytest.mark.parametrize("path", [3, 1.5, b"a", [], "", True], ids=repr)
@pytest.mark.parametrize("call", FILES.values(), ids=FILES.keys())
def test_what_is_no_path_is_refused(call, path):
    if "plot" in str(call) and importlib.util.find_spec("matplotlib") is None:
        pytest.skip("pictures need matplotlib")
    with pytest.raises(
        (TypeError, ValueError), match=r"path must (be a string or a pathlib\.Path|name a file), got"
    ):
        call(path)


# -- plotting, data, demo and the command --------------------------------------------------------------

RUNS = {"a": [[0.1, 0.2]]}
OTHERS = {
    "plot_range_test": (
        TypeError,
        "result must be a RangeTestResult, got None",
        plotting.plot_range_test,
        (None,),
    ),
    "plot_range_test of a grid": (TypeError, "a RangeTestResult", plotting.plot_range_test, (GRID_OF_TWO,)),
    "plot_range_test_grid": (TypeError, "a RangeTestGrid", plotting.plot_range_test_grid, (RESULT,)),
    "plot_batch_plan": (TypeError, "plan must be a BatchPlan, got 3", plotting.plot_batch_plan, (3,)),
    "plot_schedules": (
        TypeError,
        "schedules must be a dict .* got Cosine",
        plotting.plot_schedules,
        (COSINE,),
    ),
    "schedules of numbers": (
        TypeError,
        "'a' must be a fastlr schedule, got 1",
        plotting.plot_schedules,
        ({"a": 1},),
    ),
    "a schedule's class": (
        TypeError,
        "'a' must be a fastlr schedule, got <class",
        plotting.plot_schedules,
        ({"a": type(COSINE)},),
    ),
    "steps a float": (ValueError, "steps must be an integer", plotting.plot_schedules, ({"a": COSINE}, 1.5)),
    "steps True": (ValueError, "steps must be an integer", plotting.plot_schedules, ({"a": COSINE}, True)),
    "accuracies a list": (
        TypeError,
        "accuracies must be a dict",
        plotting.plot_accuracy,
        ([1, 2], [[0.1, 0.2]]),
    ),
    "accuracies empty": (ValueError, "there must be an accuracy", plotting.plot_accuracy, ([1, 2], {})),
    "accuracies too many": (
        ValueError,
        r"'a' must have 3 .* of \[2\]",
        plotting.plot_accuracy,
        ([1, 2, 3], RUNS),
    ),
    "accuracies complex": (TypeError, "real numbers", plotting.plot_accuracy, ([1], {"a": [[1j]]})),
    "updates a number": (ValueError, "updates must have one dimension", plotting.plot_accuracy, (1, RUNS)),
    "load a list": (ValueError, r"name must be one of digits, .* got \[\]", data.load, ([],)),
    "load a path of another kind": (TypeError, "path must be a string", data.load, ("fashion-mnist", 3)),
    "batches of lists": (TypeError, "x must be a tensor of samples, got list", data.Batches, ([1], [1], 1)),
    "batches of numbers": (
        TypeError,
        "x must be a tensor of samples, got one of no dimension",
        data.Batches,
        (torch.ones(()), torch.ones(()), 1),
    ),
    "batches of parts": (
        ValueError,
        "batch_size must be an integer",
        data.Batches,
        (*[torch.ones(3)] * 2, 1.5),
    ),
    "seed a string": (
        ValueError,
        "seed must be an integer >= 0",
        data.Batches,
        (*[torch.ones(3)] * 2, 1, "a"),
    ),
    "demo of a list": (ValueError, "name must be one of", demo.run, ([],)),
    "argv a string": (TypeError, "argv must be a sequence of strings, got 'doctor'", cli.main, ("doctor",)),
    "argv numbers": (TypeError, "each of argv must be a string, got 5", cli.main, (["schedule", 5],)),
}


@pytest.mark.parametrize(("error", "message", "call", "arguments"), OTHERS.values(), ids=OTHERS.keys())
def test_other_calls_refuse(error, message, call, arguments):
    with pytest.raises(error, match=message):
        call(*arguments)


OPTIONS = {
    "noise a string": (
        data.load,
        {"label_noise": "much"},
        r"label_noise must be in \[0, 1\], got 'much' \(str\)",
    ),
    "noise None": (data.load, {"label_noise": None}, r"label_noise must be in \[0, 1\], got None"),
    "noise True": (data.load, {"label_noise": True}, r"label_noise must be in \[0, 1\], got True"),
    "seed a float": (data.load, {"seed": 0.5}, "seed must be an integer >= 0, got 0.5"),
    "seeds a string": (demo.run, {"seeds": "5"}, "seeds must be an integer >= 1, got '5'"),
    "updates a float": (demo.run, {"updates": 99.5}, "updates must be an integer >= 40, got 99.5"),
    "progress a number": (demo.run, {"progress": 1}, "progress must be True or False, got 1"),
}


@pytest.mark.parametrize(("call", "options", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_other_calls_refuse_options(call, options, message, tmp_path):
    out = {"out": tmp_path / "report"} if call is demo.run else {}
    with pytest.raises(ValueError, match=message):
        call(**options, **out)
    assert list(tmp_path.iterdir()) == []


def test_a_target_beyond_100_percent_is_refused():
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\], got 90"):
        plotting.plot_accuracy([1, 2], RUNS, target=90)

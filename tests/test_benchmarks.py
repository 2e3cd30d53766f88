"""The benchmarks' own logic, on tiny sets; that of the GPU with a stand-in for the device."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from native import toolchain

from fastlr.bench import rounds, rules, updates


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script or module of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(toolchain.ROOT / "benchmarks")
        yield importlib.import_module


# -- rounds --------------------------------------------------------------------------------------


def test_contenders_take_turns():
    order: list[str] = []

    def turn(name: str) -> Callable[[], int]:
        def run() -> int:
            order.append(name)
            return len(order)

        return run

    measured = rounds.in_turn({name: turn(name) for name in "abc"}, seconds=0.0, fewest=4)
    assert "".join(order) == "bcacababcbca"
    assert measured == {"a": [7, 12], "b": [8, 10], "c": [9, 11]}


def test_summary_compares_within_a_round():
    found = rounds.summary({"fastlr": [1e-6, 2e-6, 4e-6], "other": [3e-6, 2e-6, 8e-6]})
    assert found["fastlr"] == pytest.approx({"us": 2.0, "ratio": 1.0, "rounds": 3})
    assert found["other"] == pytest.approx({"us": 3.0, "ratio": 2.0, "rounds": 3})


# -- the step on the CPU -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adamw", "rmsprop", "adagrad", "adadelta"])
@pytest.mark.parametrize("gradients", ["warm", "fresh"])
def test_step_is_measured(
    load: Callable[[str], ModuleType], gradients: str, rule: str, monkeypatch, tmp_path
):
    script = load("step")
    monkeypatch.setitem(script.PARAMETER_SETS, "tiny", [(3, 2), (5,)])
    times = script.measure(script.RULES[rule], "tiny", 1, gradients, 0.0, tmp_path)
    fused = {"fused"} if script.RULES[rule].has_fused else set()
    assert set(times) == {"fastlr", "foreach", "for-loop"} | fused
    assert times["fastlr"]["ratio"] == 1.0
    assert all(found["us"] > 0 and found["rounds"] == 10 for found in times.values())


def test_norms_are_measured(load: Callable[[str], ModuleType]):
    script = load("grad_norm")
    steps = script.contenders([(3, 2), (5,)], torch.float32)
    assert steps["step"]() is None
    assert steps["measured"]() > 0.0
    assert steps["torch"]() > 0.0
    assert all(script.timed(step) > 0.0 for step in steps.values())


def test_the_norms_pass_is_measured_beside_reading(load: Callable[[str], ModuleType], monkeypatch, tmp_path):
    toolchain.tool("cc")
    script, bandwidth = load("grad_norm"), load("step").load_bandwidth(tmp_path)
    read: list[float] = []
    found = script.squared_norm
    monkeypatch.setattr(script, "squared_norm", lambda g, tables: read.append(found(g, tables)))
    size, turns = script.passes([(3, 5), (2,)], torch.bfloat16, bandwidth)
    assert size == 2 * 18  # whole words
    assert list(turns) == ["again", "after a copy"]
    for each in turns.values():
        assert all(turn() > 0.0 for turn in each.values())
    assert len(read) == 3  # twice again, once after a copy
    assert read[0] == read[1] == read[2] > 0.0


# PyTorch 2.6 says so of any mesh of CPUs.
@pytest.mark.filterwarnings("ignore:DTensor random operators may not:UserWarning")
def test_steps_over_dtensors_are_measured(load: Callable[[str], ModuleType], tmp_path):
    script = load("distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        mesh = script.init_device_mesh("cpu", (1,))
        steps = script.contenders(lambda sharded: script.parameters(3, 4, mesh if sharded else None))
        assert len(steps) == 6
        assert all(script.timed(step) > 0.0 for step in steps.values())
    finally:
        torch.distributed.destroy_process_group()


# -- the whole update ----------------------------------------------------------------------------


@pytest.fixture
def pipeline(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What is compiled is left as it is: the compiler takes half a minute."""
    script = load("pipeline")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setitem(script.PARAMETER_SETS, "tiny", [(3, 2), (5,)])
    return script


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta"])
def test_every_contender_makes_the_same_updates(pipeline: ModuleType, rule: str):
    contest = rules.RULES[rule]
    for stages in updates.CASES.values():
        gradients, models, steps = updates.make_contenders(contest, [(7, 3), (5,)], stages)
        assert list(steps) == [
            name
            for name in updates.CONTENDERS
            if (name != updates.TORCHS_SCALER or "unscale" in stages)
            and (name != "torch fused" or contest.has_fused)
        ]
        originals = [gradient.clone() for gradient in gradients]
        start = models["fastlr"][0].detach().clone()
        for _ in range(5):
            for update in steps.values():
                torch._foreach_copy_(gradients, originals)
                update()
        assert not torch.equal(models["fastlr"][0], start)
        for model in models.values():
            for p, q in zip(model, models["fastlr"], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_whole_update_is_measured(pipeline: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    drawn: list[tuple[object, ...]] = []
    monkeypatch.setattr(pipeline, "draw_bars", lambda *what: drawn.append(what))
    monkeypatch.setattr(pipeline, "BOUND", 0)
    given = ["--rules", "sgd", "rmsprop", "--sets", "tiny", "--threads", "1", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", ["pipeline.py", *given, "--compile", "clip", "--out", str(tmp_path)])
    pipeline.main()
    cases = updates.CASES
    results = json.loads((tmp_path / "pipeline.json").read_text())["results"]
    assert [(r["rule"], r["case"]) for r in results] == [(k, c) for k in ("sgd", "rmsprop") for c in cases]
    for result in results:
        names = {"fastlr", "torch foreach", "limit"}
        names |= {"torch fused"} if result["rule"] == "sgd" else set()
        names |= {updates.TORCHS_SCALER} if "unscale" in cases[result["case"]] else set()
        names |= {updates.COMPILED} if result["case"] == "clip" else set()
        assert set(result["times"]) == names
        assert all(found["us"] > 0 for found in result["times"].values())
    ((sets, bars, *_),) = drawn
    assert (sets, list(bars)) == (["tiny"], ["sgd", "rmsprop"])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_limit_writes_every_array_but_the_gradient(
    load: Callable[[str], ModuleType], slots: int, tmp_path: Path
):
    traffic = load("step").make_traffic(1000, slots, 2, tmp_path, norm_first=True)
    (arrays,) = traffic.__defaults__
    traffic()
    changed = [not torch.equal(array, torch.ones(1000)) for array in arrays]
    assert changed == [True, False, *[True] * slots]


# -- the step on a GPU ---------------------------------------------------------------------------


class Host:
    """Stands in for a GPU: no events and no graphs, a captured step is run anew."""

    device = torch.device("cpu")

    def __init__(self, turn: Callable[..., object]) -> None:
        self._turn = turn
        self.repeats: list[int] = []
        self.captured = 0

    def time(self, step: Callable[[], object], repeats: int) -> object:
        self.repeats.append(repeats)
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        seconds = (time.perf_counter() - begin) / repeats
        return self._turn(device=seconds, host=seconds / 2)

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        self.captured += 1
        step()
        return step


@pytest.fixture
def gpu_step(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("gpu_step")


# apex runs on GPUs only; torch.optim.SGD has all that is asked of it.
CONTENDERS = ("fastlr", "fastlr, graph", "torch fused", "torch foreach", "torch fused, graph", "apex")


def test_gpu_benchmark_measures_every_contender(gpu_step: ModuleType, monkeypatch, capsys):
    monkeypatch.setattr(gpu_step, "LARGE", 1000)
    monkeypatch.setattr(gpu_step, "find_apex", lambda: torch.optim.SGD)
    host = Host(gpu_step.Turn)
    sets = {"small": [(3, 2), (5,), ()], "large": [(400, 50)]}
    small, large = gpu_step.run(host, "sgd", "step", sets, seconds=0.0, fewest=4)
    assert (small["set"], large["set"]) == ("small", "large")
    assert tuple(small["times"]) == CONTENDERS
    assert tuple(large["times"]) == (*CONTENDERS, "copy")
    assert set(host.repeats) == {20, 10}
    assert host.captured == 4
    for found, elements in ((small, 12), (large, 20_000)):
        for times in found["times"].values():
            assert times["rounds"] == 2
            assert times["host_us"] == pytest.approx(times["us"] / 2)
            assert times["gb_per_s"] == pytest.approx(20 * elements / times["us"] / 1e3)
    printed = capsys.readouterr().out
    assert "sgd, step, small: 3 tensors, 12 elements" in printed
    assert printed.count("bandwidth") == 1


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta"])
@pytest.mark.parametrize("case", ["step", "clip, average", "whole"])
def test_every_contender_takes_the_same_steps(gpu_step: ModuleType, case: str, rule: str, monkeypatch):
    """With its schedule, captured or not."""
    made: list[torch.nn.Parameter] = []
    parameter = torch.nn.Parameter

    class Deferred(Host):
        def capture(self, step):  # its first step is the first replay
            return step

    def from_zero(data: torch.Tensor) -> torch.nn.Parameter:
        made.append(parameter(torch.zeros_like(data)))
        return made[-1]

    monkeypatch.setattr(gpu_step, "find_apex", lambda: torch.optim.SGD)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn, "Parameter", from_zero)
        contest = gpu_step.RULES[rule]
        if not contest.has_fused:  # torch's foreach form is capturable on a GPU only
            contest = dataclasses.replace(contest, captured=None)
        stages = gpu_step.CASES[case]
        steps = gpu_step.make_contenders(Deferred(gpu_step.Turn), contest, [(7,)], stages)
    assert rule != "sgd" or case != "step" or tuple(steps) == CONTENDERS
    assert (gpu_step.TORCHS_SCALER in steps) == ("unscale" in stages)
    assert any("graph" in name for name in steps) == ("unscale" not in stages)
    original = made[0].grad.clone()
    for _ in range(5):
        for step in steps.values():
            made[0].grad.copy_(original)  # which all share
            step()
    assert len(made) == len(steps)
    assert all(p.abs().min() > 0 for p in made)
    for p in made[1:]:
        torch.testing.assert_close(p, made[0], rtol=1e-5, atol=0.0)


def test_copy_moves_as_many_bytes_as_the_step(gpu_step: ModuleType, monkeypatch):
    sizes = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, **options: sizes.append(size) or zeros(size, **options))
    gpu_step.make_copy(torch.device("cpu"), 100 * gpu_step.RULES["sgd"].bytes_per_element)()
    assert 2 * sizes[0] == 100 * (3 + 2) * 4  # p, g, m are read, p and m written
    assert gpu_step.bytes_per_element(gpu_step.RULES["adamw"], ()) == (4 + 3) * 4
    assert gpu_step.bytes_per_element(gpu_step.RULES["adamw"], ("clip", "average")) == 40


def test_a_set_that_does_not_fit_is_left_out(gpu_step: ModuleType, monkeypatch, capsys):
    measure = gpu_step.measure

    def measure_small(device, rule, shapes, *rest):
        if math.prod(shapes[0]) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(device, rule, shapes, *rest)

    monkeypatch.setattr(gpu_step, "measure", measure_small)
    found = gpu_step.run(Host(gpu_step.Turn), "sgd", "step", {"big": [(11,)], "small": [(2,)]}, 0.0, 3)
    assert [result["set"] for result in found] == ["small"]
    assert "big: does not fit" in capsys.readouterr().out


def test_without_a_gpu_no_number_is_reported(gpu_step: ModuleType, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_step.py", "--out", str(tmp_path / "out")])
    gpu_step.main()
    assert capsys.readouterr().out == "PyTorch finds no GPU here, so no GPU number is reported.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
def test_gpu_benchmark_runs_on_a_gpu(gpu_step: ModuleType):
    (found,) = gpu_step.run(gpu_step.Gpu(), "sgd", "step", {"small": [(64,)] * 10}, seconds=0.0, fewest=4)
    assert set(found["times"]) >= set(CONTENDERS) - {"apex"}

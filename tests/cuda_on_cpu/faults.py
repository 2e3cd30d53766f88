"""Plants faults into copies of the CUDA sources and shows what notices each.

From the folder ``tests``: ``python -m cuda_on_cpu.faults [NAME ...]`` prints a table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from native import toolchain

from . import build, drivers

# What can notice a fault, and the pattern of what it then says; the first that matches counts. State:
# clocks, flags, launches.
NOTICED = {
    "test": r"\d+ failed(,| in)",
    "race": "ThreadSanitizer: data race",
    "address": "AddressSanitizer: ",
    "undefined": ": runtime error: ",
    "emulator": "emulated CUDA: ",
    "launcher": " failed: cuda",
    "comparison of state": r"(kernels_driver\.cpp|driver_optimizer\.h):\d+: ",
    "comparison of tensors": r"cases\.h:\d+: ",
}
KERNELS = "cuda/kernels.cuh"
LAUNCHER = "cuda/step_cuda.cu"
LAUNCH = "cuda/launch.cuh"
LAUNCHES = "cuda/launches.cpp"
TABLES = "cuda/tables.h"
STEP = "step.h"
AVERAGE = "average.h"
STAGES = "stages.h"
DEVICE_PLAN = "cuda/device_plan.cpp"
DEVICE_MEMORY = "cuda/device_memory.cpp"
GATHER = "gather.cpp"
GATHER_STATE = "gather_state.cpp"
SHARES = "shares.cpp"

EXTENSION = "extension"  # the build that the tests of EXTENSION_TESTS run on
EXTENSION_TESTS = "test_cuda_launcher.py"
STATES = "test_rules_state.py"
DISTRIBUTED = "test_distributed.py"


@dataclass(frozen=True)
class Fault:
    """A text that stands in a file of csrc once, what takes its place, the build in which the fault is
    noticed, by what, and the rule whose kernels are built and run for it.

    Or, in the extension: the test that notices the fault, on its CPU loops or another backend, and the source
    that is built anew for a header.
    """

    file: str
    old: str
    new: str
    build: str
    noticed: str
    rule: str = "sgd"
    test: str = EXTENSION_TESTS
    backend: str = "cpu"
    source: str = ""


TICKET = "is_last = atomicAdd(&state.ticket, 1u) == gridDim.x - 1;"
ADVANCE = "  if (step.ends_step && amp.applied) advance_clocks<R>(step.clocks, 1, 0);\n"
ALIGNED = "(!is_live(live, k) || aligned(slots.at[k] + head))"
AGES = "for (int32_t i = threadIdx.x; i < step.count; i += kThreads)"
LEADS = "      if (tensor.leads_group) clock.next_age = static_cast<int64_t>(age);\n"
BARRIER = "  __syncthreads();  // all options"
ADDRESS = ("address", "address")
UNDEFINED = ("address", "undefined")
STATE = ("plain", "comparison of state")
TENSORS = ("plain", "comparison of tensors")
RACE = ("thread", "race")
TEST = (EXTENSION, "test")

FAULTS = {
    # Threads of a block.
    "no barrier before the shared value is used": Fault(
        KERNELS, "  __syncthreads();\n  return is_last;", "  return is_last;", *RACE
    ),
    "no barrier before the ticket": Fault(
        KERNELS, "(bool, is_last);\n  __syncthreads();\n", "(bool, is_last);\n", *RACE
    ),
    "divergent barrier": Fault(
        KERNELS, BARRIER, BARRIER.replace("  __sync", "  if (threadIdx.x < 32) __sync"), "plain", "emulator"
    ),
    # The last block.
    "ticket not atomic": Fault(
        KERNELS, TICKET, TICKET.replace("atomicAdd(&state.ticket, 1u)", "state.ticket++"), *RACE
    ),
    "no fence before the ticket": Fault(
        KERNELS, f"    __threadfence();\n    {TICKET}", f"    {TICKET}", *RACE
    ),
    "fence for the block alone before the ticket": Fault(
        KERNELS, f"    __threadfence();\n    {TICKET}", f"    __threadfence_block();\n    {TICKET}", *RACE
    ),
    "fence for the block alone after the ticket": Fault(
        KERNELS, f"{TICKET}\n    __threadfence();", f"{TICKET}\n    __threadfence_block();", *RACE
    ),
    "no fence after the ticket": Fault(KERNELS, f"{TICKET}\n    __threadfence();", TICKET, *RACE),
    "last block by index": Fault(KERNELS, TICKET, "is_last = blockIdx.x == gridDim.x - 1;", *TENSORS),
    "ticket not reset": Fault(KERNELS, "    state.ticket = 0;\n", "", *STATE),
    # Elements.
    "tail too short": Fault(
        KERNELS,
        "rest = end - begin - vectors * kWidth;",
        "rest = end - begin - vectors * kWidth - 1;",
        *TENSORS,
    ),
    "tail too long": Fault(
        KERNELS,
        "rest = end - begin - vectors * kWidth;",
        "rest = end - begin - vectors * kWidth + 1;",
        *ADDRESS,
    ),
    "chunk too long": Fault(
        KERNELS,
        "begin + kChunkElements < tensor.numel ?",
        "begin + kChunkElements <= tensor.numel + 7 ?",
        *TENSORS,
    ),
    "head counted from the boundary before": Fault(
        KERNELS,
        "(0 - reinterpret_cast<uintptr_t>(p)) % 16",
        "reinterpret_cast<uintptr_t>(p) % 16",
        *UNDEFINED,
    ),
    "head one longer in the scalar loop": Fault(KERNELS, "begin + e < head", "begin + e <= head", *TENSORS),
    "vectors whatever the gradient's alignment": Fault(
        KERNELS, "bool all_aligned = aligned(g + head);", "bool all_aligned = true;", *UNDEFINED
    ),
    "vectors whatever the state's alignment": Fault(KERNELS, ALIGNED, "true", *UNDEFINED),
    "vectors whatever the second slot's alignment": Fault(
        KERNELS, ALIGNED, f"(k == 1 || {ALIGNED})", *UNDEFINED, "adam"
    ),
    "strided state by the parameter's strides": Fault(
        KERNELS, "index * layout.slot[k][d]", "index * layout.param[d]", *ADDRESS
    ),
    "strided state by the first slot's strides": Fault(
        KERNELS, "index * layout.slot[k][d]", "index * layout.slot[0][d]", *TENSORS, "adam"
    ),
    "second slot not written back": Fault(
        KERNELS,
        "if (is_live(live, k)) store_vector(slots.at[k] + i",
        "if (is_live(live, k) && k != 1) store_vector(slots.at[k] + i",
        *TENSORS,
        "adam",
    ),
    "second slot not written back beside vectors": Fault(
        KERNELS,
        "if (is_live(form.live, k)) store(",
        "if (is_live(form.live, k) && k != 1) store(",
        *TENSORS,
        "adam",
    ),
    "vectors read of a slot that is not live": Fault(
        KERNELS,
        "if (is_live(live, k)) load_vector(slot_values[k]",
        "load_vector(slot_values[k]",
        *UNDEFINED,
        "adam",
    ),
    "elements read of a slot that is not live": Fault(
        KERNELS,
        "is_live(form.live, k) ? static_cast<C>(load(slots.at[k][at.slot[k]])) : C(0);",
        "static_cast<C>(load(slots.at[k][at.slot[k]]));",
        *ADDRESS,
        "adam",
    ),
    "elements written to a slot that is not live": Fault(
        KERNELS, "if (is_live(form.live, k)) store(", "store(", *ADDRESS, "adam"
    ),
    "32-bit chunks": Fault(
        KERNELS,
        "of_tensor * kChunkElements;",
        "static_cast<int>(of_tensor) * static_cast<int>(kChunkElements);",
        *UNDEFINED,
    ),
    "no grid stride": Fault(KERNELS, "chunk += gridDim.x", "++chunk", *TENSORS),
    "search stops one tensor early": Fault(KERNELS, "high - low > 1", "high - low > 2", *TENSORS),
    # Launches.
    "tensor lost between launches": Fault(LAUNCHES, "begin += capacity)", "begin += capacity + 1)", *STATE),
    "tensor lost at the end of a launch": Fault(
        LAUNCHES, "std::min(begin + capacity, batch", "std::min(begin + capacity - 1, batch", *STATE
    ),
    "last tensor not counted": Fault(
        LAUNCHES, "<int32_t>(launch.grads.size());", "<int32_t>(launch.grads.size()) - 1;", *TENSORS
    ),
    "chunks counted on from the launch before": Fault(
        LAUNCHES,
        "entry.first_chunk = launch.head.chunks;",
        "entry.first_chunk = launch.head.chunks + static_cast<int64_t>(cut.launches.size());",
        *ADDRESS,
    ),
    "empty chunk behind each tensor": Fault(
        LAUNCHES,
        "launch.head.chunks += chunks_of(tensor.numel);",
        "launch.head.chunks += chunks_of(tensor.numel + 1);",
        *STATE,
    ),
    "large arguments for an old driver": Fault(
        LAUNCHER, "launch.grads.size() <= static", "launch.grads.size() < static", "plain", "launcher"
    ),
    "kernel first loaded in a capture": Fault(
        LAUNCHER, "  load(residency, kClockKernels[rule.index], multiprocessors);\n", "", *STATE
    ),
    "launch on whatever device is current": Fault(
        LAUNCHER, "const Launch& launch) {\n  use_device(device);\n", "const Launch& launch) {\n", *STATE
    ),
    "a block for each chunk": Fault(
        LAUNCH, "std::min(launch.head.chunks, resident)", "launch.head.chunks", *STATE
    ),
    # Clocks and flags.
    "clock never moved": Fault(KERNELS, ADVANCE, "", *STATE),
    "clock moved by every launch": Fault(
        KERNELS, ADVANCE, ADVANCE.replace("step.ends_step && ", ""), *TENSORS
    ),
    "clocks of the first groups only": Fault(
        KERNELS, "i < groups; i += kHalf", "i < groups && i < kHalf; i += kHalf", *STATE
    ),
    "schedule evaluated before the clock moves": Fault(
        TABLES, "before + (schedule.in_samples ? samples : updates)", "before", *STATE
    ),
    "a schedule's end noticed an update late": Fault(
        TABLES, "before > schedule.end)", "before > schedule.end + 1)", *STATE
    ),
    "skipped step forgotten when samples are consumed": Fault(
        LAUNCHER, "if (updates != 0 && threadIdx.x == 0) {", "if (threadIdx.x == 0) {", *STATE
    ),
    "found_inf ignored": Fault(KERNELS, "*found_inf == 0.0f", "*found_inf < 2.0f", *TENSORS),
    "unusable scale applied": Fault(
        KERNELS, "amp.applied = !amp.invalid_scale && ", "amp.applied = ", *TENSORS
    ),
    "state ages on a skipped step": Fault(KERNELS, "  if (amp.applied) {\n", "  {\n", *STATE),
    "state ages in the last launch only": Fault(
        KERNELS, "  if (amp.applied) {\n", "  if (amp.applied && step.ends_step) {\n", *STATE
    ),
    # Ages, and what follows from them.
    "state never ages": Fault(KERNELS, "      *tensor.age = age;\n", "", *STATE),
    "state ages without a live slot": Fault(
        KERNELS, "if (as<R>(clock.next).in_double.around.live == 0) continue;", "", *STATE
    ),
    "ages of as many tensors as a block has threads": Fault(
        KERNELS, AGES, AGES.replace("i < step.count", "i < step.count && i < kThreads"), *STATE
    ),
    "the group keeps its age": Fault(KERNELS, LEADS, "", *STATE, "adam"),
    "the group's age one update late": Fault(
        KERNELS, LEADS, LEADS.replace("(age)", "(age - 1.0f)"), *STATE, "adam"
    ),
    "the group's age before its clock moves": Fault(
        KERNELS, LEADS, LEADS.replace("next_age", "age"), *STATE, "adam"
    ),
    "the group's age that of any tensor": Fault(
        KERNELS, LEADS, LEADS.replace("if (tensor.leads_group) ", ""), *RACE, "adam"
    ),
    "a leader in each launch": Fault(
        LAUNCHES,
        " && led.insert(tensor.group).second",
        " && (i == begin || led.insert(tensor.group).second)",
        *STATE,
    ),
    "a leader without state": Fault(LAUNCHES, "tensor.step != nullptr && led", "led", *STATE),
    "own scalars at the group's age": Fault(
        KERNELS,
        "scalars<R, C>(clock.options, age, Unscaling{})",
        "scalars<R, C>(clock.options, clock.age, Unscaling{})",
        *TENSORS,
        "adam",
    ),
    "own scalars formed by every thread": Fault(
        KERNELS, "if (threadIdx.x == 0) own = scalars", "own = scalars", *RACE, "adam"
    ),
    "the group's scalars for every age": Fault(KERNELS, "|| age == clock.age)", "|| true)", *TENSORS, "adam"),
    "the group's scalars for a first update": Fault(KERNELS, "|| age == clock.age)", "|| true)", *TENSORS),
    "the group's scalars at another age": Fault(
        KERNELS,
        "scalars<R, float>(clock.options, age,",
        "scalars<R, float>(clock.options, age + 1,",
        *TENSORS,
        "adam",
    ),
    "the group's scalars in double at the age before": Fault(
        KERNELS,
        "scalars<R, double>(clock.options, age,",
        "scalars<R, double>(clock.options, age - 1,",
        *TENSORS,
        "adam",
    ),
    "schedules of the first two options only": Fault(
        TABLES,
        "if (group.schedule[option].count != 0)",
        "if (option < 2 && group.schedule[option].count != 0)",
        *TENSORS,
        "adam",
    ),
    "options formed by one block's width only": Fault(
        KERNELS,
        "i < groups * kOptionCount<R>; i += kThreads",
        "i < groups * kOptionCount<R> && i < kThreads; i += kThreads",
        *STATE,
        "adam",
    ),
    "no barrier between options and scalars": Fault(KERNELS, BARRIER, "  //", *RACE, "adam"),
    "no barrier before own scalars are formed": Fault(
        KERNELS, "  __syncthreads();  // the last tensor's are done with\n", "", *RACE
    ),
    "no barrier before own scalars are used": Fault(
        KERNELS, "Unscaling{});\n  __syncthreads();\n  return own;", "Unscaling{});\n  return own;", *RACE
    ),
    # Around the rules, and in them.
    "scale ignored": Fault(
        KERNELS, "C factor = static_cast<C>(amp.inverse_scale);", "C factor = 1;", *TENSORS
    ),
    "maximize ignored": Fault(
        STEP, "if (options[R::kMaximize] != 0.0) s.around.of_gradient = -s.around.of_gradient;", "", *TENSORS
    ),
    "decoupled decay not taken": Fault(
        STEP, "decouples ? static_cast<T>(1.0 - options[R::kLr] * decay) : T(1);", "T(1);", *TENSORS, "adam"
    ),
    "decoupled decay after the rule": Fault(
        STEP,
        "      p = p * s.around.of_parameter;\n    }\n  }\n  R::update(s.rule, form.live, p, g, slots);\n",
        "    }\n  }\n  R::update(s.rule, form.live, p, g, slots);\n  p = p * s.around.of_parameter;\n",
        *TENSORS,
        "lion",
    ),
    "coupled decay taken with decoupled": Fault(
        STEP, "decay != 0.0 && !decouples;", "decay != 0.0;", *TENSORS, "adam"
    ),
    "sgd: the first update reads the buffer": Fault(
        "rules/sgd.h", "s.first ? kNothing<T> : m * s.momentum", "m * s.momentum", *TENSORS
    ),
    "adam: bias correction one update late": Fault(
        "rules/adam.h", "power(options[kBeta2], age + 1)", "power(options[kBeta2], age + 2)", *TENSORS, "adam"
    ),
    "adam: root of the square that is not the largest": Fault(
        "rules/adam.h", "(square_root(n) /", "(square_root(v) /", *TENSORS, "adam"
    ),
    "rmsprop: variance with the mean added": Fault(
        "rules/rmsprop.h", "fused_multiply_add(-a, a, v)", "fused_multiply_add(a, a, v)", *TENSORS, "rmsprop"
    ),
    "adagrad: rate decays from the first update": Fault(
        "rules/adagrad.h", "static_cast<double>(age) *", "static_cast<double>(age + 1) *", *TENSORS, "adagrad"
    ),
    "adadelta: no eps under the first root": Fault(
        "rules/adadelta.h",
        "square_root(slots[kDeltas] + s.eps)",
        "square_root(slots[kDeltas])",
        *TENSORS,
        "adadelta",
    ),
    "lion: the average moves by beta1": Fault(
        "rules/lion.h",
        "(s.one_minus_beta2, g, m * s.beta2)",
        "(s.one_minus_beta1, g, m * s.beta1)",
        *TENSORS,
        "lion",
    ),
    "averages always from their start": Fault(
        AVERAGE,
        "const bool from_start = part < T(0.5);",
        "const bool from_start = true;",
        *TENSORS,
        "adam",
    ),
    # The gradients' norm.
    "no barrier before lanes are added": Fault(
        KERNELS, "lanes[threadIdx.x] = lane;\n  __syncthreads();\n", "lanes[threadIdx.x] = lane;\n", *RACE
    ),
    "no barrier between rounds of adding lanes": Fault(
        KERNELS,
        "lanes[threadIdx.x + apart];\n    __syncthreads();\n",
        "lanes[threadIdx.x + apart];\n",
        *RACE,
    ),
    "squares by the parameter's strides": Fault(
        KERNELS, "places_of<0>(*layout, i).grad", "places_of<0>(*layout, i).param", *STATE
    ),
    "squares of a chunk's first elements only": Fault(
        KERNELS,
        "sum_of_squares(g, layout, begin, end, of)",
        "sum_of_squares(g, layout, begin, begin + 8, of)",
        *STATE,
    ),
    "squares numbered within the launch": Fault(
        KERNELS, "tensor.first_square + of_tensor)", "chunk)", *STATE
    ),
    "squares of all tensors in one place": Fault(LAUNCHES, "{&tensor, square}", "{&tensor, 0}", *STATE),
    "norm of the last launch only": Fault(
        KERNELS,
        "sum_of_range(step.squares, 0, step.step_chunks), amp",
        "sum_of_range(step.squares, 0, step.chunks), amp",
        *STATE,
    ),
    "norm of the scaled gradients": Fault(
        KERNELS,
        "unscaled_squares(sum_of_range(step.squares, 0, step.step_chunks), amp.inverse_scale)",
        "sum_of_range(step.squares, 0, step.step_chunks)",
        *STATE,
    ),
    "norm of a skipped step": Fault(KERNELS, "measures_norm && amp.applied) {", "measures_norm) {", *STATE),
    "norm said to be measured where it was not": Fault(
        KERNELS, "state.norm_measured = measures_norm;", "state.norm_measured = 1;", *STATE
    ),
    "gradients not clipped": Fault(KERNELS, "    factor = step.clocks.state->factor(C{});\n", "", *TENSORS),
    "a norm that is inf or NaN clips": Fault(
        KERNELS, "amp.applied = amp.applied && factor == factor;", "", *TENSORS
    ),
    "clipped by the norm of the last launch": Fault(
        KERNELS,
        "const bool ends_norm = step.ends_step && !step.of_shares;",
        "const bool ends_norm = !step.of_shares;",
        *STATE,
    ),
    "norm that could not be clipped not told": Fault(KERNELS, "    state.nonfinite = 1;\n", "", *STATE),
    "an inf or NaN that GradScaler seeks not told": Fault(
        KERNELS, "    *step.clocks.found_inf = 1.0f;\n", "", *STATE
    ),
    "an inf or NaN that GradScaler seeks told as an error": Fault(
        KERNELS, "  } else {\n    state.nonfinite", "  }\n  {\n    state.nonfinite", *STATE
    ),
    "an inf or NaN not sought where the scale is unusable": Fault(
        KERNELS, "amp.applied || (step.seeks_inf && amp.invalid_scale);", "amp.applied;", *STATE
    ),
    "an unusable scale told as an inf": Fault(
        KERNELS, "amp.applied ? factor == factor : squares <= DBL_MAX;", "factor == factor;", *STATE
    ),
    "found_inf written while other threads read it": Fault(
        KERNELS,
        "if (finite || !step.clips || !measures(step, amp)) return;",
        "if (finite || !step.clips) return;",
        *RACE,
    ),
    "a scale judged where an inf was found": Fault(
        KERNELS, "amp.invalid_scale = !found && !(", "amp.invalid_scale = !(", *STATE
    ),
    "norm of the step before where there are no tensors": Fault(
        LAUNCHER, "    clocks.state->squared_norm = amp.applied ? 0.0 : NAN;\n", "", *STATE
    ),
    # The parameters' averages.
    "average of the parameter that is not rounded": Fault(
        KERNELS,
        "    store(p, value);\n    return load(p);\n",
        "    store(p, value);\n    return value;\n",
        *TENSORS,
    ),
    "averages not written back": Fault(
        KERNELS,
        "      if (stages.averages != nullptr) store_vector(stages.averages + i, averages);\n",
        "",
        *TENSORS,
    ),
    "averages beside vectors stay": Fault(
        KERNELS,
        "      stages.averages[at.average] = stages.moved(stages.averages[at.average], target);\n",
        "",
        *TENSORS,
    ),
    "vectors whatever the average's alignment": Fault(KERNELS, "fits(stages.averages) && ", "", *UNDEFINED),
    "strided averages by the parameter's strides": Fault(
        KERNELS, "index * layout.slot[kEmaSlot][d]", "index * layout.param[d]", *ADDRESS
    ),
    "averages of halves all taken for float32": Fault(
        KERNELS, "tensor.ema_type != StorageType::kFloat32", "false", *UNDEFINED
    ),
    "stages told to launches without": Fault(LAUNCHES, "batch.staged == tensor.staged", "true", *TENSORS),
    "averages warmed up by the update after": Fault(
        KERNELS,
        "group_stages(of_stages, clock.updates)",
        "group_stages(of_stages, clock.updates + 1)",
        *TENSORS,
    ),
    "averages not warmed up": Fault(STAGES, "if (warms_up && ", "if (false && ", *TENSORS),
    # What else is kept of half parameters.
    "masters not written back": Fault(
        KERNELS, "      if (stages.rests != nullptr) store_vector(stages.rests + i, rests);\n", "", *TENSORS
    ),
    "masters beside vectors stay": Fault(
        KERNELS, "    if (stages.rests != nullptr) stages.rests[at.master] = rest;\n", "", *TENSORS
    ),
    "strided masters by the average's strides": Fault(
        KERNELS, "index * layout.slot[kMasterSlot][d]", "index * layout.slot[kEmaSlot][d]", *ADDRESS
    ),
    "vectors whatever the master's alignment": Fault(KERNELS, " && fits(stages.rests)", "", *UNDEFINED),
    "averages follow the parameter and not its master": Fault(
        KERNELS, "        return value;\n", "        return load(p);\n", *TENSORS
    ),
    "halfway masters rounded towards zero": Fault(
        STAGES, "(bits + 0x8000u) >> 16", "(bits + 0x7fffu) >> 16", *TENSORS
    ),
    "a float16 that somebody wrote is not the master": Fault(
        STAGES, "to_float16(master).bits == p.bits ? master : to_float(p)", "master", *TENSORS
    ),
    "chance by the place in the chunk": Fault(
        KERNELS, "rests[e], i + e)", "rests[e], i + e - begin)", *TENSORS
    ),
    "chance by the place in the tensor's order": Fault(
        KERNELS,
        "update_one<R>(s, p, at.param, g[at.grad], slots, stages, at.of)",
        "update_one<R>(s, p + at.param - i, i, g[at.grad], slots, stages, at.of)",
        *TENSORS,
    ),
    "one chance for all parameters": Fault(
        KERNELS, "random_key(of_group.random, tensor.place)", "random_key(of_group.random, 0)", *TENSORS
    ),
    "one chance for all updates": Fault(
        STAGES, "hashed(hashed(seed) + static_cast<uint64_t>(updates))", "hashed(hashed(seed))", *TENSORS
    ),
    "rounded to nearest in spite of chance": Fault(
        KERNELS,
        "stages.by_chance = tensor.kept == Keeping::kStochastic;",
        "stages.by_chance = false;",
        *TENSORS,
    ),
    # Around the rule, but not of plain steps.
    "clipped to the value that scaled gradients have": Fault(
        KERNELS,
        "    if constexpr (kStaged) s.around.bound /= static_cast<C>(amp.inverse_scale);\n",
        "",
        *TENSORS,
    ),
    "the norm of gradients before they are clipped by value": Fault(
        KERNELS, "if constexpr (kStaged) return clipped(x, s.around.bound);", "", *STATE
    ),
    "the norm that clips of gradients before they are clipped by value": Fault(
        KERNELS, "if (bound < static_cast<C>(INFINITY)) {", "if (false) {", *TENSORS
    ),
    "an infinity that is sought clipped": Fault(
        KERNELS, "return keeps_inf && is_inf ? x : clipped(x, bound);", "return clipped(x, bound);", *TENSORS
    ),
    "clipped after the scale is taken out": Fault(
        STEP,
        "  if (form.clips) g = clipped(g, s.around.bound);\n  if (!form.plain) {\n"
        "    g = g * s.around.of_gradient;\n",
        "  if (!form.plain) {\n    g = g * s.around.of_gradient;\n"
        "    if (form.clips) g = clipped(g, s.around.bound);\n",
        *TENSORS,
    ),
    "cautious decay spares what shrinks": Fault(
        STEP,
        "opposed ? s.around.of_opposed : s.around.of_parameter",
        "opposed ? s.around.of_parameter : s.around.of_opposed",
        *TENSORS,
        "lion",
    ),
    "a graph goes on without a stage": Fault(
        DEVICE_PLAN,
        "      seen.stages_in_graph = seen.stages;\n",
        "",
        *TEST,
        test="test_clip_grad_value.py::test_a_graph_keeps_the_stages_that_it_has_captured",
    ),
    # What the device holds for an optimizer.
    "the same schedule begins where it began before": Fault(
        DEVICE_PLAN, "driven.start != seen.start[k]", "(k != 0 && driven.start != seen.start[k])", *TEST
    ),
    "the same schedule of momentum begins where it began before": Fault(
        DEVICE_PLAN, "driven.start != seen.start[k]", "(k != 1 && driven.start != seen.start[k])", *TEST
    ),
    "other threads wait for the device too": Fault(
        DEVICE_MEMORY, "  if (others_run) other_threads_run.emplace();\n", "", *TEST
    ),
    "a graph's clocks go with the optimizer": Fault(DEVICE_PLAN, "  graph.add(state_);\n", "", *TEST),
    "a graph's schedules go with the optimizer": Fault(
        DEVICE_PLAN,
        '  if (changed.schedules || grows) table.hold("schedules", schedules.table);\n',
        "",
        *TEST,
    ),
    # What there is to know of tensors and numbers before a step, for every backend.
    "state is not noted as written": Fault(
        GATHER_STATE,
        "overlaps_.writes(slots[k]->data, bytes(extents[k], slots[k]->dtype));",
        "{}",
        *TEST,
        test=f"{STATES}::test_state_that_another_update_reads_or_writes_is_updated_in_order",
        backend="cuda-on-cpu",  # the extension's CPU loops have one thread
    ),
    "lazily conjugated state taken as it lies": Fault(
        GATHER_STATE,
        "may_be_lazy(m, parameter.order.numel, dense) &&",
        "!is_complex(m.dtype) && may_be_lazy(m, parameter.order.numel, dense) &&",
        *TEST,
        test=f"{STATES}::test_lazily_conjugated_and_negated_slots_are_refused",
    ),
    "lazily negated state taken as it lies": Fault(
        GATHER_STATE,
        "may_be_lazy(m, parameter.order.numel, dense) &&",
        "is_complex(m.dtype) &&",
        *TEST,
        test=f"{STATES}::test_lazily_conjugated_and_negated_slots_are_refused",
    ),
    # Parts of distributed parameters.
    "every part in the share of what is whole": Fault(
        GATHER,
        "  ref.share = parameter.cut.share;\n",
        "",
        *TEST,
        test=f"{DISTRIBUTED}::test_each_share_is_added_up_along_its_own_dimensions",
    ),
    "parts rounded by chance as if each were the first": Fault(
        GATHER,
        "  ref.first = parameter.cut.first;\n",
        "",
        *TEST,
        test=f"{DISTRIBUTED}::test_rows_are_rounded_as_if_they_were_not_cut",
    ),
    "state that is cut otherwise taken as it lies": Fault(
        SHARES,
        "    if (same == 0) return false;\n",
        "",
        *TEST,
        test=f"{DISTRIBUTED}::test_state_that_is_cut_otherwise_is_refused",
    ),
    "a device's sums of shares not those of the other processes": Fault(
        DEVICE_PLAN,
        'checked(PyObject_CallMethod(scope.runtime(), "add_up_shares_in"',
        'if (shares.count == 0) checked(PyObject_CallMethod(scope.runtime(), "add_up_shares_in"',
        *TEST,
        test=f"{DISTRIBUTED}::test_each_share_is_added_up_along_its_own_dimensions",
        backend="cuda-on-cpu",
    ),
    "a device's squares of all shares in one order": Fault(
        LAUNCHES,
        "next_square[static_cast<size_t>(tensor.share)]",
        "next_square[0]",
        *TEST,
        test=f"{DISTRIBUTED}::test_each_share_is_added_up_along_its_own_dimensions",
        backend="cuda-on-cpu",
    ),
    "room for state not taken back": Fault(
        GATHER_STATE,
        "if ((added.room >> k & 1u) != 0) PyDict_DelItem(added.state.get(), keys_[k]);",
        "",
        *TEST,
        test=f"{STATES}::test_a_step_that_is_stopped_leaves_no_room_for_state",
    ),
    "a step in the parameter's memory": Fault(
        GATHER_STATE,
        'meets(p, parameter.order.extent) ? "the parameter"',
        'false ? "the parameter"',
        *TEST,
        test=f"{STATES}::test_a_step_that_shares_memory_is_refused",
    ),
    "state of another type than its group's": Fault(
        GATHER_STATE,
        "found == expected;",
        "(found == ref.type || found == StorageType::kFloat32);",
        *TEST,
        test=f"{STATES}::test_a_type_of_state_that_is_written_into_a_group_is_that_of_new_state",
    ),
    "numbers beyond a type": Fault(
        GATHER,
        "  if (group.large_options != 0) check_range(place, ref, updated_by);\n",
        "",
        *TEST,
        test=f"{STATES}::test_numbers_beyond_float32_are_refused",
    ),
    "adam: bias corrections that end": Fault(
        "rules/adam.h",
        "power(options[kBeta2], age + 1)",
        "power(options[kBeta2], age < 1000 ? age + 1 : 1000)",
        *TEST,
        test="test_rules.py::test_old_state_equals_torch",
        source="rules.cpp",
    ),
    "adam: a NaN that is not the largest": Fault(
        "numeric.h",
        "return a > b || a != a ? a : b;",
        "return a > b ? a : b;",
        *TEST,
        test="test_rules.py::test_what_is_no_number_in_the_largest_squares_stays_as_in_torch",
        source="cpu/kernels.cpp",
    ),
}


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault."""
    csrc = toolchain.copy_sources(folder, only="" if fault.build == EXTENSION else fault.rule)
    path = csrc / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {text.count(fault.old)} times, not once:\n{fault.old}")
    path.write_text(text.replace(fault.old, fault.new))
    return csrc


def noticed_by(done: subprocess.CompletedProcess[str]) -> str:
    """What ended the driver, "nothing" where it passed."""
    output = done.stdout + done.stderr
    if done.returncode == 0:
        return "nothing"
    return next(
        (name for name, pattern in NOTICED.items() if re.search(pattern, output)),
        f"exit status {done.returncode}",
    )


def run_faulty(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Builds the driver from a faulty copy, in a folder that does not exist yet, and runs it."""
    fault = FAULTS[name]
    if fault.build == EXTENSION:
        unchanged = build.build_extension(build.CACHE)
        source = fault.source or fault.file
        library = build.relink_extension(unchanged, plant(fault, folder), source, folder)
        options = ("-q", "-x", "-p", "no:cacheprovider", "--backend", fault.backend)
        command = (sys.executable, "-m", "pytest", *options, fault.test)
        environment = {**os.environ, build.LIBRARY: str(library)}
        return toolchain.run(*command, cwd=Path(__file__).parents[1], env=environment, timeout=300)
    part = "launches" if fault.file == LAUNCHES else "kernels"
    replaced = next(n for n in drivers.PROGRAMS[fault.build] if n.split("-")[0] == part)
    path = drivers.compile_object(replaced, plant(fault, folder), folder / "faulty.o")
    return drivers.run(drivers.link(fault.build, folder / "driver", {replaced: path}), fault.rule)


def main(names: list[str]) -> int:
    chosen = names or list(FAULTS)
    unexpected = 0
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        folder = Path(temporary)
        running = [pool.submit(run_faulty, name, folder / str(i)) for i, name in enumerate(chosen)]
        print(f"{'fault':48} {'build':9} noticed by")
        for name, future in zip(chosen, running, strict=True):
            fault, found = FAULTS[name], noticed_by(future.result())
            unexpected += found != fault.noticed
            note = "" if found == fault.noticed else f", not by {fault.noticed}"
            print(f"{name:48} {fault.build:9} {found}{note}", flush=True)
    return min(unexpected, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

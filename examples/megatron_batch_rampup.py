"""Megatron's --rampup-batch-size START INCREMENT SAMPLES, with --global-batch-size FULL, as a BatchPlan.

Megatron cuts the ramp of SAMPLES into as many equal stretches as there are increments from START to FULL. An
update takes the size of the stretch that it begins in, and is not cut where the next one begins.
"""

from __future__ import annotations

import fastlr


def rampup_plan(
    rampup: tuple[int, int, int], full: int, samples: int, lr: fastlr.Schedule, **options: int
) -> fastlr.BatchPlan:
    """The plan of a run of so many samples.

    Args:
        rampup: start, increment and samples, as Megatron takes them.
        full: the batch size after the ramp.
        samples: --train-samples.
        lr: a schedule in samples, as Megatron's with --lr-decay-samples is.
        options: of ``BatchPlan.from_phases``, as micro_batch_size and ranks.
    """
    start, increment, ramp = rampup
    if (full - start) % increment or full <= start:
        raise ValueError(f"the batch must grow from {start} to {full} by increments of {increment}")
    stretch = ramp / ((full - start) // increment)
    phases, consumed = [(0, start)], 0
    while phases[-1][1] < full:
        consumed += phases[-1][1]
        size = full if consumed > ramp else start + int(consumed / stretch) * increment
        if consumed >= samples:
            break  # the run ends on the ramp
        if size > phases[-1][1]:
            phases.append((consumed, size))
    return fastlr.BatchPlan.from_phases(
        phases, unit="sample", dataset_size=samples, epochs=1, lr=lr, scaling="sqrt", **options
    )


def main() -> None:
    samples = 1_000_000
    lr = fastlr.LinearRamp(0.0, 6e-4, 10_000, unit="sample").then(
        fastlr.Cosine(6e-4, 6e-5, samples - 10_000, unit="sample")
    )
    plan = rampup_plan((32, 32, 100_000), full=256, samples=samples, lr=lr, micro_batch_size=4, ranks=8)
    print(plan)


if __name__ == "__main__":
    main()

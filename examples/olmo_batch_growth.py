"""OLMo-core's batch sizes and the tokens at which they apply, as a BatchPlan.

There a batch grows once its tokens are due and the batches so far are a whole number of the new size, and the
rate that a schedule says is multiplied by the square root of the growth, as adaptive rules want it.
"""

from __future__ import annotations

import math

import fastlr


def growth_plan(
    batch_sizes: list[int], schedule: list[int], sequence_length: int, tokens: int, lr: fastlr.Schedule
) -> fastlr.BatchPlan:
    """The plan of a run of so many tokens.

    Args:
        batch_sizes: in tokens, each a multiple of the one before.
        schedule: the tokens at which each is due, the first 0.
        sequence_length: tokens of a sample.
        tokens: of the run.
        lr: a schedule in tokens, for the first batch size.
    """
    phases, rate = [(0, batch_sizes[0])], lr
    for size, due, next_due in zip(batch_sizes[1:], schedule[1:], [*schedule[2:], tokens], strict=True):
        begin, before = phases[-1]
        start = begin + -(-(due - begin) // before) * before  # where an update begins
        start += -start % size  # and the batches so far can be counted in the new size
        if next_due <= start:
            continue  # by then a larger one is due, or the run is over
        phases.append((start, size))
        grown = fastlr.schedules.Shifted(lr, start) * math.sqrt(size / batch_sizes[0])
        rate = rate.then(grown, at=start)
    return fastlr.BatchPlan.from_phases(
        phases,
        unit="token",
        sequence_length=sequence_length,
        dataset_size=tokens // sequence_length,
        epochs=1,
        lr=rate,
        scaling="sqrt",
    )


def main() -> None:
    length, total = 4096, 2**34
    warm_up = 2**28
    lr = fastlr.LinearRamp(0.0, 3e-4, warm_up, unit="token").then(
        fastlr.Cosine(3e-4, 3e-5, total - warm_up, unit="token")
    )
    print(growth_plan([2**19, 2**20, 2**22], [0, 2**31, 2**33], length, total, lr))


if __name__ == "__main__":
    main()

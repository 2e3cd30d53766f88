"""How a batch is divided between ranks and into micro-batches."""

from __future__ import annotations


def divide(batch_size: int, micro_batch_size: int | None, ranks: int) -> tuple[int, int]:
    """``(micro, steps)``, so that ``micro * steps * ranks == batch_size`` with the fewest steps.

    Raises:
        ValueError: there is no such division, or none with fewer than twice the steps needed, which
            would leave the device half idle.

    >>> divide(640, 256, 1), divide(640, 256, 2), divide(128, 256, 1)
    ((160, 4), (160, 2), (128, 1))
    """
    share, rest = divmod(batch_size, ranks)
    if rest:
        below, above = share * ranks, (share + 1) * ranks
        near = " or ".join(f"{size:,}" for size in (below, above) if size)
        raise ValueError(
            f"a batch of {batch_size:,} samples cannot be shared evenly between {ranks} ranks; "
            f"sizes that can are multiples of {ranks}, such as {near}"
        )
    if micro_batch_size is None or share <= micro_batch_size:
        return share, 1
    fewest = -(-share // micro_batch_size)
    for steps in range(fewest, 2 * fewest):
        if share % steps == 0:
            return share // steps, steps
    block = ranks * micro_batch_size
    below, above = batch_size // block * block, -(-batch_size // block) * block
    divisors = [m for m in range(1, share + 1) if share % m == 0]
    near = " or ".join(f"{m:,}" for m in divisors if micro_batch_size // 2 <= m <= 4 * micro_batch_size)
    raise ValueError(
        f"a batch of {batch_size:,} samples on {ranks} rank{'s' if ranks > 1 else ''} cannot be cut into "
        f"equal micro-batches of about micro_batch_size={micro_batch_size:,}; batches that can are "
        f"multiples of {block:,}, such as {below:,} or {above:,}"
        + (f"; for this batch, micro_batch_size={near} can" if near else "")
    )

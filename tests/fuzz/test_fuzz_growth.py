"""Any plan, grown on the way, shared by any ranks and resumed from any checkpoint, is the one run."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

from fuzz import seeds
from fuzz.growth import GENERATORS, Run, case, counted, expected_updates


@pytest.mark.parametrize("seed", seeds(30))
def test_a_run_is_the_plans_on_every_rank_and_from_every_checkpoint(seed: int) -> None:
    torch.set_num_threads(1)
    drawn = case(seed)
    ranks = [Run(drawn, rank) for rank in range(drawn.world)]
    for run in ranks:
        run.train()
    whole = ranks[0]

    # The updates are those that walking through the run finds, and every epoch comes.
    growths = [tuple(growth) for growth in whole.loader.state_dict()["growths"]]
    assert whole.updates == list(expected_updates(drawn, growths))
    assert whole.epochs == list(range(drawn.epochs))

    # The ranks go in step, and together take each sample of an update once, none more than micro at once.
    samples: dict[int, list[list[int]]] = {}
    for together in zip(*(run.taken for run in ranks), strict=True):
        (position,) = {micro.position for micro in together}
        shares = samples.setdefault(position, [[] for _ in ranks])
        for share, micro in zip(shares, together, strict=True):
            assert 1 <= micro.samples == len(micro.indices) <= (drawn.micro or drawn.size)
            share.extend(micro.indices)
    assert [(position, sum(map(len, shares))) for position, shares in samples.items()] == whole.updates
    taken = Counter(index for shares in samples.values() for share in shares for index in share)
    if drawn.tail != "drop":
        assert taken == dict.fromkeys(range(drawn.size), drawn.epochs)
    else:
        for shares in samples.values():
            assert len(set(itertools.chain(*shares))) == sum(map(len, shares))
        assert max(taken.values()) <= drawn.epochs

    # Sample i of an update is rank i % ranks', and each epoch has an order of its own.
    orders: list[dict[int, int]] = [{} for _ in range(drawn.epochs)]
    for position, shares in samples.items():
        for i in range(sum(map(len, shares))):
            epoch, place = divmod(position + i, drawn.size)
            orders[epoch][place] = shares[i % drawn.world][i // drawn.world]
    for one, other in itertools.pairwise(orders):
        both = one.keys() & other.keys()
        if not drawn.shuffle:
            assert all(place == index for place, index in one.items())
        elif len(both) >= 12:  # of so many the same order does not come by chance
            assert any(one[place] != other[place] for place in both)

    # Weighted means of micro-batches make the mean over the update, and every sample draws its own numbers.
    sizes = dict(whole.updates)
    for run in ranks:
        for position, group in itertools.groupby(run.taken, lambda micro: micro.position):
            micros = list(group)
            counts, total = [micro.samples for micro in micros], sizes[position]
            if drawn.by_count:
                counts = [counted(torch.tensor(micro.indices)) for micro in micros]
                total = sum(counts)
            weights = [drawn.world * number / total for number in counts]
            assert [micro.weight for micro in micros] == pytest.approx(weights, rel=1e-12)
    numbers = [number for run in ranks for micro in run.taken for number in micro.drawn]
    for generator in range(GENERATORS):
        own = numbers[generator::GENERATORS]
        assert len(set(own)) == len(own) == drawn.seeded * sum(taken.values())

    # The noise scale is the paper's.
    assert whole.noise.observations == whole.own_noise.observations
    for name, value in vars(whole.own_noise).items():
        if name in ("gradient", "noise", "weight"):
            assert whole.noise.state_dict()[name] == pytest.approx(value, rel=1e-6, abs=1e-12)

    # Any checkpoint goes on as if nothing had happened.
    rng = random.Random(seed)
    places = range(len(whole.saved)) if not drawn.workers else [rng.randrange(len(whole.saved))]
    for place in rng.sample(places, min(len(places), 10)):
        resumed = Run(drawn, rank=0, seed=1)
        resumed.load(whole.saved[place])
        resumed.train()
        assert resumed.updates == whole.updates[len(whole.updates) - len(resumed.updates) :]
        assert resumed.epochs == whole.epochs[len(whole.epochs) - len(resumed.epochs) :]
        assert resumed.loader.state_dict() == whole.loader.state_dict()
        assert resumed.optimizer.clock() == whole.optimizer.clock()
        assert resumed.noise.state_dict() == whole.noise.state_dict()
        for a, b in zip(whole.trained(), resumed.trained(), strict=True):
            assert torch.equal(a, b)


def test_a_seed_draws_the_same_case_again() -> None:
    assert [case(seed) for seed in range(5)] == [case(seed) for seed in range(5)]


def test_the_cases_are_of_many_kinds() -> None:
    """What the runs are for is among the first of them."""
    drawn = [case(seed) for seed in range(40)]
    assert {c.tail for c in drawn} == {"carry", "keep", "drop"}
    assert {c.world for c in drawn} == {1, 2, 3}
    assert {c.workers for c in drawn} == {0, 2}
    assert {c.noise for c in drawn if c.world == 1} == {None, "parameters", "optimizer"}
    assert {c.seeded for c in drawn} == {bool(c.skips) for c in drawn} == {False, True}
    assert sum(c.shuffle and c.size >= 12 and c.epochs > 1 for c in drawn) >= 6
    assert {when for c in drawn for _, when in c.growths.values()} == {"before", "after"}
    updates = [list(expected_updates(c, [])) for c in drawn]
    pairs = list(zip(drawn, updates, strict=True))
    assert sum(len({start // c.size for start, _ in found}) < c.epochs for c, found in pairs) >= 1
    across = [c for c, found in pairs if any(s // c.size != (s + n - 1) // c.size for s, n in found)]
    assert len(across) >= 6
    assert any(c.world > 1 and c.layers for c in across)

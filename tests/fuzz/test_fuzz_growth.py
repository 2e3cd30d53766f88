"""Any plan, grown on the way, shared by any ranks and resumed from any checkpoint, is the one run."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from fuzz import seeds
from fuzz.growth import Run, case, expected_updates


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
    samples: dict[int, list[int]] = {}
    for together in zip(*(run.taken for run in ranks), strict=True):
        assert len({position for position, _, _ in together}) == 1
        for position, size, indices in together:
            assert 1 <= size == len(indices) <= (drawn.micro or drawn.size)
            samples.setdefault(position, []).extend(indices)
    assert [(position, len(indices)) for position, indices in samples.items()] == whole.updates
    taken = Counter(index for indices in samples.values() for index in indices)
    if drawn.tail != "drop":
        assert taken == dict.fromkeys(range(drawn.size), drawn.epochs)
    else:
        assert all(len(indices) == len(set(indices)) for indices in samples.values())
        assert max(taken.values()) <= drawn.epochs

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
    assert {when for c in drawn for _, when in c.growths.values()} == {"before", "after"}
    updates = [list(expected_updates(c, [])) for c in drawn]
    pairs = list(zip(drawn, updates, strict=True))
    assert sum(len({start // c.size for start, _ in found}) < c.epochs for c, found in pairs) >= 1
    across = [c for c, found in pairs if any(s // c.size != (s + n - 1) // c.size for s, n in found)]
    assert len(across) >= 6
    assert any(c.world > 1 and c.layers for c in across)

"""Plans that leave samples out: epochs and phases without updates, batches that outgrow what is left."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import pytest
import torch

import fastlr
from fastlr import BatchPlan, GrowingLoader


class Case(NamedTuple):
    """A plan, when its batch grows, and the updates that are left of it, worked out by hand."""

    phases: list[tuple[float, int]]
    epochs: int
    grow: dict[int, int]  # after how many updates, and to what
    updates: list[tuple[int, int]]  # (start, size)
    per_epoch: list[int]  # updates


# Epochs of ten samples.
CASES = {
    "epoch without updates": Case([(0, 8), (1.5, 6)], 3, {}, [(0, 8), (20, 6)], [1, 0, 1]),
    "rest of an epoch": Case([(0, 4)], 2, {1: 8}, [(0, 4), (10, 8)], [1, 1]),
    "rest of the run": Case([(0, 4)], 1, {1: 8}, [(0, 4)], [1]),
    "nothing left out": Case([(0, 4)], 2, {2: 5}, [(0, 4), (4, 4), (10, 5), (15, 5)], [2, 2]),
    "phase too short": Case(
        [(0, 4), (1.5, 4), (2, 4)], 3, {2: 8}, [(0, 4), (4, 4), (20, 8)], [2, 0, 1]
    ),
    "all that is left too short": Case([(0, 4), (1, 4), (1.5, 4)], 2, {1: 8}, [(0, 4)], [1, 0]),
    "grown before it begins": Case([(0, 4), (0.5, 4), (1, 4)], 2, {0: 8}, [(10, 8)], [0, 1]),
    "grown twice": Case([(0, 2)], 3, {1: 4, 2: 6}, [(0, 2), (2, 4), (10, 6), (20, 6)], [2, 1, 1]),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

X = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))


class Run:
    def __init__(self, case: Case, bound: bool = True, workers: int = 0, **options: Any) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.case = case
        plan = BatchPlan.from_phases(
            case.phases, dataset_size=10, epochs=case.epochs, lr=0.1, momentum=0.9, tail="drop"
        )
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
        self.optimizer = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr if bound else 0.1, momentum=0.9)
        self.loader = GrowingLoader(torch.arange(10), plan, 2, num_workers=workers, **options)
        if bound:
            self.loader.bind(self.optimizer)
        self.saved: list[bytes] = []

    def save(self) -> None:
        file = io.BytesIO()
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "loader")}
        torch.save({**parts, "rng": torch.get_rng_state()}, file)
        self.saved.append(file.getvalue())

    def load(self, file: bytes) -> None:
        state = torch.load(io.BytesIO(file), weights_only=True)
        for name in ("model", "optimizer", "loader"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])

    def train(self, when: str = "after") -> tuple[list[tuple[int, int]], list[int]]:
        """The updates, and how many each epoch has; grows ``"after"`` a step, or ``"before"`` it."""
        grow = dict(self.case.grow)
        if self.optimizer.clock().updates == 0 and 0 in grow:
            self.loader.grow(grow[0])
        updates, per_epoch = [], []
        for epoch in self.loader.epochs():
            per_epoch.append(0)
            for batch in epoch:
                (self.model(X[batch.data]).square().mean() * batch.weight).backward()
                if not batch.ends_update:
                    continue
                size = grow.get(self.optimizer.clock().updates + 1)
                if size and when == "before":
                    self.loader.grow(size)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if size and when == "after":
                    self.loader.grow(size)
                updates.append((batch.position, batch.global_batch))
                per_epoch[-1] += 1
                self.save()
            assert epoch.finished
            self.save()
        assert self.loader.samples == 10 * self.case.epochs
        return updates, per_epoch


@every_case
@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("bound", [True, False], ids=["bound", "alone"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_updates_that_are_left_run(case: Case, when: str, bound: bool, workers: int) -> None:
    run = Run(case, bound, workers)
    assert run.train(when) == (case.updates, case.per_epoch)
    if bound:
        assert run.optimizer.clock() == (len(case.updates), 10 * case.epochs)


def test_the_loader_itself_runs_through_them() -> None:
    case = CASES["epoch without updates"]
    loader = Run(case).loader
    length = len(loader)
    batches = list(loader)
    assert [(b.position, b.global_batch) for b in batches if b.ends_update] == case.updates
    assert (len(batches), len(loader)) == (length, 0)


@every_case
@pytest.mark.parametrize("when", ["after", "before"])
def test_a_checkpoint_anywhere_resumes_to_the_bit(case: Case, when: str) -> None:
    whole = Run(case)
    updates, per_epoch = whole.train(when)
    for file in whole.saved:
        resumed = Run(case)
        resumed.load(file)
        rest, rest_per_epoch = resumed.train(when)
        assert rest == updates[len(updates) - len(rest) :]
        # The first may be the rest of an epoch.
        assert rest_per_epoch[1:] == per_epoch[len(per_epoch) - len(rest_per_epoch) + 1 :]
        assert sum(rest_per_epoch) == len(rest)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_leave_out_the_same(world: int, workers: int) -> None:
    plan = BatchPlan.from_phases([(0, 6), (1.5, 6)], dataset_size=10, epochs=3, lr=0.1, tail="drop")
    alone = [sorted(batch.data.tolist()) for batch in GrowingLoader(torch.arange(10), plan)]
    assert [len(update) for update in alone] == [6, 6]
    updates: list[list[int]] = [[], []]
    for rank in range(world):
        options = {"rank": rank, "world_size": world, "num_workers": workers}
        loader = GrowingLoader(torch.arange(10), plan, 1, **options)
        epochs = [[(batch.position, batch.data.tolist()) for batch in epoch] for epoch in loader.epochs()]
        assert [len(epoch) for epoch in epochs] == [6 // world, 0, 6 // world]
        for at, indices in (batch for epoch in epochs for batch in epoch):
            updates[at // 20] += indices
    assert [sorted(update) for update in updates] == alone


# -- growth that measures ------------------------------------------------------------------------------------


class Told(fastlr.GradientNoiseScale):
    """A noise scale so large that the batch should grow at each update."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)])

    def tell(self) -> None:
        self._observations += 1
        self._gradient, self._noise, self._weight = 1.0, 1e9, 1.0


@pytest.mark.parametrize(
    "phases", [[(0, 2)], [(0, 2), (1.2, 2), (1.6, 2)]], ids=["one phase", "short phases"]
)
def test_adaptive_growth_goes_on(phases: list[tuple[float, int]]) -> None:
    run = Run(Case(phases, 4, {}, [], []))
    noise = Told()
    growth = fastlr.AdaptiveGrowth(noise, run.loader, max_batch_size=8, patience=2, apply=True)
    sizes = []
    for batch in run.loader:
        if batch.ends_update:
            run.optimizer.step()
            noise.tell()
            growth.update(batch)
            run.save()
            sizes.append(batch.global_batch)
    assert sizes[-1] == 8
    assert sizes == sorted(sizes)
    assert run.optimizer.clock().samples == 40
    for file in run.saved:
        resumed = Run(run.case)
        resumed.load(file)
        assert resumed.loader.samples == resumed.optimizer.clock().samples
        list(resumed.loader)


def test_growth_to_less_than_there_is_changes_nothing() -> None:
    run = Run(Case([(0, 4), (1, 8)], 2, {}, [], []))
    for batch in run.loader:
        state = run.loader.state_dict()
        run.loader.grow(batch.global_batch // 2)
        assert run.loader.state_dict() == state
        if batch.ends_update:
            run.optimizer.step()


def test_growth_that_leaves_nothing_of_the_run_is_refused() -> None:
    run = Run(Case([(0, 2), (0.5, 2)], 1, {}, [], []))
    with pytest.raises(ValueError, match="the plan has no update"):
        run.loader.grow(8)
    assert run.train() == ([(0, 2), (2, 2), (5, 2), (7, 2)], [4])


def test_a_size_that_ranks_cannot_share_later_is_refused_when_growth_is_set_up() -> None:
    """A later phase of 9 would grow to 12, and of its 26 samples leave 2 to 3 ranks."""
    plan = BatchPlan.from_phases([(0, 6), (0.48, 9)], dataset_size=50, epochs=1, lr=0.1)
    loader = GrowingLoader(torch.arange(50), plan, rank=0, world_size=3)
    with pytest.raises(
        ValueError, match=r"the update that ends at sample 50 has 2 samples, fewer than the 3"
    ):
        fastlr.AdaptiveGrowth(Told(), loader, max_batch_size=12)

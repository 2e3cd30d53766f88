"""range_test() of models that answer with their own loss, fed with dicts: as with a step function."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import assert_same

import fastlr

FEATURES, CLASSES, SIZE = 6, 3, 8
cross_entropy = torch.nn.functional.cross_entropy


class Output(NamedTuple):
    loss: torch.Tensor | None
    logits: torch.Tensor


class Model(torch.nn.Module):
    """Answers as transformers' models do, in an object or in a dict."""

    def __init__(self, in_dict: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 16),
            torch.nn.Dropout(0.1),
            torch.nn.Tanh(),
            torch.nn.Linear(16, CLASSES),
        )
        self.in_dict = in_dict

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.layers(x)
        output = Output(None if labels is None else cross_entropy(logits, labels), logits)
        return output._asdict() if self.in_dict else output


def batches(count: int = 60) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, SIZE, FEATURES, generator=generator)
    labels = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(-1)
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def job(in_dict: bool = False) -> tuple[Model, fastlr.FusedSGD]:
    model = Model(in_dict)
    return model, fastlr.FusedSGD(model.parameters(), lr=0.05, momentum=0.9)


OPTIONS = {"num_steps": 40, "val_every": 5, "end_lr": 10.0, "progress": False}


@pytest.mark.parametrize("in_dict", [False, True], ids=["object", "dict"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_that_of_a_step_function_and_leaves_no_trace(in_dict: bool, accumulate: int) -> None:
    def loss_of(output: Any) -> torch.Tensor:
        return output["loss"] if in_dict else output.loss

    def rightly(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = output["logits"] if in_dict else output.logits
        return (logits.argmax(1) == batch["labels"]).double().mean()

    options = {**OPTIONS, "accumulate": accumulate, "val_loader": batches(4)}
    model, opt = job(in_dict)
    before = [p.detach().clone() for p in model.parameters()]
    own = fastlr.range_test(model, opt, train_loader=batches(), **options)
    assert_same(before, model.parameters())
    assert opt.clock() == (0, 0)
    model, opt = job(in_dict)
    stepped = fastlr.range_test(
        model,
        opt,
        train_loader=batches(),
        step_fn=lambda batch: loss_of(model(**batch)),
        metric=lambda batch: rightly(model(**batch), batch),
        **options,
    )
    measured = fastlr.range_test(*job(in_dict), train_loader=batches(), metric=rightly, **options)
    for other in (stepped, measured):
        np.testing.assert_array_equal(other.losses, own.losses)
        np.testing.assert_array_equal(other.accuracies, own.accuracies)  # NaN where none was measured
    assert (own.metric_name, measured.metric_name) == ("accuracy", "rightly")
    assert own.max_lr == measured.max_lr


def test_metrics_are_averaged_over_the_samples() -> None:
    uneven = [
        {key: value[:n] for key, value in batch.items()} for n, batch in zip((8, 2), batches(2), strict=True)
    ]
    model, opt = job()
    found = fastlr.range_test(
        model,
        opt,
        train_loader=batches(),
        val_loader=uneven,
        metric=lambda _, batch: len(batch["x"]),
        **OPTIONS,
    )
    assert set(found.accuracies[4::5].tolist()) == {(8 * 8 + 2 * 2) / 10}


def test_any_mapping_is_a_batch() -> None:
    plain = fastlr.range_test(*job(), train_loader=batches(), **OPTIONS)
    users = [collections.UserDict(batch) for batch in batches()]
    assert plain.losses.tolist() == fastlr.range_test(*job(), train_loader=users, **OPTIONS).losses.tolist()


def test_a_grid_takes_them() -> None:
    data = [{key: value[k] for key, value in batch.items()} for batch in batches(8) for k in range(SIZE)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model, opt = job()
    grid = fastlr.range_test_grid(
        model, opt, train_loader=loader, momentum=[0.5, 0.9], batch_size=[2, 16], **OPTIONS
    )
    alone = fastlr.range_test_grid(
        model, opt, train_loader=loader, momentum=[0.9], batch_size=[16], **OPTIONS
    )
    assert len(grid) == 4
    np.testing.assert_array_equal(grid.results[-1].losses, alone.results[0].losses)


BATCHES = batches()
PAIRS = [(batch["x"], batch["labels"]) for batch in BATCHES]
UNLABELLED = [{"x": batch["x"]} for batch in BATCHES]
DEEP = [{"x": batch["x"].reshape(2, 4, FEATURES), "labels": batch["labels"]} for batch in BATCHES]
REFUSED = {
    "pairs": (
        TypeError,
        r"train_loader must yield dicts.*got tuple of 2; for other batches",
        {"train_loader": PAIRS},
    ),
    "a val_loader of pairs": (TypeError, "val_loader must yield dicts", {"val_loader": PAIRS}),
    "no labels": (
        ValueError,
        r"output \(Output\) has no loss for a batch of x; add what",
        {"train_loader": UNLABELLED},
    ),
    "dicts with a loss_fn": (
        TypeError,
        r"pairs \(input, target\), got dict.*or neither where model\(\*\*batch\) answers",
        {"loss_fn": cross_entropy},
    ),
    "logits of several classes a sample": (
        ValueError,
        r"no accuracy for logits of shape \(2, 4, 3\).*pass metric=\(output, batch\)",
        {"val_loader": [{"x": batch["x"]} for batch in DEEP]},
    ),
    "no labels to measure": (
        ValueError,
        "no accuracy for logits of shape .* and targets of NoneType",
        {"val_loader": UNLABELLED},
    ),
}


@pytest.mark.parametrize(("error", "message", "options"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_and_nothing_has_changed(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    model, opt = job()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        fastlr.range_test(model, opt, **{"train_loader": BATCHES, **OPTIONS, **options})
    assert_same(before, model.parameters())
    assert opt.clock() == (0, 0)

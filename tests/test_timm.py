"""timm's factory, scaler, averages and checkpoints around fastlr's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_without_cuda  # noqa: F401  # which timm imports
from helpers import assert_same
from pages import run_page
from rule_table import taking_exact_roots

import fastlr

timm_optim = pytest.importorskip("timm.optim", reason="timm is not installed")
from timm.models import resume_checkpoint  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler  # noqa: E402

from fastlr.integrations.timm import register  # noqa: E402

NAMES = register()
LR = fastlr.Triangular2(0.001, 0.02, step_size_up=3)


class Model(torch.nn.Module):
    """Two layers and a norm, whose depth timm's decay by layer sees."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Linear(6, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^body", "blocks": [(r"^norm", None), (r"^head", (99999,))]}


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]


def make(opt: str, model: torch.nn.Module, **options: Any) -> Any:
    return timm_optim.create_optimizer_v2(model, opt=opt, **{"lr": LR, "weight_decay": 0.05, **options})


def train(
    model: torch.nn.Module,
    opt: Any,
    data: list[tuple[torch.Tensor, torch.Tensor]],
    scaler: NativeScaler | None = None,
    after: Callable[[], object] = lambda: None,
    **clipping: Any,
) -> None:
    """A loop as timm's own training script has it, two micro-batches an update with a scaler."""
    for k, (x, y) in enumerate(data):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
            opt.step()
            opt.zero_grad()
        else:
            scaler(loss / 2, opt, parameters=model.parameters(), need_update=k % 2 == 1, **clipping)
            if k % 2 == 1:
                opt.zero_grad()
        after()


@pytest.mark.parametrize("name", NAMES)
def test_the_factory_makes_what_timms_own_is(name: str) -> None:
    """The same groups and defaults, and the same weights after three updates."""
    models = Model(), Model()
    ours, theirs = (
        make(opt, model, lr=0.01)
        for opt, model in zip((name, name.removeprefix("fastlr")), models, strict=True)
    )
    assert type(ours) in vars(fastlr.optim).values()
    if isinstance(theirs, torch.optim.Adam):
        taking_exact_roots(theirs)
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert len(group["params"]) == len(other["params"])
        common = group.keys() & other.keys() - {"params", "foreach", "fused", "capturable", "differentiable"}
        assert common >= {"lr", "weight_decay"}
        assert {key: group[key] for key in common} == {key: other[key] for key in common}
    for model, opt in zip(models, (ours, theirs), strict=True):
        train(model, opt, batches(3))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_registering_again_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = timm_optim.get_optimizer_info("fastlradamw")
    assert register() == NAMES
    assert timm_optim.get_optimizer_info("fastlradamw") is before
    assert not caplog.records
    assert set(NAMES) <= set(timm_optim.list_optimizers("fastlr*"))


def test_schedules_follow_the_decay_by_layer() -> None:
    """As timm's own schedulers, which multiply what they write by a group's ``lr_scale``."""
    model, other = Model(), Model()
    opt = make("fastlradamw", model, layer_decay=0.5)
    theirs = make("adamw", other, layer_decay=0.5, lr=0.01)
    scales = [group["lr_scale"] for group in theirs.param_groups]
    assert len(set(scales)) > 1
    assert [group["lr"] for group in opt.param_groups] == [LR(0) * scale for scale in scales]
    train(model, opt, batches(2))
    assert [group["lr"] for group in opt.param_groups] == [LR(2) * scale for scale in scales]
    fixed = make("fastlradamw", Model(), layer_decay=0.5, lr=0.01)  # timm's schedulers scale that
    CosineLRScheduler(fixed, t_initial=4, t_in_epochs=False).step_update(0)
    assert [group["lr"] for group in fixed.param_groups] == [0.01 * scale for scale in scales]


def test_cosine_with_warmup_and_cooldown_is_timms() -> None:
    peak, warmup, cosine, cooldown = 0.4, 977, 98_523, 500
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    theirs = CosineLRScheduler(
        sgd, cosine, lr_min=1e-3, cycle_limit=1, warmup_t=warmup, warmup_lr_init=1e-4, warmup_prefix=True
    )
    updates = warmup + cosine + cooldown
    expected = [theirs._get_lr(t)[0] for t in range(updates)]
    ours = fastlr.cosine_with_warmup(
        peak, warmup, warmup + cosine, start_lr=1e-4, end_lr=1e-3, cooldown_steps=cooldown
    )
    np.testing.assert_allclose(ours.values(0, updates), expected, rtol=0.0, atol=1e-15 * peak)


def test_timms_schedulers_beside_a_schedule_are_noticed() -> None:
    model = Model()
    opt = make("fastlrsgd", model)
    CosineLRScheduler(opt, t_initial=4, t_in_epochs=False).step_update(1)
    with pytest.raises(RuntimeError, match="a schedule owns it"):
        train(model, opt, batches(1))


@pytest.mark.parametrize(
    "clipping",
    [
        {},
        *(
            {"clip_grad": value, "clip_mode": mode}
            for mode, value in (("norm", 0.3), ("value", 0.05), ("agc", 0.02))
        ),
    ],
    ids=["unclipped", "norm", "value", "agc"],
)
def test_native_scaler_steps_and_clips_as_with_torchs(clipping: dict[str, Any]) -> None:
    """Two micro-batches an update; the third update overflows and is skipped."""
    data = batches(12)
    data[5] = (data[5][0] * float("inf"), data[5][1])
    models = Model(), Model()
    ours = make("fastlradamw", models[0])
    theirs = taking_exact_roots(make("adamw", models[1], lr=1.0))
    scaler, applied = NativeScaler("cpu"), 0
    train(models[0], ours, data, scaler, **clipping)
    scaler = NativeScaler("cpu")
    for k in range(0, 12, 2):  # a schedule's rates, by hand
        for group in theirs.param_groups:
            group["lr"] = LR(applied)
        train(models[1], theirs, data[k : k + 2], scaler, **clipping)
        applied += k != 4
    assert ours.clock() == (5, 0)
    assert ours.param_groups[0]["lr"] == LR(5)
    assert_same(*(model.parameters() for model in models))


def test_averages_are_those_of_model_ema_v3() -> None:
    """Of parameters and of BatchNorm's buffers, where both begin at the first step."""
    model = Model()
    model.norm = torch.nn.BatchNorm1d(16)
    opt = make("fastlradamw", model, ema_decay=0.75)
    opt.average_buffers(model)
    emas: list[Any] = []
    opt.register_step_pre_hook(lambda *_: None if emas else emas.append(ModelEmaV3(model, decay=0.75)))
    train(model, opt, batches(6), after=lambda: emas[0].update(model))
    averaged = opt.averaged_state_dict(model, buffers="average")
    expected = emas[0].module.state_dict()
    assert averaged.keys() == expected.keys()
    assert_same([averaged[name] for name in expected], expected.values())
    assert not torch.equal(averaged["head.weight"], model.head.weight)


def test_warmed_up_averages_are_those_of_model_ema_v3() -> None:
    """timm's warm-up is a schedule; timm counts from what it is given as ``step``."""
    model = Model()
    warmup = ModelEmaV3(model, decay=0.9, use_warmup=True)
    decay = fastlr.Tabulated([warmup.get_decay(step) for step in range(1, 7)], 6)
    opt = make("fastlradamw", model, ema_decay=decay)
    steps = iter(range(1, 7))
    train(model, opt, batches(6), after=lambda: warmup.update(model, step=next(steps)))
    averaged = opt.averaged_state_dict(model)
    assert_same([averaged[name] for name in warmup.module.state_dict()], warmup.module.state_dict().values())


def test_a_checkpoint_of_timms_resumes_to_the_bit(tmp_path: Path) -> None:
    def made(seed: int, **options: Any) -> tuple[Any, Any, NativeScaler]:
        model = Model(seed)
        return model, make("fastlradamw", model, layer_decay=0.5, **options), NativeScaler("cpu")

    data = batches(12)
    model, opt, scaler = made(0)
    train(model, opt, data[:6], scaler, clip_grad=0.3)
    saver = CheckpointSaver(model, opt, amp_scaler=scaler, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    train(model, opt, data[6:], scaler, clip_grad=0.3)

    resumed, resumed_opt, resumed_scaler = made(1, lr=0.5)
    (file,) = tmp_path.glob("checkpoint-0*")
    resume_checkpoint(resumed, str(file), resumed_opt, resumed_scaler)
    assert resumed_opt.clock() == (3, 0)
    train(resumed, resumed_opt, data[6:], resumed_scaler, clip_grad=0.3)
    assert resumed_opt.clock() == opt.clock() == (6, 0)
    assert [g["lr_schedule"] for g in resumed_opt.param_groups] == [
        g["lr_schedule"] for g in opt.param_groups
    ]
    assert_same(model.state_dict().values(), resumed.state_dict().values())


def test_lookahead_takes_the_optimizer() -> None:
    model, other = Model(), Model()
    opt = make("lookahead_fastlrsgd", model)
    theirs = make("lookahead_sgd", other, lr=LR(0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda t: LR(t) / LR(0))
    train(model, opt, batches(7))
    train(other, theirs, batches(7), after=scheduler.step)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_page_runs() -> None:
    names = {"model": Model(), "loss_fn": torch.nn.functional.cross_entropy}
    left = run_page("frameworks/timm.md", loader=batches(4), **names)
    assert left["optimizer"].clock() == (4, 0)

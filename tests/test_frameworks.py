"""Training under frameworks: a run saved and resumed midway equals one that was not interrupted."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchvision_without_cuda  # noqa: F401  # which transformers and Lightning import
from helpers import assert_same, set_gradients
from rule_table import RULES, Rule, with_rules
from rule_table import assert_same_run as assert_same_rules_run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastlr

BATCHES = 5  # in each epoch
BATCH_SIZE = 4


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def make_optimizer(model: torch.nn.Module) -> fastlr.FusedCyclicSGD:
    return fastlr.FusedCyclicSGD(
        model.parameters(),
        base_lr=0.01,
        max_lr=0.2,
        step_size_up=3,
        mode="triangular2",
        momentum=0.9,
        dampening=0.1,
        weight_decay=0.01,
    )


def make_adamw(model: torch.nn.Module) -> fastlr.FusedAdamW:
    return fastlr.FusedAdamW(
        model.parameters(),
        lr=fastlr.Triangular2(0.001, 0.02, step_size_up=3),
        betas=(fastlr.Triangular(0.8, 0.95, 4, inverted=True), 0.99),
        weight_decay=fastlr.Cosine(0.1, 0.0, 50),
        amsgrad=True,
    )


Make = Callable[[torch.nn.Module], Any]
with_optimizers = pytest.mark.parametrize(
    "make", [make_optimizer, make_adamw], ids=["FusedCyclicSGD", "FusedAdamW"]
)


def make_data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.tensor(k % 3)}
        for k in range(BATCHES * BATCH_SIZE)
    ]


def train(
    model: torch.nn.Module, opt: Any, steps: int, *, start: int = 0, after_step: Any = None
) -> fastlr.FusedSGD:
    """A plain loop over the same data again and again."""
    data = make_data()
    for step in range(start, start + steps):
        batch = [data[(step * BATCH_SIZE + k) % len(data)] for k in range(BATCH_SIZE)]
        x, y = (torch.stack([sample[key] for sample in batch]) for key in ("x", "labels"))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        if after_step is not None:
            after_step()
        opt.zero_grad()
    return opt


def assert_same_run(
    expected: tuple[torch.nn.Module, fastlr.FusedSGD], actual: tuple[torch.nn.Module, fastlr.FusedSGD]
) -> None:
    """The same weights, state, clock and rate, all to the bit."""
    (model, opt), (other_model, other_opt) = expected, actual
    assert opt.clock() == other_opt.clock()
    assert opt.param_groups[0]["lr"] == other_opt.param_groups[0]["lr"]
    assert opt.param_groups[0]["lr"] == opt.param_groups[0]["lr_schedule"](opt.clock().updates)
    assert_same(model.parameters(), other_model.parameters())
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        state, other = opt.state[p], other_opt.state[q]
        assert state.keys() == other.keys()
        assert_same(state.values(), [other[name] for name in state])


# -- torch.distributed.checkpoint ----------------------------------------------------------------

OPTIONS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
one_process = pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled|unavailable):UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",  # PyTorch 2.6's own use of it
)
# PyTorch 2.6 sees for itself that there is one process, and has no such argument.
ALONE = {"no_dist": True} if "no_dist" in inspect.signature(dcp.save).parameters else {}


def trained_by_rule(
    rule: Rule, steps: int, *, scheduled: bool, seed: int = 0, **options: Any
) -> tuple[torch.nn.Module, Any]:
    model = make_model(seed)
    opt = rule.make(model.parameters(), **options)
    if scheduled:
        opt.set_schedule(**rule.drives)
    return model, train(model, opt, steps)


@with_rules
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_distributed_helpers_change_no_rules_run(rule: Rule, steps: int, options: StateDictOptions):
    untouched, touched = (trained_by_rule(rule, steps, scheduled=True, **rule.full) for _ in range(2))
    saved = get_optimizer_state_dict(*touched, options=options)
    set_optimizer_state_dict(*touched, saved, options=options)
    assert touched[1].clock() == (steps, 0)
    for model, opt in (untouched, touched):
        train(model, opt, 4, start=steps)
    assert_same_optimizers(rule, untouched, touched)


def assert_same_optimizers(rule: Rule, expected: tuple[Any, Any], actual: tuple[Any, Any]) -> None:
    models = [list(model.parameters()) for model, _ in (expected, actual)]
    assert_same_rules_run(rule, (expected[1], models[0]), (actual[1], models[1]))
    groups, others = (opt.state_dict()["param_groups"] for _, opt in (expected, actual))
    assert groups == others


@one_process
@with_rules
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("steps", [0, 3])
def test_distributed_checkpoint_continues_every_rule(
    tmp_path: Path, rule: Rule, steps: int, options: StateDictOptions
):
    uninterrupted = trained_by_rule(rule, steps + 4, scheduled=True, **rule.full)
    model, opt = trained_by_rule(rule, steps, scheduled=True, **rule.full)
    saved = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path, **ALONE)
    fresh, fresh_opt = trained_by_rule(rule, 0, scheduled=True, seed=1, **rule.full)
    # What is read must have the same keys; the values are the file's.
    fresh_opt.set_schedule(lr=fastlr.Triangular2(0.25, 0.5, 1, 1))
    template = {
        "model": fresh.state_dict(),
        "optim": get_optimizer_state_dict(fresh, fresh_opt, options=options),
    }
    dcp.load(template, checkpoint_id=tmp_path, **ALONE)
    fresh.load_state_dict(template["model"])
    set_optimizer_state_dict(fresh, fresh_opt, template["optim"], options=options)
    train(fresh, fresh_opt, 4, start=steps)
    assert_same_optimizers(rule, uninterrupted, (fresh, fresh_opt))


@with_rules
@pytest.mark.parametrize("back", [False, True], ids=["from-torch", "to-torch"])
def test_distributed_helpers_carry_a_run_over(rule: Rule, back: bool):
    model = make_model()
    made = rule.make, rule.make_torch
    first, other = reversed(made) if not back else made
    opt = first(model.parameters(), **rule.full)
    train(model, opt, 4)
    carried_model = copy.deepcopy(model)
    carried = other(carried_model.parameters(), **rule.full)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))  # torch's would share its tensors
    set_optimizer_state_dict(carried_model, carried, saved)
    train(model, opt, 3, start=4)
    train(carried_model, carried, 3, start=4)
    models = list(model.parameters()), list(carried_model.parameters())
    assert_same_rules_run(rule, (opt, models[0]), (carried, models[1]))


@one_process
@with_rules
def test_a_distributed_checkpoint_of_torchs_optimizer_is_read(tmp_path: Path, rule: Rule):
    """Whose groups have fewer keys than the template, so that the template's own values stay for these."""
    model = make_model()
    reference = rule.make_torch(model.parameters(), **rule.full)
    train(model, reference, 4)
    saved = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, reference)}
    dcp.save(saved, checkpoint_id=tmp_path, **ALONE)
    carried_model = make_model(1)
    carried = rule.make(carried_model.parameters(), **rule.full)
    template = {
        "model": carried_model.state_dict(),
        "optim": get_optimizer_state_dict(carried_model, carried),
    }
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(template, checkpoint_id=tmp_path, **ALONE, planner=planner)
    carried_model.load_state_dict(template["model"])
    set_optimizer_state_dict(carried_model, carried, template["optim"])
    train(model, reference, 3, start=4)
    train(carried_model, carried, 3, start=4)
    models = list(model.parameters()), list(carried_model.parameters())
    assert_same_rules_run(rule, (reference, models[0]), (carried, models[1]))


@one_process
@pytest.mark.parametrize("kept", [{"ema_decay": 0.9}, {"master_weights": True}], ids=str)
def test_what_a_distributed_checkpoint_leaves_in_its_file_is_told(
    kept: dict[str, Any], tmp_path: Path
) -> None:
    """It reads what the optimizer that it reads for keeps, and all options of its groups."""
    model = make_model().to(torch.bfloat16)
    fused = fastlr.FusedAdamW(model.parameters(), lr=0.1, **kept)
    set_gradients(0, list(model.parameters()))
    fused.step()
    fused.zero_grad()  # else PyTorch makes no state to read a file into
    dcp.save(get_optimizer_state_dict(model, fused), checkpoint_id=tmp_path, **ALONE)
    for options in ({}, kept):
        other = fastlr.FusedAdamW(model.parameters(), lr=0.1, **options)
        read = get_optimizer_state_dict(model, other)
        dcp.load(read, checkpoint_id=tmp_path, **ALONE)
        if options:
            set_optimizer_state_dict(model, other, read)
            for p in model.parameters():
                assert set(other.state[p]) == set(fused.state[p])
                assert_same(
                    [fused.state[p][name] for name in fused.state[p]],
                    [other.state[p][name] for name in fused.state[p]],
                )
            continue
        with pytest.warns(
            UserWarning, match=rf"with the next update: {next(iter(kept))} of parameter group 0\. "
        ):
            set_optimizer_state_dict(model, other, read)
        other.load_state_dict(fused.state_dict())  # a file as it stands brings all
    wide = fastlr.FusedAdamW(model.float().parameters(), lr=0.1, **kept)
    set_gradients(1, list(model.parameters()))
    wide.step()
    fastlr.FusedAdamW(model.parameters(), lr=0.1).load_state_dict(wide.state_dict())  # which has no masters


@with_rules
@pytest.mark.parametrize("back", [False, True], ids=["from-torch", "to-torch"])
def test_a_flat_state_of_another_optimizer_is_read_over_the_own_one(rule: Rule, back: bool):
    """torch's helper asks it for every key that the optimizer's groups have, and that it has not."""
    model = make_model()
    first, other = (rule.make, rule.make_torch) if back else (rule.make_torch, rule.make)
    opt = first(model.parameters(), **rule.full)
    train(model, opt, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=OPTIONS["flat"]))
    carried_model = copy.deepcopy(model)
    carried = other(carried_model.parameters(), **rule.full)
    own = get_optimizer_state_dict(carried_model, carried, options=OPTIONS["flat"])
    with pytest.raises(KeyError, match="param_groups"):
        set_optimizer_state_dict(carried_model, carried, saved, options=OPTIONS["flat"])
    set_optimizer_state_dict(carried_model, carried, {**own, **saved}, options=OPTIONS["flat"])
    train(model, opt, 3, start=4)
    train(carried_model, carried, 3, start=4)
    models = list(model.parameters()), list(carried_model.parameters())
    assert_same_rules_run(rule, (opt, models[0]), (carried, models[1]))


def test_files_of_the_distributed_helpers_bring_torchs_schedule():
    """By names, and flat through torch's own optimizer."""

    def pair(model: torch.nn.Module) -> tuple[Any, Any]:
        opt = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
        return opt, torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)

    model = make_model()
    opt, scheduler = pair(model)
    for update in range(5):
        train(model, opt, 1, start=update)
        scheduler.step()
    for flat in (False, True):
        options = OPTIONS["flat" if flat else "plain"]
        saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
        carried_model = copy.deepcopy(model)
        if flat:
            theirs = pair(carried_model)
            set_optimizer_state_dict(carried_model, theirs[0], saved, options=options)
            theirs[1].load_state_dict(scheduler.state_dict())
            carried = fastlr.fuse(*theirs, updates_per_tick=1)
        else:
            carried = fastlr.FusedSGD(carried_model.parameters())
            kind = type(scheduler)
            carried.load_torch(saved, scheduler.state_dict(), scheduler=kind, updates_per_tick=1)
        assert carried.param_groups[0]["lr_schedule"] == fastlr.StepDecay(0.25, 2, 0.5)
        went_on, went_on_opt, went_on_scheduler = copy.deepcopy((model, opt, scheduler))
        for update in range(5, 9):
            train(went_on, went_on_opt, 1, start=update)
            went_on_scheduler.step()
            train(carried_model, carried, 1, start=update)
        assert_same(carried_model.parameters(), went_on.parameters())


def test_a_flat_state_of_version_0_1_is_read_over_the_own_one():
    rule = RULES["SGD"]
    model, opt = trained_by_rule(rule, 4, scheduled=False, **rule.full)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=OPTIONS["flat"]))
    later = ("state_dtype", "weight_decay_schedule", "weight_decay_start")
    saved = {key: value for key, value in saved.items() if not key.endswith(later)}
    resumed_model = copy.deepcopy(model)
    resumed = rule.make(resumed_model.parameters(), **rule.full)  # state is read where there is some
    own = get_optimizer_state_dict(resumed_model, resumed, options=OPTIONS["flat"])
    set_optimizer_state_dict(resumed_model, resumed, {**own, **saved}, options=OPTIONS["flat"])
    for m, o in ((model, opt), (resumed_model, resumed)):
        train(m, o, 3, start=4)
    assert_same_optimizers(rule, (model, opt), (resumed_model, resumed))


# -- Lightning -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning on new PyTorch
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@with_optimizers
@pytest.mark.parametrize("with_scheduler", [False, True], ids=["optimizer", "optimizer-and-scheduler"])
def test_lightning_resumes_midway(tmp_path: Path, with_scheduler: bool, make: Make):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = make_model(seed)
            self.rates: list[float] = []

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return torch.nn.functional.cross_entropy(self.model(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            opt = make(self.model)
            if not with_scheduler:
                return opt
            scheduler = fastlr.integrations.ReadOnlyScheduler(opt)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def run(seed: int, resume_from: Path | None = None) -> tuple[Module, Any]:
        module = Module(seed)
        trainer = lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            devices=1,
            logger=False,
            gradient_clip_val=1.0,
            callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        data = torch.utils.data.DataLoader(make_data(), batch_size=BATCH_SIZE)
        trainer.fit(module, data, ckpt_path=resume_from)
        return module, trainer.optimizers[0]

    module, opt = run(seed=0)
    assert opt.clock() == (4 * BATCHES, 0)
    schedule = opt.param_groups[0]["lr_schedule"]
    assert module.rates == schedule.values(0, 4 * BATCHES).tolist()
    resumed, resumed_opt = run(seed=1, resume_from=tmp_path / "epoch=1.ckpt")
    assert resumed.rates == module.rates[2 * BATCHES :]
    assert_same_run((module, opt), (resumed, resumed_opt))


# -- Hugging Face --------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """Takes and returns what transformers.Trainer expects."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = make_model(seed)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_trainer(model: Classifier, folder: Path, optimizers: tuple[Any, Any], **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=12,
            save_steps=7,
            logging_steps=1,
            per_device_train_batch_size=BATCH_SIZE,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=make_data(),
        optimizers=optimizers,
    )


@with_optimizers
@pytest.mark.usefixtures("_accelerate_state")
def test_transformers_trainer_resumes_midway(tmp_path: Path, make: Make):
    def run(seed: int, resume_from: Path | None = None) -> tuple[Classifier, Any, Any]:
        model = Classifier(seed)
        opt = make(model)
        trainer = make_trainer(model, tmp_path, (opt, fastlr.integrations.ReadOnlyScheduler(opt)))
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return model, opt, trainer

    model, opt, trainer = run(seed=0)
    assert opt.clock() == (12, 0)
    schedule = opt.param_groups[0]["lr_schedule"]
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == schedule.values(0, 12).tolist()  # of each update, its own
    resumed, resumed_opt, _ = run(seed=1, resume_from=tmp_path / "checkpoint-7")
    assert_same_run((model, opt), (resumed, resumed_opt))


@with_optimizers
@pytest.mark.usefixtures("_accelerate_state")
def test_transformers_own_scheduler_is_noticed(tmp_path: Path, make: Make):
    model = Classifier(seed=0)
    trainer = make_trainer(model, tmp_path, (make(model), None))
    with pytest.raises(RuntimeError, match=r"a schedule owns it.*ReadOnlyScheduler"):
        trainer.train()


@with_optimizers
@pytest.mark.usefixtures("_accelerate_state")
def test_accelerate_prepares_saves_and_loads(tmp_path: Path, make: Make):
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)

    def prepared(seed: int) -> tuple[Any, Any, Any]:
        model = make_model(seed)
        opt = make(model)
        return accelerator.prepare(model, opt, fastlr.integrations.ReadOnlyScheduler(opt))

    plain_model = make_model()
    plain = plain_model, train(plain_model, make(plain_model), 10)
    model, opt, scheduler = prepared(seed=0)
    train(model, opt, 4, after_step=scheduler.step)
    accelerator.save_state(str(tmp_path))
    train(model, opt, 6, start=4, after_step=scheduler.step)
    assert scheduler.get_last_lr() == [plain[1].param_groups[0]["lr"]]
    assert_same_run(plain, (model, opt.optimizer))

    accelerator.load_state(str(tmp_path))
    assert opt.optimizer.clock() == (4, 0)
    train(model, opt, 6, start=4, after_step=scheduler.step)
    assert_same_run(plain, (model, opt.optimizer))


# -- clipping ------------------------------------------------------------------------------------

LIMIT = 0.1  # below every gradient's norm here


def train_clipped(model: torch.nn.Module, opt: Any, clip: Callable[[], object], steps: int) -> None:
    """A plain loop, whose gradients are clipped before the step."""
    data = make_data()
    for step in range(steps):
        batch = [data[(step * BATCH_SIZE + k) % len(data)] for k in range(BATCH_SIZE)]
        x, y = (torch.stack([sample[key] for sample in batch]) for key in ("x", "labels"))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        clip()
        opt.step()
        opt.zero_grad()


def clipped_by_torch(make: Make, steps: int) -> tuple[torch.nn.Module, Any]:
    """What a run is whose gradients are clipped once."""
    model = make_model()
    opt = make(model)
    train_clipped(model, opt, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT), steps)
    return model, opt


def handing_over(make: Make) -> Make:
    """An optimizer that clips by itself, and says so when a norm was clipped before."""

    def made(model: torch.nn.Module) -> Any:
        opt = make(model)
        opt.max_grad_norm = LIMIT

        def check(*_: object) -> None:
            assert opt.last_grad_norm > 1.5 * LIMIT

        opt.register_step_post_hook(check)
        return opt

    return made


def assert_close_run(expected: tuple[torch.nn.Module, Any], actual: tuple[torch.nn.Module, Any]) -> None:
    """torch adds the norm up in float32: some last bits differ."""
    assert expected[1].clock() == actual[1].clock()
    for p, q in zip(expected[0].parameters(), actual[0].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)


@with_rules
def test_torchs_clipping_is_not_repeated(rule: Rule) -> None:
    models = [make_model() for _ in range(2)]
    makers = rule.make, rule.make_torch
    opts = [make(model.parameters(), **rule.full) for make, model in zip(makers, models, strict=True)]
    for model, opt in zip(models, opts, strict=True):
        parameters = list(model.parameters())
        train_clipped(
            model, opt, lambda parameters=parameters: torch.nn.utils.clip_grad_norm_(parameters, LIMIT), 6
        )
    ours, theirs = (list(model.parameters()) for model in models)
    assert_same_rules_run(rule, (opts[1], theirs), (opts[0], ours))


@with_optimizers
def test_torchs_clipping_is_handed_over(make: Make) -> None:
    model = make_model()
    opt = handing_over(make)(model)
    train_clipped(model, opt, lambda: None, 8)
    assert_close_run(clipped_by_torch(make, 8), (model, opt))


@with_optimizers
def test_clipping_by_both_is_that_of_one(make: Make) -> None:
    model = make_model()
    opt = make(model)
    opt.max_grad_norm = LIMIT
    train_clipped(model, opt, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT), 8)
    assert_close_run(clipped_by_torch(make, 8), (model, opt))


def lightning_run(make: Make, folder: Path, **options: Any) -> tuple[torch.nn.Module, Any]:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            return make(self.model)

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(make_data(), batch_size=BATCH_SIZE))
    return module.model, trainer.optimizers[0]


with_lightning = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",  # on new PyTorch
    "ignore:.*does not have many workers",
    "ignore:GPU available but not used",
)


@with_lightning
@with_optimizers
def test_lightning_clips_and_nobody_again(tmp_path: Path, make: Make) -> None:
    run = lightning_run(make, tmp_path, gradient_clip_val=LIMIT)
    assert_same_run(clipped_by_torch(make, 2 * BATCHES), run)


@with_lightning
@with_optimizers
def test_lightning_hands_clipping_over(tmp_path: Path, make: Make) -> None:
    run = lightning_run(handing_over(make), tmp_path)
    assert_close_run(clipped_by_torch(make, 2 * BATCHES), run)


@with_lightning
@with_optimizers
def test_lightning_clips_nothing_in_half_precision_where_the_step_unscales(
    tmp_path: Path, make: Make
) -> None:
    """Which the optimizer does then, with fastlr's GradScaler or torch's."""
    plugins = pytest.importorskip("lightning.pytorch.plugins", reason="lightning is not installed")

    def half(kind: type[torch.amp.GradScaler], maker: Make, **options: Any) -> tuple[Any, Any]:
        scaler = kind("cpu", init_scale=256.0)
        return lightning_run(
            maker, tmp_path, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler)], **options
        )

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        half(fastlr.GradScaler, make, gradient_clip_val=LIMIT)
    runs = [half(kind, handing_over(make)) for kind in (fastlr.GradScaler, torch.amp.GradScaler)]
    assert_same_run(*runs)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning_run(make, tmp_path, precision="bf16-mixed", gradient_clip_val=LIMIT)  # without a scale
    runs.append(lightning_run(handing_over(make), tmp_path, precision="bf16-mixed"))
    for run in runs:
        for p, q in zip(run[0].parameters(), clipped_by_torch(make, 10)[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.1, atol=0.01)  # which computes in float32


@with_optimizers
@pytest.mark.parametrize("over", [False, True], ids=["framework", "handed-over"])
@pytest.mark.usefixtures("_accelerate_state")
def test_accelerate_clips_or_hands_it_over(make: Make, over: bool) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    model, opt = accelerator.prepare(model, (handing_over(make) if over else make)(model))

    def clip() -> None:
        if not over:
            accelerator.clip_grad_norm_(model.parameters(), LIMIT)

    train_clipped(model, opt, clip, 8)
    same = assert_close_run if over else assert_same_run
    same(clipped_by_torch(make, 8), (model, opt.optimizer))


@with_optimizers
@pytest.mark.usefixtures("_accelerate_state")
def test_transformers_clips_or_hands_it_over(tmp_path: Path, make: Make) -> None:
    """The Trainer shuffles, so that it runs the plain loop, too, which clips in a callback."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Clip(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)

    def run(make: Make, limit: float, *callbacks: Any) -> tuple[torch.nn.Module, Any]:
        model = Classifier(seed=0)
        opt = make(model)
        scheduler = fastlr.integrations.ReadOnlyScheduler(opt)
        trainer = make_trainer(model, tmp_path, (opt, scheduler), max_grad_norm=limit)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        return model, opt

    plain = run(make, 0.0, Clip())
    assert_same_run(plain, run(make, LIMIT))
    assert_close_run(plain, run(handing_over(make), 0.0))


# -- growing batches -----------------------------------------------------------------------------


def grown_plan() -> fastlr.BatchPlan:
    return fastlr.BatchPlan.from_schedule(
        fastlr.MultiStep(0.1, [1, 2], 0.5, unit="epoch"),
        batch_size=4,
        dataset_size=BATCHES * BATCH_SIZE,
        epochs=3,
        momentum=0.9,
        max_batch_size=8,
    )


def growing(model: torch.nn.Module) -> tuple[fastlr.FusedSGD, fastlr.GrowingLoader]:
    plan = grown_plan()
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
    return opt, fastlr.GrowingLoader(make_data(), plan, micro_batch_size=2)


def trained_on_growing_batches() -> tuple[torch.nn.Module, fastlr.FusedSGD]:
    model = make_model()
    opt, loader = growing(model)
    for batch in loader.bind(opt):
        loss = torch.nn.functional.cross_entropy(model(batch.data["x"]), batch.data["labels"])
        (loss * batch.weight).backward()
        if batch.ends_update:
            opt.step()
            opt.zero_grad()
    return model, opt


def assert_same_weights_and_clock(
    expected: tuple[torch.nn.Module, fastlr.FusedSGD], actual: tuple[torch.nn.Module, fastlr.FusedSGD]
) -> None:
    assert expected[1].clock() == actual[1].clock() == (grown_plan().total_updates, 3 * BATCHES * BATCH_SIZE)
    assert_same(expected[0].parameters(), actual[0].parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning on new PyTorch
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_lightning_takes_growing_batches_and_resumes(tmp_path: Path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.automatic_optimization = False  # when to step is for the batch to say
            self.model = make_model(seed)
            self.optimizer, self.loader = growing(self.model)
            self.loader.bind(self.optimizer)

        def train_dataloader(self) -> fastlr.batch_growth.Epoch:
            return next(self.loader.epochs())

        def training_step(self, batch: fastlr.batch_growth.Batch, index: int) -> None:
            opt = self.optimizers()
            x, labels = batch.data["x"], batch.data["labels"]
            loss = torch.nn.functional.cross_entropy(self.model(x), labels)
            self.manual_backward(loss * batch.weight)
            self.log("loss", loss, on_epoch=True, batch_size=batch.samples)
            if batch.ends_update:
                opt.step()
                opt.zero_grad()

        def configure_optimizers(self) -> fastlr.FusedSGD:
            return self.optimizer

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["loader"] = self.loader.state_dict()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loader.load_state_dict(checkpoint["loader"])

    def run(seed: int, resume_from: Path | None = None) -> tuple[torch.nn.Module, fastlr.FusedSGD]:
        module = Module(seed)
        trainer = lightning.Trainer(
            max_epochs=3,
            reload_dataloaders_every_n_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, ckpt_path=resume_from)
        return module.model, module.optimizer

    expected = trained_on_growing_batches()
    assert_same_weights_and_clock(expected, run(seed=0))
    assert_same_weights_and_clock(expected, run(seed=1, resume_from=tmp_path / "epoch=0.ckpt"))


@pytest.mark.usefixtures("_accelerate_state")
def test_accelerate_takes_growing_batches():
    import accelerate
    from accelerate.utils import send_to_device

    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    opt, loader = growing(model)
    model, prepared_opt, prepared = accelerator.prepare(model, opt, loader)
    assert prepared is loader
    for epoch in loader.bind(prepared_opt).epochs():
        for batch in epoch:
            batch = send_to_device(batch, accelerator.device)
            loss = torch.nn.functional.cross_entropy(model(batch.data["x"]), batch.data["labels"])
            accelerator.backward(loss * batch.weight)
            if batch.ends_update:
                prepared_opt.step()
                prepared_opt.zero_grad()
    assert_same_weights_and_clock(trained_on_growing_batches(), (model, opt))
